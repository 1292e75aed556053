package ike

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici"
	"github.com/q-ipsec/q-ipsec/sad"
)

// Whatever the limits, charon is told to rekey before the SA ends, at the
// configured time, and the hard limits are the connection's.
func TestChildLimits(t *testing.T) {
	const hour, min10 = time.Hour, 10 * time.Minute
	for name, c := range map[string]struct {
		conn                  Connection
		child                 Child
		rekey, life           time.Duration
		rekeyBytes, lifeBytes uint64
	}{
		"plain":         {Connection{}, Child{}, hour, 0, 0, 0},
		"age far above": {Connection{MaxKeyAge: hour}, Child{RekeyTime: min10}, min10, hour, 0, 0},
		"age below":     {Connection{MaxKeyAge: min10}, Child{RekeyTime: hour}, 8 * time.Minute, min10, 0, 0},
		"soft bytes":    {Connection{}, Child{RekeyBytes: 500}, hour, 0, 500, 0},
		"both bytes":    {Connection{MaxKeyBytes: 5000}, Child{RekeyBytes: 500}, hour, 0, 500, 5000},
		"hard bytes":    {Connection{MaxKeyBytes: 5000}, Child{}, hour, 0, 4000, 5000},
		"equal bytes":   {Connection{MaxKeyBytes: 5000}, Child{RekeyBytes: 5000}, hour, 0, 4000, 5000},
	} {
		v := viciChild(c.conn, c.child)
		if v.RekeyTime != c.rekey || v.LifeTime != c.life || v.RekeyBytes != c.rekeyBytes || v.LifeBytes != c.lifeBytes {
			t.Errorf("%s: %+v", name, v)
		}
		// Packets are limited as bytes are.
		c.conn.MaxKeyBytes, c.conn.MaxKeyPackets = 0, c.conn.MaxKeyBytes
		c.child.RekeyBytes, c.child.RekeyPackets = 0, c.child.RekeyBytes
		if v := viciChild(c.conn, c.child); v.RekeyPackets != c.rekeyBytes || v.LifePackets != c.lifeBytes || v.RekeyBytes != 0 || v.LifeBytes != 0 {
			t.Errorf("%s, in packets: %+v", name, v)
		}
	}
}

// What charon gets is that policy, not the configuration's word alone.
func TestLoadAppliesUnique(t *testing.T) {
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		second, keep, other := c[0], c[0], c[0]
		second.Name, keep.Name, keep.Unique = "second", "keep", "keep"
		other.Name, other.RemoteID = "other", "c.example"
		return append(c, second, keep, other)
	})
	s.hello("5.9.8")
	s.run()
	for name, want := range map[string]string{"link": "never", "second": "never", "keep": "keep", "other": ""} {
		eventually(t, name+" loaded", func() bool { return s.loaded(name) })
		s.charon.Lock()
		got := s.charon.Conns[name].Text("unique")
		s.charon.Unlock()
		if got != want {
			t.Errorf("%s: unique = %q, want %q", name, got, want)
		}
	}
}

// One IKE_SA's INITIAL_CONTACT must not end those of other connections between the
// same two identities.
func TestUnique(t *testing.T) {
	conn := func(name, local, remote, unique string) Connection {
		return Connection{Name: name, LocalID: local, RemoteID: remote, Unique: unique}
	}
	m := &Manager{o: ManagerOptions{Connections: []Connection{
		conn("alone", "a", "b", ""),
		conn("one", "a", "c", ""), conn("two", "@a", "c", ""), conn("set", "a", "c", "keep"),
		conn("reverse", "b", "a", ""),
	}}}
	for i, want := range []string{"", "never", "never", "keep", ""} {
		if c := m.o.Connections[i]; m.unique(c) != want {
			t.Errorf("%s: unique = %q, want %q", c.Name, m.unique(c), want)
		}
	}
}

// Every field of a Connection reaches charon in its own place.
func TestViciConn(t *testing.T) {
	dir := t.TempDir()
	c := Connection{
		Name: "link", LocalAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, RemoteAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.2")},
		LocalID: "a.example", RemoteID: "b.example",
		LocalCert: filepath.Join(dir, "cert"), RemoteCA: filepath.Join(dir, "ca"), RemoteCert: filepath.Join(dir, "peer"),
		Proposals: []string{"p"}, Unique: "keep", IKERekeyTime: time.Hour, ReauthTime: 2 * time.Hour, DPDDelay: 9 * time.Second, Encap: true, MOBIKE: true,
		MaxKeyAge: 10 * time.Minute, MaxKeyBytes: 5000, MaxKeyPackets: 500,
		Children: []Child{{
			Name: "net", LocalTS: []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/48")}, RemoteTS: []netip.Prefix{netip.MustParsePrefix("2001:db8:2::/48")},
			Proposals: []string{"e"}, Start: StartTrap, RekeyTime: time.Minute, RekeyBytes: 4999, RekeyPackets: 499, ReplayWindow: 4096,
			MarkIn: sad.Mark{Value: 1, Mask: 0xff}, MarkOut: sad.Mark{Mask: 0xf}, SetMarkIn: sad.Mark{Value: 3, Mask: 0xffffffff}, SetMarkOut: sad.Mark{Value: 4, Mask: 4},
			IfIDIn: 5, IfIDOut: 6, NoCopyDF: true, NoCopyECN: true, CopyDSCP: "no",
		}, {Name: "host", Transport: true}},
	}
	for _, path := range []string{c.LocalCert, c.RemoteCA, c.RemoteCert} {
		if err := os.WriteFile(path, []byte(filepath.Base(path)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := vici.Conn{
		Name: "link", LocalAddrs: []string{"192.0.2.1"}, RemoteAddrs: []string{"192.0.2.2"}, Proposals: []string{"p"}, Unique: "keep",
		RekeyTime: time.Hour, ReauthTime: 2 * time.Hour, DPDDelay: 9 * time.Second, Encap: true, MOBIKE: true,
		Local:  vici.Auth{ID: "a.example", Certs: [][]byte{[]byte("cert")}},
		Remote: vici.Auth{ID: "b.example", Certs: [][]byte{[]byte("peer")}, CACerts: [][]byte{[]byte("ca")}},
		Children: []vici.Child{{
			Name: "net", LocalTS: []string{"2001:db8:1::/48"}, RemoteTS: []string{"2001:db8:2::/48"}, Proposals: []string{"e"}, Mode: "tunnel",
			RekeyTime: time.Minute, LifeTime: 10 * time.Minute, RekeyBytes: 4999, LifeBytes: 5000, RekeyPackets: 499, LifePackets: 500, Trap: true, ReplayWindow: 4096,
			MarkIn: "0x1/0xff", MarkOut: "0x0/0xf", SetMarkIn: "0x3/0xffffffff", SetMarkOut: "0x4/0x4",
			IfIDIn: 5, IfIDOut: 6, NoCopyDF: true, NoCopyECN: true, CopyDSCP: "no",
		}, {
			Name: "host", Proposals: defaultESPProposals, Mode: "transport",
			RekeyTime: 8 * time.Minute, LifeTime: 10 * time.Minute, RekeyBytes: 4000, LifeBytes: 5000, RekeyPackets: 400, LifePackets: 500,
		}},
	}
	if got, err := viciConn(c); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v\ngot  %+v\nwant %+v", err, got, want)
	}
	if err := os.Remove(c.RemoteCA); err != nil {
		t.Fatal(err)
	}
	if _, err := viciConn(c); err == nil {
		t.Error("loaded without the CA's certificate")
	}
}
