package ike

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici"
	"github.com/q-ipsec/q-ipsec/sad"
)

// reconcile has the SAD compared with charon's list: what is ours and unknown
// to charon is deleted, a CHILD_SA that charon has and the kernel has not is
// terminated here, so that charon's side of the tunnel starts anew.
func (m *Manager) reconcile(ctx context.Context, l *link) error {
	var last []vici.IKESA
	missing, err := m.o.SAD.Reconcile(ctx, func(ctx context.Context) ([]sad.ID, error) {
		var err error
		if last, err = l.client.SAs(ctx); err != nil {
			return nil, err
		}
		return idsOf(last), nil
	})
	if err != nil {
		// The next comparison tries again; a charon that is gone ends the session by its events.
		m.log.Warn("SAD not compared with charon", "cause", err)
		return nil
	}
	gone := map[saKey]bool{}
	for _, id := range missing {
		gone[keyOf(id)] = true
	}
	for _, ike := range last {
		c := m.config(ike.Conn)
		if c == nil || c.Policy == Off {
			continue
		}
		for _, ch := range ike.Children {
			in, out := childIDs(ike, ch)
			if ch.Carries() && (gone[keyOf(in)] || gone[keyOf(out)]) {
				m.terminate(ctx, l, c.Name, ch, EventMissingSA, "charon has a CHILD_SA whose SA the kernel has not")
			}
		}
	}
	return nil
}

// terminate closes one CHILD_SA and raises an alarm.
func (m *Manager) terminate(ctx context.Context, l *link, conn string, ch vici.ChildSA, code, why string) {
	report(m.log, m.o.Events, Event{
		Severity: Alarm, Code: code, Connection: conn,
		Text: fmt.Sprintf("connection %q: %s (child %s, SPIs %08x in, %08x out): terminated", conn, why, ch.Name, ch.SPIIn, ch.SPIOut),
	})
	if err := l.client.TerminateChild(ctx, ch.UniqueID, 0); err != nil {
		m.log.Warn("CHILD_SA not terminated", "connection", conn, "child", ch.Name, "cause", err)
	}
}

// idsOf gives the SAs of all CHILD_SAs that have some in the kernel.
func idsOf(ikes []vici.IKESA) []sad.ID {
	var ids []sad.ID
	for _, ike := range ikes {
		for _, ch := range ike.Children {
			in, out := childIDs(ike, ch)
			if in.SPI != 0 {
				ids = append(ids, in)
			}
			if out.SPI != 0 {
				ids = append(ids, out)
			}
		}
	}
	return ids
}

// childIDs names a CHILD_SA's two SAs; an SPI of 0 means there is none.
func childIDs(ike vici.IKESA, ch vici.ChildSA) (in, out sad.ID) {
	local, _ := netip.ParseAddr(ike.LocalHost)
	remote, _ := netip.ParseAddr(ike.RemoteHost)
	l, r := netip.AddrPortFrom(local, 0), netip.AddrPortFrom(remote, 0)
	return sad.ID{Src: r, Dst: l, SPI: ch.SPIIn, Protocol: sad.ProtoESP},
		sad.ID{Src: l, Dst: r, SPI: ch.SPIOut, Protocol: sad.ProtoESP}
}

// look takes a new view of charon and the SAD, closes what should not be, and
// reports what came up or went down.
func (m *Manager) look(ctx context.Context, l *link) error {
	began := time.Now()
	ikes, states, err := m.both(ctx, l)
	if err != nil {
		m.log.Warn("no view of the tunnels", "cause", err)
		return nil
	}
	if foreign := m.foreign(ikes, states); len(foreign) > 0 {
		// Again, because a CHILD_SA may have gone between the two lists.
		if ikes, states, err = m.both(ctx, l); err != nil {
			return nil
		}
		for id, f := range m.foreign(ikes, states) {
			if _, before := foreign[id]; before {
				m.terminate(ctx, l, f.conn, f.child, EventForeignSA, "a CHILD_SA that qipsecd did not key with a quantum key")
			}
		}
	}
	m.o.Broker.prune(states, m.o.Broker.now().Add(-time.Since(began)-time.Second))
	m.update(ikes, states, began)
	m.mend(ctx, l, ikes)
	m.start(ctx, l)
	return nil
}

// both lists charon's SAs, then ours in the SAD.
func (m *Manager) both(ctx context.Context, l *link) ([]vici.IKESA, []sad.State, error) {
	ikes, err := l.client.SAs(ctx)
	if err != nil {
		return nil, nil, err
	}
	states, err := m.o.SAD.State(ctx)
	return ikes, states, err
}

type foreignChild struct {
	conn  string
	child vici.ChildSA
}

// foreign gives, by unique id, the CHILD_SAs of required connections whose SAs
// are not ours or have no quantum key in them: those were made while the policy
// was optional, before a crash and a change of the configuration.
func (m *Manager) foreign(ikes []vici.IKESA, states []sad.State) map[uint32]foreignChild {
	ours := byKey(states)
	found := map[uint32]foreignChild{}
	for _, ike := range ikes {
		c := m.config(ike.Conn)
		if c == nil || c.Policy != Required {
			continue
		}
		for _, ch := range ike.Children {
			if !ch.Carries() {
				continue
			}
			in, out := childIDs(ike, ch)
			for _, id := range []sad.ID{in, out} {
				// The peer's DELETE may just be taking a REKEYED one out.
				if s, ok := ours[keyOf(id)]; !ok && ch.Up() || ok && s.Mix == sad.MixClassical {
					found[ch.UniqueID] = foreignChild{c.Name, ch}
				}
			}
		}
	}
	return found
}

