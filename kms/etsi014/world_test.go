package etsi014_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
)

const sanPrefix = "urn:q-ipsec:sae:"

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// ca issues the certificates of one test.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newCA(t testing.TB) *ca {
	t.Helper()
	c := &ca{pool: x509.NewCertPool()}
	tmpl := template(1, "test CA")
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage = true, true, x509.KeyUsageCertSign
	c.key = newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &c.key.PublicKey, c.key)
	if err != nil {
		t.Fatal(err)
	}
	if c.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	c.pool.AddCert(c.cert)
	return c
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func template(serial int64, cn string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: cn},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// issue makes a certificate for the loopback address and, if sae is not empty,
// that SAE.
func (c *ca) issue(t testing.TB, sae string) tls.Certificate {
	t.Helper()
	tmpl := template(2, "test")
	tmpl.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	if sae != "" {
		u, err := url.Parse(sanPrefix + sae)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = []*url.URL{u}
	}
	k := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, &k.PublicKey, c.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
}

func (c *ca) serverTLS(t testing.TB) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{c.issue(t, "")}, ClientCAs: c.pool}
}

func (c *ca) clientTLS(t testing.TB, sae string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{c.issue(t, sae)}, RootCAs: c.pool,
		ClientSessionCache: tls.NewLRUClientSessionCache(4),
	}
}

func identity(r *http.Request) (string, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return "", errors.New("no certificate")
	}
	for _, u := range r.TLS.PeerCertificates[0].URIs {
		if id, ok := strings.CutPrefix(u.String(), sanPrefix); ok {
			return id, nil
		}
	}
	return "", errors.New("no SAE in the certificate")
}

// inventory is the KMA of both nodes: keys as many as are asked for up to a
// number, each claimable once by the other node.
type inventory struct {
	mu   sync.Mutex
	pool uuid.UUID
	n    uint32
	left map[string]int // by node that takes
	held map[string][]ksa.MasterKey
	out  map[key.ID]*key.Material
}

type side struct {
	*inventory
	node string
}

func (s side) Take(context.Context, string) (ksa.MasterKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.held[s.node]; len(h) > 0 {
		s.held[s.node] = h[:len(h)-1]
		s.left[s.node]--
		return h[len(h)-1], nil
	}
	if s.left[s.node] <= 0 {
		return ksa.MasterKey{}, errors.New("no key left")
	}
	m, err := key.Random(rand.Reader, key.MasterSize)
	if err != nil {
		return ksa.MasterKey{}, err
	}
	twin, err := m.Clone()
	if err != nil {
		return ksa.MasterKey{}, err
	}
	s.left[s.node]--
	s.n++
	mk := ksa.MasterKey{Pool: s.pool, Position: key.At(1, s.n), ID: key.DeriveID(make([]byte, 32), s.pool, 1, s.n), Class: key.Direct, Material: m}
	s.out[mk.ID] = twin
	return mk, nil
}

func (s side) PutBack(mk ksa.MasterKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[s.node] = append(s.held[s.node], mk)
	s.left[s.node]++
}

func (s side) Claim(_ string, _ uuid.UUID, _ key.Position, id key.ID) (*key.Material, key.Class, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.out[id]
	if m == nil {
		return nil, 0, ksa.ErrGone
	}
	delete(s.out, id)
	return m, key.Direct, nil
}

func (s side) Level(string) (ksa.Level, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return ksa.Level{Active: s.left[s.node], Synced: true}, nil
}

// wire joins two agents without a network.
type wire struct {
	from string
	to   **ksa.Agent
}

func (w wire) SendNotices(ctx context.Context, _ string, n []ksa.Notice) error {
	return (*w.to).Receive(ctx, w.from, n)
}

func (w wire) PullSettled(_ context.Context, _ string, upTo uint64, due []key.ID) (ksa.Settled, error) {
	return (*w.to).Settled(w.from, upTo, due), nil
}

func (w wire) PullNotices(_ context.Context, _ string, ids []key.ID) (ns []ksa.Notice, _ error) {
	for _, id := range ids {
		if n, ok := (*w.to).Issued(w.from, id); ok {
			ns = append(ns, n)
		}
	}
	return ns, nil
}

// world is two nodes, a and b, each with a KSA behind a real server on
// loopback. SAEs a1 and b1 are peers, and so are a2 and b2; a404 and b1, too.
type world struct {
	ca       *ca
	inv      *inventory
	agents   [2]*ksa.Agent
	handlers [2]*etsi014.Handler
	url      [2]string
	usage    []key.UsageReport
}

const (
	nodeA = 0
	nodeB = 1
)

func newWorld(t testing.TB, keys int, change func(*etsi014.Options)) *world {
	t.Helper()
	w := &world{ca: newCA(t), inv: &inventory{
		pool: uuid.New(), left: map[string]int{"a": keys, "b": keys},
		held: map[string][]ksa.MasterKey{}, out: map[key.ID]*key.Material{},
	}}
	tables := [2][]ksa.SAE{
		{
			{ID: "a1", Node: "a", Peers: []string{"b1", "a2"}},
			{ID: "a2", Node: "a", Peers: []string{"b2"}},
			{ID: "b1", Node: "b"},
			{ID: "b2", Node: "b"},
			{ID: "b404", Node: "b"},
		},
		{
			{ID: "b1", Node: "b", Peers: []string{"a1"}},
			{ID: "b2", Node: "b", Peers: []string{"a2"}},
			{ID: "b404", Node: "b", Peers: []string{"a1"}},
			{ID: "a1", Node: "a"},
			{ID: "a2", Node: "a"},
		},
	}
	for i, node := range []string{"a", "b"} {
		agent, err := ksa.New(ksa.Options{
			Node: node, SAEs: tables[i], Keys: side{w.inv, node}, Peers: wire{node, &w.agents[1-i]}, Log: quiet,
			RetryAfter: 1500 * time.Millisecond,
			Usage: func(_ context.Context, _, _ string, r []key.UsageReport) error {
				w.inv.mu.Lock()
				defer w.inv.mu.Unlock()
				w.usage = append(w.usage, r...)
				return nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		w.agents[i] = agent
	}
	for i := range w.agents {
		runJoined(t, w.agents[i].Run)
		o := etsi014.Options{Supplier: w.agents[i], Identity: identity, Log: quiet, Quirks: map[string]etsi014.Quirks{"b404": {NotFound404: true}}}
		if change != nil {
			change(&o)
		}
		h, err := etsi014.NewHandler(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(h.Close)
		w.handlers[i] = h
		w.url[i] = serve(t, etsi014.ServerConfig{Handler: h, TLS: w.ca.serverTLS(t), Log: quiet})
	}
	return w
}

// runJoined runs f until the test ends and waits for it.
func runJoined(t testing.TB, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("does not end")
		}
	})
}

func serve(t testing.TB, cfg etsi014.ServerConfig) (url string) {
	t.Helper()
	s, err := etsi014.NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	runJoined(t, func(ctx context.Context) error { return s.Serve(ctx, ln) })
	return "https://" + ln.Addr().String()
}

// as gives a plain HTTPS client with the certificate of sae.
func (w *world) as(t testing.TB, sae string) *http.Client {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: w.ca.clientTLS(t, sae)}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// answer is a response as bytes.
type answer struct {
	status int
	header http.Header
	body   string
}

func do(t testing.TB, c *http.Client, verb, url, body string) answer {
	t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(t.Context(), verb, url, r)
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return send(t, c, req)
}

func send(t testing.TB, c *http.Client, req *http.Request) answer {
	t.Helper()
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(b)}
}
