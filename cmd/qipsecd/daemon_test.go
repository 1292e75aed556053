package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici/vicitest"
	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// bin is where TestMain puts the real programs.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "qipsecd")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
		bin = dir
		build := exec.Command("go", "build", "-o", dir+"/", "github.com/q-ipsec/q-ipsec/cmd/qipsecd", "github.com/q-ipsec/q-ipsec/cmd/qipsec")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v: %s", err, out)
			return 1
		}
		return m.Run()
	}())
}

const bound = 30 * time.Second // for anything a daemon is waited for

// lab is two nodes on loopback addresses of their own, written by qipsec init.
type lab struct {
	t   *testing.T
	dir string
	ip  [2]string
	// inside are words before every command, to run it in a network namespace.
	inside []string
}

// command is a program of ours, run inside.
func (l *lab) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	words := append(append(append([]string{}, l.inside...), filepath.Join(bin, name)), args...)
	return exec.CommandContext(ctx, words[0], words[1:]...)
}

// newLab writes the lab. The addresses are drawn from the process id, so that
// two runs of the test on one machine do not meet.
func newLab(t *testing.T, n int) *lab {
	t.Helper()
	pid := os.Getpid()
	l := &lab{t: t, dir: filepath.Join(t.TempDir(), "lab")}
	for i := range l.ip {
		l.ip[i] = fmt.Sprintf("127.%d.%d.%d", 64+pid>>7&63, 1+pid&127, 10*n+1+i)
	}
	l.must("init", "--pair", "a", "b", "--here", "--no-ipsec", "--out", l.dir, "--address", l.ip[0]+","+l.ip[1])
	return l
}

func (l *lab) config(node string) string { return filepath.Join(l.dir, node, "qipsecd.toml") }

// run runs the real qipsec.
func (l *lab) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(l.t.Context(), bound)
	defer cancel()
	var out, errs bytes.Buffer
	c := l.command(ctx, "qipsec", args...)
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("qipsec %q: %w: %s", args, err, &errs)
	}
	return out.String(), nil
}

func (l *lab) must(args ...string) string {
	l.t.Helper()
	out, err := l.run(args...)
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

// feed makes one QKD-Key file for both ends.
func (l *lab) feed(seq, keys int) {
	l.t.Helper()
	l.must("keyfile", "make", "--config", l.config("a"), "--peer-config", l.config("b"), "--seq", fmt.Sprint(seq), "--keys", fmt.Sprint(keys))
}

// saeKey is one key as `qipsec sae --json --show-key` prints it.
type saeKey struct {
	ID          string `json:"key_ID"`
	Bits        int    `json:"bits"`
	Fingerprint string `json:"fingerprint"`
	Key         string `json:"key"`
}

// sae plays the transmission device of a node: it calls its own KME about its
// peer.
func (l *lab) sae(node, verb string, args ...string) ([]saeKey, error) {
	i, peer := 0, "b-te"
	if node == "b" {
		i, peer = 1, "a-te"
	}
	p := filepath.Join(l.dir, node, "pki")
	out, err := l.run(append([]string{
		"sae", verb, "--url", "https://" + l.ip[i] + ":8442", "--peer", peer, "--json", "--show-key",
		"--ca", p + "/sae-ca.crt", "--cert", p + "/saes/" + node + "-te.crt", "--key", p + "/saes/" + node + "-te.key",
	}, args...)...)
	if err != nil {
		return nil, err
	}
	var v struct{ Keys []saeKey }
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		l.t.Fatalf("%v: %s", err, out)
	}
	return v.Keys, nil
}

// await polls until ok, for bound.
func (l *lab) await(what string, ok func() error) {
	l.t.Helper()
	end := time.Now().Add(bound)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			l.t.Fatalf("%s: not within %v: %v", what, bound, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// supplies waits until node has at least that many keys leased.
func (l *lab) supplies(node string, least int) {
	l.t.Helper()
	l.await(node+" can supply keys", func() error {
		out, err := l.run("keys", "--json", "--config", l.config(node))
		if err != nil {
			return err
		}
		var pools []struct {
			Leased int
			Synced bool
		}
		if err := json.Unmarshal([]byte(out), &pools); err != nil {
			return err
		}
		if len(pools) != 1 || !pools[0].Synced || pools[0].Leased < least {
			return fmt.Errorf("pools: %s", out)
		}
		return nil
	})
}

// daemon is a running qipsecd.
type daemon struct {
	l    *lab
	cmd  *exec.Cmd
	log  syncBuffer
	done chan struct{} // closed when it has ended
	err  error         // valid then
}

// syncBuffer is a log that a process writes while the test reads.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// start starts the node's daemon and waits for READY=1, as systemd does.
func (l *lab) start(node string) *daemon {
	l.t.Helper()
	name := filepath.Join(l.t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		l.t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // the test's own
	d := &daemon{l: l, cmd: l.command(context.Background(), "qipsecd", "-config", l.config(node)), done: make(chan struct{})}
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+name)
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	if err := d.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.done)
	}()
	l.t.Cleanup(func() {
		_ = d.cmd.Process.Kill() // an error if it has ended
		<-d.done
		if l.t.Failed() {
			l.t.Logf("log of %s:\n%s", node, &d.log)
		}
	})
	if err := c.SetReadDeadline(time.Now().Add(bound)); err != nil {
		l.t.Fatal(err)
	}
	b := make([]byte, 64)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		l.t.Fatalf("%s is not ready: %q, %v\n%s", node, b[:n], err, &d.log)
	}
	return d
}