func byKey(states []sad.State) map[saKey]sad.State {
	ours := make(map[saKey]sad.State, len(states))
	for _, s := range states {
		k := keyOf(s.ID)
		k.mark = sad.Mark{} // charon's list does not tell it
		ours[k] = s
	}
	return ours
}

// update replaces the view and reports what changed.
func (m *Manager) update(ikes []vici.IKESA, states []sad.State, at time.Time) {
	ours := byKey(states)
	fresh := map[string]*connView{}
	for _, c := range m.o.Connections {
		fresh[c.Name] = &connView{}
	}
	for _, ike := range ikes {
		v := fresh[ike.Conn]
		if v == nil {
			continue
		}
		v.ikes = append(v.ikes, ike)
		for _, ch := range ike.Children {
			in, out := childIDs(ike, ch)
			v.children = append(v.children, childView{ChildSA: ch, in: ours[keyOf(in)], out: ours[keyOf(out)]})
			v.up = v.up || ch.Carries()
		}
	}
	m.mu.Lock()
	var changed []Event
	views := m.view
	for _, c := range m.o.Connections {
		v, old := fresh[c.Name], m.view[c.Name]
		v.since = old.since
		if v.up != old.up {
			v.since = at
		}
		changed = append(changed, changes(c.Name, old, v, m.held[c.Name])...)
	}
	m.view, m.at = fresh, at
	m.replaced()
	m.mu.Unlock()
	for _, e := range changed {
		report(m.log, m.o.Events, e)
	}
	for _, c := range m.o.Connections {
		if c.Policy != Optional {
			continue
		}
		switch v := fresh[c.Name]; {
		case v.bare(views[c.Name]):
			m.o.Broker.fellBack(c.Name, cmp.Or(m.o.Broker.note(c.Name).fallback, "charon keyed a CHILD_SA without qipsecd"))
		case !v.classical():
			m.o.Broker.keyed(c.Name, m.o.Broker.now().Add(-time.Since(at)), v.up)
		}
	}
}

// changes are the events of what differs between two views of a connection.
func changes(name string, old, v *connView, held bool) (list []Event) {
	say := func(s Severity, code, text string) {
		list = append(list, Event{Severity: s, Code: code, Connection: name, Text: fmt.Sprintf("connection %q %s", name, text)})
	}
	switch {
	case v.up && !old.up:
		say(Run, EventUp, "is up")
	case old.up && !v.up && held:
		say(Run, EventDown, "is down: the operator took it down")
	case old.up && !v.up:
		say(Fault, EventDown, "is down")
	}
	for _, now := range v.ikes {
		for _, was := range old.ikes {
			if was.UniqueID == now.UniqueID && was.State == "ESTABLISHED" && now.State == "ESTABLISHED" && was.Ends() != now.Ends() {
				say(Run, EventMoved, fmt.Sprintf("has moved: IKE_SA %d from %s to %s", now.UniqueID, was.Ends(), now.Ends()))
			}
		}
	}
	return list
}

// replaced tells those who wait for a new view; m.mu is held.
func (m *Manager) replaced() {
	close(m.seen)
	m.seen = make(chan struct{})
}

// refreshMost bounds Refresh beside a charon that is slow.
const refreshMost = 2 * time.Second

// Refresh has the Manager look at charon again and waits for that, 2 s at most:
// charon tells nobody of a CHILD_SA that goes once it is replaced.
func (m *Manager) Refresh(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, refreshMost)
	defer cancel()
	asked := time.Now()
	m.again()
	for {
		m.mu.Lock()
		done, next := m.link == nil || m.at.After(asked), m.seen
		m.mu.Unlock()
		if done {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-next:
		}
	}
}

// rekeyMoved rekeys the CHILD_SA of an SA that was moved to new addresses: its
// sequence numbers were advanced, a fresh key ends that state. Mostly both ends
// move theirs, and one rekeying renews all four SAs, so the end that leads asks at
// once. The other does late: behind a NAT the leader may not see that there is
// anything to move.
func (m *Manager) rekeyMoved(ctx context.Context, l *link, id sad.ID, late bool) error {
	ikes, err := l.client.SAs(ctx)
	if err != nil {
		m.log.Warn("moved SA not rekeyed", "spi", fmt.Sprintf("%08x", id.SPI), "cause", err)
		return nil
	}
	for _, ike := range ikes {
		for _, ch := range ike.Children {
			if !ch.Up() || ch.SPIIn != id.SPI && ch.SPIOut != id.SPI {
				continue
			}
			if !late && !leads(ike) {
				l.moved = append(l.moved, movedSA{id, time.Now().Add(m.t.follow)})
				return nil
			}
			m.log.Info("tunnel command", "connection", ike.Conn, "child", ch.Name, "rekey", true, "why", "its addresses changed")
			if _, err := l.client.Rekey(ctx, ch.UniqueID); err != nil {
				m.log.Warn("moved SA not rekeyed", "connection", ike.Conn, "cause", err)
			}
			return nil
		}
	}
	return nil
}
