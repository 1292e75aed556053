package ike

import (
	"slices"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/ike/vici/vicitest"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// told gives "severity code" of the events from the n-th on.
func (e *events) told(n int) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for _, ev := range e.list[n:] {
		out = append(out, ev.Severity.String()+" "+ev.Code)
	}
	return out
}

// telling does one thing after the other and wants exactly the events of each.
type telling struct {
	t *testing.T
	s *site
	n int
}

func (y *telling) after(what string, do func(), want ...string) {
	y.t.Helper()
	do()
	for range 2000 {
		if len(y.s.events.told(y.n)) >= len(want) {
			break
		}
		time.Sleep(5 * time.Millisecond)
		y.s.Refresh(y.t.Context())
	}
	// Two more looks: one event each, not one at each look.
	y.s.Refresh(y.t.Context())
	y.s.Refresh(y.t.Context())
	got := y.s.events.told(y.n)
	if !slices.Equal(got, want) {
		y.t.Fatalf("%s: events %q, want %q", what, got, want)
	}
	y.n += len(got)
}

// Every change of a tunnel's state is one event, with its severity and with what is
// done about it.
func TestEventsOfATunnel(t *testing.T) {
	s := newSite(t, nil)
	s.Manager.o.Reconcile = time.Hour
	id := key.ID{7}
	s.connects(sad.Owner{Connection: "link", KeyID: id, Mix: sad.MixHybrid})
	y := &telling{t: t, s: s}
	y.after("start without the plugin", s.run, "run ipsec-charon", "alarm ipsec-plugin")
	y.after("the plugin comes", func() { s.hello("5.9.8") }, "run ipsec-loaded", "run ipsec-up")
	y.after("a rekeying", func() {
		old := ikeOf("link", "net", 1)
		s.charon.Emit("child-rekey", vicitest.Message{vicitest.S("link", vicitest.V("uniqueid", "1"),
			vicitest.S("child-sas", vicitest.S("net", vicitest.S("old", vicitest.V("spi-in", "c0000001")), vicitest.S("new", vicitest.V("spi-in", "c0000002"))))), old.Up()[0]})
	}, "run ipsec-rekeyed")
	y.after("another address of the peer", func() {
		s.charon.Lock()
		s.charon.IKEs[0].RemotePort = 61234
		s.charon.Unlock()
	}, "run ipsec-moved")
	y.after("the operator has it rekeyed", func() {
		if err := s.Rekey(t.Context(), "link"); err != nil {
			t.Error(err)
		}
	}, "run ipsec-command")
	y.after("the operator takes it down", func() {
		if err := s.Terminate(t.Context(), "link"); err != nil {
			t.Error(err)
		}
	}, "run ipsec-command", "run ipsec-down")
	y.after("the operator sets it up", func() {
		if err := s.Initiate(t.Context(), "link"); err != nil {
			t.Error(err)
		}
	}, "run ipsec-command", "run ipsec-up")
	y.after("the peer closes it", func() {
		was := s.charon.IKEs[0]
		s.charon.SetIKEs()
		s.charon.Emit("child-updown", was.Up()[1:])
	}, "fault ipsec-down", "run ipsec-up")
	y.after("charon dies", func() { s.charon.Stop(); s.broker.Gone(s.inst) }, "fault ipsec-charon")
	y.after("charon comes back", func() {
		s.hello("5.9.8") // before, so that nothing is blocked meanwhile
		s.charon.Listen()
	}, "run ipsec-charon", "fault ipsec-down", "run ipsec-up")
	y.after("a plugin of another version", func() { s.hello("6.0.1") }, "alarm ipsec-plugin", "fault ipsec-down")
	y.after("the right one again", func() { s.hello("5.9.8") }, "run ipsec-loaded", "run ipsec-up")
	y.after("a refusal", func() {
		s.broker.refusal("BIND", "link", sad.ErrConfirmWrong)
	}, "fault ipsec-refused")
	y.after("a peer without Q-IPsec", func() {
		s.broker.Ignored(t.Context(), plugin.Ignored{SA: plugin.SA{Instance: s.inst, UID: 1}, Connection: "link", Peer: addrB})
	}, "fault ipsec-ignored")
	s.stop()
	if got := s.events.told(y.n); !slices.Equal(got, []string{"run ipsec-down"}) {
		t.Errorf("an orderly stop: %q", got)
	}
	for _, e := range s.events.list {
		if e.Action == "" || e.Text == "" || e.Connection != "link" && e.Code != EventCharon {
			t.Errorf("%+v", e)
		}
	}
}

// A fallback is one alarm for as long as it lasts, however often it is rekeyed, and
// its end one event.
func TestEventsOfAFallback(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		c[0].Policy = Optional
		return c
	})
	s.Manager.o.Reconcile = time.Hour
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixClassical})
	s.hello("5.9.8")
	replace := func(n uint32, owner *sad.Owner) func() {
		return func() {
			child := ikeOf("link", "net", n).Children[0]
			if owner != nil {
				s.sad.put(child.SPIIn, child.SPIOut, *owner)
			}
			s.charon.Lock()
			s.charon.IKEs[0].Children = []vicitest.Child{child}
			s.charon.Unlock()
		}
	}
	y := &telling{t: t, s: s}
	y.after("fallback", s.run, "run ipsec-charon", "run ipsec-up", "alarm ipsec-fallback")
	y.after("rekeyed, and no better", replace(2, &sad.Owner{Connection: "link", Mix: sad.MixClassical}))
	y.after("rekeyed with a key", replace(3, &sad.Owner{Connection: "link", KeyID: key.ID{1}, Mix: sad.MixHybrid}), "run ipsec-fallback")
	y.after("charon keys one without us", replace(4, nil), "alarm ipsec-fallback")
	y.after("down", func() {
		if err := s.Terminate(t.Context(), "link"); err != nil {
			t.Error(err)
		}
	}, "run ipsec-command", "run ipsec-down")
	if !s.broker.conns["link"].fell.IsZero() {
		t.Error("a connection that is down is on fallback")
	}
}

// The Broker raises the alarm with the CHILD_SA, without waiting for a look.
func TestEventOfAFallbackAtOnce(t *testing.T) {
	p := newPair(t, func(c *Connection) { c.Policy = Optional })
	p.kms.set(func(k *kms) { k.err = sad.ErrNotFound })
	for i := range uint32(3) {
		r := newTry(i+1, i+1)
		r.ni = random(32)
		for _, responder := range []bool{true, false} {
			e := p.a
			if responder {
				e = p.b
			}
			b, err := e.bind(r, responder, nil)
			if err == nil {
				err = b.both()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, e := range []*end{p.a, p.b} {
		if got := e.events.told(0); !slices.Equal(got, []string{"alarm ipsec-fallback"}) {
			t.Errorf("%s: %q", e.name, got)
		}
	}
}
