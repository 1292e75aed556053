package vici

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	govici "github.com/strongswan/govici/vici"
)

// IKESA is an IKE_SA as charon lists it.
type IKESA struct {
	Conn        string // name of its connection
	UniqueID    uint32
	State       string // charon's word: ESTABLISHED, CONNECTING, ...
	Initiator   bool
	LocalHost   string
	RemoteHost  string
	LocalPort   uint16
	RemotePort  uint16
	RemoteID    string
	Established time.Duration // ago
	Creating    bool          // a CHILD_SA is being set up in it, or waits for that
	Children    []ChildSA
}

// Ends names both ends with their ports.
func (s IKESA) Ends() string {
	return fmt.Sprintf("%s[%d]...%s[%d]", s.LocalHost, s.LocalPort, s.RemoteHost, s.RemotePort)
}

// ChildSA is a CHILD_SA as charon lists it. Counters and SPIs are zero where
// the SA is not installed.
type ChildSA struct {
	Name              string // of its configuration
	UniqueID          uint32
	State             string // charon's word: INSTALLED, REKEYED, ...
	SPIIn, SPIOut     uint32 // host order
	Protocol          string
	BytesIn, BytesOut uint64
	Installed         time.Duration // ago
}

// Up reports whether the CHILD_SA has both its SAs: it is installed, or it is
// being rekeyed and not yet replaced.
func (c ChildSA) Up() bool { return c.State == "INSTALLED" || c.State == "REKEYING" }

// Carries reports whether traffic goes through the CHILD_SA. Besides one that is
// up that may be one whose rekeying the peer began: charon calls it REKEYED from
// our answer until the peer's DELETE, and goes on using it when the peer deletes
// the new one instead.
func (c ChildSA) Carries() bool { return c.Up() || c.State == "REKEYED" }

// Kind says what an Event reports.
type Kind uint8

// The kinds of events.
const (
	IKEUp Kind = iota + 1
	IKEDown
	ChildUp
	ChildDown
	ChildRekeyed
)

// Event is one change that charon reports. Child is set for the child kinds;
// for ChildRekeyed it is the new one and Old the one it replaces.
type Event struct {
	Kind  Kind
	IKE   IKESA // without Children
	Child ChildSA
	Old   ChildSA
}

// parseEvent reads one event message; charon may put several children in one.
func parseEvent(name string, m *govici.Message) ([]Event, error) {
	sas, err := parseSections(m)
	if err != nil {
		return nil, err
	}
	up := text(m, "up") == "yes"
	var evs []Event
	for _, s := range sas {
		ike := s.sa
		ike.Children = nil
		switch name {
		case "ike-updown":
			evs = append(evs, Event{Kind: pick(up, IKEUp, IKEDown), IKE: ike})
		case "child-updown":
			for _, c := range s.sa.Children {
				evs = append(evs, Event{Kind: pick(up, ChildUp, ChildDown), IKE: ike, Child: c})
			}
		case "child-rekey":
			for _, r := range s.rekeyed {
				evs = append(evs, Event{Kind: ChildRekeyed, IKE: ike, Child: r.fresh, Old: r.old})
			}
		default:
			return nil, fmt.Errorf("vici: event %q was not asked for", name)
		}
	}
	return evs, nil
}

func pick(up bool, yes, no Kind) Kind {
	if up {
		return yes
	}
	return no
}

// parseIKESAs reads the message of one list-sa event.
func parseIKESAs(m *govici.Message) ([]IKESA, error) {
	sections, err := parseSections(m)
	if err != nil {
		return nil, err
	}
	sas := make([]IKESA, 0, len(sections))
	for _, s := range sections {
		sas = append(sas, s.sa)
	}
	return sas, nil
}

// section is one IKE_SA of a message, with the old and new children of a
// child-rekey event.
type section struct {
	sa      IKESA
	rekeyed []struct{ old, fresh ChildSA }
}

