package ike

import (
	"crypto/rand"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/ike/vici"
	"github.com/q-ipsec/q-ipsec/ike/vici/vicitest"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// The whole life of a connection, from an absent plugin to an orderly stop.
func TestManagerLife(t *testing.T) {
	s := newSite(t, nil)
	id := key.ID{1}
	s.connects(sad.Owner{Connection: "link", KeyID: id, Mix: sad.MixHybrid})
	s.run()
	eventually(t, "blocked without hello", func() bool { return s.events.count(EventPlugin) == 1 && s.state("link").State == StateBlocked })
	if s.loaded("link") {
		t.Error("a required connection was loaded without the plugin")
	}
	if st := s.state("link"); !strings.Contains(st.Cause, "said hello") {
		t.Errorf("%+v", st)
	}
	s.hello("5.9.8")
	eventually(t, "up", s.is("link", StateUp))
	st := s.state("link")
	if len(st.Children) != 1 || st.Children[0].KeyID != id || st.Children[0].SPIIn != 0xc0000001 || st.Children[0].FingerprintIn != "f" || st.Since.IsZero() {
		t.Errorf("%+v", st)
	}
	conn := s.charon.Conns["link"]
	for path, want := range map[string]string{
		"local id": "a.example", "remote id": "b.example", "local auth": "pubkey", "unique": "", "dpd_delay": "0", "rekey_time": "14400",
		"children net rekey_time": "2880", "children net life_time": "3600", "children net start_action": "none", "children net mode": "tunnel",
	} {
		if got := conn.Text(strings.Fields(path)...); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	if got := conn.Items("children", "net", "remote_ts"); !slices.Equal(got, []string{"10.2.0.0/24"}) {
		t.Errorf("remote_ts %v", got)
	}
	if got := conn.Items("local", "certs"); !slices.Equal(got, []string{"the cert"}) {
		t.Errorf("certs %v", got)
	}
	if got := conn.Items("remote", "cacerts"); !slices.Equal(got, []string{"the ca"}) {
		t.Errorf("cacerts %v", got)
	}
	if got := conn.Items("children", "net", "esp_proposals"); !slices.Equal(got, defaultESPProposals) {
		t.Errorf("esp_proposals %v", got)
	}
	s.stop()
	s.charon.Lock()
	defer s.charon.Unlock()
	if len(s.charon.Conns)+len(s.charon.IKEs)+len(s.charon.Keys) != 0 {
		t.Errorf("left in charon: %v, %v, %v", s.charon.Conns, s.charon.IKEs, s.charon.Keys)
	}
	if n := strings.Count(s.log.String(), `msg="tunnel command"`); n < 1 {
		t.Error("no tunnel command in the log")
	}
	if strings.Contains(s.log.String(), "the key") {
		t.Error("the private key is in the log")
	}
}

// What is not required does not wait for the plugin.
func TestManagerPolicies(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		opt, off := c[0], c[0]
		opt.Name, opt.Policy, off.Name, off.Policy = "opt", Optional, "off", Off
		return append(c, opt, off)
	})
	s.charon.Plugins = []string{"vici"}
	s.run()
	eventually(t, "optional and off loaded", func() bool { return s.loaded("opt") && s.loaded("off") })
	eventually(t, "required blocked", func() bool {
		return strings.Contains(s.state("link").Cause, "has not loaded the qipsec plugin")
	})
	s.hello("5.9.8")
	if err := s.Initiate(t.Context(), "link"); err == nil || !strings.Contains(err.Error(), "has not loaded the qipsec plugin") {
		t.Errorf("%v", err)
	}
	if s.loaded("link") {
		t.Error("a required connection was loaded into a charon without the plugin")
	}
}

