package vici

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	govici "github.com/strongswan/govici/vici"

	"github.com/q-ipsec/q-ipsec/ike/vici/vicitest"
)

func dial(t *testing.T) (*vicitest.Charon, *Client) {
	t.Helper()
	return dialWithin(t, 0)
}

// dialWithin is dial with another bound of each command.
func dialWithin(t *testing.T, timeout time.Duration) (*vicitest.Charon, *Client) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "vici")
	charon := vicitest.Start(t, socket)
	c, err := Dial(t.Context(), Options{Socket: socket, Timeout: timeout, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return charon, c
}

func TestDialWithoutCharon(t *testing.T) {
	_, err := Dial(t.Context(), Options{Socket: filepath.Join(t.TempDir(), "none"), Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "is it running") {
		t.Errorf("%v", err)
	}
}

func TestCommands(t *testing.T) {
	charon, c := dial(t)
	ctx := t.Context()
	if v, err := c.Version(ctx); v != "5.9.8" || err != nil {
		t.Errorf("version %q, %v", v, err)
	}
	if p, err := c.Plugins(ctx); !slices.Contains(p, "qipsec") || err != nil {
		t.Errorf("plugins %v, %v", p, err)
	}
	id, err := c.LoadKey(ctx, []byte("PEM"))
	if err != nil || charon.Keys[id] != "PEM" {
		t.Errorf("key %q, %v: %v", id, err, charon.Keys)
	}
	if err := c.UnloadKey(ctx, id); err != nil || len(charon.Keys) != 0 {
		t.Errorf("%v, %v", err, charon.Keys)
	}
	if err := c.Initiate(ctx, "link", "net", 0); err == nil || !strings.Contains(err.Error(), "CHILD_SA config not found") {
		t.Errorf("initiate of an unknown connection: %v", err)
	}
	charon.Fail["rekey"] = "busy"
	if _, err := c.Rekey(ctx, 7); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("%v", err)
	}
	delete(charon.Fail, "rekey")
	if n, err := c.Rekey(ctx, 7); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	calls := charon.Calls("rekey")
	if got := calls[len(calls)-1].Message.Text("child-id"); got != "7" {
		t.Errorf("child-id %q", got)
	}
	if _, err := c.call(ctx, "no-such-command", nil); err == nil {
		t.Error("an unknown command succeeded")
	}
	dead, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := c.Version(dead); err == nil {
		t.Error("a call with a dead context succeeded")
	}
	if v, err := c.Version(ctx); v != "5.9.8" || err != nil {
		t.Errorf("after a cancelled call: %q, %v", v, err)
	}
}

func TestInitiateAndTerminate(t *testing.T) {
	charon, c := dial(t)
	ctx := t.Context()
	if err := c.LoadConn(ctx, Conn{Name: "link", Children: []Child{{Name: "net"}}}); err != nil {
		t.Fatal(err)
	}
	if names, err := c.Conns(ctx); err != nil || !slices.Equal(names, []string{"link"}) {
		t.Errorf("%v, %v", names, err)
	}
	if err := c.Initiate(ctx, "link", "net", 0); err != nil {
		t.Error(err)
	}
	if err := c.Initiate(ctx, "link", "net", 1500*time.Millisecond); err != nil {
		t.Error(err)
	}
	var waits []string
	for _, call := range charon.Calls("initiate") {
		waits = append(waits, call.Message.Text("ike")+"/"+call.Message.Text("child")+" "+call.Message.Text("timeout"))
	}
	if !slices.Equal(waits, []string{"link/net -1", "link/net 1500"}) {
		t.Errorf("%v", waits)
	}
	charon.SetIKEs(tunnel(1), tunnel(2))
	if err := c.TerminateChild(ctx, 102, 0); err != nil {
		t.Error(err)
	}
	if err := c.TerminateConn(ctx, "link", time.Second); err != nil {
		t.Error(err)
	}
	if err := c.TerminateConn(ctx, "link", 0); err == nil || !strings.Contains(err.Error(), "no matching SAs") {
		t.Errorf("%v", err)
	}
	last := charon.Calls("terminate")[1].Message
	if last.Text("force") != "yes" || last.Text("timeout") != "1000" {
		t.Errorf("%+v", last)
	}
	if err := c.UnloadConn(ctx, "link"); err != nil {
		t.Error(err)
	}
	if err := c.UnloadConn(ctx, "link"); err == nil {
		t.Error("unloaded twice")
	}
}

func TestLoadConn(t *testing.T) {
	charon, c := dial(t)
	err := c.LoadConn(t.Context(), Conn{
		Name: "link", LocalAddrs: []string{"192.0.2.1"}, RemoteAddrs: []string{"192.0.2.2", "2001:db8::2"},
		Proposals: []string{"p1", "p2"}, Unique: "replace", RekeyTime: time.Hour, ReauthTime: 2 * time.Hour, DPDDelay: 30 * time.Second, MOBIKE: true,
		Local:  Auth{ID: "a.example", Certs: [][]byte{[]byte("\x30\x82cert")}},
		Remote: Auth{ID: "b.example", CACerts: [][]byte{[]byte("ca")}},
		Children: []Child{
			{Name: "z", LocalTS: []string{"10.1.0.0/24"}, RemoteTS: []string{"10.2.0.0/24"}, Proposals: []string{"e1"}, Mode: "tunnel", RekeyTime: 10 * time.Minute, LifeTime: time.Hour, ReplayWindow: 64},
			{Name: "a", Mode: "transport", Trap: true, RekeyBytes: 50, LifeBytes: 90},
			{
				Name: "m", Mode: "tunnel", RekeyPackets: 700, LifePackets: 900, ReplayWindow: 4096,
				MarkIn: "0x1/0xff", MarkOut: "0x2/0xff", SetMarkIn: "0x3/0xffffffff", SetMarkOut: "0x0/0xf0",
				IfIDIn: 7, IfIDOut: 0xfffffffd, NoCopyDF: true, NoCopyECN: true, CopyDSCP: "in",
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := vicitest.Message{
		vicitest.V("version", "2"),
		vicitest.L("local_addrs", "192.0.2.1"),
		vicitest.L("remote_addrs", "192.0.2.2", "2001:db8::2"),
		vicitest.L("proposals", "p1", "p2"),
		vicitest.V("unique", "replace"),
		vicitest.V("rekey_time", "3600"),
		vicitest.V("reauth_time", "7200"),
		vicitest.V("dpd_delay", "30"),
		vicitest.V("encap", "no"),
		vicitest.V("mobike", "yes"),
		vicitest.S("local", vicitest.V("auth", "pubkey"), vicitest.V("id", "a.example"), vicitest.L("certs", "\x30\x82cert")),
		vicitest.S("remote", vicitest.V("auth", "pubkey"), vicitest.V("id", "b.example"), vicitest.L("cacerts", "ca")),
		vicitest.S(
			"children",
			vicitest.S("a", vicitest.V("mode", "transport"), vicitest.V("rekey_time", "0"), vicitest.V("rand_time", "0"),
				vicitest.V("rekey_bytes", "50"), vicitest.V("rand_bytes", "5"), vicitest.V("life_bytes", "90"), vicitest.V("rekey_packets", "0"), vicitest.V("rand_packets", "0"), vicitest.V("life_packets", "0"),
				vicitest.V("start_action", "trap"), vicitest.V("close_action", "none"), vicitest.V("dpd_action", "clear")),
			vicitest.S("m", vicitest.V("mode", "tunnel"), vicitest.V("rekey_time", "0"), vicitest.V("rand_time", "0"),
				vicitest.V("rekey_bytes", "0"), vicitest.V("rand_bytes", "0"), vicitest.V("life_bytes", "0"),
				vicitest.V("rekey_packets", "700"), vicitest.V("rand_packets", "70"), vicitest.V("life_packets", "900"),
				vicitest.V("start_action", "none"), vicitest.V("close_action", "none"), vicitest.V("dpd_action", "clear"), vicitest.V("replay_window", "4096"),
				vicitest.V("mark_in", "0x1/0xff"), vicitest.V("mark_out", "0x2/0xff"), vicitest.V("set_mark_in", "0x3/0xffffffff"), vicitest.V("set_mark_out", "0x0/0xf0"),
				vicitest.V("if_id_in", "7"), vicitest.V("if_id_out", "4294967293"),
				vicitest.V("copy_df", "no"), vicitest.V("copy_ecn", "no"), vicitest.V("copy_dscp", "in")),
			vicitest.S("z", vicitest.L("local_ts", "10.1.0.0/24"), vicitest.L("remote_ts", "10.2.0.0/24"), vicitest.L("esp_proposals", "e1"),
				vicitest.V("mode", "tunnel"), vicitest.V("rekey_time", "600"), vicitest.V("rand_time", "60"), vicitest.V("life_time", "3600"),
				vicitest.V("rekey_bytes", "0"), vicitest.V("rand_bytes", "0"), vicitest.V("life_bytes", "0"), vicitest.V("rekey_packets", "0"), vicitest.V("rand_packets", "0"), vicitest.V("life_packets", "0"),
				vicitest.V("start_action", "none"), vicitest.V("close_action", "none"), vicitest.V("dpd_action", "clear"), vicitest.V("replay_window", "64")),
		),
	}
	if got := charon.Conns["link"]; !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for _, bad := range []Conn{{Name: "x"}, {Children: []Child{{Name: "n"}}}, {Name: "x", Children: []Child{{Name: "n"}, {Name: "n"}}}} {
		if err := c.LoadConn(t.Context(), bad); err == nil {
			t.Errorf("%+v was loaded", bad)
		}
	}
}

// tunnel is an IKE_SA with one child.
func tunnel(id uint32) vicitest.IKE {
	return vicitest.IKE{
		Conn: "link", ID: id, State: "ESTABLISHED", Local: "192.0.2.1", Remote: "192.0.2.2",
		Children: []vicitest.Child{{Name: "net", ID: 100 + id, State: "INSTALLED", SPIIn: 0xc0000000 + id, SPIOut: 0xcf000000 + id}},
	}
}

func TestSAs(t *testing.T) {
	charon, c := dial(t)
	busy := tunnel(7)
	busy.Queued = []string{"IKE_DPD", "CHILD_CREATE"}
	charon.SetIKEs(busy)
	if sas, err := c.SAs(t.Context()); err != nil || len(sas) != 1 || !sas[0].Creating {
		t.Errorf("a queued CHILD_SA: %+v, %v", sas, err)
	}
	busy.Queued = []string{"CHILD_REKEY"}
	charon.SetIKEs(busy)
	sas, err := c.SAs(t.Context())
	want := []IKESA{{
		Conn: "link", UniqueID: 7, State: "ESTABLISHED", Initiator: true, LocalHost: "192.0.2.1", RemoteHost: "192.0.2.2", Established: 3 * time.Second,
		Children: []ChildSA{{
			Name: "net", UniqueID: 107, State: "INSTALLED", SPIIn: 0xc0000007, SPIOut: 0xcf000007, Protocol: "ESP",
			BytesIn: 10, BytesOut: 20, Installed: 2 * time.Second,
		}},
	}}
	if err != nil || !reflect.DeepEqual(sas, want) {
		t.Errorf("got %+v, %v\nwant %+v", sas, err, want)
	}
	// More than a streaming call of govici holds.
	var many []vicitest.IKE
	for i := range uint32(3000) {
		many = append(many, tunnel(i))
	}
	charon.SetIKEs(many...)
	for range 3 {
		if sas, err := c.SAs(t.Context()); err != nil || len(sas) != 3000 {
			t.Fatalf("%d SAs, %v", len(sas), err)
		}
	}
	charon.Lock()
	charon.Fail["list-sas"] = "no"
	charon.Unlock()
	if _, err := c.SAs(t.Context()); err == nil {
		t.Error("a failed listing gave a list")
	}
	charon.Lock()
	delete(charon.Fail, "list-sas")
	charon.IKEs = many[:1]
	charon.Unlock()
	if sas, err := c.SAs(t.Context()); err != nil || len(sas) != 1 {
		t.Errorf("after a failure: %d SAs, %v", len(sas), err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if sas, err := c.SAs(t.Context()); err != nil || len(sas) != 1 {
				t.Errorf("at the same time: %d SAs, %v", len(sas), err)
			}
		})
	}
	all.Wait()
	for range listBuffer {
		many = append(many, tunnel(1))
	}
	charon.SetIKEs(many...)
	if _, err := c.SAs(t.Context()); err == nil || !strings.Contains(err.Error(), ErrTruncated.Error()) {
		t.Errorf("a list that does not fit: %v", err)
	}
	c.Close()
	if _, err := c.SAs(t.Context()); err == nil {
		t.Error("a closed client gave a list")
	}
}

func receive(t *testing.T, c *Client) (Event, bool) {
	t.Helper()
	select {
	case e, ok := <-c.Events():
		return e, ok
	case <-time.After(10 * time.Second):
		t.Fatal("no event")
		return Event{}, false
	}
}

func TestEvents(t *testing.T) {
	charon, c := dial(t)
	charon.Emit("ike-updown", tunnel(1).Up())
	charon.Emit("child-updown", tunnel(1).Up())
	bad := tunnel(2)
	charon.Emit("child-updown", vicitest.Message{vicitest.S("link", vicitest.V("uniqueid", "many"))})
	charon.Emit("child-updown", bad.Up()[1:]) // down
	old, fresh := tunnel(3).Children[0], tunnel(4).Children[0]
	charon.Emit("child-rekey", vicitest.Message{vicitest.S("link", vicitest.V("uniqueid", "1"),
		vicitest.S("child-sas", vicitest.S("net", vicitest.S("old", vicitest.V("spi-in", fmt.Sprintf("%x", old.SPIIn))),
			vicitest.S("new", vicitest.V("spi-in", fmt.Sprintf("%x", fresh.SPIIn))))))})
	var kinds []Kind
	var spis []uint32
	for len(kinds) < 4 {
		e, ok := receive(t, c)
		if !ok {
			t.Fatal("events ended")
		}
		if e.IKE.Conn != "link" || e.IKE.Children != nil {
			t.Errorf("%+v", e.IKE)
		}
		kinds = append(kinds, e.Kind)
		spis = append(spis, e.Child.SPIIn, e.Old.SPIIn)
	}
	if !slices.Equal(kinds, []Kind{IKEUp, ChildUp, ChildDown, ChildRekeyed}) {
		t.Errorf("kinds %v", kinds)
	}
	if want := []uint32{0, 0, 0xc0000001, 0, 0xc0000002, 0, 0xc0000004, 0xc0000003}; !slices.Equal(spis, want) {
		t.Errorf("SPIs %x, want %x", spis, want)
	}
	charon.Stop()
	if e, ok := receive(t, c); ok {
		t.Errorf("%+v after charon's end", e)
	}
	if _, err := c.Version(t.Context()); err == nil {
		t.Error("a call to a dead charon succeeded")
	}
}

// A command session that ends, or does not answer a command in time, ends the
// whole Client with that cause; a caller who waits no longer does not.
func TestCommandSession(t *testing.T) {
	charon, c := dial(t)
	charon.Cut()
	if e, ok := receive(t, c); ok {
		t.Errorf("%+v", e)
	}
	if err := c.Err(); err == nil || !strings.Contains(err.Error(), "command session") {
		t.Errorf("cause %v", err)
	}

	charon, c = dialWithin(t, 50*time.Millisecond)
	charon.Lock()
	charon.Hang["initiate"] = true
	charon.Unlock()
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := c.Initiate(short, "link", "net", 0); err == nil {
		t.Error("a call without an answer succeeded")
	}
	if err := c.Err(); err != nil {
		t.Errorf("after a call whose caller waited no longer: %v", err)
	}
	if err := c.Initiate(t.Context(), "link", "net", 0); err == nil {
		t.Error("a call without an answer succeeded")
	}
	if e, ok := receive(t, c); ok {
		t.Errorf("%+v", e)
	}
	if err := c.Err(); err == nil || !strings.Contains(err.Error(), "initiate") {
		t.Errorf("cause %v", err)
	}
	if _, err := c.Version(t.Context()); err == nil {
		t.Error("a call succeeded after that")
	}
}

// A length prefix above VICI's limit ends the session before anything is
// allocated for it.
func TestOversizedPacket(t *testing.T) {
	charon, c := dial(t)
	charon.Header(1 << 31)
	if e, ok := receive(t, c); ok {
		t.Errorf("%+v", e)
	}
	// So does a message that cannot be decoded.
	charon, c = dial(t)
	charon.EmitRaw("child-updown", []byte{3, 2, 'u'})
	if e, ok := receive(t, c); ok {
		t.Errorf("%+v", e)
	}
}

func TestFramed(t *testing.T) {
	good := append([]byte{0, 0, 0, 3, 1, 2, 3, 0, 0, 0, 0}, 0, 8, 0, 0)
	for cut := range good {
		f := &framed{}
		if err := f.scan(good[:cut]); err != nil {
			t.Fatal(err)
		}
		if err := f.scan(good[cut:]); err != nil || f.body != maxPacket {
			t.Errorf("cut at %d: %v, %d", cut, err, f.body)
		}
		if err := f.scan(bytes.Repeat([]byte{1}, maxPacket)); err != nil {
			t.Error(err)
		}
		if err := f.scan([]byte{0, 8, 0, 1}); err == nil {
			t.Error("a packet of one byte too many was taken")
		}
	}
}

// build turns a test's message into govici's.
func build(m vicitest.Message) *govici.Message {
	g := govici.NewMessage()
	for _, e := range m {
		switch {
		case e.Section != nil:
			_ = g.Set(e.Key, build(e.Section))
		case e.List != nil:
			_ = g.Set(e.Key, e.List)
		default:
			_ = g.Set(e.Key, e.Value)
		}
	}
	return g
}

func FuzzParseEvent(f *testing.F) {
	f.Add("child-updown", []byte("\x03\x02up\x00\x03yes\x01\x04link\x03\x08uniqueid\x00\x011\x01\x09child-sas\x01\x03n-1\x03\x06spi-in\x00\x08c0000001\x02\x02\x02"))
	f.Add("child-rekey", []byte("\x01\x04link\x01\x09child-sas\x01\x01n\x01\x03old\x02\x01\x03new\x02\x02\x02\x02"))
	f.Add("ike-updown", []byte("\x01\x01x\x02"))
	f.Add("list-sa", []byte("\x04\x01x\x05\x00\x01y\x06"))
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		m, err := vicitest.Decode(b)
		if err != nil {
			return
		}
		g := build(m)
		if evs, err := parseEvent(name, g); err != nil && evs != nil {
			t.Error("events beside an error")
		}
		sas, err := parseIKESAs(g)
		if err == nil && len(sas) > len(m) {
			t.Errorf("%d IKE_SAs of %d sections", len(sas), len(m))
		}
	})
}
