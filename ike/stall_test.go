package ike

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici/vicitest"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

var ours = sad.Owner{Connection: "link", KeyID: key.ID{1}, Mix: sad.MixHybrid}

// upSite is a site with a tunnel, whose stalls come due at once.
func upSite(t *testing.T) *site {
	t.Helper()
	s := newSite(t, nil)
	s.Manager.t.stall, s.Manager.t.halfway = 10*time.Millisecond, time.Hour
	s.connects(ours)
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	return s
}

// children replaces those of the tunnel; what has SPIs goes into the SAD.
func (s *site) children(list ...vicitest.Child) {
	s.t.Helper()
	for _, ch := range list {
		s.sad.put(ch.SPIIn, ch.SPIOut, ours)
	}
	s.charon.Lock()
	s.charon.IKEs[0].Children = list
	s.charon.Unlock()
}

func (s *site) asked(id string) bool {
	return slices.ContainsFunc(s.charon.Calls("rekey"), func(c vicitest.Call) bool { return c.Message.Text("child-id") == id })
}

// No policy leads into a CHILD_SA any more: it is rekeyed, which is told once, and
// again until that has helped; explain says so meanwhile.
func TestStall(t *testing.T) {
	s := upSite(t)
	s.sad.lose(0xcf000001)
	eventually(t, "rekeyed", func() bool { return s.asked("101") })
	eventually(t, "stalled", s.is("link", StateStalled))
	if text, err := s.Explain("link"); err != nil || !strings.Contains(text, "Why: nothing leads into child net (SPIs c0000001 in, cf000001 out)") || !strings.Contains(text, "link is stalled") {
		t.Errorf("%s, %v", text, err)
	}
	if n := s.events.count(EventStalled); n != 1 {
		t.Errorf("%d events", n)
	}

	// The next one has its policy.
	s.children(vicitest.Child{Name: "net", ID: 102, State: "INSTALLED", SPIIn: 0xc0000002, SPIOut: 0xcf000002})
	s.charon.Emit("child-updown", s.charon.IKEs[0].Up())
	eventually(t, "up again", s.is("link", StateUp))
	eventually(t, "told", func() bool { return s.events.count(EventStalled) == 2 })
	if n := len(s.charon.Calls("rekey")); n != 1 {
		t.Errorf("%d rekeyings", n)
	}
	if e := s.events.last(EventStalled); e.Severity != Run || !strings.Contains(e.Text, "sends again") {
		t.Errorf("%+v", e)
	}
}

// Each rekeying in vain puts the next one off.
func TestStallRepeats(t *testing.T) {
	s := upSite(t)
	s.sad.lose(0xcf000001)
	eventually(t, "rekeyed", func() bool { return s.asked("101") })
	var waits []time.Duration
	for range 7 {
		s.Manager.mu.Lock()
		st := s.Manager.stalled[childName{"link", "net"}]
		waits = append(waits, time.Until(st.at).Round(time.Second))
		st.at = time.Now()
		n := st.tries
		s.Manager.mu.Unlock()
		eventually(t, "again", func() bool {
			s.Manager.mu.Lock()
			defer s.Manager.mu.Unlock()
			return st.tries == n+1
		})
	}
	if waits[0] < 4*time.Second || waits[1] < 9*time.Second || waits[6] < 55*time.Second || waits[6] > stallMax {
		t.Errorf("%v", waits)
	}
	if n := s.events.count(EventStalled); n != 1 {
		t.Errorf("%d events", n)
	}
}

// What is no stall: the peer's DELETE is still to come, another CHILD_SA of the child
// is in use, a rekeying is on its way.
func TestNoStall(t *testing.T) {
	old := vicitest.Child{Name: "net", ID: 101, State: "REKEYED", SPIIn: 0xc0000001, SPIOut: 0xcf000001}
	fresh := vicitest.Child{Name: "net", ID: 102, State: "INSTALLED", SPIIn: 0xc0000002, SPIOut: 0xcf000002}
	used, rekeying := old, fresh
	used.State, rekeying.State = "INSTALLED", "REKEYING"
	for name, children := range map[string][]vicitest.Child{
		"rekeyed by the peer": {old, fresh}, "two": {used, fresh}, "being rekeyed": {rekeying},
	} {
		t.Run(name, func(t *testing.T) {
			s := upSite(t)
			s.sad.lose(fresh.SPIOut)
			s.children(children...)
			s.Refresh(t.Context())
			time.Sleep(100 * time.Millisecond)
			s.Refresh(t.Context())
			if n := len(s.charon.Calls("rekey")) + s.events.count(EventStalled); n != 0 || s.state("link").State != StateUp {
				t.Errorf("%d rekeyings and events, state %+v", n, s.state("link"))
			}
		})
	}
}

// The peer never deletes what it has rekeyed, as when it lost the collision with a
// rekeying of ours that was refused here: charon would keep both until the old one
// ends.
func TestStallHalfway(t *testing.T) {
	s := upSite(t)
	s.Manager.mu.Lock()
	s.Manager.t.halfway = 50 * time.Millisecond
	s.Manager.mu.Unlock()
	s.sad.lose(0xcf000002)
	s.children(
		vicitest.Child{Name: "net", ID: 101, State: "REKEYED", SPIIn: 0xc0000001, SPIOut: 0xcf000001},
		vicitest.Child{Name: "net", ID: 102, State: "INSTALLED", SPIIn: 0xc0000002, SPIOut: 0xcf000002})
	s.Refresh(t.Context())
	eventually(t, "the new one is rekeyed", func() bool { return s.asked("102") })
	if e := s.events.last(EventStalled); !strings.Contains(e.Text, "by halves") {
		t.Errorf("%+v", e)
	}
}

// The peer deletes what it has rekeyed, which no event tells, and later the policies of
// the new one are lost: there is no reason to wait any more.
func TestStallAfterRekeying(t *testing.T) {
	s := upSite(t)
	fresh := vicitest.Child{Name: "net", ID: 102, State: "INSTALLED", SPIIn: 0xc0000002, SPIOut: 0xcf000002}
	s.sad.lose(fresh.SPIOut)
	s.children(vicitest.Child{Name: "net", ID: 101, State: "REKEYED", SPIIn: 0xc0000001, SPIOut: 0xcf000001}, fresh)
	s.Refresh(t.Context())
	s.children(fresh)
	s.Refresh(t.Context())
	eventually(t, "rekeyed", func() bool { return s.asked("102") })
	if e := s.events.last(EventStalled); !strings.Contains(e.Text, "nothing leads into") {
		t.Errorf("%+v", e)
	}
}
