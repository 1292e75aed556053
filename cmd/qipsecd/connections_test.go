package main

import (
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/sad"
)

// What the config says of an SA is what ike is told.
func TestConnections(t *testing.T) {
	b, err := os.ReadFile("../../conf/qipsecd.toml")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, ch := range [][2]string{
		{"# max_key_bytes = 0", "max_key_bytes = 5000"},
		{"# max_key_packets = 0", "max_key_packets = 4000"},
		{`# reauth_time = "0s"`, `reauth_time = "1m"`},
		{`# dpd_delay = "30s"`, `dpd_delay = "0s"`},
		{`start = "now"`, `start = "trap"`},
		{"# rekey_bytes = 0", "rekey_bytes = 50"},
		{"# rekey_packets = 0", "rekey_packets = 40"},
		{"# replay_window = 128", "replay_window = 4096"},
		{`# mark_in = ""`, `mark_in = "1/0xff"`},
		{`# mark_out = ""`, `mark_out = "2/0xff"`},
		{`# set_mark_in = ""`, `set_mark_in = "3/0xff"`},
		{`# set_mark_out = ""`, `set_mark_out = "4/0xff"`},
		{"# if_id_in = 0", "if_id_in = 5"},
		{"# if_id_out = 0", "if_id_out = 6"},
		{"# copy_df = true", "copy_df = false"},
		{`# copy_dscp = "out"`, `copy_dscp = "in"`},
	} {
		if !strings.Contains(text, ch[0]) {
			t.Fatalf("the sample has no %q", ch[0])
		}
		text = strings.Replace(text, ch[0], ch[1], 1)
	}
	n, err := conf.ParseNode("f", "/", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	list := connections(n.IPsec)
	c, from := list[0], n.IPsec.Connection[0].Children[0]
	if err := c.Validate(); err != nil || c.MaxKeyBytes != 5000 || c.MaxKeyPackets != 4000 || c.ReauthTime != time.Minute || c.DPDDelay != 0 {
		t.Errorf("%+v, %v", c, err)
	}
	want := ike.Child{
		Name: "a-b-net", LocalTS: from.LocalTS, RemoteTS: from.RemoteTS, Start: ike.StartTrap,
		RekeyTime: 10 * time.Minute, RekeyBytes: 50, RekeyPackets: 40, ReplayWindow: 4096,
		MarkIn: sad.Mark{Value: 1, Mask: 0xff}, MarkOut: sad.Mark{Value: 2, Mask: 0xff}, SetMarkIn: sad.Mark{Value: 3, Mask: 0xff}, SetMarkOut: sad.Mark{Value: 4, Mask: 0xff},
		IfIDIn: 5, IfIDOut: 6, NoCopyDF: true, CopyDSCP: "in",
	}
	if !reflect.DeepEqual(c.Children[0], want) {
		t.Errorf("got  %+v\nwant %+v", c.Children[0], want)
	}
}
