// Package guard gives the guard of a node: that of its config, and the last good one
// where the config does not read. qipsec installs it at boot, qipsecd at each start.
package guard

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/sad"
)

// Config is the guard of n; the zero GuardConfig where it guards nothing.
func Config(n *conf.Node) (c sad.GuardConfig) {
	if n.IPsec == nil || !n.IPsec.Guard {
		return c
	}
	remotes, allow := n.Guarded()
	c.Remotes, c.Routed = remotes, n.Routed()
	if len(Networks(c)) == 0 {
		return sad.GuardConfig{}
	}
	for _, v := range allow {
		c.Allow = append(c.Allow, sad.Channel(v))
	}
	return c
}

// Networks are those that c guards.
func Networks(c sad.GuardConfig) []string {
	var all []string
	for _, p := range slices.Concat(c.Remotes, c.Routed) {
		all = append(all, p.String())
	}
	return all
}

func file(stateDir string) string { return filepath.Join(stateDir, "guard") }

// Save keeps the guard of n in the state directory, made if it is not there.
// stateDir overrides that of n if it is not empty.
func Save(n *conf.Node, stateDir string, now time.Time) error {
	if stateDir == "" {
		stateDir = n.StateDir
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return fmt.Errorf("save the guard: %w", err)
	}
	return sad.SaveGuard(file(stateDir), sad.SavedGuard{Config: n.File, Time: now.UTC().Truncate(time.Second), Guard: Config(n)})
}

// LastGood is the guard to install where the file config has faults: what Save kept,
// and what else the config says to protect as far as that reads. Its report says
// where that comes from, a line each. The error says that nothing is known: neither
// gave a guard, not even an empty one.
//
// stateDir is where Save kept it; empty: where the config says, or the default.
func LastGood(stateDir, config string) (c sad.GuardConfig, report []string, err error) {
	p, errRead := conf.ReadProtected(config)
	if errRead == nil && p.Off {
		return c, []string{"it says guard = false"}, nil
	}
	if stateDir == "" {
		stateDir = p.StateDir
	}
	saved, errSaved := sad.LoadGuard(file(stateDir))
	if errSaved == nil {
		c = saved.Guard
		report = append(report, fmt.Sprintf("last good guard, of %s, from %s: %s", saved.Time.Format(time.RFC3339), saved.Config, list(Networks(c))))
	} else {
		report = append(report, "no last good guard: "+errSaved.Error())
	}
	more := sad.GuardConfig{Remotes: p.Remotes, Routed: p.Routed}
	switch {
	case errRead != nil:
		report = append(report, "nothing of the config reads: "+errRead.Error())
	case len(Networks(more)) > 0:
		report = append(report, "what the config names, as far as it reads: "+list(Networks(more)))
	}
	c.Remotes = union(c.Remotes, more.Remotes)
	// A block is more than a route: what has had one keeps it.
	c.Routed = union(c.Routed, slices.DeleteFunc(more.Routed, func(r netip.Prefix) bool { return slices.Contains(c.Remotes, r) }))
	if errSaved != nil && len(Networks(c)) == 0 {
		return c, report, errors.New("nothing is known that is to be protected")
	}
	return c, report, nil
}

func union[T comparable](a, b []T) []T {
	for _, v := range b {
		if !slices.Contains(a, v) {
			a = append(a, v)
		}
	}
	return a
}

func list(all []string) string {
	if len(all) == 0 {
		return "no network"
	}
	return fmt.Sprint(all)
}