// A plugin built for another strongSwan blocks, also connections that ran; a
// charon with the right one frees them.
func TestManagerVersion(t *testing.T) {
	s := newSite(t, nil)
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	s.hello("6.0.1")
	eventually(t, "taken out", func() bool { return !s.loaded("link") })
	eventually(t, "terminated", func() bool {
		s.charon.Lock()
		defer s.charon.Unlock()
		return len(s.charon.IKEs) == 0
	})
	if _, err := s.broker.GetKey(t.Context(), plugin.GetKey{SA: plugin.SA{Instance: s.inst, UID: 1}, Connection: "link"}); err == nil || !strings.Contains(err.Error(), "rebuild the plugin") {
		t.Errorf("a plugin of another version got an answer: %v", err)
	}
	eventually(t, "explained", func() bool { // the view follows
		text, err := s.Explain("link")
		return err == nil && strings.Contains(text, "blocked") && strings.Contains(text, "6.0.1")
	})
	s.hello("5.9.8")
	eventually(t, "up again", s.is("link", StateUp))
}

// A required connection that charon is told to key by itself is not loaded, and
// what an earlier run left of it is taken out.
func TestManagerBypassed(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		other := c[0]
		other.Name = "link2"
		return append(c, other)
	})
	_, _ = rand.Read(s.inst[:])
	h := plugin.Hello{Instance: s.inst, ABI: plugin.ABI, Version: "5.9.8", Off: "mgmt,  link"}
	if err := s.broker.Hello(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	s.run()
	eventually(t, "the other is loaded", func() bool { return s.loaded("link2") })
	eventually(t, "blocked", s.is("link", StateBlocked))
	eventually(t, "taken out", func() bool {
		return slices.ContainsFunc(s.charon.Calls("terminate"), func(c vicitest.Call) bool { return c.Message.Text("ike") == "link" })
	})
	if s.loaded("link") || !strings.Contains(s.state("link").Cause, "charon.plugins.qipsec.off") {
		t.Errorf("loaded: %v, status %+v", s.loaded("link"), s.state("link"))
	}
	if n := s.events.count(EventLoadFailed); n != 1 {
		t.Errorf("%d alarms", n)
	}
}

// charon dies and comes back: everything is loaded and initiated again, and
// what the dead one left in the SAD goes.
func TestManagerReconnect(t *testing.T) {
	s := newSite(t, nil)
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	s.charon.Stop()
	eventually(t, "no charon", s.is("link", StateNoCharon))
	eventually(t, "said, with the connection", func() bool {
		return strings.HasPrefix(s.events.last(EventCharon).Text, `connections "link": no charon: `)
	})
	if err := s.Initiate(t.Context(), "link"); err == nil || !strings.Contains(err.Error(), "no charon") {
		t.Errorf("%v", err)
	}
	s.broker.Gone(s.inst)
	s.charon.Listen()
	s.hello("5.9.8")
	eventually(t, "up again", s.is("link", StateUp))
	eventually(t, "old SAs gone", func() bool { return s.sad.count() == 2 })
	if n := s.events.count(EventCharon); n == 0 {
		t.Error("no event")
	}
}

