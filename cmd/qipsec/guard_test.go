package main

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/sad"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// memorySPD is a kernel of nothing but policies and blackhole routes.
type memorySPD struct {
	policies []xfrm.Policy
	routes   []netip.Prefix
}

func (m *memorySPD) AddPolicy(_ context.Context, p xfrm.Policy) error {
	m.policies = append(m.policies, p)
	return nil
}

func (m *memorySPD) DeletePolicy(_ context.Context, p xfrm.Policy) error {
	m.policies = slices.DeleteFunc(m.policies, func(q xfrm.Policy) bool { return q.Selector() == p.Selector() })
	return nil
}

func (m *memorySPD) Policies(context.Context) ([]xfrm.Policy, error) {
	return slices.Clone(m.policies), nil
}

func (m *memorySPD) AddBlackhole(_ context.Context, to netip.Prefix) error {
	m.routes = append(m.routes, to)
	return nil
}

func (m *memorySPD) DeleteBlackhole(context.Context, netip.Prefix) error { return nil }

func (m *memorySPD) Blackholes(context.Context) ([]netip.Prefix, error) {
	return slices.Clone(m.routes), nil
}

// blocked are the networks to which nothing may go out.
func (m *memorySPD) blocked() string {
	var all []string
	for _, p := range m.policies {
		if p.Dir == xfrm.Out && p.Block && !slices.Contains(all, p.Dst.String()) {
			all = append(all, p.Dst.String())
		}
	}
	return strings.Join(all, " ")
}

func (m *memorySPD) allowed() (n int) {
	for _, p := range m.policies {
		if p.Dir == xfrm.Out && !p.Block {
			n++
		}
	}
	return n
}

// guardBoots is a node that boots again and again with the config of the day.
type guardBoots struct {
	t      *testing.T
	config string
	spd    *memorySPD
}

func newGuardBoots(t *testing.T) *guardBoots {
	dir := t.TempDir()
	return &guardBoots{t: t, config: filepath.Join(dir, "qipsecd.toml")}
}

// with makes the sample the config, changed.
func (g *guardBoots) with(change ...string) {
	g.t.Helper()
	b, err := os.ReadFile("../../conf/qipsecd.toml")
	if err != nil {
		g.t.Fatal(err)
	}
	text := strings.Replace(string(b), `# state_dir = "/var/lib/q-ipsec"`, `state_dir = "state"`, 1)
	for i := 0; i < len(change); i += 2 {
		if !strings.Contains(text, change[i]) {
			g.t.Fatalf("the sample has no %q", change[i])
		}
		text = strings.Replace(text, change[i], change[i+1], 1)
	}
	if err := os.WriteFile(g.config, []byte(text), 0o600); err != nil {
		g.t.Fatal(err)
	}
}

// boot gives the kernel of a machine that has just run qipsec-guard.service.
func (g *guardBoots) boot(more ...string) (code int, out, errs string) {
	g.spd = &memorySPD{}
	return g.run("install", more...)
}

func (g *guardBoots) run(command string, more ...string) (code int, out, errs string) {
	g.t.Helper()
	var o, e bytes.Buffer
	a := &app{out: &o, err: &e, now: time.Now, guard: sad.NewGuard(g.spd, filepath.Join(g.t.TempDir(), "removed"))}
	code = run(g.t.Context(), a, append([]string{"guard", command, "--config", g.config}, more...))
	return code, o.String(), e.String()
}

