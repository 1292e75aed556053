package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// realm is one channel's CA in a directory of its own.
type realm struct {
	t   *testing.T
	ca  *CA
	dir string
}

func newRealm(t *testing.T, name string) realm {
	t.Helper()
	ca, err := NewCA(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r := realm{t: t, ca: ca, dir: t.TempDir()}
	c, err := ca.Credential()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Write(r.dir, "ca", false); err != nil {
		t.Fatal(err)
	}
	return r
}

// files issues req now+shift and writes it as base.
func (r realm) files(base string, req Request, shift time.Duration) Files {
	r.t.Helper()
	c, err := r.ca.Issue(req, time.Now().Add(shift))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := c.Write(r.dir, base, true); err != nil {
		r.t.Fatal(err)
	}
	return r.named(base)
}

func (r realm) named(base string) Files {
	return Files{CA: filepath.Join(r.dir, "ca.crt"), Cert: filepath.Join(r.dir, base+".crt"), Key: filepath.Join(r.dir, base+".key")}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func loopback() []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} }

// serve answers with the name that identify finds, or 401.
func serve(t *testing.T, c *tls.Config, identify func(*http.Request) (string, error)) string {
	t.Helper()
	return listen(t, "127.0.0.1:0", c, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, err := identify(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, name)
	}))
}

func listen(t *testing.T, addr string, c *tls.Config, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, TLSConfig: c, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.ServeTLS(l, "", "") }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return "https://" + l.Addr().String()
}