func parseSections(m *govici.Message) ([]section, error) {
	var out []section
	for _, name := range m.Keys() {
		body, ok := m.Get(name).(*govici.Message)
		if !ok {
			continue
		}
		s, err := parseSection(name, body)
		if err != nil {
			return nil, fmt.Errorf("IKE_SA %q: %w", name, err)
		}
		out = append(out, s)
	}
	return out, nil
}

func parseSection(name string, m *govici.Message) (section, error) {
	f := fields{m: m}
	s := section{sa: IKESA{
		Conn:        name,
		UniqueID:    uint32(f.uint("uniqueid", 10, 32)),
		State:       text(m, "state"),
		Initiator:   text(m, "initiator") == "yes",
		LocalHost:   text(m, "local-host"),
		LocalPort:   uint16(f.uint("local-port", 10, 16)),
		RemotePort:  uint16(f.uint("remote-port", 10, 16)),
		RemoteHost:  text(m, "remote-host"),
		RemoteID:    text(m, "remote-id"),
		Established: f.seconds("established"),
	}}
	for _, queue := range []string{"tasks-queued", "tasks-active", "tasks-passive"} {
		s.sa.Creating = s.sa.Creating || slices.Contains(list(m, queue), "CHILD_CREATE")
	}
	if f.err != nil {
		return section{}, f.err
	}
	children, _ := m.Get("child-sas").(*govici.Message)
	if children == nil {
		return s, nil
	}
	for _, key := range children.Keys() {
		body, ok := children.Get(key).(*govici.Message)
		if !ok {
			continue
		}
		old, _ := body.Get("old").(*govici.Message)
		fresh, _ := body.Get("new").(*govici.Message)
		if old != nil && fresh != nil {
			o, err := parseChild(key, old)
			if err != nil {
				return section{}, err
			}
			n, err := parseChild(key, fresh)
			if err != nil {
				return section{}, err
			}
			s.rekeyed = append(s.rekeyed, struct{ old, fresh ChildSA }{o, n})
			continue
		}
		c, err := parseChild(key, body)
		if err != nil {
			return section{}, err
		}
		s.sa.Children = append(s.sa.Children, c)
	}
	return s, nil
}

func parseChild(key string, m *govici.Message) (ChildSA, error) {
	f := fields{m: m}
	c := ChildSA{
		Name:      text(m, "name"),
		UniqueID:  uint32(f.uint("uniqueid", 10, 32)),
		State:     text(m, "state"),
		SPIIn:     uint32(f.uint("spi-in", 16, 32)),
		SPIOut:    uint32(f.uint("spi-out", 16, 32)),
		Protocol:  text(m, "protocol"),
		BytesIn:   f.uint("bytes-in", 10, 64),
		BytesOut:  f.uint("bytes-out", 10, 64),
		Installed: f.seconds("install-time"),
	}
	if c.Name == "" {
		c.Name = key
	}
	if f.err != nil {
		return ChildSA{}, fmt.Errorf("CHILD_SA %q: %w", key, f.err)
	}
	return c, nil
}

// fields reads numbers and keeps the first error. An absent field is zero.
type fields struct {
	m   *govici.Message
	err error
}

func (f *fields) uint(key string, base, bits int) uint64 {
	s := text(f.m, key)
	if s == "" {
		return 0
	}
	n, err := strconv.ParseUint(s, base, bits)
	if err != nil && f.err == nil {
		f.err = fmt.Errorf("field %s: %q is not a number of %d bits", key, s, bits)
	}
	return n
}

func (f *fields) seconds(key string) time.Duration {
	n := f.uint(key, 10, 33) // 272 years: fits a Duration
	return time.Duration(n) * time.Second
}

// message makes a flat message of key, value pairs.
func message(kv ...string) *govici.Message {
	m := govici.NewMessage()
	for i := 0; i+1 < len(kv); i += 2 {
		_ = m.Set(kv[i], kv[i+1]) // fails only for unsupported types
	}
	return m
}

func text(m *govici.Message, key string) string {
	s, _ := m.Get(key).(string)
	return s
}

func list(m *govici.Message, key string) []string {
	l, _ := m.Get(key).([]string)
	return l
}

func number(m *govici.Message, key string) int {
	n, _ := strconv.Atoi(text(m, key))
	return n
}
