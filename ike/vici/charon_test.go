package vici

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// charon starts the installed charon-systemd in a network namespace of its own,
// with a config of its own, and gives the path of its VICI socket.
func charon(t *testing.T) string {
	t.Helper()
	binary := "/usr/sbin/charon-systemd"
	if _, err := os.Stat(binary); err != nil {
		t.Skipf("skipped: %v (package charon-systemd)", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("skipped: starting charon in a network namespace takes root")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "strongswan.conf")
	text := fmt.Sprintf(`charon-systemd {
  load = random nonce aes sha1 sha2 hmac kdf gcm openssl pem pkcs1 pkcs8 x509 pubkey constraints kernel-netlink socket-default vici
  journal { default = -1 }
  plugins { vici { socket = unix://%s/vici } }
}
`, dir)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Env = []string{"STRONGSWAN_CONF=" + conf, "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Skipf("skipped: no network namespace here: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		gone := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait() // charon's way to end does not matter here
		gone.Stop()
		if t.Failed() {
			t.Log(out.String())
		}
	})
	return filepath.Join(dir, "vici")
}

// credentials makes a certificate for name, signed by itself, and its key.
func credentials(t *testing.T, name string) (cert, priv []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	p8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: p8})
}

// The installed charon takes every field of every message.
func TestRealCharon(t *testing.T) {
	socket := charon(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var c *Client
	for {
		var err error
		if c, err = Dial(ctx, Options{Socket: socket, Log: slog.New(slog.DiscardHandler)}); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	defer c.Close()
	if v, err := c.Version(ctx); err != nil || !strings.Contains(v, ".") {
		t.Errorf("version %q, %v", v, err)
	}
	if p, err := c.Plugins(ctx); err != nil || !slices.Contains(p, "vici") {
		t.Errorf("plugins %v, %v", p, err)
	}
	cert, priv := credentials(t, "a.example")
	id, err := c.LoadKey(ctx, priv)
	if err != nil || len(id) != 40 {
		t.Errorf("key %q, %v", id, err)
	}
	conn := Conn{
		Name: "link", LocalAddrs: []string{"192.0.2.1"}, RemoteAddrs: []string{"192.0.2.2"},
		Proposals: []string{"aes256gcm16-prfsha384-x25519", "aes256gcm16-prfsha384-ecp384"}, Unique: "replace",
		RekeyTime: time.Hour, DPDDelay: 30 * time.Second, Encap: true, MOBIKE: true,
		Local:  Auth{ID: "a.example", Certs: [][]byte{cert}},
		Remote: Auth{ID: "b.example", Certs: [][]byte{cert}, CACerts: [][]byte{cert}},
		Children: []Child{{
			Name: "net", LocalTS: []string{"10.1.0.0/24"}, RemoteTS: []string{"10.2.0.0/24"}, Proposals: []string{"aes256gcm16-x25519", "aes256gcm16-ecp384"},
			Mode: "tunnel", RekeyTime: 10 * time.Minute, LifeTime: time.Hour, RekeyBytes: 1 << 30, RekeyPackets: 1 << 20, ReplayWindow: 64,
		}, {Name: "other", Mode: "transport"}},
	}
	for range 2 { // again: replaced
		if err := c.LoadConn(ctx, conn); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := c.Conns(ctx); err != nil || !slices.Equal(names, []string{"link"}) {
		t.Errorf("connections %v, %v", names, err)
	}
	if sas, err := c.SAs(ctx); err != nil || len(sas) != 0 {
		t.Errorf("%v, %v", sas, err)
	}
	if err := c.Initiate(ctx, "link", "net", 0); err != nil {
		t.Errorf("queued initiation: %v", err)
	}
	var sas []IKESA
	for len(sas) == 0 {
		if sas, err = c.SAs(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if len(sas) != 1 || sas[0].Conn != "link" || sas[0].State != "CONNECTING" || sas[0].RemoteHost != "192.0.2.2" {
		t.Errorf("%+v", sas)
	}
	if err := c.Initiate(ctx, "link", "none", time.Second); err == nil {
		t.Error("an unknown child was initiated")
	}
	if n, err := c.Rekey(ctx, 99); err == nil && n != 0 {
		t.Errorf("%d SAs to rekey, %v", n, err)
	}
	if err := c.TerminateChild(ctx, 99, time.Second); err == nil {
		t.Error("an unknown CHILD_SA was terminated")
	}
	if err := c.UnloadConn(ctx, "link"); err != nil {
		t.Error(err)
	}
	if err := c.TerminateConn(ctx, "link", 500*time.Millisecond); err != nil {
		t.Error(err)
	}
	if sas, err := c.SAs(ctx); err != nil || len(sas) != 0 {
		t.Errorf("after terminate: %v, %v", sas, err)
	}
	if err := c.UnloadKey(ctx, id); err != nil {
		t.Error(err)
	}
	conn.Children[0].Proposals = []string{"nonsense"}
	if err := c.LoadConn(ctx, conn); err == nil {
		t.Error("a nonsense proposal was loaded")
	}
}