// get returns status and body, or the error of the handshake.
func get(t *testing.T, addr string, c *tls.Config) (int, string, tls.ConnectionState, error) {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: c}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get(addr)
	if err != nil {
		return 0, "", tls.ConnectionState{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), *resp.TLS, nil
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestNodesMeetOverPostQuantumTLS13(t *testing.T) {
	km := newRealm(t, "km")
	a := km.files("a", Request{Kind: KindNode, Name: "a", IPs: loopback()}, 0)
	b := km.files("b", Request{Kind: KindNode, Name: "b"}, 0)
	addr := serve(t, must[*tls.Config](t)(Server(a, quiet())), NodeFromRequest)
	c := must[*tls.Config](t)(NodeClient(b, "a", quiet()))
	for round, resumed := range []bool{false, true} {
		code, body, state, err := get(t, addr, c)
		if err != nil || code != 200 || body != "b" {
			t.Fatalf("round %d: %d %q %v, want the node b", round, code, body, err)
		}
		if state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 {
			t.Errorf("round %d: version %x with group %v, want TLS 1.3 with X25519MLKEM768", round, state.Version, state.CurveID)
		}
		if state.DidResume != resumed {
			t.Errorf("round %d: resumed is %v", round, state.DidResume)
		}
	}
	c.MaxVersion, c.MinVersion = tls.VersionTLS12, tls.VersionTLS12
	if _, _, _, err := get(t, addr, c); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
}

func TestRefused(t *testing.T) {
	km, sae := newRealm(t, "km"), newRealm(t, "sae")
	a := km.files("a", Request{Kind: KindNode, Name: "a"}, 0)
	b := km.files("b", Request{Kind: KindNode, Name: "b"}, 0)
	late := km.files("late", Request{Kind: KindNode, Name: "late"}, -LeafLife-time.Hour)
	early := km.files("early", Request{Kind: KindNode, Name: "early"}, 3*time.Hour)
	sameCA := km.files("s", Request{Kind: KindSAE, Name: "s"}, 0)
	foreign := sae.files("b", Request{Kind: KindNode, Name: "b"}, 0)
	foreign.CA = a.CA // trusts us, is not trusted by us
	addr := serve(t, must[*tls.Config](t)(Server(a, quiet())), NodeFromRequest)

	t.Run("handshake", func(t *testing.T) {
		for name, f := range map[string]Files{"wrong CA": foreign, "expired": late, "not yet valid": early} {
			if code, body, _, err := get(t, addr, must[*tls.Config](t)(NodeClient(f, "a", quiet()))); err == nil {
				t.Errorf("%s: answered %d %q", name, code, body)
			}
		}
		none := must[*tls.Config](t)(NodeClient(b, "a", quiet()))
		none.GetClientCertificate = nil
		if code, _, _, err := get(t, addr, none); err == nil {
			t.Errorf("no certificate: answered %d", code)
		}
	})
	t.Run("wrong role in the same CA", func(t *testing.T) {
		code, body, _, err := get(t, addr, must[*tls.Config](t)(NodeClient(sameCA, "a", quiet())))
		if err != nil || code != http.StatusUnauthorized || !strings.Contains(body, "urn:q-ipsec:sae:s") {
			t.Errorf("%d %q %v, want 401 naming the URI", code, body, err)
		}
	})
	t.Run("server is another node", func(t *testing.T) {
		_, _, _, err := get(t, addr, must[*tls.Config](t)(NodeClient(b, "c", quiet())))
		if err == nil || !strings.Contains(err.Error(), "not c") {
			t.Errorf("node a answered for c: %v", err)
		}
	})
	t.Run("server has the name but not the URI", func(t *testing.T) {
		liar := km.files("liar", Request{Kind: KindNode, Name: "liar", DNS: []string{"c"}}, 0)
		addr := serve(t, must[*tls.Config](t)(Server(liar, quiet())), NodeFromRequest)
		_, _, _, err := get(t, addr, must[*tls.Config](t)(NodeClient(b, "c", quiet())))
		if err == nil || !strings.Contains(err.Error(), `"liar" answered`) {
			t.Errorf("node liar answered for c: %v", err)
		}
	})
	t.Run("server of another CA", func(t *testing.T) {
		f := b
		f.CA = filepath.Join(sae.dir, "ca.crt")
		if _, _, _, err := get(t, addr, must[*tls.Config](t)(NodeClient(f, "a", quiet()))); err == nil {
			t.Error("accepted")
		}
	})
}

func TestSAECallsKME(t *testing.T) {
	r := newRealm(t, "sae")
	kme := r.files("kme", Request{Kind: KindKME, Name: "a", IPs: loopback()}, 0)
	s := r.files("s", Request{Kind: KindSAE, Name: "Line_1.A~b"}, 0)
	addr := serve(t, must[*tls.Config](t)(Server(kme, quiet())), SAEFromRequest)
	code, body, _, err := get(t, addr, must[*tls.Config](t)(KMEClient(s, false, quiet())))
	if err != nil || code != 200 || body != "Line_1.A~b" {
		t.Fatalf("%d %q %v", code, body, err)
	}
	host := listen(t, "127.0.0.2:0", must[*tls.Config](t)(Server(kme, quiet())), http.NotFoundHandler())
	if _, _, _, err := get(t, host, must[*tls.Config](t)(KMEClient(s, false, quiet()))); err == nil {
		t.Error("a KME was accepted at an address that is not in its certificate")
	}
}

func TestIdentityNeedsExactlyOneURI(t *testing.T) {
	parse := func(s ...string) *x509.Certificate {
		c := &x509.Certificate{}
		for _, v := range s {
			u, err := url.Parse(v)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = append(c.URIs, u)
		}
		return c
	}
	for _, c := range []struct {
		uris []string
		node string // "" = refused
	}{
		{[]string{"urn:q-ipsec:node:a"}, "a"},
		{[]string{"https://example.org/x", "urn:q-ipsec:node:a"}, "a"},
		{nil, ""},
		{[]string{"urn:q-ipsec:node:a", "urn:q-ipsec:node:b"}, ""},
		{[]string{"urn:q-ipsec:node:a", "urn:q-ipsec:sae:b"}, ""},
		{[]string{"urn:q-ipsec:node:a", "URN:Q-IPSEC:node:b"}, ""},
		{[]string{"urn:q-ipsec:sae:a"}, ""},
		{[]string{"urn:q-ipsec:node:"}, ""},
		{[]string{"urn:q-ipsec:node:A"}, ""},
		{[]string{"urn:q-ipsec:node:a/b"}, ""},
		{[]string{"urn:q-ipsec:node:a?b"}, ""},
		{[]string{"urn:q-ipsec:node:" + strings.Repeat("a", 33)}, ""},
		{[]string{"urn:q-ipsec:other:a"}, ""},
	} {
		got, err := Node(parse(c.uris...))
		if got != c.node || (err == nil) != (c.node != "") {
			t.Errorf("%q: %q, %v", c.uris, got, err)
		}
		if err != nil && !errors.Is(err, ErrNoIdentity) {
			t.Errorf("%q: %v does not wrap ErrNoIdentity", c.uris, err)
		}
	}
	if _, err := NodeFromRequest(&http.Request{TLS: &tls.ConnectionState{PeerCertificates: []*x509.Certificate{parse("urn:q-ipsec:node:a")}}}); err == nil {
		t.Error("an unverified certificate named a node")
	}
	if _, err := SAEFromRequest(&http.Request{}); err == nil {
		t.Error("a request without TLS named an SAE")
	}
}

func TestReloadFollowsGoodFilesOnly(t *testing.T) {
	km := newRealm(t, "km")
	a := km.files("a", Request{Kind: KindNode, Name: "a"}, 0)
	b := km.files("b", Request{Kind: KindNode, Name: "b"}, 0)
	addr := serve(t, must[*tls.Config](t)(Server(a, quiet())), NodeFromRequest)
	serial := func() string {
		_, _, s, err := get(t, addr, must[*tls.Config](t)(NodeClient(b, "a", quiet())))
		if err != nil {
			t.Fatal(err)
		}
		return s.PeerCertificates[0].SerialNumber.String()
	}
	age := func() { // make sure that the new files differ in time
		old := time.Now().Add(-time.Hour)
		for _, f := range []string{a.Cert, a.Key} {
			if err := os.Chtimes(f, old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	first := serial()
	age()
	if err := os.WriteFile(a.Cert, []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := serial(); got != first {
		t.Fatal("a broken file was taken")
	}
	km.files("a", Request{Kind: KindNode, Name: "a"}, 0)
	second := serial()
	if second == first {
		t.Fatal("the new certificate was not taken")
	}
	age()
	km.files("a", Request{Kind: KindNode, Name: "a"}, 0)
	if err := os.Chmod(a.Key, 0o640); err != nil {
		t.Fatal(err)
	}
	if got := serial(); got != second {
		t.Fatal("a key that others can read was taken")
	}
}

func TestIssue(t *testing.T) {
	km := newRealm(t, "km")
	now := time.Now()
	for _, r := range []Request{
		{Kind: KindNode, Name: "A"},
		{Kind: KindNode, Name: "-a"},
		{Kind: KindKME, Name: "a.b"},
		{Kind: KindSAE, Name: "a b"},
		{Kind: KindSAE, Name: ".."},
		{Kind: KindGateway, Name: "x@y"},
		{Kind: KindGateway},
		{Name: "a"},
	} {
		if _, err := km.ca.Issue(r, now); err == nil {
			t.Errorf("%+v was issued", r)
		}
	}
	c, err := km.ca.Issue(Request{Kind: KindGateway, Name: "a.gw.example"}, now)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := parseCert(c.Cert)
	if err != nil {
		t.Fatal(err)
	}
	if err := leaf.VerifyHostname("a.gw.example"); err != nil || len(leaf.URIs) != 0 || leaf.IsCA {
		t.Errorf("gateway certificate: %v %v", err, leaf.URIs)
	}
	if life := leaf.NotAfter.Sub(now); life < LeafLife-time.Minute || life > LeafLife {
		t.Errorf("lives %v", life)
	}
	if leaf.SerialNumber.BitLen() < 64 {
		t.Errorf("serial %v is not random", leaf.SerialNumber)
	}
	if c, err := km.ca.Issue(Request{Kind: KindNode, Name: "a"}, now.Add(CALife-time.Hour)); err != nil {
		t.Error(err)
	} else if leaf, _ := parseCert(c.Cert); leaf.NotAfter.After(km.ca.cert.NotAfter) {
		t.Error("a leaf outlives its CA")
	}
	if _, err := km.ca.Issue(Request{Kind: KindNode, Name: "a"}, now.Add(CALife+time.Hour)); err == nil {
		t.Error("an expired CA issued")
	}
}

func TestCARoundTrip(t *testing.T) {
	km := newRealm(t, "km")
	c, err := ReadCredential(km.dir, "ca")
	if err != nil {
		t.Fatal(err)
	}
	ca, err := ParseCA(c)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Issue(Request{Kind: KindNode, Name: "a"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCA(leaf); err == nil {
		t.Error("a leaf was taken for a CA")
	}
	if _, err := ParseCA(Credential{Cert: c.Cert, Key: leaf.Key}); err == nil {
		t.Error("a foreign key was taken for the CA's")
	}
	block, _ := pem.Decode(leaf.Cert)
	got, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := Pool(filepath.Join(km.dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := got.Verify(x509.VerifyOptions{Roots: pool}); err != nil {
		t.Error(err)
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	if err := WriteFile(name, []byte("one"), 0o600, false); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(name, []byte("two"), 0o600, false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("overwrote: %v", err)
	}
	if err := WriteFile(name, []byte("two"), 0o600, true); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(name); string(b) != "two" {
		t.Errorf("holds %q", b)
	}
	if err := CheckSecret(name); err != nil {
		t.Error(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(name, link); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := WriteFile(open, nil, 0o604, false); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{link, dir, open, filepath.Join(dir, "none")} {
		if err := CheckSecret(bad); err == nil {
			t.Errorf("%s passes for a secret", bad)
		}
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(name, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		if err := CheckSecret(name); err == nil {
			t.Error("another user's secret passes")
		}
	}
}

func TestPoolRefusesWhatIsNotACA(t *testing.T) {
	km := newRealm(t, "km")
	f := km.files("a", Request{Kind: KindNode, Name: "a"}, 0)
	empty := filepath.Join(km.dir, "empty")
	if err := os.WriteFile(empty, []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{f.Cert, f.Key, empty, filepath.Join(km.dir, "none"), km.dir} {
		if _, err := Pool(name); err == nil {
			t.Errorf("%s passes for a trust file", name)
		}
	}
}