// Told to leave the tunnels, a stop asks nothing of charon; the next start finds them
// up, and takes out what is not configured any more.
func TestManagerLeaves(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		other := c[0]
		other.Name, other.RemoteID = "other", "c.example"
		return append(c, other)
	})
	s.connects(sad.Owner{Connection: "link", KeyID: key.ID{1}, Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", func() bool { return s.is("link", StateUp)() && s.is("other", StateUp)() })
	var leave atomic.Bool
	s.Manager.o.Leave = leave.Load
	leave.Store(true)
	s.stop()
	if n := len(s.charon.Calls("terminate")) + len(s.charon.Calls("unload-conn")) + len(s.charon.Calls("unload-key")); n != 0 || len(s.charon.IKEs) != 2 {
		t.Errorf("%d commands to take out, left are %+v", n, s.charon.IKEs)
	}
	if n := s.events.count(EventDown); n != 0 {
		t.Errorf("%d times down", n)
	}

	// The next start has no connection "other"; the SAD's journal says whose it was.
	id := s.charon.IKEs[1].Children[0]
	s.sad.put(id.SPIIn, id.SPIOut, sad.Owner{Connection: "other", KeyID: key.ID{2}, Mix: sad.MixHybrid})
	o := s.Manager.o
	o.Connections = o.Connections[:1]
	next, err := NewManager(o)
	if err != nil {
		t.Fatal(err)
	}
	next.t, s.Manager = s.Manager.t, next
	initiated := len(s.charon.Calls("initiate"))
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	eventually(t, "taken out", func() bool {
		s.charon.Lock()
		defer s.charon.Unlock()
		return len(s.charon.IKEs) == 1 && len(s.charon.Conns) == 1
	})
	if n := len(s.charon.Calls("initiate")); n != initiated {
		t.Errorf("%d initiations", n-initiated)
	}
	leave.Store(false)
	s.stop()
	if n := len(s.charon.IKEs) + len(s.charon.Conns); n != 0 {
		t.Errorf("%d left by a stop for good", n)
	}
}

// Only the command session is gone: its events would go on telling of a charon that
// does nothing any more. One that ends is noticed at once, one that has no answer at
// the next comparison at the latest.
func TestManagerCommandSession(t *testing.T) {
	s := newSite(t, nil)
	s.Manager.t.call = 300 * time.Millisecond
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	s.charon.Cut()
	eventually(t, "noticed", func() bool { return s.events.count(EventCharon) == 3 }) // there, gone, there

	eventually(t, "up again", s.is("link", StateUp))

	s.charon.Lock()
	s.charon.Hang["version"] = true
	s.charon.Unlock()
	eventually(t, "no answer", func() bool {
		st := s.state("link")
		return st.State == StateNoCharon && strings.Contains(st.Cause, "version: charon has no answer")
	})
	s.charon.Lock()
	delete(s.charon.Hang, "version")
	s.charon.Unlock()
	eventually(t, "up once more", s.is("link", StateUp))
	if n := len(s.charon.Calls("initiate")); n != 1 {
		t.Errorf("%d initiations of a tunnel that was up all the time", n)
	}
}

// An orderly stop ends the SAs also where charon answers no command that does not
// wait.
func TestManagerStopsBesideAHungSession(t *testing.T) {
	s := newSite(t, nil)
	s.Manager.o.StopTimeout = time.Second
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	s.charon.Lock()
	s.charon.Hang["unload-conn"] = true
	s.charon.Unlock()
	s.stop()
	s.charon.Lock()
	defer s.charon.Unlock()
	if len(s.charon.IKEs) != 0 {
		t.Errorf("left in charon: %v", s.charon.IKEs)
	}
}

// A CHILD_SA of a required connection that qipsecd did not install is closed,
// wherever it comes from; others' and our own stay.
func TestManagerForeign(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		opt := c[0]
		opt.Name, opt.Policy = "opt", Optional
		opt.Children = []Child{{Name: "net"}}
		c[0].Children = []Child{{Name: "net"}}
		return append(c, opt)
	})
	s.Manager.o.Reconcile = time.Hour // only look works here
	s.hello("5.9.8")
	ours, foreign, half := ikeOf("link", "net", 1), ikeOf("link", "net", 2), ikeOf("link", "net", 3)
	rekeyed, weak := ikeOf("link", "net", 6), ikeOf("link", "net", 8)
	rekeyed.Children[0].State, weak.Children[0].State = "REKEYED", "REKEYED"
	s.run()
	eventually(t, "loaded", func() bool { return s.loaded("link") })
	s.seen()
	quantum := sad.Owner{Connection: "link", Mix: sad.MixHybrid}
	s.sad.put(0xc0000001, 0xcf000001, quantum)
	s.sad.put(0xc0000003, 0xcfffffff, quantum)
	s.sad.put(0xc0000007, 0xcf000007, sad.Owner{Connection: "link"}) // of a time when the policy was optional
	s.sad.put(0xc0000008, 0xcf000008, sad.Owner{Connection: "link"}) // likewise, and the peer is rekeying it
	s.charon.SetIKEs(ours, foreign, half, ikeOf("link", "net", 7), ikeOf("opt", "net", 4), ikeOf("theirs", "net", 5), rekeyed, weak)
	s.charon.Emit("child-updown", foreign.Up())
	eventually(t, "all four closed", func() bool { return s.events.count(EventForeignSA) >= 4 })
	eventually(t, "seen", func() bool { return len(s.state("link").Children) == 2 })
	closed := map[string]bool{}
	for _, c := range s.charon.Calls("terminate") {
		closed[c.Message.Text("child-id")] = true
	}
	if len(closed) != 4 || !closed["102"] || !closed["103"] || !closed["107"] || !closed["108"] {
		t.Errorf("terminated %v", closed)
	}
}