// end sends a signal that ends the daemon, and waits for that.
func (d *daemon) end(s syscall.Signal) error {
	d.l.t.Helper()
	if err := d.cmd.Process.Signal(s); err != nil {
		d.l.t.Fatal(err)
	}
	select {
	case <-d.done:
		return d.err
	case <-time.After(bound):
		d.l.t.Fatalf("did not end within %v of %v:\n%s", bound, s, &d.log)
		return nil
	}
}

// The paper's stage 1: two transmission devices get the same keys from the two
// KMSs, over nothing but configs written by init and files of the QKD devices.
func TestStage1(t *testing.T) {
	l := newLab(t, 0)
	a, b := l.start("a"), l.start("b")
	l.feed(1, 400)
	l.supplies("a", 10)
	l.supplies("b", 10)
	var all []string
	for _, c := range []struct{ master, slave string }{{"a", "b"}, {"b", "a"}} {
		for _, size := range []string{"256", "512", "64"} {
			got, err := l.sae(c.master, "get-key", "--number", "3", "--size", size)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != 3 || fmt.Sprint(got[0].Bits) != size {
				t.Fatalf("got %+v", got)
			}
			ids := []string{got[0].ID, got[1].ID, got[2].ID}
			again, err := l.sae(c.slave, "get-key-with-id", ids...)
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprint(got) != fmt.Sprint(again) {
				t.Errorf("the two ends' keys differ: %v %v", ids, got[0].Fingerprint)
			}
			if _, err := l.sae(c.slave, "get-key-with-id", ids[0]); err == nil {
				t.Error("a key was supplied twice")
			}
			if _, err := l.sae(c.master, "get-key-with-id", ids[0]); err == nil {
				t.Error("the master got its key a second time")
			}
			for _, k := range got {
				all = append(all, k.Key)
				if strings.Count(strings.Join(all, " "), k.Key) != 1 {
					t.Error("two keys are equal")
				}
			}
		}
	}
	if out := l.must("status", "--config", l.config("a")); !strings.Contains(out, "node a, kms") {
		t.Errorf("status: %s", out)
	}
	l.await("the usage history of both nodes", func() error {
		for _, n := range []string{"a", "b"} {
			out, err := l.run("history", "--limit", "500", "--config", l.config(n))
			if err != nil {
				return err
			}
			if c := strings.Count(out, " supplied "); c < 18 {
				return fmt.Errorf("%s: %d of 18 keys", n, c)
			}
		}
		return nil
	})
	for _, d := range []*daemon{a, b} {
		if err := d.end(syscall.SIGTERM); err != nil {
			t.Errorf("an orderly stop is %v", err)
		}
		for _, k := range all {
			if strings.Contains(d.log.String(), k) {
				t.Error("a key is in the log")
			}
		}
	}
}

// Whatever a crash takes, no Key-ID comes twice and both ends agree afterwards.
func TestCrashAndRestart(t *testing.T) {
	l := newLab(t, 1)
	a, b := l.start("a"), l.start("b")
	seen := map[string]bool{}
	for round := range 3 {
		l.feed(1+round, 200) // a crash burns the open leases
		l.supplies("a", 5)
		l.supplies("b", 5)
		for _, c := range []struct{ master, slave string }{{"a", "b"}, {"b", "a"}} {
			got, err := l.sae(c.master, "get-key", "--number", "5")
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range got {
				if seen[k.ID] {
					t.Fatalf("round %d: Key-ID %s was supplied before", round, k.ID)
				}
				seen[k.ID] = true
			}
			again, err := l.sae(c.slave, "get-key-with-id", got[0].ID, got[4].ID)
			if err != nil {
				t.Fatal(err)
			}
			if again[0] != got[0] || again[1] != got[4] {
				t.Error("the two ends' keys differ")
			}
		}
		if round%2 == 0 {
			_ = a.end(syscall.SIGKILL)
			a = l.start("a")
		} else {
			_ = b.end(syscall.SIGKILL)
			b = l.start("b")
		}
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	l := newLab(t, 2)
	l.start("a")
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "qipsecd"), "-config", l.config("a")).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitFailed || !strings.Contains(string(out), "in use") {
		t.Errorf("%v: %s", err, out)
	}
	l.must("status", "--config", l.config("a"))
}

