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
