package ike

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici"
)

// Bounds of the IKE_SAs that are being set up with one peer. charon drops what one
// address asks for while it has 5 of that address half-open (block_threshold), and
// each attempt so dropped costs seconds.
const (
	maxAttempts  = 4
	attemptLeast = time.Second      // charon lists it by then
	attemptMost  = 10 * time.Second // a peer that does not answer must not hold others at its address up for longer
)

// What charon or the peer is setting up in an IKE_SA, as they do all children one by
// one after a reauthentication, is not asked for a second time.
const (
	youngIKE     = 5 * time.Second  // of an IKE_SA of the peer's: its tasks are not ours to see
	exchangeMost = 30 * time.Second // of the tasks in ours
)

// childName names a child of a connection.
type childName struct{ conn, child string }

// retry is when a child is initiated next, and how often it was in vain.
type retry struct {
	at  time.Time
	try int
}

// attempts are the IKE_SAs that were begun and may still be under way, by
// connection.
type attempts map[string]attempt

type attempt struct {
	peer netip.Addr
	at   time.Time
}

// settle forgets the attempts that have ended, as far as the last view tells.
func (a attempts) settle(now time.Time, view map[string]*connView) {
	for conn, t := range a {
		age, v := now.Sub(t.at), view[conn]
		if v.established() || age >= attemptMost || age >= attemptLeast && !v.connecting() {
			delete(a, conn)
		}
	}
}

// take notes that conn is begun, if its peer's address allows one more.
func (a attempts) take(conn string, peer netip.Addr, now time.Time) bool {
	n := 0
	for other, t := range a {
		if other != conn && t.peer == peer {
			n++
		}
	}
	if n >= maxAttempts {
		return false
	}
	a[conn] = attempt{peer, now}
	return true
}

// start initiates what may be begun, each child with its own back-off.
func (m *Manager) start(ctx context.Context, l *link) {
	for _, w := range m.begin(l, time.Now()) {
		c := m.config(w.conn)
		m.log.Info("tunnel command", "connection", w.conn, "child", w.child, "peer", joinAddrs(c.RemoteAddrs))
		if err := l.client.Initiate(ctx, w.conn, w.child, 0); err != nil {
			m.log.Warn("charon refuses to initiate", "connection", w.conn, "child", w.child, "cause", err)
			if l.client.Err() != nil {
				return
			}
		}
		m.mu.Lock()
		l.tried(w, time.Now(), m.t)
		m.mu.Unlock()
	}
}

// begin gives the children that are due as far as each peer's address allows, and
// notes the attempts; what must wait is due again in the next round.
func (m *Manager) begin(l *link, now time.Time) []childName {
	due := m.due(l, now)
	m.mu.Lock()
	defer m.mu.Unlock()
	l.begun.settle(now, m.view)
	return slices.DeleteFunc(due, func(w childName) bool {
		// Within an IKE_SA that is there a child makes no half-open one.
		return !m.view[w.conn].established() && !l.begun.take(w.conn, m.config(w.conn).peerAddr(), now)
	})
}

// tried puts the next initiation of a child off; m.mu is held.
func (l *link) tried(w childName, now time.Time, t timing) {
	r := l.next[w]
	wait := min(t.retryMin<<min(r.try, 10), t.retryMax)
	l.next[w] = retry{at: now.Add(wait/2 + rand.N(wait/2+1)), try: r.try + 1}
}

// peerAddr is the address that charon tries first; zero: any.
func (c *Connection) peerAddr() netip.Addr {
	if len(c.RemoteAddrs) == 0 {
		return netip.Addr{}
	}
	return c.RemoteAddrs[0]
}

// due gives the children that shall be up, are not by the last view, and whose
// next try has come: first those that wait longest.
func (m *Manager) due(l *link, now time.Time) []childName {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []childName
	for _, c := range m.o.Connections {
		if !l.loaded[c.Name] || m.held[c.Name] || m.at.IsZero() {
			continue
		}
		v := m.view[c.Name]
		wait := v.connecting() || l.awaits(c.Name, v, now)
		for _, ch := range c.Children {
			w := childName{c.Name, ch.Name}
			switch {
			case ch.Start != StartNow:
			case v.has(ch.Name):
				delete(l.next, w)
			case wait:
			case !now.Before(l.next[w].at):
				out = append(out, w)
			}
		}
	}
	slices.SortStableFunc(out, func(a, b childName) int { return l.next[a].at.Compare(l.next[b].at) })
	return out
}

// awaits reports whether children of conn are on their way without us.
func (l *link) awaits(conn string, v *connView, now time.Time) bool {
	if slices.ContainsFunc(v.ikes, func(i vici.IKESA) bool { return !i.Initiator && i.State == "ESTABLISHED" && i.Established < youngIKE }) {
		return true
	}
	if !slices.ContainsFunc(v.ikes, func(i vici.IKESA) bool { return i.Creating }) {
		delete(l.busy, conn)
		return false
	}
	if l.busy[conn].IsZero() {
		l.busy[conn] = now
	}
	return now.Sub(l.busy[conn]) < exchangeMost
}

// has reports whether a child of that name carries traffic.
func (v *connView) has(child string) bool {
	return slices.ContainsFunc(v.children, func(c childView) bool { return c.Name == child && c.Carries() })
}

// connecting reports whether charon is setting the IKE_SA up.
func (v *connView) connecting() bool {
	return slices.ContainsFunc(v.ikes, func(i vici.IKESA) bool { return i.State == "CONNECTING" || i.State == "CREATED" })
}

// established reports whether there is an IKE_SA that takes children.
func (v *connView) established() bool {
	return slices.ContainsFunc(v.ikes, func(i vici.IKESA) bool { return i.State == "ESTABLISHED" || i.State == "REKEYING" })
}
