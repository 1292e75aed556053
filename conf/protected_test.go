package conf

import (
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestProtected(t *testing.T) {
	net := func(list ...string) (all []netip.Prefix) {
		for _, s := range list {
			all = append(all, netip.MustParsePrefix(s))
		}
		return all
	}
	for name, c := range map[string]struct {
		old, repl       string
		remotes, routed []netip.Prefix
	}{
		"as it is":           {"", "", net("10.2.0.0/24"), nil},
		"a key elsewhere":    {"# lease = 1024  ", "leese = 64 # ", net("10.2.0.0/24"), nil},
		"a value elsewhere":  {"# lease = 1024  ", `lease = "64" # `, net("10.2.0.0/24"), nil},
		"an address at odds": {`remote_addr = "192.0.2.2"`, `remote_addr = 7`, net("10.2.0.0/24"), nil},
		"no policy at all":   {`# policy = "required"`, `policy = "mandatory"`, net("10.2.0.0/24"), nil},
		"a number as policy": {`# policy = "required"`, `policy = 3`, net("10.2.0.0/24"), nil},
		"optional":           {`# policy = "required"`, `policy = "optional"`, nil, nil},
		"off":                {`# policy = "required"`, `policy = "off"`, nil, nil},
		"half a list":        {`["10.2.0.0/24"]`, `["here", 7, "10.2.0.9/24", "10.3.0.1", "::ffff:10.4.0.0/112", "fe80::1%eth0"]`, net("10.2.0.0/24", "10.3.0.1/32", "10.4.0.0/16", "fe80::1/128"), nil},
		"no list":            {`["10.2.0.0/24"]`, `"10.2.0.0/24"`, net("10.2.0.0/24"), nil},
		"behind interface":   {"# if_id_out = 0", "if_id_out = 7", nil, net("10.2.0.0/24")},
		"odd interface":      {"# if_id_out = 0", `if_id_out = "7"`, net("10.2.0.0/24"), nil},
		"one connection":     {"[[ipsec.connection]]", "[ipsec.connection]", net("10.2.0.0/24"), nil},
	} {
		text := sample(t)
		if !strings.Contains(text, c.old) {
			t.Fatalf("the sample has no %q", c.old)
		}
		if name == "one connection" {
			text = strings.Replace(text, "[[ipsec.connection.child]]", "[ipsec.connection.child]", 1)
		}
		got, err := parseProtected("/etc/q-ipsec", []byte(strings.Replace(text, c.old, c.repl, 1)))
		if err != nil || got.Off || !slices.Equal(got.Remotes, c.remotes) || !slices.Equal(got.Routed, c.routed) || got.StateDir != defaultStateDir {
			t.Errorf("%s: %+v, %v, want %v and %v", name, got, err, c.remotes, c.routed)
		}
	}
	if got, err := parseProtected("/etc", []byte("[node]\nstate_dir = \"x\"\n[ipsec]\nguard = false\n")); err != nil || !got.Off || got.StateDir != "/etc/x" {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := parseProtected("/etc", []byte("[node")); err == nil {
		t.Error("no TOML, no fault")
	}
	if _, err := ReadProtected("/nonexistent"); err == nil {
		t.Error("no file, no fault")
	}
}

// bare is a sample without its comments: the fuzzer spends its time on what means
// something.
func bare(tb testing.TB, name string) []byte {
	tb.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		tb.Fatal(err)
	}
	return regexp.MustCompile(`(?m)[ \n]*#.*$`).ReplaceAll(b, nil)
}

func FuzzProtected(f *testing.F) {
	f.Add(bare(f, "qipsecd.toml"))
	f.Add([]byte("[ipsec]\nconnection = [{child = [{remote_ts = [\"0.0.0.0/0\", \"::ffff:1.2.3.4\", \"10.2.0.9/24\"], if_id_out = 1}]}]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseProtected("/", b)
		for _, r := range slices.Concat(p.Remotes, p.Routed) {
			if !r.IsValid() || r != r.Masked() || r.Addr().Is4In6() || r.Addr().Zone() != "" || r.Bits() == 0 && slices.Contains(p.Routed, r) {
				t.Fatalf("%v is nothing that a guard can hold", r)
			}
		}
		n, errNode := ParseNode("f", "/", b)
		if errNode != nil || n.IPsec == nil {
			return
		}
		if err != nil || p.Off == n.IPsec.Guard || p.StateDir != n.StateDir {
			t.Fatalf("of a good config %+v is read, %v", p, err)
		}
		if remotes, _ := n.Guarded(); n.IPsec.Guard && (!slices.Equal(p.Remotes, remotes) || !slices.Equal(p.Routed, n.Routed())) {
			t.Fatalf("of a good config %+v is read, not %v and %v", p, remotes, n.Routed())
		}
	})
}