// With a config that has faults, the guard of the last good one goes in.
func TestGuardOutlivesTheConfig(t *testing.T) {
	const peer = `["10.2.0.0/24"]`
	misspelt := []string{"# lease = 1024  ", "leese = 64 # "}
	for name, c := range map[string]struct {
		change  []string
		blocked string
		says    string
	}{
		"misspelt key":       {misspelt, "10.2.0.0/24 192.0.2.2/32", "leese"},
		"no TOML":            {[]string{"[kms]\n", "[kms\n"}, "", "nothing of the config reads"},
		"no connection left": {append([]string{"[[ipsec.connection]]", "[[ipsec.conection]]", "[[ipsec.connection.child]]", "[[ipsec.conection.child]]"}, misspelt...), "10.2.0.0/24 192.0.2.2/32", "conection"},
		"one more network":   {append([]string{peer, `["10.2.0.0/24", "10.5.0.0/24"]`}, misspelt...), "10.2.0.0/24 192.0.2.2/32 10.5.0.0/24", "10.5.0.0/24"},
		"another interface":  {append([]string{"# if_id_out = 0", "if_id_out = 7"}, misspelt...), "10.2.0.0/24 192.0.2.2/32", "leese"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuardBoots(t)
			g.with(peer, `["10.2.0.0/24", "192.0.2.2/32"]`)
			if code, _, errs := g.boot(); code != exitOK || errs != "" || g.spd.blocked() != "10.2.0.0/24 192.0.2.2/32" || g.spd.allowed() == 0 {
				t.Fatalf("good config: exit %d, %s, blocked: %s", code, errs, g.spd.blocked())
			}
			allowed := g.spd.allowed()
			if fi, err := os.Stat(filepath.Join(filepath.Dir(g.config), "state", "guard")); err != nil || fi.Mode() != 0o600 {
				t.Fatalf("%v, %v", fi, err)
			}
			g.with(c.change...)
			more := []string{}
			want := c.blocked
			if want == "" { // where state_dir does not read
				more = []string{"--state-dir", filepath.Join(filepath.Dir(g.config), "state")}
				want = "10.2.0.0/24 192.0.2.2/32"
			}
			code, out, errs := g.boot(more...)
			if code != exitOK || g.spd.blocked() != want || g.spd.allowed() != allowed || !strings.Contains(out, "guarded: [10.2.0.0/24") {
				t.Errorf("exit %d, %s%s, blocked: %s, want %s; %d allow rules, want %d", code, out, errs, g.spd.blocked(), want, g.spd.allowed(), allowed)
			}
			for _, must := range []string{"WARNING", "last good guard, of 20", c.says, "qipsecd -check"} {
				if !strings.Contains(errs, must) {
					t.Errorf("%q is not said: %s", must, errs)
				}
			}
			if code, out, _ := g.run("status", more...); code != exitOK || !strings.Contains(out, "in place") {
				t.Errorf("status: exit %d, %s", code, out)
			}
			if err := os.Remove(g.config); err != nil {
				t.Fatal(err)
			}
			if code, _, errs := g.boot("--state-dir", filepath.Join(filepath.Dir(g.config), "state")); code != exitOK || g.spd.blocked() != "10.2.0.0/24 192.0.2.2/32" {
				t.Errorf("no config: exit %d, %s, blocked: %s", code, errs, g.spd.blocked())
			}
		})
	}
}

// Without a guard of before, what the config names is taken; with nothing at all it
// is a failure, for units to wait upon.
func TestGuardOfAFaultyFirstConfig(t *testing.T) {
	g := newGuardBoots(t)
	g.with("# lease = 1024  ", "leese = 64 # ")
	if code, _, errs := g.boot(); code != exitOK || g.spd.blocked() != "10.2.0.0/24" || !strings.Contains(errs, "no last good guard") {
		t.Errorf("exit %d, %s, blocked: %s", code, errs, g.spd.blocked())
	}
	g.with("[kms]\n", "[kms\n")
	empty := filepath.Join(filepath.Dir(g.config), "none")
	if code, _, errs := g.boot("--state-dir", empty); code != exitFailed || len(g.spd.policies) != 0 || !strings.Contains(errs, "NOTHING IS GUARDED") {
		t.Errorf("exit %d, %s, blocked: %s", code, errs, g.spd.blocked())
	}
	g.with("# lease = 1024  ", "leese = 64 # ")
	state := filepath.Join(filepath.Dir(g.config), "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(state, "guard"), []byte("q-ipsec guard 1\n{}\n00\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := g.boot(); code != exitOK || g.spd.blocked() != "10.2.0.0/24" || !strings.Contains(errs, "damaged") {
		t.Errorf("exit %d, %s, blocked: %s", code, errs, g.spd.blocked())
	}
}

// Nothing to guard is no failure, and what the kernel has stays: a network that was
// protected does not become clear by a change of the config.
func TestGuardOfNothing(t *testing.T) {
	g := newGuardBoots(t)
	g.with()
	if code, _, errs := g.boot(); code != exitOK {
		t.Fatal(errs)
	}
	for _, change := range [][]string{{`# policy = "required"`, `policy = "optional"`}, {"# guard = true", "guard = false"}} {
		g.with(change...)
		if code, out, errs := g.run("install"); code != exitOK || errs != "" || !strings.Contains(out, "nothing is guarded") || g.spd.blocked() != "10.2.0.0/24" {
			t.Errorf("exit %d: %s%s, blocked: %s", code, out, errs, g.spd.blocked())
		}
		if code, _, _ := g.run("status"); code != exitOK {
			t.Errorf("status: exit %d", code)
		}
		// The last good config guarded nothing: that is known, and no failure either.
		g.with(append([]string{"# lease = 1024  ", "leese = 64 # "}, change...)...)
		if code, out, errs := g.boot(); code != exitOK || g.spd.blocked() != "" || !strings.Contains(errs, "WARNING") {
			t.Errorf("exit %d: %s%s, blocked: %s", code, out, errs, g.spd.blocked())
		}
		g.with()
		if code, _, errs := g.boot(); code != exitOK {
			t.Fatal(errs)
		}
	}
}

// A full or missing state directory keeps no guard out of the kernel.
func TestGuardThatCannotBeKept(t *testing.T) {
	g := newGuardBoots(t)
	g.with()
	if err := os.WriteFile(filepath.Join(filepath.Dir(g.config), "state"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := g.boot(); code != exitOK || g.spd.blocked() != "10.2.0.0/24" || !strings.Contains(errs, "WARNING") {
		t.Errorf("exit %d, %s, blocked: %s", code, errs, g.spd.blocked())
	}
}