// The peer's rekeying made a successor here and gave it up: our CHILD_SA stays
// REKEYED in charon, carries on, and needs no second one beside it.
func TestManagerRekeyedCarries(t *testing.T) {
	s := newSite(t, nil)
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	initiated := len(s.charon.Calls("initiate"))
	s.charon.Lock()
	s.charon.IKEs[0].Children[0].State = "REKEYED"
	ike := s.charon.IKEs[0]
	s.charon.Unlock()
	s.charon.Emit("child-updown", ike.Up())
	eventually(t, "seen as rekeyed", func() bool {
		c := s.state("link").Children
		return len(c) == 1 && c[0].State == "REKEYED"
	})
	time.Sleep(3 * s.Manager.t.tick)
	if n := len(s.charon.Calls("initiate")); n != initiated || s.events.count(EventDown) != 0 || s.state("link").State != StateUp {
		t.Errorf("%d more initiations, %d times down, %v", n-initiated, s.events.count(EventDown), s.state("link").State)
	}
}

// charon tells nobody when a CHILD_SA that was replaced goes: who asks sees what is,
// and waits for no charon that does not answer.
func TestManagerRefresh(t *testing.T) {
	s := newSite(t, nil)
	s.Manager.o.Reconcile = time.Hour
	s.Refresh(t.Context()) // without a charon
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	s.charon.Lock()
	s.charon.IKEs[0].Children[0].State = "REKEYED"
	fresh := ikeOf("link", "net", 9).Children[0]
	s.charon.IKEs[0].Children = append(slices.Clone(s.charon.IKEs[0].Children), fresh)
	s.charon.Unlock()
	s.sad.put(fresh.SPIIn, fresh.SPIOut, sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	if s.Refresh(t.Context()); len(s.state("link").Children) != 2 {
		t.Errorf("%+v", s.state("link"))
	}
	s.charon.Lock()
	s.charon.IKEs[0].Children = []vicitest.Child{fresh}
	s.charon.Unlock()
	if s.Refresh(t.Context()); len(s.state("link").Children) != 1 {
		t.Errorf("a CHILD_SA that is gone is shown: %+v", s.state("link"))
	}
	s.charon.Lock()
	s.charon.Hang["list-sas"] = true
	s.charon.Unlock()
	began := time.Now()
	if s.Refresh(t.Context()); time.Since(began) > 2*refreshMost || len(s.state("link").Children) != 1 {
		t.Errorf("after %v: %+v", time.Since(began), s.state("link"))
	}
}

// Events without a pause must not keep the Manager from looking.
func TestManagerLooksAmongEvents(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		c[0].Children = []Child{{Name: "net"}}
		return c
	})
	s.Manager.o.Reconcile = time.Hour
	s.Manager.t.debounce = 200 * time.Millisecond
	s.hello("5.9.8")
	s.run()
	eventually(t, "loaded", func() bool { return s.loaded("link") })
	s.seen()
	other := ikeOf("theirs", "net", 5)
	s.charon.SetIKEs(ikeOf("link", "net", 1), other)
	eventually(t, "closed", func() bool {
		s.charon.Emit("child-updown", other.Up())
		return s.events.count(EventForeignSA) > 0
	})
}

