package conf

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestSimSample(t *testing.T) {
	text, err := os.ReadFile("qkdsim.toml")
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseSim("qkdsim.toml", "/etc/q-ipsec", text)
	if err != nil {
		t.Fatal(err)
	}
	if s.Master.Dir != "/etc/q-ipsec/intake-a" || s.Slave.SFTP == nil || s.Slave.SFTP.HostKey != "/etc/q-ipsec/sftp-host.pub" || s.Speed != 1 || s.KeysPerFile != 1000 {
		t.Errorf("sample reads as %+v", s)
	}
	// Every default that the sample shows is the one that holds: with the
	// comment signs off nothing changes but the optional control section.
	on := uncomment(string(text))
	all, err := ParseSim("qkdsim.toml", "/etc/q-ipsec", []byte(on))
	if err != nil {
		t.Fatal(err)
	}
	if all.Control == nil || all.Control.Listen.Port() != 8443 {
		t.Errorf("control section reads as %+v", all.Control)
	}
	all.Control = nil
	if !reflect.DeepEqual(s, all) {
		t.Errorf("a default in the sample is wrong:\n%+v\n%+v", s, all)
	}
}

// uncomment turns "# name = value" and "# [section]" on.
func uncomment(text string) string {
	var out []string
	for _, l := range strings.Split(text, "\n") {
		rest, ok := strings.CutPrefix(l, "# ")
		name, _, eq := strings.Cut(rest, " = ")
		if ok && (strings.HasPrefix(rest, "[") || eq && !strings.ContainsAny(name, " :`")) {
			l = rest
		}
		out = append(out, l)
	}
	return strings.Join(out, "\n")
}

func TestSimFaults(t *testing.T) {
	const good = `
[pair]
id = "0f4d7c9e-3b1a-8c2d-9e4f-5a6b7c8d9e0f"
seed = 1
[link]
device = "snspd-1ghz"
[master]
node = "a"
qkd_id = "1c0ffee0-0000-8000-8000-00000000000a"
dir = "a"
[slave]
node = "b"
qkd_id = "1c0ffee0-0000-8000-8000-00000000000b"
dir = "b"
`
	if _, err := ParseSim("x", "/", []byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ old, repl, field string }{
		{"seed = 1", "", "pair.state_file"},
		{"seed = 1", "seed = -1", "pair.seed"},
		{"seed = 1", "seed = 1\nspeed = 0.0", "pair.speed"},
		{"seed = 1", "seed = 1\nspeed = nan", "pair.speed"},
		{"seed = 1", "seed = 1\nkeys_per_file = 0", "pair.keys_per_file"},
		{"seed = 1", "seed = 1\nhash = \"sha-1\"", "pair.hash"},
		{"snspd", "other", "link.device"},
		{`device =`, "km = -1.0\ndevice =", "link.km"},
		{`dir = "a"`, "", "master.dir"},
		{`dir = "b"`, "dir = \"b\"\n[slave.sftp]\naddress = \"x\"", "slave.dir"},
		{`dir = "b"`, "[slave.sftp]\naddress = \"x\"", "slave.sftp.user"},
		{"00000000000b", "00000000000a", "slave.qkd_id"},
		{"[link]", "[weather]\nlose_slave = 1.5\n[link]", "weather.lose_slave"},
		{"[link]", "[weather]\noutage_every = \"often\"\n[link]", "weather.outage_every"},
		{"[link]", "[control]\nlisten = \"x\"\n[link]", "control.listen"},
		{"[link]", "[link]\nlenght = 3", "link.lenght"},
	} {
		_, err := ParseSim("x", "/", []byte(strings.Replace(good, c.old, c.repl, 1)))
		var f *Faults
		if !errors.As(err, &f) {
			t.Errorf("%q for %q: %v", c.repl, c.old, err)
			continue
		}
		found := false
		for _, v := range f.List {
			found = found || v.Field == c.field
		}
		if !found {
			t.Errorf("%q for %q: no fault at %s in %v", c.repl, c.old, c.field, err)
		}
	}
}

// What others can change would let them choose keys, or the host that gets them.
func TestLoadSimChecksFiles(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "qkdsim.toml")
	text, err := os.ReadFile("qkdsim.toml")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(name, text, 0o644), os.WriteFile(dir+"/sftp.key", nil, 0o600),
		os.WriteFile(dir+"/sftp-host.pub", nil, 0o644), os.WriteFile(dir+"/qkdsim.seq", nil, 0o600), os.Mkdir(dir+"/intake-a", 0o755)); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSim(name); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		file         string
		spoilt, good os.FileMode
		field        string
	}{
		"config":      {"qkdsim.toml", 0o666, 0o644, ""},
		"directory":   {"", 0o777, 0o755, ""},
		"key":         {"sftp.key", 0o640, 0o600, "slave.sftp.key"},
		"host key":    {"sftp-host.pub", 0o664, 0o644, "slave.sftp.host_key"},
		"seq":         {"qkdsim.seq", 0o606, 0o600, "pair.state_file"},
		"destination": {"intake-a", 0o777, 0o755, "master.dir"},
	} {
		file := filepath.Join(dir, c.file)
		if err := os.Chmod(file, c.spoilt); err != nil {
			t.Fatal(err)
		}
		_, err := LoadSim(name)
		var f *Faults
		if !errors.As(err, &f) || len(f.List) != 1 || f.List[0].Field != c.field || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.Chmod(file, c.good); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzParseSim(f *testing.F) {
	f.Add(bare(f, "qkdsim.toml"))
	f.Add([]byte("[pair]\nid = \"x\""))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := ParseSim("x", "/", b); (s == nil) == (err == nil) {
			t.Errorf("%v, %v", s, err)
		}
	})
}
