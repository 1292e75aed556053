package vici

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici/vicitest"
)

// everySuite is one child with every field for each suite of sad/xfrm, with and
// without ESN, in the words of the configuration.
func everySuite() []Child {
	var all []Child
	for _, suite := range []string{
		"aes128gcm16", "aes192gcm16", "aes256gcm16", "chacha20poly1305", "aes128-sha256", "aes192-sha256", "aes256-sha256",
		"aes128-sha384", "aes192-sha384", "aes256-sha384", "aes128-sha512", "aes192-sha512", "aes256-sha512",
	} {
		for _, esn := range []string{"esn", "noesn"} {
			all = append(all, Child{
				Name: suite + "-" + esn, LocalTS: []string{"2001:db8:1::/48"}, RemoteTS: []string{"2001:db8:2::/48"}, Proposals: []string{suite + "-x25519-" + esn},
				Mode: "tunnel", RekeyPackets: 700, LifePackets: 900, ReplayWindow: 4096, Trap: true,
				MarkIn: "0x1/0xff", MarkOut: "0x2/0xff", SetMarkIn: "0x3/0xffffffff", SetMarkOut: "0x0/0xf0",
				IfIDIn: 7, IfIDOut: 0xfffffffd, NoCopyDF: true, NoCopyECN: true, CopyDSCP: "in",
			})
		}
	}
	return all
}

// The installed charon takes every field of every message.
func TestRealCharon(t *testing.T) {
	socket := vicitest.Real(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := Dial(ctx, Options{Socket: socket, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if v, err := c.Version(ctx); err != nil || !strings.Contains(v, ".") {
		t.Errorf("version %q, %v", v, err)
	}
	if p, err := c.Plugins(ctx); err != nil || !slices.Contains(p, "vici") {
		t.Errorf("plugins %v, %v", p, err)
	}
	cert, priv := vicitest.Credentials(t, "a.example")
	id, err := c.LoadKey(ctx, priv)
	if err != nil || len(id) != 40 {
		t.Errorf("key %q, %v", id, err)
	}
	conn := Conn{
		Name: "link", LocalAddrs: []string{"192.0.2.1"}, RemoteAddrs: []string{"192.0.2.2"},
		Proposals: []string{"aes256gcm16-prfsha384-x25519", "aes256gcm16-prfsha384-ecp384"}, Unique: "replace",
		RekeyTime: time.Hour, ReauthTime: 2 * time.Hour, DPDDelay: 30 * time.Second, Encap: true, MOBIKE: true,
		Local:  Auth{ID: "a.example", Certs: [][]byte{cert}},
		Remote: Auth{ID: "b.example", Certs: [][]byte{cert}, CACerts: [][]byte{cert}},
		Children: []Child{{
			Name: "net", LocalTS: []string{"10.1.0.0/24"}, RemoteTS: []string{"10.2.0.0/24"}, Proposals: []string{"aes256gcm16-x25519", "aes256gcm16-ecp384"},
			Mode: "tunnel", RekeyTime: 10 * time.Minute, LifeTime: time.Hour, RekeyBytes: 1 << 30, RekeyPackets: 1 << 20, ReplayWindow: 64,
		}, {Name: "other", Mode: "transport"}},
	}
	conn.Children = append(conn.Children, everySuite()...)
	for range 2 { // again: replaced
		if err := c.LoadConn(ctx, conn); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := c.Conns(ctx); err != nil || !slices.Equal(names, []string{"link"}) {
		t.Errorf("connections %v, %v", names, err)
	}
	if sas, err := c.SAs(ctx); err != nil || len(sas) != 0 {
		t.Errorf("%v, %v", sas, err)
	}
	if err := c.Initiate(ctx, "link", "net", 0); err != nil {
		t.Errorf("queued initiation: %v", err)
	}
	var sas []IKESA
	for len(sas) == 0 {
		if sas, err = c.SAs(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if len(sas) != 1 || sas[0].Conn != "link" || sas[0].State != "CONNECTING" || sas[0].RemoteHost != "192.0.2.2" {
		t.Errorf("%+v", sas)
	}
	if err := c.Initiate(ctx, "link", "none", time.Second); err == nil {
		t.Error("an unknown child was initiated")
	}
	if n, err := c.Rekey(ctx, 99); err == nil && n != 0 {
		t.Errorf("%d SAs to rekey, %v", n, err)
	}
	if err := c.TerminateChild(ctx, 99, time.Second); err == nil {
		t.Error("an unknown CHILD_SA was terminated")
	}
	if err := c.UnloadConn(ctx, "link"); err != nil {
		t.Error(err)
	}
	if err := c.TerminateConn(ctx, "link", 500*time.Millisecond); err != nil {
		t.Error(err)
	}
	if sas, err := c.SAs(ctx); err != nil || len(sas) != 0 {
		t.Errorf("after terminate: %v, %v", sas, err)
	}
	if err := c.UnloadKey(ctx, id); err != nil {
		t.Error(err)
	}
	conn.Children[0].Proposals = []string{"nonsense"}
	if err := c.LoadConn(ctx, conn); err == nil {
		t.Error("a nonsense proposal was loaded")
	}
}
