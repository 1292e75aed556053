package ike

import (
	"context"
	"fmt"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici"
)

// Bounds of the rekeyings that shall end a stall.
const (
	stallMin = 5 * time.Second
	stallMax = time.Minute
)

// stall is a child that charon has installed and that carries nothing out, because
// no outbound policy names one of its SAs: it was lost (a flush of the SPD), or
// charon did not set it after a rekeying that ended by halves. A rekeying sets it
// anew. charon tells nobody, and its list looks as ever.
type stall struct {
	id    uint32    // unique id of the CHILD_SA that is to be rekeyed
	old   bool      // the CHILD_SA before it carries the traffic still
	at    time.Time // when it is rekeyed, if it is one still
	tries int
	cause string // as reported; empty: it was not
}

// stalledGroup is what the CHILD_SAs of one child have in common.
type stalledGroup struct {
	ike    vici.IKESA
	newest *vici.ChildSA // INSTALLED
	up     bool          // one is installed or being rekeyed
	led    bool          // a policy leads into one of those
	old    bool          // or into one that the peer has rekeyed and will delete
}

// groups sorts CHILD_SAs by their child; what charon keys by itself is not there.
func (m *Manager) groups(ikes []vici.IKESA, steered map[uint32]bool) map[childName]*stalledGroup {
	all := map[childName]*stalledGroup{}
	for _, ike := range ikes {
		c := m.config(ike.Conn)
		if c == nil || c.Policy == Off {
			continue
		}
		for i := range ike.Children {
			ch := &ike.Children[i]
			name := childName{ike.Conn, ch.Name}
			g := all[name]
			if g == nil {
				g = &stalledGroup{}
				all[name] = g
			}
			leads := steered[ch.SPIOut]
			g.up = g.up || ch.Up()
			g.led = g.led || leads && ch.Up()
			g.old = g.old || leads && ch.State == "REKEYED"
			if ch.State == "INSTALLED" && ike.State == "ESTABLISHED" && (g.newest == nil || ch.UniqueID > g.newest.UniqueID) {
				g.ike, g.newest = ike, ch
			}
		}
	}
	return all
}

// mend has charon rekey the children that are stalled. One look is not enough to
// tell: a policy is read after the list, and charon sets it after the SAs. Where the
// old CHILD_SA carries the traffic on, because the peer's DELETE of it is still to
// come, there is time.
func (m *Manager) mend(ctx context.Context, l *link, ikes []vici.IKESA) {
	steered, err := m.o.SAD.Steered(ctx)
	if err != nil {
		m.log.Warn("policies not compared with charon's CHILD_SAs", "cause", err)
		return
	}
	now := time.Now()
	groups := m.groups(ikes, steered)
	m.mu.Lock()
	var due []childName
	var over []Event
	for name, g := range groups {
		s := m.stalled[name]
		switch {
		case !g.up || g.led:
		case g.newest == nil: // it is being rekeyed
			continue
		case s == nil || s.tries == 0 && (s.id != g.newest.UniqueID || s.old != g.old):
			wait := m.t.stall
			if g.old {
				wait = m.t.halfway
			}
			m.stalled[name] = &stall{id: g.newest.UniqueID, old: g.old, at: now.Add(wait)}
		case !now.Before(s.at):
			due = append(due, name)
		}
	}
	for name, s := range m.stalled {
		if g := groups[name]; g == nil || !g.up || g.led {
			delete(m.stalled, name)
			if s.cause != "" {
				over = append(over, stallOver(name, g))
			}
		}
	}
	m.mu.Unlock()
	for _, e := range over {
		report(m.log, m.o.Events, e)
	}
	for _, name := range due {
		m.mendOne(ctx, l, name, groups[name], now)
	}
}

func stallOver(name childName, g *stalledGroup) Event {
	text := "is down"
	if g != nil && g.led {
		text = "sends again"
	}
	return Event{Severity: Run, Code: EventStalled, Connection: name.conn, Text: fmt.Sprintf("connection %q, child %s: %s", name.conn, name.child, text)}
}

func (m *Manager) mendOne(ctx context.Context, l *link, name childName, g *stalledGroup, now time.Time) {
	ch := g.newest
	m.mu.Lock()
	s := m.stalled[name]
	told := s.cause != ""
	s.cause = fmt.Sprintf("nothing leads into child %s (SPIs %08x in, %08x out): no outbound policy names its SA", name.child, ch.SPIIn, ch.SPIOut)
	if g.old {
		s.cause = fmt.Sprintf("child %s was rekeyed by halves (SPIs %08x in, %08x out): the peer does not delete the old one", name.child, ch.SPIIn, ch.SPIOut)
	}
	s.id, s.at = ch.UniqueID, now.Add(min(stallMin<<min(s.tries, 8), stallMax))
	s.tries++
	cause := s.cause
	m.mu.Unlock()
	if !told {
		report(m.log, m.o.Events, Event{Severity: Alarm, Code: EventStalled, Connection: name.conn, Text: fmt.Sprintf("connection %q: %s", name.conn, cause)})
	}
	m.log.Info("tunnel command", "connection", name.conn, "child", name.child, "rekey", true, "why", "nothing leads into it")
	if _, err := l.client.Rekey(ctx, ch.UniqueID); err != nil {
		m.log.Warn("stalled CHILD_SA not rekeyed", "connection", name.conn, "child", name.child, "cause", err)
	}
}

// stallDue reports whether a stall has to be looked at again.
func (m *Manager) stallDue(now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.stalled {
		if !now.Before(s.at) {
			return true
		}
	}
	return false
}

// stallOf is why a connection that is up carries nothing out; empty if it does.
// m.mu is held.
func (m *Manager) stallOf(conn string) string {
	for name, s := range m.stalled {
		if name.conn == conn && s.cause != "" {
			return s.cause
		}
	}
	return ""
}