// charon has a CHILD_SA whose SA the kernel lost.
func TestManagerMissing(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		c[0].Policy = Optional
		c[0].Children = []Child{{Name: "net"}}
		return c
	})
	s.run()
	eventually(t, "loaded", func() bool { return s.loaded("link") })
	rekeyed := ikeOf("link", "net", 3) // nobody else would end it: charon does not rekey it from here
	rekeyed.Children[0].State = "REKEYED"
	s.charon.SetIKEs(ikeOf("link", "net", 1), ikeOf("theirs", "net", 2), rekeyed)
	eventually(t, "closed", func() bool { return s.events.count(EventMissingSA) >= 2 })
	for _, c := range s.charon.Calls("terminate") {
		if id := c.Message.Text("child-id"); id != "101" && id != "103" {
			t.Errorf("terminated %q", id)
		}
	}
}

// What goes down comes up again, unless the operator took it down.
func TestManagerRestart(t *testing.T) {
	s := newSite(t, nil)
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	ike := ikeOf("link", "net", 1)
	s.charon.SetIKEs()
	s.charon.Emit("child-updown", ike.Up()[1:])
	eventually(t, "initiated again", func() bool { return len(s.charon.Calls("initiate")) >= 2 })
	eventually(t, "up again", s.is("link", StateUp))

	if err := s.Rekey(t.Context(), "link"); err != nil {
		t.Error(err)
	}
	if n := len(s.charon.Calls("rekey")); n != 1 {
		t.Errorf("%d rekeyings", n)
	}
	if err := s.Terminate(t.Context(), "link"); err != nil {
		t.Error(err)
	}
	eventually(t, "down", s.is("link", StateDown))
	if text, _ := s.Explain("link"); !strings.Contains(text, "operator took it down") {
		t.Error(text)
	}
	n := len(s.charon.Calls("initiate"))
	looks := len(s.charon.Calls("list-sas"))
	eventually(t, "more looks", func() bool { return len(s.charon.Calls("list-sas")) > looks+3 })
	if m := len(s.charon.Calls("initiate")); m != n {
		t.Errorf("%d initiations of what the operator took down", m-n)
	}
	if err := s.Rekey(t.Context(), "link"); err == nil {
		t.Error("rekeyed what is down")
	}
	if err := s.Initiate(t.Context(), "link"); err != nil {
		t.Error(err)
	}
	eventually(t, "up on command", s.is("link", StateUp))
	n = len(s.charon.Calls("initiate"))
	if err := s.Initiate(t.Context(), "link"); err != nil || len(s.charon.Calls("initiate")) != n {
		t.Errorf("initiated again what is up: %v", err)
	}
	for _, err := range []error{s.Initiate(t.Context(), "x"), s.Rekey(t.Context(), "x"), s.Terminate(t.Context(), "x")} {
		if err == nil || !strings.Contains(err.Error(), ErrUnknownConnection.Error()) {
			t.Errorf("%v", err)
		}
	}
}

// An attempt that charon is at is left alone; one that comes to nothing is
// repeated.
func TestManagerRetry(t *testing.T) {
	s := newSite(t, nil)
	s.hello("5.9.8")
	s.run()
	eventually(t, "three attempts", func() bool { return len(s.charon.Calls("initiate")) >= 3 })
	s.charon.SetIKEs(vicitest.IKE{Conn: "link", ID: 1, State: "CONNECTING", Local: addrA.String(), Remote: addrB.String()})
	eventually(t, "connecting", s.is("link", StateConnecting))
	n := len(s.charon.Calls("initiate"))
	looks := len(s.charon.Calls("list-sas"))
	eventually(t, "more looks", func() bool { return len(s.charon.Calls("list-sas")) > looks+3 })
	if m := len(s.charon.Calls("initiate")); m != n {
		t.Errorf("%d initiations beside a running one", m-n)
	}
}

