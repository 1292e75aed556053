package vicitest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Real starts the installed charon-systemd in a network namespace of its own,
// with a config of its own, and gives the path of its VICI socket
// once that is there. The test is skipped where that cannot be.
func Real(t *testing.T) string {
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
	socket := filepath.Join(dir, "vici")
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		gone := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait() // charon's way to end does not matter here
		gone.Stop()
		if t.Failed() {
			t.Log(out.String())
		}
	})
	for range 1000 {
		if c, err := net.Dial("unix", socket); err == nil {
			_ = c.Close()
			return socket
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("charon has no VICI socket after 10 s")
	return ""
}

// Credentials makes a certificate for name, signed by itself, and its key.
func Credentials(t *testing.T, name string) (cert, priv []byte) {
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
