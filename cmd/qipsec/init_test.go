package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A plan that does not fit is told before anything is written, so that the
// corrected call finds the place as it was.
func TestInitRefusesBeforeItWrites(t *testing.T) {
	for name, c := range map[string]struct{ flags, says string }{
		"host bits":        {"--subnet 10.1.0.1/24,10.2.0.0/24", "10.1.0.0/24"},
		"mixed subnets":    {"--subnet 10.1.0.0/24,2001:db8:b::/64", "famil"},
		"mixed addresses":  {"--address 192.0.2.1,2001:db8::2", "famil"},
		"mixed KM":         {"--km-address 192.0.2.1,2001:db8::2", "famil"},
		"equal addresses":  {"--address 192.0.2.1,192.0.2.1", "both"},
		"equal KM":         {"--km-address 198.51.100.1,198.51.100.1", "both"},
		"equal subnets":    {"--subnet 10.1.0.0/24,10.1.0.0/24", "both"},
		"any address":      {"--address 0.0.0.0,192.0.2.2", "unicast"},
		"group address":    {"--km-address 224.0.0.1,192.0.2.2", "unicast"},
		"guard's selector": {"--subnet 0.0.0.0/1,10.2.0.0/24", "0.0.0.0/1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			out := filepath.Join(dir, "site")
			args := append([]string{"init", "--pair", "a", "b", "--out", out}, strings.Fields(c.flags)...)
			code, _, errs := qipsec(t, args...)
			if code == exitOK || !strings.Contains(errs, c.says) {
				t.Errorf("exit %d: %s", code, errs)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
			mustRun(t, "init", "--pair", "a", "b", "--out", out)
		})
	}
}

// A failure in the middle leaves nothing, and takes nothing that was there.
func TestInitFailsWithoutATrace(t *testing.T) {
	dir := t.TempDir()
	for name, spoil := range map[string]func(out string) error{
		"a file in the way":  func(out string) error { return os.WriteFile(filepath.Join(out, "b"), nil, 0o600) },
		"CAs that are there": func(out string) error { return os.Mkdir(filepath.Join(out, "ca"), 0o700) },
		"a long way":         func(string) error { return nil }, // the sockets of --here do not fit
	} {
		t.Run(name, func(t *testing.T) {
			out := filepath.Join(dir, name)
			if name == "a long way" {
				out = filepath.Join(dir, strings.Repeat("long", 20))
			}
			if err := os.Mkdir(out, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := spoil(out); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadDir(out)
			if err != nil {
				t.Fatal(err)
			}
			if code, _, errs := qipsec(t, "init", "--pair", "a", "b", "--here", "--out", out); code != exitFailed || errs == "" {
				t.Errorf("exit %d: %s", code, errs)
			}
			after, err := os.ReadDir(out)
			if err != nil || len(after) != len(before) {
				t.Errorf("there was %v, there is %v, %v", before, after, err)
			}
		})
	}
	full := filepath.Join(dir, "full")
	if err := os.Mkdir(full, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=16k"); err != nil {
		t.Skipf("a full disk needs a mount: %v", err)
	}
	defer func() {
		if err := unix.Unmount(full, 0); err != nil {
			t.Error(err)
		}
	}()
	if code, _, errs := qipsec(t, "init", "--pair", "a", "b", "--out", filepath.Join(full, "site")); code != exitFailed || !strings.Contains(errs, "no space left") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if left, err := os.ReadDir(full); err != nil || len(left) != 0 {
		t.Errorf("on a full disk %v is left, %v", left, err)
	}
}

// --force replaces what init writes and nothing else.
func TestInitForceKeepsOtherFiles(t *testing.T) {
	out := initPair(t)
	other := filepath.Join(out, "a", "pki", "saes", "line-7.crt")
	if err := os.WriteFile(other, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "init", "--pair", "a", "b", "--out", out, "--here", "--force")
	if b, err := os.ReadFile(other); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	if list, err := os.ReadDir(out); err != nil || len(list) != 3 {
		t.Errorf("%v, %v", list, err)
	}
}

// Nobody writes into the FIFO; an open that waits for that could not be ended.
func TestFIFOIsNoFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"keyfile", "inspect", name}, {"pki", "show", name}} {
		done := make(chan string, 1)
		go func() {
			code, _, errs := qipsec(t, args...)
			if code != exitFailed {
				errs = "exit code is not 1: " + errs
			}
			done <- errs
		}()
		select {
		case errs := <-done:
			if !strings.Contains(errs, "not a regular file") {
				t.Errorf("%q: %s", args, errs)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%q waits for a writer", args)
		}
	}
}

func TestHelpOfAGroup(t *testing.T) {
	for _, args := range [][]string{{"help", "guard"}, {"guard", "--help"}, {"guard"}} {
		code, out, errs := qipsec(t, args...)
		text := out
		want := exitOK
		if len(args) == 1 {
			text, want = errs, exitUsage
		}
		if code != want || !strings.Contains(text, "guard install") || !strings.Contains(text, "guard remove") || strings.Contains(text, "keyfile") {
			t.Errorf("%q: exit %d: %s%s", args, code, out, errs)
		}
	}
	if code, _, errs := qipsec(t, "help", "nonsense"); code != exitUsage || !strings.Contains(errs, `no command "nonsense"`) {
		t.Errorf("exit %d: %s", code, errs)
	}
}

// --as is the base of two names in --out, no way out of it.
func TestIssueStaysInItsDirectory(t *testing.T) {
	dir := initPair(t)
	saes := filepath.Join(dir, "a/pki/saes")
	for _, as := range []string{"../x", "x/y", "..", ".", "/x"} {
		if code, _, errs := qipsec(t, "pki", "issue", "sae", "line-7", "--ca", filepath.Join(dir, "ca"), "--out", saes, "--as", as); code != exitUsage || !strings.Contains(errs, "--as") {
			t.Errorf("--as %q: exit %d: %s", as, code, errs)
		}
	}
	mustRun(t, "pki", "issue", "sae", "line-7", "--ca", filepath.Join(dir, "ca"), "--out", saes, "--as", "x")
}