func TestProcess(t *testing.T) {
	l := newLab(t, 3)
	d := l.start("a")
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(strings.Fields(string(b)), " "), "Max core file size 0 0 bytes") {
		t.Errorf("core dumps are possible:\n%s", b)
	}
	for range 2 {
		before := strings.Count(d.log.String(), "log level changed")
		if err := d.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		l.await("SIGUSR1", func() error {
			if strings.Count(d.log.String(), "log level changed") == before {
				return errors.New("the level did not change")
			}
			return nil
		})
	}
	if log := d.log.String(); !strings.Contains(log, "level=DEBUG") && !strings.Contains(log, "level=INFO msg=\"log level changed\" level=DEBUG") {
		t.Errorf("no debug level: %s", log)
	}
	if err := d.end(syscall.SIGINT); err != nil {
		t.Errorf("%v", err)
	}
	for _, f := range []string{"state/root", "state/inventory.db"} {
		if fi, err := os.Stat(filepath.Join(l.dir, "a", f)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, fi, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(l.dir, "a/run/operator.sock")); err == nil {
		t.Error("the socket is still there")
	}
}

func TestFlags(t *testing.T) {
	l := newLab(t, 4)
	bad := filepath.Join(t.TempDir(), "bad.toml")
	if err := os.WriteFile(bad, []byte("[node]\nname = \"A B\"\nx = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	loose := filepath.Join(l.dir, "b/pki/km.key")
	if err := os.Chmod(loose, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		code int
		want []string
	}{
		{"-check -config " + l.config("a"), 0, []string{"in order"}},
		{"-version", 0, []string{"qipsecd"}},
		{"-check -config " + bad, 1, []string{"node.name", "node.x", "neither [kms] nor [ipsec]"}},
		{"-config " + bad, 1, []string{"node.name"}},
		{"-config " + l.config("b"), 1, []string{"tls.km.key", "chmod 600"}},
		{"-config /nonexistent", 1, []string{"nonexistent"}},
		{"-nonsense", 2, nil},
		{"now", 2, nil},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), bound)
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "qipsecd"), strings.Fields(c.args)...)
		out, err := cmd.CombinedOutput()
		cancel()
		if code := cmd.ProcessState.ExitCode(); code != c.code {
			t.Errorf("%s: exit %d, %v: %s", c.args, code, err, out)
		}
		for _, w := range c.want {
			if !strings.Contains(string(out), w) {
				t.Errorf("%s: no %q in %s", c.args, w, out)
			}
		}
	}
}

// The [ipsec] role on a kernel of its own, without a charon: it serves, says why
// no tunnel is up, and its guard outlives it.
// newIPsecLab is a lab in a network namespace of its own whose node a has the [ipsec]
// role; charon's VICI socket is vici, below the node's directory.
func newIPsecLab(t *testing.T, n int, vici string) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	holder := exec.Command("sleep", "300")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = holder.Process.Kill(); _ = holder.Wait() })
	l := newLab(t, n)
	l.inside = []string{"nsenter", "--net=/proc/" + fmt.Sprint(holder.Process.Pid) + "/ns/net", "--"}
	if out, err := exec.Command("nsenter", l.inside[1], "--", "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l.must("init", "--pair", "a", "b", "--here", "--force", "--out", l.dir, "--address", l.ip[0]+","+l.ip[1])
	l.edit("a", "[ipsec]\n", "[ipsec]\nvici = \""+vici+"\"\n")
	return l
}

