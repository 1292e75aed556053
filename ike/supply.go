package ike

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici"
	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Levels tells how many keys a KME has for one of our SAEs with another. It
// returns by ctx's end.
type Levels interface {
	Status(ctx context.Context, local, peer string) (key.SupplyStatus, error)
}

// measureTimeout bounds one question for a level.
const measureTimeout = 3 * time.Second

// backstop is charon's own rekey_time where max_key_age sets none below it: the
// longest max_key_age that the configuration takes.
const backstop = 24 * time.Hour

// Supply is what is known of the keys that a connection's rekeyings take.
type Supply struct {
	Pool       string // who shares them: "KME local with node-b"
	Level      int    // keys left
	Reserve    int    // of them, not for rekeyings that can wait
	Measured   bool   // there are rates
	SupplyRate float64
	UseRate    float64 // this node's IPsec alone; both in keys per second
	// Dry is when the last key goes if that goes on; negative: never.
	Dry time.Duration
	// Interval is what the pool affords each CHILD_SA; zero: whatever its policy is.
	Interval time.Duration
	Waits    bool // it affords none now
}

// text is s in words.
func (s *Supply) text() string {
	t := fmt.Sprintf("%d left at %s, reserve %d", s.Level, s.Pool, s.Reserve)
	if s.Measured {
		dry := "never dry at that"
		if s.Dry >= 0 {
			dry = "dry in " + s.Dry.Round(time.Second).String()
		}
		t += fmt.Sprintf("; %.3g/s come, %.3g/s are used here: %s", s.SupplyRate, s.UseRate, dry)
	}
	switch {
	case s.Waits:
		t += "; rekeyings wait for keys"
	case s.Interval > 0:
		t += fmt.Sprintf("; enough to rekey each CHILD_SA every %s", s.Interval.Round(time.Second))
	}
	return t
}

// saePair is who asks a KME for keys with whom.
type saePair struct{ kme, local, peer string }

func pairOf(c Connection) saePair { return saePair{c.KME, c.LocalSAE, c.PeerSAE} }

// withBackstop leaves the rekeyings by time to the Manager: charon's own timer
// is what remains when qipsecd does not get to it, 80 % of max_key_age. A
// connection that is off takes no keys and stays charon's.
func withBackstop(c Connection) Connection {
	if c.Policy == Off {
		return c
	}
	c.Children = slices.Clone(c.Children)
	for i := range c.Children {
		c.Children[i].RekeyTime = backstop
	}
	return c
}

// measure asks one KME for its levels until ctx ends. It has a goroutine of its
// own, because a KME may be slow.
func (m *Manager) measure(ctx context.Context, kme string, source Levels) {
	t := time.NewTicker(m.t.measure)
	defer t.Stop()
	for {
		m.measureOnce(ctx, kme, source)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

func (m *Manager) measureOnce(ctx context.Context, kme string, source Levels) {
	asked := map[saePair]bool{}
	found := map[poolID]key.SupplyStatus{}
	for _, c := range m.o.Connections {
		p := pairOf(c)
		if c.KME != kme || c.Policy == Off || asked[p] {
			continue
		}
		asked[p] = true
		ctx, cancel := context.WithTimeout(ctx, measureTimeout)
		s, err := source.Status(ctx, c.LocalSAE, c.PeerSAE)
		cancel()
		if err != nil {
			m.log.Debug("level of keys not told", "kme", kme, "peer_sae", c.PeerSAE, "cause", err)
			continue
		}
		if s.MaxKeyCount <= 0 {
			continue // a KME that counts nothing
		}
		id := poolID{kme, cmp.Or(s.TargetKME, "SAE "+c.PeerSAE)}
		m.pacer.learn(p, id)
		found[id] = s
	}
	now := time.Now()
	for id, s := range found {
		taken := 0
		for _, c := range m.o.Connections {
			if m.pacer.poolOf(pairOf(c)) == id {
				taken += m.o.Broker.note(c.Name).taken
			}
		}
		m.pacer.measured(now, id, s.StoredKeyCount, s.MaxKeyCount, taken)
	}
}

// pace has charon rekey what is due.
func (m *Manager) pace(ctx context.Context, l *link, now time.Time) {
	due, events := m.pacer.plan(now, m.paced(l))
	for _, e := range events {
		report(m.log, m.o.Events, e)
	}
	for _, p := range due {
		m.log.Info("tunnel command", "connection", p.conn, "child", p.child, "rekey", true, "why", "its key is due")
		if _, err := l.client.Rekey(ctx, p.id); err != nil {
			m.log.Warn("charon refuses to rekey", "connection", p.conn, "child", p.child, "cause", err)
			if l.client.Err() != nil {
				return
			}
		}
	}
}

// paced gives the CHILD_SAs whose rekeyings take keys, by the last view.
func (m *Manager) paced(l *link) []paced {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []paced
	for _, c := range m.o.Connections {
		if c.Policy == Off || !l.loaded[c.Name] {
			continue
		}
		n, v := m.o.Broker.note(c.Name), m.view[c.Name]
		for _, ike := range v.ikes {
			for _, ch := range ike.Children {
				i := slices.IndexFunc(c.Children, func(w Child) bool { return w.Name == ch.Name })
				if i < 0 || !ch.Up() {
					continue
				}
				out = append(out, paced{
					id: ch.UniqueID, conn: c.Name, child: ch.Name, pair: pairOf(c),
					policy: policyOf(c.Children[i].RekeyTime, c.MaxKeyAge), limit: c.MaxKeyAge,
					since: m.at.Add(-ch.Installed), leads: leads(ike), bare: !n.mute && v.fellBack(ch.UniqueID),
					ready: ike.State == "ESTABLISHED" && ch.State == "INSTALLED" && n.backOff == 0,
				})
			}
		}
	}
	return out
}

// policyOf is the shortest interval between rekeyings by time. A longer one would
// leave the end that follows no window of its own before the limit, where both
// ends rekey and may take from the reserve.
func policyOf(rekeyTime, limit time.Duration) time.Duration {
	policy := cmp.Or(rekeyTime, defaultRekey)
	if limit > 0 {
		policy = min(policy, times(limit, mostPolicy))
	}
	return policy
}

// leads reports whether this end rekeys first: the one that began the IKE_SA,
// which both know without asking and of which there is exactly one. The other
// waits half as long again, and so steps in where the leader has no keys or is
// a charon without qipsecd.
func leads(ike vici.IKESA) bool { return ike.Initiator }

// names lists a few connections.
func names(list []string) string {
	slices.Sort(list)
	list = slices.Compact(list)
	const most = 5
	if more := len(list) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), more)
	}
	return strings.Join(list, ", ")
}
