package ike

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici"
)

// startSim plays second after second: the Manager's choice of what to initiate, and
// a charon that shows each attempt as CONNECTING until it is up or given up.
type startSim struct {
	t     *testing.T
	m     *Manager
	l     *link
	now   time.Time
	ends  map[string]time.Time
	begun map[string]int
	most  map[netip.Addr]int
}

// newStartSim has n connections with addrB, each with two children, and one with
// another peer.
func newStartSim(t *testing.T, n int) *startSim {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		now := []Child{{Name: "net", Start: StartNow}, {Name: "more", Start: StartNow}}
		c[0].Children, c[0].Name, c[0].RemoteAddrs = now, "other", []netip.Addr{addrA}
		for i := range n {
			one := c[0]
			one.Name, one.RemoteAddrs = fmt.Sprintf("c%03d", i), []netip.Addr{addrB}
			c = append(c, one)
		}
		return c
	})
	s.Manager.t = defaultTiming
	sim := &startSim{
		t: t, m: s.Manager, now: newClock().Now(), ends: map[string]time.Time{}, begun: map[string]int{}, most: map[netip.Addr]int{},
		l: &link{loaded: map[string]bool{}, next: map[childName]retry{}, begun: attempts{}, busy: map[string]time.Time{}},
	}
	for _, c := range s.o.Connections {
		sim.l.loaded[c.Name] = true
	}
	return sim
}

// run lets d pass. An attempt takes as long as takes says and then makes the tunnel
// or, if that is negative, nothing.
func (s *startSim) run(d time.Duration, takes func(conn string) time.Duration) {
	for end := s.now.Add(d); s.now.Before(end); s.now = s.now.Add(time.Second) {
		view := map[string]*connView{}
		under := map[netip.Addr]int{}
		for _, c := range s.m.o.Connections {
			v := &connView{}
			view[c.Name] = v
			at, on := s.ends[c.Name]
			switch {
			case !on:
			case s.now.Before(at):
				v.ikes = []vici.IKESA{{State: "CONNECTING"}}
				under[c.peerAddr()]++
			case takes(c.Name) < 0:
				delete(s.ends, c.Name)
			default:
				v.ikes = []vici.IKESA{{State: "ESTABLISHED"}}
				for _, ch := range c.Children {
					v.children = append(v.children, childView{ChildSA: vici.ChildSA{Name: ch.Name, State: "INSTALLED"}})
				}
			}
		}
		s.m.mu.Lock()
		s.m.view, s.m.at = view, s.now
		s.m.mu.Unlock()
		for _, w := range s.m.begin(s.l, s.now) {
			s.l.tried(w, s.now, s.m.t)
			if _, on := s.ends[w.conn]; !on { // charon sets both children up in one IKE_SA
				s.begun[w.conn]++
				s.ends[w.conn] = s.now.Add(max(takes(w.conn), -takes(w.conn)))
				under[s.m.config(w.conn).peerAddr()]++
			}
		}
		for a, n := range under {
			s.most[a] = max(s.most[a], n)
		}
	}
}

// A hundred connections with one peer that start at once: it is asked for a few
// IKE_SAs at a time, another peer is not held up, and all come up in their turn.
func TestStartManyConnections(t *testing.T) {
	s := newStartSim(t, 100)
	s.run(time.Second, func(string) time.Duration { return 2 * time.Second })
	if s.begun["other"] != 1 || len(s.begun) != 1+maxAttempts {
		t.Errorf("begun %v", s.begun)
	}
	s.run(time.Minute, func(string) time.Duration { return 2 * time.Second })
	if s.most[addrB] != maxAttempts || s.most[addrA] != 1 {
		t.Errorf("at most %v at once", s.most)
	}
	for conn, n := range s.begun {
		if n != 1 {
			t.Errorf("%s was begun %d times", conn, n)
		}
	}
	if len(s.begun) != 101 {
		t.Errorf("%d connections came up in a minute", len(s.begun))
	}
}

// Connections that come to nothing, or hang for as long as charon repeats itself, do
// not keep the others with that peer down.
func TestStartIsFair(t *testing.T) {
	s := newStartSim(t, 100)
	s.run(2*time.Minute, func(conn string) time.Duration {
		switch {
		case conn < "c006":
			return -165 * time.Second
		case conn < "c090":
			return -time.Second
		}
		return 2 * time.Second
	})
	for conn, v := range s.m.view {
		if up := v.has("net"); up != (conn >= "c090") {
			t.Errorf("%s: up %v", conn, up)
		}
	}
	if n := s.begun["c007"]; n < 3 {
		t.Errorf("%d attempts of one that fails at once", n)
	}
}

// A peer that goes down with all tunnels is asked for a few again.
func TestStartAgain(t *testing.T) {
	s := newStartSim(t, 10)
	quick := func(string) time.Duration { return time.Second }
	s.run(time.Minute, quick)
	clear(s.ends)
	clear(s.begun)
	s.run(time.Second, quick)
	if len(s.begun) != 1+maxAttempts {
		t.Errorf("begun at once: %v", s.begun)
	}
	s.run(time.Minute, quick)
	if len(s.begun) != 11 {
		t.Errorf("begun: %v", s.begun)
	}
}

// After a reauthentication charon sets the children up one by one. The Manager asks
// for one of them only when no exchange makes it: the key would be fetched twice.
func TestStartWaitsForTheExchange(t *testing.T) {
	s := newStartSim(t, 0)
	one := []childView{{ChildSA: vici.ChildSA{Name: "net", State: "INSTALLED"}}}
	asked := func(ike vici.IKESA, after time.Duration) bool {
		s.now = s.now.Add(after)
		s.m.mu.Lock()
		s.m.at, s.m.view = s.now, map[string]*connView{"other": {ikes: []vici.IKESA{ike}, children: one}}
		s.m.mu.Unlock()
		list := s.m.begin(s.l, s.now)
		if len(list) > 0 && list[0] != (childName{"other", "more"}) {
			t.Errorf("begun %v", list)
		}
		return len(list) > 0
	}
	ours := vici.IKESA{State: "ESTABLISHED", Initiator: true}
	busy, theirs := ours, ours
	busy.Creating, theirs.Initiator = true, false
	if asked(busy, 0) || asked(busy, exchangeMost-time.Second) {
		t.Error("asked for beside the exchange")
	}
	if !asked(busy, time.Second) {
		t.Error("waits for ever for an exchange that does not end")
	}
	if !asked(ours, 0) || asked(busy, time.Minute) || !asked(ours, time.Second) {
		t.Error("a later exchange is not waited for, or the end of one not noticed")
	}
	if asked(theirs, 0) {
		t.Error("asked for in an IKE_SA that the peer has just begun")
	}
	theirs.Established = youngIKE
	if !asked(theirs, youngIKE) {
		t.Error("waits for ever for the peer")
	}
}
