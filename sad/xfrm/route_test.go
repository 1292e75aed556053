package xfrm

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Blackhole routes of the guard catch what has no better route, in both
// families; routes of others are neither listed nor deleted. It needs no ESP.
func TestKernelBlackholes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: a network namespace of its own")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with its namespace
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	command(t, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
	for _, dev := range []string{"lo", "v0", "v1"} {
		command(t, "ip", "link", "set", dev, "up")
	}
	for family, list := range map[string][]string{"-4": {"10.1.0.0/16", "default"}, "-6": {"2001:db8:1::/48", "default"}} {
		for _, to := range list {
			command(t, "ip", family, "route", "add", to, "dev", "v0")
		}
	}
	command(t, "ip", "route", "add", "blackhole", "10.9.0.0/16", "metric", "2147483647")
	command(t, "ip", "route", "add", "blackhole", "default", "metric", "7", "proto", "81") // without the metric: not ours
	command(t, "ip", "-6", "route", "add", "blackhole", "default", "metric", "2000", "proto", "81")
	four, six := netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("2001:db8:1::/48")
	for _, p := range []netip.Prefix{six, four} {
		if err := c.AddBlackhole(ctx, p); err != nil {
			t.Fatal(err)
		}
		if err := c.AddBlackhole(ctx, p); !errors.Is(err, ErrExists) {
			t.Errorf("again: %v", err)
		}
	}
	if list, err := c.Blackholes(ctx); err != nil || !slices.Equal(list, []netip.Prefix{four, six}) {
		t.Errorf("%v, %v", list, err)
	}
	reaches := func(to string) bool { return exec.Command("ip", "route", "get", to).Run() == nil }
	for _, to := range []string{"10.1.0.5", "2001:db8:1::5"} {
		if !reaches(to) {
			t.Errorf("the blackhole wins over the route to %s:\n%s", to, command(t, "ip", "route"))
		}
	}
	command(t, "ip", "route", "del", "10.1.0.0/16", "dev", "v0")
	command(t, "ip", "-6", "route", "del", "2001:db8:1::/48", "dev", "v0")
	for to, want := range map[string]bool{"10.1.0.5": false, "2001:db8:1::5": false, "10.2.0.5": true, "2001:db8:2::5": true} {
		if got := reaches(to); got != want {
			t.Errorf("without its route %s is reached: %v, want %v", to, got, want)
		}
	}
	for _, p := range []netip.Prefix{four, six} {
		if err := c.DeleteBlackhole(ctx, p); err != nil {
			t.Fatal(err)
		}
		if err := c.DeleteBlackhole(ctx, p); !errors.Is(err, ErrNotFound) {
			t.Errorf("again: %v", err)
		}
	}
	if err := c.DeleteBlackhole(ctx, netip.MustParsePrefix("10.9.0.0/16")); !errors.Is(err, ErrNotFound) {
		t.Errorf("another's route: %v", err)
	}
	if list, err := c.Blackholes(ctx); err != nil || len(list) != 0 || reaches("10.9.0.1") {
		t.Errorf("left: %v, %v", list, err)
	}
}
