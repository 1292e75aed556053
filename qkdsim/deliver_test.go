package qkdsim

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// sshd is a real OpenSSH server on its own configuration, one loopback port
// and two fresh keys.
type sshd struct {
	opt    SFTPOptions
	config string
	cmd    *exec.Cmd
	log    string
}

func newKey(t *testing.T, file string) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(priv, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newSSHD(t *testing.T) *sshd {
	t.Helper()
	if _, err := exec.LookPath("/usr/sbin/sshd"); err != nil {
		t.Fatalf("no OpenSSH server (scripts/deps.sh tunnel installs it): %v", err)
	}
	dir := t.TempDir()
	intake := filepath.Join(dir, "intake")
	if err := os.Mkdir(intake, 0o700); err != nil {
		t.Fatal(err)
	}
	host, client := newKey(t, filepath.Join(dir, "host")), newKey(t, filepath.Join(dir, "client"))
	auth := filepath.Join(dir, "authorized_keys")
	if err := os.WriteFile(auth, ssh.MarshalAuthorizedKey(client.PublicKey()), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	s := &sshd{config: filepath.Join(dir, "sshd_config")}
	conf := fmt.Sprintf("ListenAddress 127.0.0.1:%d\nHostKey %s\nAuthorizedKeysFile %s\nPidFile none\nStrictModes no\nUsePAM no\n"+
		"PasswordAuthentication no\nPermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\nForceCommand internal-sftp\n",
		addr.Port, filepath.Join(dir, "host"), auth)
	if err := os.WriteFile(s.config, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	s.opt = SFTPOptions{Address: addr.String(), User: me.Username, Key: client, HostKey: host.PublicKey(), Dir: intake, Timeout: 5 * time.Second}
	s.start(t)
	t.Cleanup(func() { s.stop(t) })
	return s
}

func (s *sshd) start(t *testing.T) {
	t.Helper()
	run := []string{"/usr/sbin/sshd", "-D", "-e", "-f", s.config}
	if os.Getuid() == 0 {
		// Root's sshd wants /run/sshd: give it one that nobody else sees.
		run = []string{"unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec /usr/sbin/sshd -D -e -f " + s.config}
	}
	s.log = filepath.Join(filepath.Dir(s.config), "log")
	// A file, not a pipe: sessions outlive the listener and would hold it open.
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.cmd = exec.Command(run[0], run[1:]...)
	s.cmd.Stderr = log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", s.opt.Address)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("sshd does not listen: %v", err)
		}
	}
}

func (s *sshd) stop(t *testing.T) {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
	s.cmd = nil
	if t.Failed() {
		b, _ := os.ReadFile(s.log)
		t.Logf("sshd: %s", b)
	}
}

func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, e := range es {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		m[e.Name()] = fmt.Sprintf("%o %s", fi.Mode().Perm(), b)
	}
	return m
}

func TestLocalDelivers(t *testing.T) {
	dir := t.TempDir()
	l := Local{Dir: dir}
	if err := l.Deliver(t.Context(), "x.qkd", []byte("one")); err != nil {
		t.Fatal(err)
	}
	if got := files(t, dir); len(got) != 1 || got["x.qkd"] != "600 one" {
		t.Errorf("directory holds %v", got)
	}
	if err := (Local{Dir: filepath.Join(dir, "none")}).Deliver(t.Context(), "y", nil); err == nil {
		t.Error("delivered into no directory")
	}
}

func TestSFTPDeliversToARealServer(t *testing.T) {
	s := newSSHD(t)
	d, err := NewSFTP(s.opt)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	big := bytes.Repeat([]byte("k"), 1<<20)
	for _, f := range []struct {
		name string
		data []byte
	}{{"1.qkd", []byte("one")}, {"2.qkd", big}, {"1.qkd", []byte("again")}} {
		if err := d.Deliver(t.Context(), f.name, f.data); err != nil {
			t.Fatal(err)
		}
	}
	got := files(t, s.opt.Dir)
	if len(got) != 2 || got["1.qkd"] != "600 again" || got["2.qkd"] != "600 "+string(big) {
		t.Errorf("intake holds %d files", len(got))
	}
	// The server goes away and comes back: one error, then it works again.
	s.stop(t)
	_ = d.conn.Close() // the session's own sshd child outlives the listener
	if err := d.Deliver(t.Context(), "3.qkd", []byte("three")); err == nil {
		t.Fatal("delivered to a dead server")
	}
	s.start(t)
	if err := d.Deliver(t.Context(), "3.qkd", []byte("three")); err != nil {
		t.Fatal(err)
	}
	if got := files(t, s.opt.Dir); got["3.qkd"] != "600 three" || len(got) != 3 {
		t.Errorf("after the restart: %d files", len(got))
	}
}

func TestSFTPTrustsOnlyThePinnedHostKey(t *testing.T) {
	s := newSSHD(t)
	opt := s.opt
	opt.HostKey = newKey(t, filepath.Join(t.TempDir(), "other")).PublicKey()
	d, err := NewSFTP(opt)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Deliver(t.Context(), "x.qkd", []byte("secret")); err == nil || !strings.Contains(err.Error(), "host key") {
		t.Errorf("wrong host key: %v", err)
	}
	opt = s.opt
	opt.Key = newKey(t, filepath.Join(t.TempDir(), "stranger"))
	d2, err := NewSFTP(opt)
	if err != nil {
		t.Fatal(err)
	}
	defer d2.Close()
	if err := d2.Deliver(t.Context(), "x.qkd", []byte("secret")); err == nil {
		t.Error("delivered with a key the server does not know")
	}
	if got := files(t, s.opt.Dir); len(got) != 0 {
		t.Errorf("intake holds %v", got)
	}
}

// A server that accepts and says nothing holds Deliver no longer than its
// bound, and ctx ends it sooner.
func TestSFTPBounded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	k := newKey(t, filepath.Join(dir, "k"))
	d, err := NewSFTP(SFTPOptions{Address: l.Addr().String(), User: "x", Key: k, HostKey: k.PublicKey(), Dir: dir, Timeout: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- d.Deliver(context.WithoutCancel(t.Context()), "x", nil) }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("delivered to a silent server")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Deliver hangs on a silent server")
	}
}
