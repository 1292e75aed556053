package conf

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The journal of installed SAs is beside the plugin's socket. A unit that lets
// systemd remove that directory at each stop would have every restart of
// qipsecd take its tunnels down.
func TestUnitKeepsTheJournalOverARestart(t *testing.T) {
	b, err := os.ReadFile("systemd/qipsecd.service")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	name := strings.TrimPrefix(filepath.Dir(defaultPlugin), "/run/")
	for _, want := range []string{"RuntimeDirectory=" + name, "RuntimeDirectoryPreserve=yes"} {
		if !slices.Contains(lines, want) {
			t.Errorf("qipsecd.service lacks %s", want)
		}
	}
}

// The README says where the programs go; the units start them from there.
func TestUnitsStartWhatIsInstalled(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	units, err := filepath.Glob("systemd/*.service")
	if err != nil || len(units) == 0 {
		t.Fatal(err)
	}
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut(string(b), "\nExecStart=")
		dir := filepath.Dir(strings.Fields(rest)[0])
		if !ok || !strings.Contains(string(readme), "into "+dir+")") {
			t.Errorf("%s starts a program from %s; the README installs elsewhere", u, dir)
		}
	}
}

// What must not run without the guard requires it and comes after it; an ordinary
// restart of the guard must not take the tunnels down with it.
func TestUnitOfTheGuard(t *testing.T) {
	b, err := os.ReadFile("systemd/qipsec-guard.service")
	if err != nil {
		t.Fatal(err)
	}
	words := map[string][]string{}
	for _, l := range strings.Split(string(b), "\n") {
		if name, value, ok := strings.Cut(l, "="); ok && !strings.HasPrefix(l, "#") {
			words[name] = append(words[name], strings.Fields(value)...)
		}
	}
	for _, unit := range []string{"strongswan.service", "strongswan-starter.service", "qipsecd.service"} {
		if !slices.Contains(words["RequiredBy"], unit) || !slices.Contains(words["Before"], unit) {
			t.Errorf("%s may run without the guard", unit)
		}
	}
	if !slices.Contains(words["Before"], "network-pre.target") || !slices.Contains(words["Wants"], "network-pre.target") {
		t.Error("the network may come before the guard")
	}
	if !slices.Equal(words["RefuseManualStop"], []string{"yes"}) || len(words["ExecReload"]) == 0 {
		t.Error("a restart takes along what requires the guard")
	}
	// The last good guard is there, and has to be written before anything else runs.
	if got := words["StateDirectory"]; len(got) != 1 || filepath.Join("/var/lib", got[0]) != defaultStateDir || !slices.Equal(words["StateDirectoryMode"], []string{"0700"}) {
		t.Errorf("StateDirectory=%v", got)
	}
}
