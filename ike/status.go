package ike

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// State is what a connection is at.
type State string

// The states of a connection.
const (
	StateUp         State = "up"         // a CHILD_SA keyed by a quantum key
	StateStalled    State = "stalled"    // up, and nothing leads into it
	StateFallback   State = "fallback"   // optional, and up without one
	StateConnecting State = "connecting" // IKE is at it
	StateDown       State = "down"       // loaded, no CHILD_SA
	StateBlocked    State = "blocked"    // must not or could not be loaded into charon
	StateNoCharon   State = "no-charon"  // charon does not answer on VICI
)

// Status is one connection for the operator. It holds no secret.
type Status struct {
	Name              string
	State             State
	Policy            string
	Mix               string
	Peer              string // its addresses
	KME               string
	LocalSAE, PeerSAE string
	Since             time.Time // of being up or down; zero if unknown
	Cause             string    // last refusal or failure; may be over
	CauseAt           time.Time
	BackOff           time.Duration // until the next key is asked for
	Supply            *Supply       // of keys; nil: not known, or none are taken
	Children          []ChildStatus
}

// ChildStatus is one CHILD_SA.
type ChildStatus struct {
	Name              string
	UniqueID          uint32
	State             string // charon's word
	KeyID             key.ID // zero on fallback or if it is not ours
	Class             string // of its key; "none" on fallback, "unknown" after a restart of qipsecd
	Mix               string
	SPIIn, SPIOut     uint32
	Algorithm         string
	FingerprintIn     string
	FingerprintOut    string
	Since             time.Time
	NextRekey         time.Time // zero: charon's business, or not planned yet
	BytesIn, BytesOut uint64
}

// Status gives every connection, in the order of the configuration, as it was at the
// last look.
func (m *Manager) Status() []Status {
	out := make([]Status, 0, len(m.o.Connections))
	for _, c := range m.o.Connections {
		out = append(out, m.status(c))
	}
	return out
}

