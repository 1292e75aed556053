package conf

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

const sampleDir = "/etc/q-ipsec"

func sample(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("qipsecd.toml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSample(t *testing.T) {
	n, err := ParseNode("qipsecd.toml", sampleDir, []byte(sample(t)))
	if err != nil {
		t.Fatal(err)
	}
	if n.Name != "a" || n.KMS.Type2Listen != netip.MustParseAddrPort("192.0.2.1:8442") || n.KMS.Type1.Key != "/etc/q-ipsec/pki/km.key" {
		t.Errorf("%+v", n)
	}
	if p := n.KMS.Pairs[0]; p.Role != key.Master || p.Algorithm != Poly1305 || p.Intake != "/etc/q-ipsec/intake" {
		t.Errorf("%+v", p)
	}
	c := n.IPsec.Connection[0]
	if c.Policy != Required || c.Mix != Hybrid || c.MinClass != key.Relayed || c.KME != Local || c.MaxKeyAge != time.Hour || !n.IPsec.Guard || n.IPsec.Reserve != 32 {
		t.Errorf("%+v", c)
	}
	if ch := c.Children[0]; ch.Start != StartNow || ch.RekeyTime != 10*time.Minute || ch.Transport || ch.LocalTS[0] != netip.MustParsePrefix("10.1.0.0/24") {
		t.Errorf("%+v", ch)
	}
}

// The sample shows every default as a comment: with these lines put in force
// the config must mean the same.
func TestSampleShowsTheDefaults(t *testing.T) {
	text := sample(t)
	shown := regexp.MustCompile(`(?m)^# ([a-z0-9_]+ = )`)
	vendor := strings.Index(text, "# [[ipsec.kme]]")
	end := vendor + strings.Index(text[vendor:], "\n\n")
	full := shown.ReplaceAllString(text[:vendor], "$1") + shown.ReplaceAllString(text[end:], "$1")
	if n := len(shown.FindAllString(text, -1)); n < 30 {
		t.Fatalf("only %d defaults are shown", n)
	}
	a, err := ParseNode("short", sampleDir, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	full = strings.Replace(full, "burst = 0 ", "# burst = 0 ", 1) // means nothing without rate
	b, err := ParseNode("full", sampleDir, []byte(full))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range b.IPsec.Connection { // an empty list is no list
		if len(c.Proposals) == 0 && len(c.Children[0].ESPProposals) == 0 {
			b.IPsec.Connection[0].Proposals, b.IPsec.Connection[0].Children[0].ESPProposals = nil, nil
		}
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("the sample's defaults are not the program's:\n%+v\n%+v\n%+v\n%+v", a.KMS, b.KMS, a.IPsec, b.IPsec)
	}
}

// Every key of the sections' structs is in the sample.
func TestSampleNamesEveryKey(t *testing.T) {
	text := sample(t)
	var walk func(reflect.Type)
	walk = func(s reflect.Type) {
		for s.Kind() == reflect.Pointer || s.Kind() == reflect.Slice {
			s = s.Elem()
		}
		if s.Kind() != reflect.Struct {
			return
		}
		for i := range s.NumField() {
			f := s.Field(i)
			if tag := f.Tag.Get("toml"); tag != "" && f.Type.Kind() != reflect.Struct {
				nested := f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct || f.Type.Kind() == reflect.Pointer && f.Type.Elem().Kind() == reflect.Struct
				if !nested && !regexp.MustCompile(`(?m)^(# )?`+tag+` = `).MatchString(text) {
					t.Errorf("key %q is not in the sample", tag)
				}
			}
			walk(f.Type)
		}
	}
	walk(reflect.TypeFor[rawNode]())
}

// Each case changes the sample in one or more places and names the fields that
// must then be at fault, and no others.
func TestFaults(t *testing.T) {
	for name, c := range map[string]struct {
		change [][2]string
		fields string // in the order of the report
	}{
		"unknown key":       {[][2]string{{`name = "a" `, `nmae = "x"` + "\n" + `name = "a" `}}, "node.nmae"},
		"unknown section":   {[][2]string{{"[operator]", "[oprator]\nx = 1\n[operator]"}}, "oprator oprator.x"},
		"node name":         {[][2]string{{`name = "a" `, `name = "Gate_A" `}}, "node.name"},
		"no node name":      {[][2]string{{`name = "a" `, `# `}}, "node.name"},
		"rekey reserve":     {[][2]string{{"# rekey_reserve = 32", "rekey_reserve = 0"}}, "ipsec.rekey_reserve"},
		"listen in R":       {[][2]string{{`type1_listen = "192.0.2.1:8441"`, `type1_listen = "0.0.0.0:8441"`}, {`remote_ts = ["10.2.0.0/24"]`, `remote_ts = ["192.0.2.0/24"]`}}, "kms.type1_listen"},
		"level":             {[][2]string{{`# level = "info"`, `level = "loud"`}}, "log.level"},
		"listen":            {[][2]string{{`"192.0.2.1:8441"`, `"gw-a:8441"`}, {`"192.0.2.1:8442"`, `"192.0.2.1:0"`}}, "kms.type1_listen kms.type2_listen"},
		"peer address":      {[][2]string{{`"192.0.2.2:8441"`, `"0.0.0.0:8441"`}}, "kms.peer[0].address"},
		"peer is us":        {[][2]string{{"name = \"b\"\naddress", "name = \"a\"\naddress"}}, "kms.peer[0].name kms.pair[0].peer kms.sae[1].node kms.sae[3].node"},
		"pair":              {[][2]string{{`"0f4d7c9e-3b1a-8c2d-9e4f-5a6b7c8d9e0f"`, `"0f4d7c9e"`}, {`role = "master"`, `role = "boss"`}, {`# algorithm = "poly1305"`, `algorithm = "sha-1"`}}, "kms.pair[0].id kms.pair[0].role kms.pair[0].algorithm"},
		"control":           {[][2]string{{`# control = ""`, `control = "http://192.0.2.3:8443"`}}, "kms.pair[0].control"},
		"same device":       {[][2]string{{"00000000000b", "00000000000a"}}, "kms.pair[0].peer_qkd_id"},
		"ranges":            {[][2]string{{"# lease = 1024  ", "lease = 0 # "}, {`# notice_ttl = "5m"`, `notice_ttl = "2h"`}, {`# ratchet_interval = "10m"`, `ratchet_interval = "11m"`}}, "kms.lease kms.notice_ttl kms.ratchet_interval"},
		"no unit":           {[][2]string{{`# intake_interval = "1s"`, `intake_interval = "1"`}}, "kms.intake_interval"},
		"sae twice":         {[][2]string{{`id = "b-te"`, `id = "a-te"`}}, "kms.sae[3].id kms.sae[2].peers"},
		"sae peers":         {[][2]string{{`peers = ["b-te"]`, `peers = ["a-ipsec"]`}, {`peers = ["b-ipsec"] `, `# `}}, "kms.sae[0].peers kms.sae[2].peers ipsec.connection[0].local_sae"},
		"sae limits afar":   {[][2]string{{`id = "b-te"`, `id = "b-te"` + "\nrate = 1"}}, "kms.sae[3].node"},
		"inventory":         {[][2]string{{`# inventory = "sqlite:/var/lib/q-ipsec/inventory.db"`, `inventory = "mysql://db/x"`}}, "node.inventory"},
		"inventory here":    {[][2]string{{`# inventory = "sqlite:/var/lib/q-ipsec/inventory.db"`, `inventory = "sqlite:inventory.db"`}}, "node.inventory"},
		"postgres":          {[][2]string{{`# inventory = "sqlite:/var/lib/q-ipsec/inventory.db"`, `inventory = "postgres://db/x"`}, {`# inventory_password_file = ""`, `inventory_password_file = "pg"`}, {"# members = []", `members = ["192.0.2.4:8441"]`}}, ""},
		"no password":       {[][2]string{{`# inventory_password_file = ""`, `inventory_password_file = "pg"`}}, "node.inventory_password_file"},
		"members alone":     {[][2]string{{"# members = []", `members = ["192.0.2.4:8441"]`}}, "kms.members"},
		"member is us":      {[][2]string{{`# inventory = "sqlite:/var/lib/q-ipsec/inventory.db"`, `inventory = "postgres://db/x"`}, {"# members = []", `members = ["192.0.2.1:8441", "gw"]`}}, "kms.members[0] kms.members[1]"},
		"more addresses":    {[][2]string{{"# more_addresses = []", `more_addresses = ["192.0.2.2:8441", "192.0.2.5:8441", "192.0.2.5:8441"]`}}, "kms.peer[0].more_addresses[0] kms.peer[0].more_addresses[2]"},
		"listen in R, more": {[][2]string{{`type1_listen = "192.0.2.1:8441"`, `type1_listen = "0.0.0.0:8441"`}, {"# more_addresses = []", `more_addresses = ["10.2.0.9:8441"]`}}, "kms.type1_listen"},
		"intake of the db":  {[][2]string{{`intake = "intake"`, `intake = "/srv"`}, {`# inventory = "sqlite:/var/lib/q-ipsec/inventory.db"`, `inventory = "sqlite:/srv/db/i.db"`}}, "kms.pair[0].intake"},
		"burst alone":       {[][2]string{{"rate = 100\n", ""}}, "kms.sae[2].burst"},
		"sae not for ipsec": {[][2]string{{"node = \"b\"\nipsec = true", `node = "b"`}}, "ipsec.connection[0].peer_sae"},
		"sae elsewhere":     {[][2]string{{`local_sae = "a-ipsec"`, `local_sae = "nobody"`}}, "ipsec.connection[0].local_sae"},
		"files":             {[][2]string{{`ca = "pki/km-ca.crt"`, ""}, {`key = "pki/ike.key"`, ""}}, "tls.km.ca ipsec.key"},
		"no type 2":         {[][2]string{{`type2_listen = "192.0.2.1:8442"`, ""}, {`ca = "pki/sae-ca.crt"`, ""}}, ""},
		"kme":               {[][2]string{{`# kme = "local"`, `kme = "vendor"`}}, "ipsec.connection[0].kme"},
		"policy":            {[][2]string{{`# policy = "required"`, `policy = "maybe"`}, {`# mix = "hybrid"`, `mix = "none"`}}, "ipsec.connection[0].policy ipsec.connection[0].mix"},
		"qkd alone":         {[][2]string{{`# mix = "hybrid"`, `mix = "qkd"`}, {`# min_class = "relayed"`, `min_class = "relayed"`}}, "ipsec.connection[0].min_class"},
		"qkd derived":       {[][2]string{{`# mix = "hybrid"`, `mix = "qkd"`}, {`# min_class = "relayed"`, `min_class = "derived"`}, {"# allow_relayed_only = false", "allow_relayed_only = true"}}, "ipsec.connection[0].min_class"},
		"relayed without":   {[][2]string{{"# allow_relayed_only = false", "allow_relayed_only = true"}}, "ipsec.connection[0].allow_relayed_only"},
		"addresses":         {[][2]string{{`local_addr = "192.0.2.1"`, `local_addr = "0.0.0.0"`}, {`remote_addr = "192.0.2.2"`, `remote_addr = "gw"`}}, "ipsec.connection[0].local_addr ipsec.connection[0].remote_addr"},
		"families":          {[][2]string{{`remote_addr = "192.0.2.2"`, `remote_addr = "2001:db8::2"`}, {`["10.2.0.0/24"]`, `["2001:db8:2::/64"]`}}, "ipsec.connection[0].remote_addr ipsec.connection[0].child[0].remote_ts"},
		"wildcard id":       {[][2]string{{`remote_id = "b.gw.q-ipsec"`, `remote_id = "*.gw.q-ipsec"`}}, "ipsec.connection[0].remote_id"},
		"a name as id":      {[][2]string{{`remote_id = "b.gw.q-ipsec"`, `remote_id = "C=KR, O=KISTI, CN=b"`}}, "ipsec.connection[0].remote_id"},
		"blank in id":       {[][2]string{{`remote_id = "b.gw.q-ipsec"`, `remote_id = "b gw"`}}, "ipsec.connection[0].remote_id"},
		"charon's word":     {[][2]string{{`remote_id = "b.gw.q-ipsec"`, `remote_id = "%any4"`}, {`local_id = "a.gw.q-ipsec"`, `local_id = "@#xyz"`}}, "ipsec.connection[0].local_id ipsec.connection[0].remote_id"},
		"own id otherwise":  {[][2]string{{`remote_id = "b.gw.q-ipsec"`, `remote_id = "@A.gw.q-ipsec"`}}, "ipsec.connection[0].remote_id"},
		"one port":          {[][2]string{{`type2_listen = "192.0.2.1:8442"`, `type2_listen = "192.0.2.1:8441"`}}, "kms.type2_listen"},
		"one port of any":   {[][2]string{{`type2_listen = "192.0.2.1:8442"`, `type2_listen = "[::]:8441"`}}, "kms.type2_listen"},
		"two addresses":     {[][2]string{{`type2_listen = "192.0.2.1:8442"`, `type2_listen = "192.0.2.3:8441"`}}, ""},
		"one socket":        {[][2]string{{`# plugin = "/run/q-ipsec/plugin.sock"`, `plugin = "/run/q-ipsec/operator.sock"`}, {`# vici = "/run/charon.vici"`, `vici = "/run/q-ipsec/operator.sock"`}}, "ipsec.vici ipsec.plugin"},
		"fractions":         {[][2]string{{`# max_key_age = "1h"`, `max_key_age = "10900ms"`}, {`# rekey_time = "4h"`, `rekey_time = "20.5s"`}, {`# reauth_time = "0s"`, `reauth_time = "60500ms"`}, {`# dpd_delay = "30s"`, `dpd_delay = "1500ms"`}, {`# rekey_time = "10m"`, `rekey_time = "1.5s"`}, {`# notice_ttl = "5m"`, `notice_ttl = "1500ms"`}}, "kms.notice_ttl ipsec.connection[0].max_key_age ipsec.connection[0].rekey_time ipsec.connection[0].reauth_time ipsec.connection[0].dpd_delay ipsec.connection[0].child[0].rekey_time"},
		"half a key's age":  {[][2]string{{`# max_key_age = "1h"`, `max_key_age = "11s"`}}, ""},
		"4 in 6 selector":   {[][2]string{{`["10.2.0.0/24"]`, `["::ffff:10.2.0.0/120"]`}, {`["10.1.0.0/24"]`, `["::ffff:10.1.0.0/120"]`}}, "ipsec.connection[0].child[0].local_ts[0] ipsec.connection[0].child[0].remote_ts[0]"},
		"feeder's address":  {[][2]string{{`# feeder_addr = ""`, `feeder_addr = "qkde"`}, {`# feeder_listen = ""`, `feeder_listen = "0.0.0.0:22"`}}, "kms.pair[0].feeder_addr kms.pair[0].feeder_listen"},
		"feeder half":       {[][2]string{{`# feeder_addr = ""`, `feeder_addr = "192.0.2.3"`}}, "kms.pair[0].feeder_listen"},
		"feeder other half": {[][2]string{{`# feeder_listen = ""`, `feeder_listen = "192.0.2.1:22"`}}, "kms.pair[0].feeder_addr"},
		"feeder's family":   {[][2]string{{`# feeder_addr = ""`, `feeder_addr = "2001:db8::3"`}, {`# feeder_listen = ""`, `feeder_listen = "192.0.2.1:22"`}}, "kms.pair[0].feeder_listen"},
		"feeder cut off":    {[][2]string{{`# feeder = ""`, `feeder = "qkde"`}, {`["10.2.0.0/24"]`, `["0.0.0.0/0"]`}}, "kms.pair[0].feeder_addr"},
		"feeder here":       {[][2]string{{`# feeder = ""`, `feeder = "qkde"`}, {`# feeder_addr = ""`, `feeder_addr = "127.0.0.1"`}, {`["10.2.0.0/24"]`, `["0.0.0.0/0"]`}}, ""},
		"feeder known":      {[][2]string{{`# feeder = ""`, `feeder = "qkde"`}, {`# feeder_addr = ""`, `feeder_addr = "192.0.2.3"`}, {`# feeder_listen = ""`, `feeder_listen = "192.0.2.1:22"`}, {`["10.2.0.0/24"]`, `["0.0.0.0/0"]`}}, ""},
		"feeder unguarded":  {[][2]string{{`# feeder = ""`, `feeder = "qkde"`}, {`# guard = true`, `guard = false`}, {`["10.2.0.0/24"]`, `["0.0.0.0/0"]`}}, ""},
		"intake of all":     {[][2]string{{`intake = "intake"`, `intake = "."`}}, "kms.pair[0].intake"},
		"intake above":      {[][2]string{{`intake = "intake"`, `intake = "/etc"`}}, "kms.pair[0].intake"},
		"intake of keys":    {[][2]string{{`intake = "intake"`, `intake = "pki"`}}, "kms.pair[0].intake"},
		"intake of sockets": {[][2]string{{`intake = "intake"`, `intake = "/run/q-ipsec"`}}, "kms.pair[0].intake"},
		"intake is state":   {[][2]string{{`intake = "intake"`, `intake = "/var/lib/q-ipsec"`}}, "kms.pair[0].intake"},
		"intake in state":   {[][2]string{{`intake = "intake"`, `intake = "/var/lib/q-ipsec/intake"`}}, "kms.pair[0].intake"},
		"intake of root":    {[][2]string{{`intake = "intake"`, `intake = "/secret"`}, {`# root_file = "/var/lib/q-ipsec/root"`, `root_file = "/secret/root"`}}, "kms.pair[0].intake"},
		"intake beside":     {[][2]string{{`intake = "intake"`, `intake = "pki2"`}}, ""},
		"intake in intake":  {[][2]string{{`intake = "intake"`, "intake = \"intake\"\n[[kms.pair]]\nid = \"0f4d7c9e-3b1a-8c2d-9e4f-5a6b7c8d9e10\"\nrole = \"slave\"\npeer = \"b\"\nqkd_id = \"1c0ffee0-0000-8000-8000-00000000000c\"\npeer_qkd_id = \"1c0ffee0-0000-8000-8000-00000000000d\"\nintake = \"intake/second\""}}, "kms.pair[0].intake"},
		"own id":            {[][2]string{{`remote_id = "b.gw.q-ipsec"`, `remote_id = "a.gw.q-ipsec"`}}, "ipsec.connection[0].remote_id"},
		"selectors":         {[][2]string{{`["10.1.0.0/24"]`, `["10.1.0.1/24", "here"]`}, {`["10.2.0.0/24"]`, `[]`}}, "ipsec.connection[0].child[0].local_ts[0] ipsec.connection[0].child[0].local_ts[1] ipsec.connection[0].child[0].remote_ts"},
		"half of all":       {[][2]string{{`["10.1.0.0/24"]`, `["128.0.0.0/1"]`}}, "ipsec.connection[0].child[0].local_ts[0]"},
		"key outlived":      {[][2]string{{`# rekey_time = "10m"`, `rekey_time = "1h"`}}, "ipsec.connection[0].child[0].rekey_time"},
		"bytes outlived":    {[][2]string{{"# max_key_bytes = 0", "max_key_bytes = 1000"}, {"# rekey_bytes = 0", "rekey_bytes = 1000"}}, "ipsec.connection[0].child[0].rekey_bytes"},
		"packets outlived":  {[][2]string{{"# max_key_packets = 0", "max_key_packets = 1000"}, {"# rekey_packets = 0", "rekey_packets = 1000"}}, "ipsec.connection[0].child[0].rekey_packets"},
		"counts":            {[][2]string{{"# max_key_packets = 0", "max_key_packets = -1"}, {"# rekey_packets = 0", "rekey_packets = -1"}, {"# if_id_in = 0", "if_id_in = 0xfffffffe"}, {"# if_id_out = 0", "if_id_out = -1"}}, "ipsec.connection[0].max_key_packets ipsec.connection[0].child[0].rekey_packets ipsec.connection[0].child[0].if_id_in ipsec.connection[0].child[0].if_id_out"},
		"reauth":            {[][2]string{{`# reauth_time = "0s"`, `reauth_time = "59s"`}}, "ipsec.connection[0].reauth_time"},
		"dpd":               {[][2]string{{`# dpd_delay = "30s"`, `dpd_delay = "999ms"`}}, "ipsec.connection[0].dpd_delay"},
		"no dpd":            {[][2]string{{`# dpd_delay = "30s"`, `dpd_delay = "0s"`}}, ""},
		"window too large":  {[][2]string{{"# replay_window = 128", "replay_window = 4097"}}, "ipsec.connection[0].child[0].replay_window"},
		"no window":         {[][2]string{{"# replay_window = 128", "replay_window = 0"}}, "ipsec.connection[0].child[0].replay_window"},
		"marks":             {[][2]string{{`# mark_in = ""`, `mark_in = "0x10/0xf"`}, {`# mark_out = ""`, `mark_out = "%unique"`}, {`# set_mark_in = ""`, `set_mark_in = "1/2/3"`}, {`# set_mark_out = ""`, `set_mark_out = "4294967295"`}}, "ipsec.connection[0].child[0].mark_in ipsec.connection[0].child[0].mark_out ipsec.connection[0].child[0].set_mark_in ipsec.connection[0].child[0].set_mark_out"},
		"dscp":              {[][2]string{{`# copy_dscp = "out"`, `copy_dscp = "both"`}}, "ipsec.connection[0].child[0].copy_dscp"},
		"not configurable":  {[][2]string{{"# copy_df = true", "ipcomp = true\nhw_offload = \"yes\"\nlabel = \"x\""}}, "ipsec.connection.child.ipcomp ipsec.connection.child.hw_offload ipsec.connection.child.label"},
		"transport nets":    {[][2]string{{`# mode = "tunnel"`, `mode = "transport"`}}, "ipsec.connection[0].child[0].local_ts ipsec.connection[0].child[0].remote_ts"},
		"transport header":  {[][2]string{{`# mode = "tunnel"`, `mode = "transport"`}, {`["10.1.0.0/24"]`, `["192.0.2.1/32"]`}, {`["10.2.0.0/24"]`, `["192.0.2.2/32"]`}, {"# copy_df = true", "copy_df = true"}, {"# copy_ecn = true", "copy_ecn = false"}, {`# copy_dscp = "out"`, `copy_dscp = "no"`}}, "ipsec.connection[0].child[0].copy_df ipsec.connection[0].child[0].copy_ecn ipsec.connection[0].child[0].copy_dscp"},
		"transport":         {[][2]string{{`# mode = "tunnel"`, `mode = "transport"`}, {`["10.1.0.0/24"]`, `["192.0.2.1/32"]`}, {`["10.2.0.0/24"]`, `["192.0.2.2/32"]`}}, ""},
		"4 in 6":            {[][2]string{{`local_addr = "192.0.2.1"`, `local_addr = "2001:db8::1"`}, {`remote_addr = "192.0.2.2"`, `remote_addr = "2001:db8::2"`}}, ""},
		"6 in 4":            {[][2]string{{`["10.1.0.0/24"]`, `["2001:db8:1::/48", "10.1.0.0/24"]`}, {`["10.2.0.0/24"]`, `["2001:db8:2::/48", "10.2.0.0/24"]`}}, ""},
		"start":             {[][2]string{{`start = "now"`, `start = "later"`}}, "ipsec.connection[0].child[0].start"},
		"long socket":       {[][2]string{{`# socket = "/run`, `socket = "/run` + strings.Repeat("/long", 22)}}, "operator.socket"},
	} {
		t.Run(name, func(t *testing.T) {
			text := sample(t)
			for _, ch := range c.change {
				if !strings.Contains(text, ch[0]) {
					t.Fatalf("the sample has no %q", ch[0])
				}
				text = strings.Replace(text, ch[0], ch[1], 1)
			}
			_, err := ParseNode("f.toml", sampleDir, []byte(text))
			var got []string
			var f *Faults
			if errors.As(err, &f) {
				for _, v := range f.List {
					got = append(got, v.Field)
					if !strings.Contains(err.Error(), v.Text) {
						t.Errorf("%q is not in the report", v.Text)
					}
				}
			}
			if strings.Join(got, " ") != c.fields {
				t.Errorf("faults in %q, want %q\n%v", got, c.fields, err)
			}
		})
	}
}

// A default that comes from another key is in whole seconds as well.
func TestDefaultRekeyTime(t *testing.T) {
	for age, want := range map[string]time.Duration{"1h": 10 * time.Minute, "11s": 5 * time.Second} {
		n, err := ParseNode("f", "/", []byte(strings.Replace(sample(t), `# max_key_age = "1h"`, `max_key_age = "`+age+`"`, 1)))
		if err != nil || n.IPsec.Connection[0].Children[0].RekeyTime != want {
			t.Errorf("max_key_age %s: %+v, %v, want rekey_time %v", age, n, err, want)
		}
	}
}

// Every key of an SA arrives in its own place.
func TestChildKeys(t *testing.T) {
	text := sample(t)
	for _, ch := range [][2]string{
		{"# max_key_bytes = 0", "max_key_bytes = 5000"},
		{"# max_key_packets = 0", "max_key_packets = 4000"},
		{`# reauth_time = "0s"`, `reauth_time = "1m"`},
		{"# encap = false", "encap = true"},
		{`start = "now"`, `start = "trap"`},
		{"# rekey_bytes = 0", "rekey_bytes = 50"},
		{"# rekey_packets = 0", "rekey_packets = 40"},
		{"# replay_window = 128", "replay_window = 4096"},
		{"# esp_proposals = []", `esp_proposals = ["aes128-sha256-x25519-esn"]`},
		{`# mark_in = ""`, `mark_in = "0x10/0xff"`},
		{`# mark_out = ""`, `mark_out = "0/0xff"`},
		{`# set_mark_in = ""`, `set_mark_in = "42"`},
		{`# set_mark_out = ""`, `set_mark_out = "0xfffffffd"`},
		{"# if_id_in = 0", "if_id_in = 0xfffffffd"},
		{"# if_id_out = 0", "if_id_out = 7"},
		{"# copy_df = true", "copy_df = false"},
		{"# copy_ecn = true", "copy_ecn = false"},
		{`# copy_dscp = "out"`, `copy_dscp = "in"`},
	} {
		if !strings.Contains(text, ch[0]) {
			t.Fatalf("the sample has no %q", ch[0])
		}
		text = strings.Replace(text, ch[0], ch[1], 1)
	}
	n, err := ParseNode("f", "/", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	c := n.IPsec.Connection[0]
	one, err := ParseNode("f", "/", []byte(strings.Replace(text, "copy_ecn = false", "", 1)))
	if err != nil || !one.IPsec.Connection[0].Children[0].CopyECN || one.IPsec.Connection[0].Children[0].CopyDF {
		t.Errorf("copy_ecn alone: %+v, %v", one, err)
	}
	want := Child{
		Name: "a-b-net", LocalTS: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}, RemoteTS: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24")},
		ESPProposals: []string{"aes128-sha256-x25519-esn"}, Start: StartTrap, RekeyTime: 10 * time.Minute, RekeyBytes: 50, RekeyPackets: 40, ReplayWindow: 4096,
		MarkIn: Mark{0x10, 0xff}, MarkOut: Mark{0, 0xff}, SetMarkIn: Mark{42, 0xffffffff}, SetMarkOut: Mark{0xfffffffd, 0xffffffff},
		IfIDIn: 0xfffffffd, IfIDOut: 7, CopyDSCP: DSCPIn,
	}
	if !reflect.DeepEqual(c.Children[0], want) {
		t.Errorf("got  %+v\nwant %+v", c.Children[0], want)
	}
	if c.MaxKeyBytes != 5000 || c.MaxKeyPackets != 4000 || c.ReauthTime != time.Minute || !c.Encap {
		t.Errorf("%+v", c)
	}
}

func TestParseMark(t *testing.T) {
	for text, want := range map[string]string{
		"":             "want VALUE/MASK",
		"/0xff":        "want VALUE/MASK",
		"1/":           "want VALUE/MASK",
		"0x100000000":  "want VALUE/MASK",
		"-1":           "want VALUE/MASK",
		"1 / 1":        "want VALUE/MASK",
		"%same":        "want VALUE/MASK",
		"0/0":          "no bit",
		"0x12/0xf":     "0x10",
		"0xfffffffe":   "at most 0xfffffffd",
		"0xffffffff/0": "no bit",
	} {
		if m, err := parseMark(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v, want %q", text, m, err, want)
		}
	}
}

func TestNotTOML(t *testing.T) {
	for _, text := range []string{"[node", "[node]\nname = 1\n", "[node]\nname = \"a\"\nname = \"b\"\n", ""} {
		if _, err := ParseNode("f", "/", []byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func TestGuard(t *testing.T) {
	text := strings.Replace(sample(t), `["10.2.0.0/24"]`, `["10.2.0.0/24", "192.0.2.2/32"]`, 1)
	text += "\n" + `[[ipsec.connection]]
name = "opt"
policy = "optional"
local_sae = "a-ipsec"
peer_sae = "b-ipsec"
local_addr = "192.0.2.1"
remote_addr = "192.0.2.2"
local_id = "a.gw.q-ipsec"
remote_id = "b2.gw.q-ipsec"
[[ipsec.connection.child]]
name = "opt"
local_ts = ["10.1.0.0/24"]
remote_ts = ["10.9.0.0/24"]
`
	n, err := ParseNode("f", "/", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	remotes, allow := n.Guarded()
	if want := []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24"), netip.MustParsePrefix("192.0.2.2/32")}; !reflect.DeepEqual(remotes, want) {
		t.Errorf("guarded: %v, want %v", remotes, want)
	}
	peer := netip.MustParsePrefix("192.0.2.2/32")
	own := netip.MustParseAddr("192.0.2.1")
	if want := []Channel{{own, peer, 6, 0, 8441}, {own, peer, 6, 8441, 0}}; !reflect.DeepEqual(allow, want) {
		t.Errorf("allowed: %v, want %v", allow, want)
	}
}

// What is reached through an XFRM interface gets a route, and its channels too.
func TestGuardRoutes(t *testing.T) {
	withID := strings.Replace(sample(t), "# if_id_out = 0", "if_id_out = 7", 1)
	withID = strings.Replace(withID, `["10.2.0.0/24"]`, `["10.2.0.0/24", "192.0.2.2/32"]`, 1)
	second := `[[ipsec.connection.child]]
name = "plain"
local_ts = ["10.1.0.0/24"]
remote_ts = ["%s"]
`
	n, err := ParseNode("f", "/", []byte(withID+strings.Replace(second, "%s", "10.3.0.0/24", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := n.Routed(), []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24"), netip.MustParsePrefix("192.0.2.2/32")}; !slices.Equal(got, want) {
		t.Errorf("routed: %v, want %v", got, want)
	}
	remotes, allow := n.Guarded()
	if want := []netip.Prefix{netip.MustParsePrefix("10.3.0.0/24")}; !slices.Equal(remotes, want) || len(allow) != 2 {
		t.Errorf("guarded: %v, want %v; allowed: %v", remotes, want, allow)
	}
	all := strings.Replace(withID, `"192.0.2.2/32"]`, `"0.0.0.0/0"]`, 1)
	for name, c := range map[string]struct{ text, fault string }{
		"overlap":           {withID + strings.Replace(second, "%s", "10.2.0.0/16", 1), "ipsec.connection[0].child[0].if_id_out: the guard drops what goes to 10.2.0.0/16"},
		"everything":        {all, "default route"},
		"without the guard": {strings.Replace(all, "# guard = true", "guard = false", 1), ""},
		"not required":      {strings.Replace(all, `# policy = "required"`, `policy = "optional"`, 1), ""},
		"inbound alone":     {strings.Replace(strings.Replace(all, "if_id_out = 7", "# if_id_out = 7", 1), "# if_id_in = 0", "if_id_in = 7", 1), ""},
	} {
		_, err := ParseNode("f", "/", []byte(c.text))
		if (err != nil) != (c.fault != "") || err != nil && (!strings.Contains(err.Error(), c.fault) || !strings.Contains(err.Error(), " 1 fault")) {
			t.Errorf("%s: %v, want %q", name, err, c.fault)
		}
	}
	if (&Node{}).Routed() != nil {
		t.Error("routes without [ipsec]")
	}
}

// With a tunnel for everything, what brings the keys must pass all the same.
func TestGuardLetsKeysCome(t *testing.T) {
	text := strings.Replace(sample(t), `["10.2.0.0/24"]`, `["0.0.0.0/0"]`, 1)
	for _, ch := range [][2]string{
		{`# control = ""`, `control = "https://192.0.2.3:8443"`},
		{"# more_addresses = []", `more_addresses = ["192.0.2.5:8441"]`},
		{`# inventory = "sqlite:/var/lib/q-ipsec/inventory.db"`, `inventory = "postgres://db/x"`},
		{"# members = []", `members = ["192.0.2.6:8441"]`},
	} {
		text = strings.Replace(text, ch[0], ch[1], 1)
	}
	n, err := ParseNode("f", "/", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	own := netip.MustParseAddr("192.0.2.1")
	n.KMS.Pairs[0].FeederAddr, n.KMS.Pairs[0].FeederListen = netip.MustParseAddr("192.0.2.4"), netip.MustParseAddrPort("192.0.2.1:2222")
	n.IPsec.KMEs = []KME{{URL: "https://192.0.2.9/api"}, {URL: "https://kme.example:8443"}, {URL: "https://[2001:db8::9]:8443"}}
	_, allow := n.Guarded()
	for _, c := range []Channel{
		{netip.Addr{}, netip.MustParsePrefix("192.0.2.9/32"), 6, 0, 443},
		{netip.Addr{}, netip.MustParsePrefix("192.0.2.3/32"), 6, 0, 8443},
		{own, netip.MustParsePrefix("192.0.2.2/32"), 6, 0, 8441},
		{own, netip.MustParsePrefix("192.0.2.2/32"), 6, 8441, 0},
		{own, netip.MustParsePrefix("192.0.2.4/32"), 6, 2222, 0},
		{own, netip.MustParsePrefix("192.0.2.5/32"), 6, 0, 8441}, // the peer's other machine
		{own, netip.MustParsePrefix("192.0.2.5/32"), 6, 8441, 0},
		{own, netip.MustParsePrefix("192.0.2.6/32"), 6, 0, 8441}, // our own
		{own, netip.MustParsePrefix("192.0.2.6/32"), 6, 8441, 0},
	} {
		if !slices.Contains(allow, c) {
			t.Errorf("%v is not among %v", c, allow)
		}
	}
	if len(allow) != 9 {
		t.Errorf("allowed: %v", allow)
	}
	for _, listen := range []string{"0.0.0.0:8441", "127.0.0.1:8441", "[2001:db8::1]:8441"} {
		n.KMS.Type1Listen = netip.MustParseAddrPort(listen)
		if got := n.KMS.Type1Local(n.KMS.Peers[0].Address); got.IsValid() {
			t.Errorf("type1_listen %s: connections would come from %v", listen, got)
		}
	}
}

// What policy required protects must have no other way out of this gateway.
func TestSharedTraffic(t *testing.T) {
	for name, c := range map[string]struct {
		policy, local, remote string
		fault                 bool
	}{
		"same":            {"off", "10.1.0.0/24", "10.2.0.0/24", true},
		"wider":           {"optional", "10.0.0.0/8", "10.0.0.0/8", true},
		"everything":      {"off", "0.0.0.0/0", "0.0.0.0/0", true},
		"one host":        {"off", "10.1.0.0/24", "10.2.0.7/32", true},
		"other remote":    {"off", "10.1.0.0/24", "10.9.0.0/24", false},
		"other local":     {"off", "10.7.0.0/24", "10.2.0.0/24", false},
		"required itself": {"required", "10.1.0.0/24", "10.2.0.0/24", false},
	} {
		t.Run(name, func(t *testing.T) {
			text := sample(t) + "\n" + `[[ipsec.connection]]
name = "second"
policy = "` + c.policy + `"
local_sae = "a-ipsec"
peer_sae = "b-ipsec"
local_addr = "192.0.2.1"
remote_addr = "192.0.2.2"
local_id = "a.gw.q-ipsec"
remote_id = "b2.gw.q-ipsec"
[[ipsec.connection.child]]
name = "second"
local_ts = ["` + c.local + `"]
remote_ts = ["` + c.remote + `"]
`
			_, err := ParseNode("f", "/", []byte(text))
			if (err != nil) != c.fault || c.fault && !strings.Contains(err.Error(), "ipsec.connection[1].child[0].remote_ts") {
				t.Errorf("got %v, want a fault: %v", err, c.fault)
			}
		})
	}
}

// charon as responder takes the first connection that has the two ends' addresses and
// identities, and in it the child whose selectors fit best. What it could not tell
// apart by these is refused.
func TestAmbiguousForCharon(t *testing.T) {
	connection := func(local, remote, localID, remoteID string) string {
		return `[[ipsec.connection]]
name = "second"
local_sae = "a-ipsec"
peer_sae = "b-ipsec"
local_addr = "` + local + `"
remote_addr = "` + remote + `"
local_id = "` + localID + `"
remote_id = "` + remoteID + `"
`
	}
	child := func(local, remote string) string {
		return `[[ipsec.connection.child]]
name = "other"
local_ts = [` + local + `]
remote_ts = [` + remote + `]
`
	}
	const addrA, addrB, idA, idB, net1, net2 = "192.0.2.1", "192.0.2.2", "a.gw.q-ipsec", "b.gw.q-ipsec", `"10.1.0.0/24"`, `"10.2.0.0/24"`
	const ends, selectors = "ipsec.connection[1].remote_id", "ipsec.connection[0].child[1].remote_ts"
	for name, c := range map[string]struct{ more, fault string }{
		"equal ends":           {connection(addrA, addrB, idA, idB) + child(net1, `"10.9.0.0/24"`), ends},
		"ids in another case":  {connection(addrA, addrB, "A.gw.q-ipsec", "B.GW.q-ipsec") + child(net1, `"10.9.0.0/24"`), ends},
		"ids written longer":   {connection(addrA, addrB, "@a.gw.q-ipsec", "@B.gw.q-ipsec") + child(net1, `"10.9.0.0/24"`), ends},
		"other local address":  {connection("192.0.2.7", addrB, idA, idB) + child(net1, net2), ""},
		"other remote address": {connection(addrA, "192.0.2.7", idA, idB) + child(net1, net2), ""},
		"other local id":       {connection(addrA, addrB, "a2.gw.q-ipsec", idB) + child(net1, net2), ""},
		"other remote id":      {connection(addrA, addrB, idA, "b2.gw.q-ipsec") + child(net1, net2), ""},
		"equal selectors":      {child(net1, net2), selectors},
		"with another mark":    {child(net1, net2) + "set_mark_in = \"1/1\"\n", selectors},
		"in another order":     {child(net1, `"10.8.0.0/24", "10.9.0.0/24"`) + strings.Replace(child(net1, `"10.9.0.0/24", "10.8.0.0/24"`), "other", "third", 1), "ipsec.connection[0].child[2].remote_ts"},
		"wider selectors":      {child(net1, `"10.0.0.0/8"`), ""},
		"other selectors":      {child(net1, `"10.9.0.0/24"`), ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseNode("f", "/", []byte(sample(t)+"\n"+c.more))
			if (err != nil) != (c.fault != "") || err != nil && (!strings.Contains(err.Error(), c.fault+":") || !strings.Contains(err.Error(), " 1 fault")) {
				t.Errorf("got %v, want a fault of %q", err, c.fault)
			}
		})
	}
}

func TestVendorKMEOnly(t *testing.T) {
	text := `
[node]
name = "a"
[ipsec]
ca = "ca"
cert = "c"
key = "k"
[[ipsec.kme]]
name = "vendor"
url = "%s"
ca = "vca"
cert = "vc"
key = "vk"
[[ipsec.connection]]
name = "x"
kme = "vendor"
local_sae = "a"
peer_sae = "b"
local_addr = "2001:db8::1"
remote_addr = "2001:db8::2"
local_id = "a.example"
remote_id = "b.example"
[[ipsec.connection.child]]
name = "x"
local_ts = ["2001:db8:a::/64"]
remote_ts = ["2001:db8:b::/64"]
`
	n, err := ParseNode("f", "/etc", []byte(strings.Replace(text, "%s", "https://kme.example:8443/", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if n.KMS != nil || n.IPsec.KMEs[0].URL != "https://kme.example:8443" || n.IPsec.KMEs[0].Files.Key != "/etc/vk" {
		t.Errorf("%+v", n.IPsec)
	}
	for _, u := range []string{"http://kme.example", "https://", "https://u:p@kme", "https://kme?x=1", "kme"} {
		if _, err := ParseNode("f", "/etc", []byte(strings.Replace(text, "%s", u, 1))); err == nil {
			t.Errorf("URL %q was taken", u)
		}
	}
}

// installed writes the sample with all it names into a directory.
func installed(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"pki", "intake", "state", "other"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	p := filepath.Join(dir, "pki")
	for ca, r := range map[string]pki.Request{
		"km":  {Kind: pki.KindNode, Name: "a"},
		"kme": {Kind: pki.KindKME, Name: "a"},
		"ike": {Kind: pki.KindGateway, Name: "a.gw.q-ipsec"},
	} {
		c, err := pki.NewCA(ca, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		root, err := c.Credential()
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := c.Issue(r, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		caFile := map[string]string{"km": "km-ca", "kme": "sae-ca", "ike": "ike-ca"}[ca]
		if err := errors.Join(pki.WriteFile(filepath.Join(p, caFile+".crt"), root.Cert, 0o644, false), leaf.Write(p, ca, false)); err != nil {
			t.Fatal(err)
		}
	}
	name := filepath.Join(dir, "qipsecd.toml")
	text := strings.Replace(sample(t), `# state_dir = "/var/lib/q-ipsec"`, `state_dir = "state"`, 1)
	text = strings.Replace(text, `# socket = "/run/q-ipsec/operator.sock"`, `socket = "run/operator.sock"`, 1)
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestLoadChecksFiles(t *testing.T) {
	name := installed(t)
	dir := filepath.Dir(name)
	if n, err := LoadNode(name); err != nil || n.StateDir != filepath.Join(dir, "state") {
		t.Fatalf("%+v, %v", n, err)
	}
	for what, c := range map[string]struct {
		spoil func() error
		mend  func() error
		field string
	}{
		"key for all":        {func() error { return os.Chmod(dir+"/pki/km.key", 0o644) }, func() error { return os.Chmod(dir+"/pki/km.key", 0o600) }, "tls.km.key"},
		"state for all":      {func() error { return os.Chmod(dir+"/state", 0o755) }, func() error { return os.Chmod(dir+"/state", 0o700) }, "node.state_dir"},
		"intake for all":     {func() error { return os.Chmod(dir+"/intake", 0o702) }, func() error { return os.Chmod(dir+"/intake", 0o700) }, "kms.pair[0].intake"},
		"intake for a group": {func() error { return os.Chmod(dir+"/intake", 0o770) }, func() error { return os.Chmod(dir+"/intake", 0o700) }, "kms.pair[0].intake"},
		"intake missing":     {func() error { return os.Remove(dir + "/intake") }, func() error { return os.Mkdir(dir+"/intake", 0o700) }, "kms.pair[0].intake"},
		"CA missing":         {func() error { return os.Rename(dir+"/pki/ike-ca.crt", dir+"/x") }, func() error { return os.Rename(dir+"/x", dir+"/pki/ike-ca.crt") }, "ipsec.ca"},
		"other's key":        {swap(dir+"/pki/kme.key", dir+"/pki/ike.key"), swap(dir+"/pki/kme.key", dir+"/pki/ike.key"), "tls.sae.cert ipsec.cert"},
		"state is no dir":    {func() error { return errors.Join(os.Remove(dir+"/state"), os.WriteFile(dir+"/state", nil, 0o600)) }, func() error { return errors.Join(os.Remove(dir+"/state"), os.Mkdir(dir+"/state", 0o700)) }, "node.state_dir"},
		"config for all":     {chmod(name, 0o644), chmod(name, 0o600), "-"},
		"config to all":      {chmod(name, 0o666), chmod(name, 0o600), "-"},
		"config's directory": {chmod(dir, 0o755), chmod(dir, 0o700), "-"},
		"config of another":  {chown(name, 970), chown(name, 0), "-"},
		"dir of another":     {chown(dir, 970), chown(dir, 0), "-"},
		"CA to a group":      {chmod(dir+"/pki/km-ca.crt", 0o664), chmod(dir+"/pki/km-ca.crt", 0o644), "tls.km.ca"},
		"CA of another":      {chown(dir+"/pki/ike-ca.crt", 970), chown(dir+"/pki/ike-ca.crt", 0), "ipsec.ca"},
		"certificate to all": {chmod(dir+"/pki/ike.crt", 0o646), chmod(dir+"/pki/ike.crt", 0o644), "ipsec.cert"},
		"key of another":     {chown(dir+"/pki/ike.key", 970), chown(dir+"/pki/ike.key", 0), "ipsec.key"},
		"certificates' dir":  {chmod(dir+"/pki", 0o770), chmod(dir+"/pki", 0o700), "tls.km.ca"}, // once, not for every file there
		"readable dir":       {chmod(dir+"/pki", 0o755), chmod(dir+"/pki", 0o700), ""},
		"root for a group":   {func() error { return os.WriteFile(dir+"/state/root", nil, 0o640) }, func() error { return os.Remove(dir + "/state/root") }, "node.root_file"},
		"root in order":      {func() error { return os.WriteFile(dir+"/state/root", nil, 0o600) }, func() error { return os.Remove(dir + "/state/root") }, ""},
		"sockets' directory": {func() error { return errors.Join(os.Mkdir(dir+"/run", 0o700), os.Chmod(dir+"/run", 0o777)) }, func() error { return os.Remove(dir + "/run") }, "operator.socket"},
		"CA behind a link": {
			func() error {
				return errors.Join(os.Rename(dir+"/pki/ike-ca.crt", dir+"/other/ca"), os.Symlink("../other/ca", dir+"/pki/ike-ca.crt"), os.Chmod(dir+"/other", 0o777))
			},
			func() error {
				return errors.Join(os.Chmod(dir+"/other", 0o700), os.Rename(dir+"/other/ca", dir+"/pki/ike-ca.crt"))
			}, "ipsec.ca",
		},
		"intake by a link": {
			func() error { return errors.Join(os.Remove(dir+"/intake"), os.Symlink("pki", dir+"/intake")) },
			func() error { return errors.Join(os.Remove(dir+"/intake"), os.Mkdir(dir+"/intake", 0o700)) }, "kms.pair[0].intake",
		},
		"state is not yet": {func() error { return os.Remove(dir + "/state") }, func() error { return os.Mkdir(dir+"/state", 0o700) }, ""},
	} {
		t.Run(what, func(t *testing.T) {
			if strings.Contains(what, "another") && os.Geteuid() != 0 {
				t.Skip("only root can give a file away")
			}
			if err := c.spoil(); err != nil {
				t.Fatal(err)
			}
			_, err := LoadNode(name)
			if err := c.mend(); err != nil {
				t.Fatal(err)
			}
			var got []string
			var f *Faults
			if errors.As(err, &f) {
				for _, v := range f.List {
					got = append(got, or(v.Field, "-"))
				}
			}
			if strings.Join(got, " ") != c.field {
				t.Errorf("faults in %q, want %q: %v", got, c.field, err)
			}
		})
	}
	if err := os.Rename(dir+"/pki", dir+"/gone"); err != nil {
		t.Fatal(err)
	}
	if n, err := ReadNode(name); err != nil || n.IPsec == nil {
		t.Errorf("the guard cannot be made without certificates: %v", err)
	}
	if err := os.Rename(dir+"/gone", dir+"/pki"); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadNode(dir + "/none"); err == nil {
		t.Error("a missing file was loaded")
	}
	text := strings.Replace(sample(t), `# feeder = ""`, `feeder = "no-such-user-here"`, 1)
	if err := os.WriteFile(name, []byte(strings.Replace(text, `# state_dir = "/var/lib/q-ipsec"`, `state_dir = "state"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadNode(name); err == nil || !strings.Contains(err.Error(), "kms.pair[0].feeder") {
		t.Errorf("unknown feeder: %v", err)
	}
}

func or(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

func chmod(name string, mode os.FileMode) func() error {
	return func() error { return os.Chmod(name, mode) }
}

func chown(name string, uid int) func() error {
	return func() error { return os.Chown(name, uid, -1) }
}

func swap(a, b string) func() error {
	return func() error {
		return errors.Join(os.Rename(a, a+".x"), os.Rename(b, a), os.Rename(a+".x", b))
	}
}

func TestFeederUID(t *testing.T) {
	for name, want := range map[string]int{"": os.Geteuid(), "0": 0, "1234": 1234, "root": 0} {
		if got, err := FeederUID(name); err != nil || got != want {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
	if _, err := FeederUID("-1"); err == nil {
		t.Error("-1 is no user")
	}
}

func FuzzParseNode(f *testing.F) {
	f.Add(bare(f, "qipsecd.toml"))
	f.Add([]byte("[node]\nname = \"a\"\n[kms]\n[[kms.sae]]\n[ipsec]\n[[ipsec.connection]]\n[[ipsec.connection.child]]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := ParseNode("f", "/", b)
		if (n == nil) == (err == nil) {
			t.Fatalf("%v and %v", n, err)
		}
		if err == nil && n.KMS == nil && n.IPsec == nil {
			t.Fatal("a node without a role")
		}
	})
}

func TestRootCredential(t *testing.T) {
	read := func(value string) (*Node, error) {
		return ParseNode("x", "/etc/q", []byte(strings.Replace(sample(t), `# root_credential = ""`, `root_credential = "`+value+`"`, 1)))
	}
	for _, bad := range []string{"two words", ".hidden", strings.Repeat("x", 256)} {
		if _, err := read(bad); err == nil || !strings.Contains(err.Error(), "node.root_credential") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for value, want := range map[string]string{"": "", "/a/b": "/a/b", "secrets/c": "/etc/q/secrets/c", "qipsec-root": "/run/credentials/qipsec-root"} {
		n, err := read(value)
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv(credentialsEnv, "/run/credentials")
		if got, err := n.CredentialPath(); got != want || err != nil {
			t.Errorf("%q: %q, %v; want %q", value, got, err, want)
		}
		t.Setenv(credentialsEnv, "")
		if got, err := n.CredentialPath(); (err != nil) != (value == "qipsec-root") {
			t.Errorf("%q outside of systemd: %q, %v", value, got, err)
		}
	}
}

func TestInventoryURL(t *testing.T) {
	read := func(url, file string) (*Node, error) {
		text := strings.Replace(sample(t), `# inventory = "sqlite:/var/lib/q-ipsec/inventory.db"`, `inventory = "`+url+`"`, 1)
		return ParseNode("x", "/etc/q", []byte(strings.Replace(text, `# inventory_password_file = ""`, `inventory_password_file = "`+file+`"`, 1)))
	}
	for _, tc := range []struct{ url, file, inventory, passwordFile string }{
		{"", "", "sqlite:/var/lib/q-ipsec/inventory.db", ""},
		{"sqlite:/srv/q/x.db", "", "sqlite:/srv/q/x.db", ""},
		{"postgres://u@h/d", "pw", "postgres://u@h/d", "/etc/q/pw"},
		{"postgresql:///d?host=/run/postgresql", "", "postgresql:///d?host=/run/postgresql", ""},
		{"postgres://u@%2Frun%2Fpostgresql/d", "", "postgres://u@%2Frun%2Fpostgresql/d", ""},
		{"postgres://u:pw@h1,h2:5433/d?target_session_attrs=read-write", "", "postgres://u:pw@h1,h2:5433/d?target_session_attrs=read-write", ""},
	} {
		n, err := read(tc.url, tc.file)
		if err != nil || n.Inventory != tc.inventory || n.InventoryPassword != tc.passwordFile {
			t.Errorf("%q, %q: %+v, %v", tc.url, tc.file, n, err)
		}
	}
	for _, tc := range []struct{ url, file, says string }{
		{"/srv/x.db", "", "want sqlite:"},
		{"sqlite:x.db", "", "want sqlite:"},
		{"mysql://u:s3cret@h/d", "", "want sqlite:"},
		{"postgres:u:s3cret@h", "", "want sqlite:"},
		{"postgres://u:s3cret%zz@h/d", "", "not a URL"},
		{"postgres://u:s3cret@h", "", "names no database"},
		{"postgres://h/d?password=s3cret&x=%zz", "", "cannot be read"},
		{"postgres://u:s3cret@h/d", "pw", "has a password"},
		{"postgres://h/d?password=s3cret", "pw", "has a password"},
		{"", "pw", "only PostgreSQL"},
	} {
		if _, err := read(tc.url, tc.file); err == nil || !strings.Contains(err.Error(), "node.inventory") || !strings.Contains(err.Error(), tc.says) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q, %q: %v", tc.url, tc.file, err)
		}
	}
}