// A connection that cannot be loaded says why, once, and is loaded when it can be.
func TestManagerLoadFault(t *testing.T) {
	s := newSite(t, func(s *site, c []Connection) []Connection {
		if err := os.Chmod(s.key, 0o640); err != nil {
			t.Fatal(err)
		}
		return c
	})
	s.hello("5.9.8")
	s.run()
	eventually(t, "blocked", func() bool { return strings.Contains(s.state("link").Cause, "chmod 0600") })
	ticks := len(s.charon.Calls("list-sas"))
	eventually(t, "more rounds", func() bool { return len(s.charon.Calls("list-sas")) > ticks+2 })
	if n := s.events.count(EventLoadFailed); n != 1 {
		t.Errorf("%d alarms", n)
	}
	if err := os.Chmod(s.key, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "loaded", func() bool { return s.loaded("link") })
}

func TestManagerMovedSA(t *testing.T) {
	s := newSite(t, nil)
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	other := ikeOf("link", "net", 2)
	other.Responder = true
	s.charon.Lock()
	s.charon.IKEs = append(s.charon.IKEs, other)
	s.charon.Unlock()
	s.sad.put(0xc0000002, 0xcf000002, sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.broker.rekeys <- sad.ID{SPI: 0xcf000002, Protocol: 50} // the peer began that IKE_SA, and asks
	s.broker.rekeys <- sad.ID{SPI: 0xcf000001, Protocol: 50}
	eventually(t, "rekeyed", func() bool { return len(s.charon.Calls("rekey")) == 1 })
	if id := s.charon.Calls("rekey")[0].Message.Text("child-id"); id != "101" {
		t.Errorf("child %q", id)
	}
	eventually(t, "the other one rekeyed, as the peer did not", func() bool { return len(s.charon.Calls("rekey")) == 2 })
	if id := s.charon.Calls("rekey")[1].Message.Text("child-id"); id != "102" {
		t.Errorf("child %q", id)
	}
}

func TestExplain(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		opt := c[0]
		opt.Name, opt.Policy = "opt", Optional
		off := c[0]
		off.Name, off.Policy = "off", Off
		c[0].Children = []Child{{Name: "net"}}
		return append(c, opt, off)
	})
	check := func(name string, want ...string) {
		t.Helper()
		text, err := s.Explain(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range append(want, "Why: ", "Next: ") {
			if !strings.Contains(text, w) {
				t.Errorf("%q is not in:\n%s", w, text)
			}
		}
	}
	if _, err := s.Explain("x"); err == nil {
		t.Error("an unknown connection was explained")
	}
	check("link", "no-charon", "start strongSwan")
	s.connects(sad.Owner{Mix: sad.MixClassical})
	s.hello("5.9.8")
	s.run()
	eventually(t, "fallback", s.is("opt", StateFallback))
	check("opt", "fallback", "no quantum key was usable", "no quantum key, since")
	if ch := s.state("opt").Children; len(ch) == 0 || ch[0].Class != "none" || ch[0].Mix != "classical" {
		t.Errorf("%+v", ch)
	}
	eventually(t, "off is up", s.is("off", StateUp))
	check("off", "policy is off")
	eventually(t, "down", s.is("link", StateDown))
	check("link", "nobody has started it")
	s.broker.refusal("BIND", "link", sad.ErrConfirmWrong)
	check("link", "key confirmation differs")
	ignored := plugin.Ignored{SA: plugin.SA{Instance: s.broker.hello.Instance, UID: 1}, Connection: "link", Peer: addrB}
	s.broker.Ignored(t.Context(), ignored)
	check("link", "the peer at 192.0.2.2 does not speak Q-IPsec (or the answer is forged)")
	now := []Child{{Name: "net", Start: StartNow}}
	for _, state := range []State{StateDown, StateConnecting} {
		n := s.broker.note("link")
		_, next := s.reason(Connection{Name: "link", Children: now}, Status{State: state, Cause: n.cause}, n)
		if !strings.Contains(next, "at 192.0.2.2, see whether qipsecd") {
			t.Errorf("%s: next: %s", state, next)
		}
	}
	s.broker.mu.Lock()
	for range 4 {
		s.broker.failed(s.broker.conns["link"], "no answer")
	}
	s.broker.mu.Unlock()
	check("link", "4 set-ups in a row", "no answer", "the next key is asked for in")
}