// edit replaces a text in the node's config, once.
func (l *lab) edit(node, old, by string) {
	l.t.Helper()
	text, err := os.ReadFile(l.config(node))
	if err != nil || !bytes.Contains(text, []byte(old)) {
		l.t.Fatalf("no %q in the config: %v", old, err)
	}
	if err := os.WriteFile(l.config(node), bytes.Replace(text, []byte(old), []byte(by), 1), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// SIGHUP ends the daemon in order and leaves its connections in charon for the next
// start; SIGTERM takes them out, also as an afterthought.
func TestHangupLeavesTheTunnels(t *testing.T) {
	l := newIPsecLab(t, 8, "vici")
	l.edit("a", `policy = "required"`, `policy = "off"`) // there is no plugin to wait for
	charon := vicitest.Start(t, filepath.Join(l.dir, "a", "vici"))
	loaded := func() int {
		charon.Lock()
		defer charon.Unlock()
		return len(charon.Conns)
	}
	start := func() *daemon {
		d := l.start("a")
		l.await("the connection", func() error {
			if loaded() == 0 || !strings.Contains(d.log.String(), "connection loaded") {
				return errors.New("not loaded")
			}
			return nil
		})
		return d
	}
	if err := start().end(syscall.SIGHUP); err != nil || loaded() != 1 {
		t.Errorf("after SIGHUP: %v, %d connections are loaded", err, loaded())
	}
	if err := start().end(syscall.SIGTERM); err != nil || loaded() != 0 {
		t.Errorf("after SIGTERM: %v, %d connections are loaded", err, loaded())
	}
}

func TestIPsecRoleWithoutCharon(t *testing.T) {
	l := newIPsecLab(t, 5, "run/no.vici")
	c := l.config("a")
	if out, err := l.run("guard", "status", "--config", c); err == nil {
		t.Errorf("a guard before the start: %s", out)
	}
	d := l.start("a")
	l.must("guard", "status", "--config", c)
	l.await("the reason", func() error {
		out, err := l.run("explain", "a-b", "--config", c)
		if err == nil {
			return fmt.Errorf("up without charon: %s", out)
		}
		for _, w := range []string{"no-charon", "no.vici", "has not agreed", "0 keys"} {
			if !strings.Contains(out, w) {
				return fmt.Errorf("no %q in %s", w, out)
			}
		}
		return nil
	})
	if out := l.must("tunnels", "--config", c); !strings.Contains(out, "required") {
		t.Errorf("tunnels: %s", out)
	}
	if out, err := l.run("tunnels", "initiate", "a-b", "--config", c); err == nil {
		t.Errorf("initiated without charon: %s", out)
	}
	if out, err := l.run("explain", "nobody", "--config", c); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("explain nobody: %s %v", out, err)
	}
	if err := d.end(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	l.must("guard", "status", "--config", c)
	l.must("guard", "remove")
	if out, err := l.run("guard", "status", "--config", c); err == nil {
		t.Errorf("a guard after its removal: %s", out)
	}
}

// A KME of another maker, which our own plays, as source of IPsec's keys.
func TestKeysOfAVendorKME(t *testing.T) {
	l := newLab(t, 6)
	l.start("a")
	l.start("b")
	l.feed(1, 100)
	l.supplies("a", 1)
	l.supplies("b", 1)
	at := func(node string, i int) vendorKME {
		p := filepath.Join(l.dir, node, "pki")
		tls, err := pki.KMEClient(pki.Files{CA: p + "/sae-ca.crt", Cert: p + "/saes/" + node + "-te.crt", Key: p + "/saes/" + node + "-te.key"}, false, quiet())
		if err != nil {
			t.Fatal(err)
		}
		c, err := etsi014.NewClient(etsi014.ClientConfig{URL: "https://" + l.ip[i] + ":8442", TLS: tls})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return vendorKME{c}
	}
	a, b := at("a", 0), at("b", 1)
	k, err := a.GetKey(t.Context(), "a-te", "b-te")
	if err != nil {
		t.Fatal(err)
	}
	defer k.Material.Wipe()
	same, err := b.GetKeyWithID(t.Context(), "b-te", "a-te", k.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer same.Material.Wipe()
	if k.Material.Len() != ipsecKeyBits/8 || !k.Material.Equal(same.Material) || k.ID != same.ID {
		t.Errorf("%d bytes, fingerprints %s %s", k.Material.Len(), k.Material.Fingerprint(), same.Material.Fingerprint())
	}
	if again, err := b.GetKeyWithID(t.Context(), "b-te", "a-te", k.ID); err == nil {
		again.Material.Wipe()
		t.Error("a key came twice")
	}
}

// What was supplied before an orderly stop can be fetched at the other end after
// the restart, although the rest of the lease is burned.
func TestRestartKeepsWhatWasSupplied(t *testing.T) {
	l := newLab(t, 7)
	a := l.start("a")
	l.start("b")
	l.feed(1, 100)
	l.supplies("a", 5)
	got, err := l.sae("a", "get-key", "--number", "5")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.end(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	l.start("a")
	l.feed(2, 100)
	l.supplies("a", 5) // so the two have met and burned
	again, err := l.sae("b", "get-key-with-id", got[3].ID, got[1].ID)
	if err != nil {
		t.Fatal(err)
	}
	if again[0] != got[3] || again[1] != got[1] {
		t.Error("the two ends' keys differ")
	}
}