func (m *Manager) status(c Connection) Status {
	s := Status{
		Name: c.Name, Policy: c.Policy.String(), Mix: c.Mix.String(), Peer: joinAddrs(c.RemoteAddrs),
		KME: c.KME, LocalSAE: c.LocalSAE, PeerSAE: c.PeerSAE,
	}
	n := m.o.Broker.note(c.Name)
	s.Cause, s.CauseAt, s.BackOff = n.cause, n.causeAt, n.backOff
	if c.Policy != Off {
		s.Supply = m.pacer.supply(pairOf(c))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.view[c.Name]
	s.Since = v.since
	for _, ch := range v.children {
		s.Children = append(s.Children, m.child(ch))
	}
	switch {
	case m.link == nil:
		s.State, s.Cause, s.CauseAt = StateNoCharon, m.cause, time.Time{}
	case !m.link.loaded[c.Name]:
		s.State, s.CauseAt = StateBlocked, time.Time{}
		if s.Cause = m.link.faults[c.Name]; c.Policy == Required && m.link.blocked != nil {
			s.Cause = m.link.blocked.Error()
		}
	case v.up && !m.at.IsZero():
		s.State = StateUp
		if c.Policy == Optional && v.classical() {
			s.State = StateFallback
			if n.fallback != "" {
				s.Cause = n.fallback
			}
		}
		if stalled := m.stallOf(c.Name); stalled != "" {
			s.State, s.Cause, s.CauseAt = StateStalled, stalled, time.Time{}
		}
	case len(v.ikes) > 0:
		s.State = StateConnecting
		if v.ikes[0].State == "ESTABLISHED" {
			s.State = StateDown // IKE is up, the CHILD_SA was refused or closed
		}
	default:
		s.State = StateDown
	}
	return s
}

// classical reports whether a CHILD_SA of v carries traffic without a quantum
// key.
func (v *connView) classical() bool {
	return slices.ContainsFunc(v.children, func(ch childView) bool { return ch.Carries() && ch.in.Mix == sad.MixClassical })
}

// bare is classical for sure: a CHILD_SA that the SAD does not know may be one that
// went between the two lists, unless the view before showed it so, too.
func (v *connView) bare(before *connView) bool {
	return slices.ContainsFunc(v.children, func(ch childView) bool {
		return v.fellBack(ch.UniqueID) || ch.Up() && ch.in.SPI == 0 && slices.ContainsFunc(before.children, func(b childView) bool {
			return b.UniqueID == ch.UniqueID && b.in.SPI == 0
		})
	})
}

// fellBack reports whether the CHILD_SA of that unique id is one that qipsecd
// installed without a quantum key.
func (v *connView) fellBack(id uint32) bool {
	return slices.ContainsFunc(v.children, func(ch childView) bool {
		return ch.UniqueID == id && ch.in.SPI != 0 && ch.in.Mix == sad.MixClassical
	})
}

func (m *Manager) child(v childView) ChildStatus {
	s := ChildStatus{
		Name: v.Name, UniqueID: v.UniqueID, State: v.State, KeyID: v.in.KeyID,
		SPIIn: v.SPIIn, SPIOut: v.SPIOut, Algorithm: v.in.Algorithm,
		FingerprintIn: v.in.Fingerprint, FingerprintOut: v.out.Fingerprint,
		BytesIn: v.BytesIn, BytesOut: v.BytesOut, NextRekey: m.pacer.next(v.UniqueID),
	}
	if v.Installed > 0 || v.Up() {
		s.Since = m.at.Add(-v.Installed)
	}
	if v.in.SPI == 0 {
		s.Class, s.Mix = "unknown", "unknown"
		return s
	}
	s.Mix, s.Class = v.in.Mix.String(), "unknown"
	if c, ok := m.o.Broker.class(v.in.ID); ok {
		s.Class = className(c)
	} else if v.in.Mix == sad.MixClassical {
		s.Class = className(0)
	}
	return s
}

// note is what the Broker knows of a connection.
type note struct {
	cause    string
	causeAt  time.Time
	next     string
	fallback string
	mute     bool
	backOff  time.Duration
	failures int
	taken    int
}

func (b *Broker) note(name string) note {
	b.mu.Lock()
	defer b.mu.Unlock()
	cs := b.conns[name]
	if cs == nil {
		return note{}
	}
	return note{
		cause: cs.cause, causeAt: cs.causeAt, next: cs.next, fallback: cs.fallback, mute: cs.mute, failures: cs.failures, taken: cs.taken,
		backOff: max(0, cs.notBefore.Sub(b.now())),
	}
}

// class gives the key class of an SA that this Broker installed.
func (b *Broker) class(id sad.ID) (key.Class, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := b.installed[keyOf(id)]
	if rec == nil {
		return 0, false
	}
	return rec.e.class, true
}

// ErrUnknownConnection says that no connection has that name.
var ErrUnknownConnection = errors.New("ike: no connection of that name")

// Explain tells in words why a connection is up, down, blocked or on fallback,
// and what to do next.
func (m *Manager) Explain(name string) (string, error) {
	c := m.config(name)
	if c == nil {
		return "", fmt.Errorf("%w: %q", ErrUnknownConnection, name)
	}
	s := m.status(*c)
	n := m.o.Broker.note(name)
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	line("%s is %s (policy %s, mix %s, peer %s as SAE %s, key source %s).", s.Name, s.State, s.Policy, s.Mix, s.Peer, s.PeerSAE, s.KME)
	for _, ch := range s.Children {
		k := "no quantum key"
		if !ch.KeyID.IsZero() {
			k = fmt.Sprintf("Key-ID %s, class %s", ch.KeyID, ch.Class)
		}
		line("  child %s: %s, SPIs %08x in, %08x out, %s, since %s.", ch.Name, ch.State, ch.SPIIn, ch.SPIOut, k, ch.Since.Format(time.RFC3339))
		if !ch.NextRekey.IsZero() {
			line("    rekeying due at %s.", ch.NextRekey.Format(time.RFC3339))
		}
	}
	if s.Supply != nil {
		line("  keys: %s.", s.Supply.text())
	}
	if c.Policy == Required {
		line("  guard: %s.", m.guardText())
	}
	why, next := m.reason(*c, s, n)
	line("Why: %s", why)
	line("Next: %s", next)
	return b.String(), nil
}

// reason gives the cause of a state and the step that follows from it.
func (m *Manager) reason(c Connection, s Status, n note) (why, next string) {
	m.mu.Lock()
	held := m.held[c.Name]
	m.mu.Unlock()
	cause := s.Cause
	if cause == "" {
		cause = "nothing was refused here since qipsecd started"
	} else if !s.CauseAt.IsZero() {
		cause += " (at " + s.CauseAt.Format(time.RFC3339) + ")"
	}
	switch s.State {
	case StateUp:
		if c.Policy == Off {
			return "its policy is off: charon keys it without qipsecd.", "nothing; `policy = \"required\"` would key it with quantum keys."
		}
		return "both ends confirmed the same quantum key, and qipsecd installed the SAs.", "nothing; every rekeying takes a fresh key."
	case StateStalled:
		return cause + ".", "wait: qipsecd has it rekeyed, which sets its policies anew; if it stays so, see who else changes policies (`ip xfrm policy`)."
	case StateFallback:
		return "no quantum key was usable: " + cause + ".", "see to the key source (`qipsec keys`) or the peer; qipsecd has it rekeyed as soon as there are keys, if the peer speaks Q-IPsec. `policy = \"required\"` would refuse instead."
	case StateNoCharon:
		return cause + ".", "start strongSwan, or correct the VICI socket in the configuration; qipsecd connects by itself."
	case StateBlocked:
		return cause + ".", "remove that cause; qipsecd loads the connection by itself. Until then no packet may leave: that is what required means."
	case StateConnecting:
		return "charon is setting it up; last refusal: " + cause + ".", cmp.Or(n.next, "wait; if it stays so, see whether the peer answers on UDP 500 and 4500.")
	}
	switch {
	case held:
		return "the operator took it down.", "`qipsec tunnels up " + c.Name + "`."
	case n.backOff > 0:
		return cause + fmt.Sprintf("; %d set-ups in a row cost a key without making an SA.", n.failures),
			fmt.Sprintf("the next key is asked for in %s; read the peer's log for its cause.", n.backOff.Round(time.Second))
	}
	for _, ch := range c.Children {
		if ch.Start == StartNow {
			return "last refusal: " + cause + ".", "qipsecd goes on trying; " + cmp.Or(n.next, "read the peer's `qipsec explain` and charon's log on both ends.")
		}
	}
	return "nobody has started it; last refusal: " + cause + ".", "`qipsec tunnels up " + c.Name + "`, or start it from the peer."
}

// ready gives the link for a command on a connection.
func (m *Manager) ready(name string) (*link, *Connection, error) {
	c := m.config(name)
	if c == nil {
		return nil, nil, fmt.Errorf("%w: %q", ErrUnknownConnection, name)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.link == nil {
		return nil, nil, fmt.Errorf("connection %q: no charon: %s", name, m.cause)
	}
	if !m.link.loaded[name] {
		cause := m.link.faults[name]
		if c.Policy == Required && m.link.blocked != nil {
			cause = m.link.blocked.Error()
		}
		return nil, nil, fmt.Errorf("connection %q is not loaded: %s", name, cause)
	}
	return m.link, c, nil
}

// commandWait is how long a command waits for its result where the caller's
// context has no end.
const commandWait = 30 * time.Second

func waitOf(ctx context.Context) time.Duration {
	if d, ok := ctx.Deadline(); ok {
		return max(time.Until(d), time.Millisecond)
	}
	return commandWait
}

// Initiate brings those children of a connection up that are not, and waits for
// the result.
func (m *Manager) Initiate(ctx context.Context, name string) error {
	l, c, err := m.ready(name)
	if err != nil {
		return err
	}
	ikes, err := l.client.SAs(ctx)
	if err != nil {
		return err
	}
	up := map[string]bool{}
	for _, ike := range ikes {
		for _, ch := range ike.Children {
			up[ch.Name] = up[ch.Name] || ike.Conn == name && ch.Carries()
		}
	}
	m.mu.Lock()
	for _, ch := range c.Children {
		// Not by the owner loop too, which would take a second key for it.
		l.next[childName{name, ch.Name}] = retry{at: time.Now().Add(m.t.retryMin)}
	}
	m.mu.Unlock()
	m.hold(name, false)
	m.commanded(name, "be set up")
	var errs []error
	for _, ch := range c.Children {
		if up[ch.Name] {
			continue
		}
		m.log.Info("tunnel command", "connection", name, "child", ch.Name, "peer", joinAddrs(c.RemoteAddrs))
		if err := l.client.Initiate(ctx, name, ch.Name, waitOf(ctx)); err != nil {
			n := m.o.Broker.note(name)
			errs = append(errs, fmt.Errorf("connection %q, child %s: %w (last refusal here: %s)", name, ch.Name, err, orNone(n.cause)))
		}
	}
	return errors.Join(errs...)
}

// Rekey has charon rekey every CHILD_SA of a connection. It returns when that
// is queued.
func (m *Manager) Rekey(ctx context.Context, name string) error {
	l, _, err := m.ready(name)
	if err != nil {
		return err
	}
	ikes, err := l.client.SAs(ctx)
	if err != nil {
		return err
	}
	m.commanded(name, "be rekeyed")
	found := 0
	for _, ike := range ikes {
		if ike.Conn != name {
			continue
		}
		for _, ch := range ike.Children {
			if ch.State != "INSTALLED" {
				continue
			}
			m.log.Info("tunnel command", "connection", name, "child", ch.Name, "rekey", true)
			n, err := l.client.Rekey(ctx, ch.UniqueID)
			if err != nil {
				return fmt.Errorf("connection %q, child %s: %w", name, ch.Name, err)
			}
			found += n
		}
	}
	if found == 0 {
		return fmt.Errorf("connection %q has no CHILD_SA to rekey", name)
	}
	return nil
}

// Terminate closes a connection's SAs and keeps it down until Initiate.
func (m *Manager) Terminate(ctx context.Context, name string) error {
	l, _, err := m.ready(name)
	if err != nil {
		return err
	}
	m.hold(name, true)
	m.commanded(name, "be taken down and stay down")
	m.log.Info("tunnel command", "connection", name, "terminate", true)
	if err := l.client.TerminateConn(ctx, name, waitOf(ctx)); err != nil {
		return fmt.Errorf("connection %q: %w", name, err)
	}
	return nil
}

// commanded reports the operator's command.
func (m *Manager) commanded(name, what string) {
	report(m.log, m.o.Events, Event{Severity: Run, Code: EventCommand, Connection: name, Text: fmt.Sprintf("the operator has connection %q %s", name, what)})
}

func (m *Manager) hold(name string, down bool) {
	m.mu.Lock()
	m.held[name] = down
	m.mu.Unlock()
	m.again()
}

// again has the owner loop look at charon as soon as it can.
func (m *Manager) again() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