func TestNewManager(t *testing.T) {
	if _, err := NewManager(ManagerOptions{}); err == nil {
		t.Error("a manager without anything")
	}
	if s := Run.String() + Fault.String() + Alarm.String(); s != "runfaultalarm" {
		t.Error(s)
	}
}

// The installed charon loads a connection without the plugin's business, tries
// to reach the peer, and has nothing left after the stop; the required one waits.
func TestManagerRealCharon(t *testing.T) {
	socket := vicitest.Real(t)
	s := newSite(t, func(s *site, c []Connection) []Connection {
		cert, priv := vicitest.Credentials(t, "a.example")
		for path, data := range map[string][]byte{c[0].LocalCert: cert, c[0].RemoteCA: cert, c[0].LocalKey: priv} {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		off, trap := c[0], c[0]
		off.Name, off.Policy = "off", Off
		trap.Name, trap.Policy, trap.Unique = "trap", Optional, "replace"
		trap.Children = []Child{{Name: "net", Start: StartTrap}, {Name: "host", Transport: true}}
		return append(c, off, trap)
	})
	s.Manager.o.VICI = socket
	s.hello("5.9.8")
	s.run()
	eventually(t, "connecting", s.is("off", StateConnecting))
	eventually(t, "the other one loaded", s.is("trap", StateDown))
	if st := s.state("link"); st.State != StateBlocked || !strings.Contains(st.Cause, "has not loaded the qipsec plugin") {
		t.Errorf("%+v", st)
	}
	s.stop()
	c, err := vici.Dial(t.Context(), vici.Options{Socket: socket, Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	conns, err := c.Conns(t.Context())
	sas, err2 := c.SAs(t.Context())
	if err != nil || err2 != nil || len(conns)+len(sas) != 0 {
		t.Errorf("left in charon: %v, %+v, %v, %v", conns, sas, err, err2)
	}
	if n := s.events.count(EventLoadFailed); n != 0 {
		t.Errorf("%d connections not loaded:\n%s", n, s.log)
	}
}

// What the operator has set up, the owner loop does not set up as well: that would take
// a second key.
func TestManagerInitiatesOnce(t *testing.T) {
	s := newSite(t, nil)
	s.Manager.t.retryMin, s.Manager.t.retryMax = 10*time.Second, 10*time.Second
	s.connects(ours)
	s.hello("5.9.8")
	s.run()
	eventually(t, "up", s.is("link", StateUp))
	if err := s.Terminate(t.Context(), "link"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "down", s.is("link", StateDown))
	before := len(s.charon.Calls("initiate"))
	s.charon.Lock()
	connect := s.charon.OnInitiate
	s.charon.OnInitiate = func(conn, child string) {
		time.Sleep(200 * time.Millisecond) // in which it is not listed yet
		connect(conn, child)
	}
	s.charon.Unlock()
	if err := s.Initiate(t.Context(), "link"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "up again", s.is("link", StateUp))
	if n := len(s.charon.Calls("initiate")) - before; n != 1 {
		t.Errorf("%d initiations", n)
	}
}
