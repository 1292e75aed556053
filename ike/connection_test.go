package ike

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/sad"
)

// Every fault of a child is reported, and nothing that charon and the kernel take.
func TestChildFaults(t *testing.T) {
	ts := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	all := Child{
		RekeyTime: -time.Second, ReplayWindow: 4097, Transport: true, LocalTS: ts("192.0.2.0/24"),
		MarkIn: sad.Mark{Value: 0x10, Mask: 0xf}, MarkOut: sad.Mark{Value: 1}, SetMarkIn: sad.Mark{Value: 0xffffffff, Mask: 0xffffffff}, SetMarkOut: sad.Mark{Value: 0xfffffffe, Mask: 0xffffffff},
		IfIDIn: 0xfffffffe, CopyDSCP: "maybe",
	}
	for name, c := range map[string]struct {
		child Child
		want  []string
	}{
		"all":               {all, []string{"rekey time", "replay window 4097", "mark_in 0x10/0xf:", "mark_out 0x1/0x0:", "set_mark_in 0xffffffff", "set_mark_out 0xfffffffe", "interface ids", `copy_dscp "maybe"`, "transport mode"}},
		"out of reach":      {Child{IfIDOut: 0xffffffff}, []string{"interface ids"}},
		"start":             {Child{Start: 9}, []string{"start action"}},
		"transport, remote": {Child{Transport: true, RemoteTS: ts("192.0.2.3/32")}, []string{"transport mode"}},
		"transport":         {Child{Transport: true, LocalTS: ts("192.0.2.1/32"), RemoteTS: ts("192.0.2.2/32")}, nil},
		"transport, bare":   {Child{Transport: true}, nil},
		"largest": {Child{
			ReplayWindow: 4096, MarkIn: sad.Mark{Value: 0xfffffffd, Mask: 0xffffffff}, MarkOut: sad.Mark{Mask: 0xff},
			IfIDIn: 0xfffffffd, IfIDOut: 0xfffffffd, CopyDSCP: "yes", LocalTS: ts("0.0.0.0/0"),
		}, nil},
	} {
		conn := connection("a", "b")
		c.child.Name = "x"
		conn.Children = []Child{c.child}
		conn.LocalAddrs, conn.RemoteAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.1")}, []netip.Addr{netip.MustParseAddr("192.0.2.2")}
		var got []string
		if err := conn.Validate(); err != nil {
			got = strings.Split(err.Error(), "\n")
		}
		if len(got) != len(c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
			continue
		}
		for i, w := range c.want {
			if !strings.Contains(got[i], "connection "+conn.Name+": child x: ") || !strings.Contains(got[i], w) {
				t.Errorf("%s: %q, want %q", name, got[i], w)
			}
		}
	}
	for _, spoil := range []func(*Connection){func(c *Connection) { c.ReauthTime = -1 }, func(c *Connection) { c.DPDDelay = -1 }} {
		conn := connection("a", "b")
		spoil(&conn)
		if err := conn.Validate(); err == nil || !strings.Contains(err.Error(), "is negative") {
			t.Errorf("%v", err)
		}
	}
}
