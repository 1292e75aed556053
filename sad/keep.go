package sad

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// GuardMarker is the file that Remove leaves for Keep: below /run, because a boot
// puts the guard in place again, and with the number of the network namespace, as
// the guard is one namespace's and the directory may be several's.
func GuardMarker() (string, error) {
	ns, err := os.Readlink("/proc/self/ns/net") // "net:[4026531840]"
	if err != nil {
		return "", fmt.Errorf("sad: guard: which network namespace this is: %w", err)
	}
	return filepath.Join("/run/q-ipsec", "guard-removed-"+strings.Trim(ns, "net:[]")), nil
}

// noteRemoval makes the marker. Where there is no directory for it no qipsecd has
// run that would read it.
func (g *Guard) noteRemoval() error {
	f, err := os.OpenFile(g.marker, os.O_WRONLY|os.O_CREATE, 0o600)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("sad: guard: note that it was removed: %w", err)
	}
	return f.Close()
}

func (g *Guard) forgetRemoval() error {
	if err := os.Remove(g.marker); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sad: guard: forget that it was removed: %w", err)
	}
	return nil
}

// GuardState is what Keep found.
type GuardState uint8

// The states of the guard.
const (
	GuardWhole   GuardState = iota + 1 // in place
	GuardMended                        // it was not: what was missing is in place again
	GuardRemoved                       // by the operator
)

// Keep puts back what is missing of the guard of c, unless the operator has removed
// it.
func (g *Guard) Keep(ctx context.Context, c GuardConfig) (GuardState, error) {
	if whole, err := g.Installed(ctx, c); whole || err != nil {
		return GuardWhole, err
	}
	if _, err := os.Lstat(g.marker); err == nil {
		return GuardRemoved, nil
	}
	return GuardMended, g.install(ctx, c)
}
