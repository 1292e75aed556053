package twonodes

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// What the real daemon answers where ETSI GS QKD 014 has it refuse. The whole of
// the interface is tested in kms/etsi014; here certificates, KMA, KSA and store
// are the real ones.
func TestType2Refusals(t *testing.T) {
	t.Parallel()
	other := "\n[[kms.sae]]\nid = \"b-other\"\nnode = \"b\"\n"
	s := newSite(t, 2, "intake_interval = \"50ms\"\n", other, other+"peers = [\"a-te\"]\n")
	s.up()
	if err := s.feed(500); err != nil {
		t.Fatal(err)
	}
	s.supplying()
	a, b := s.te(0), s.te(1)
	ks, err := a.GetKey(t.Context(), "b-te", 3, 256)
	if err != nil {
		t.Fatal(err)
	}
	defer key.WipeAll(ks)
	once, err := b.GetKeyWithID(t.Context(), "a-te", []key.ID{ks[0].ID}, 256)
	if err != nil {
		t.Fatal(err)
	}
	defer key.WipeAll(once)
	if !once[0].Material.Equal(ks[0].Material) {
		t.Error("the two sides' keys differ")
	}
	before := s.stored(a)
	s.refusals(ks)
	// A batch with one spent key is refused as a whole, and consumes nothing.
	if _, err := b.GetKeyWithID(t.Context(), "a-te", []key.ID{ks[1].ID, ks[0].ID}, 0); !notFound(err) {
		t.Errorf("a batch with a spent key: %v", err)
	}
	rest, err := b.GetKeyWithID(t.Context(), "a-te", []key.ID{ks[2].ID, ks[1].ID}, 256)
	if err != nil {
		t.Fatalf("the keys of a refused batch: %v", err)
	}
	defer key.WipeAll(rest)
	if !rest[0].Material.Equal(ks[2].Material) || !rest[1].Material.Equal(ks[1].Material) {
		t.Error("the two sides' keys differ")
	}
	if after := s.stored(a); after != before {
		t.Errorf("refused calls consumed %d keys", before-after)
	}
}

func notFound(err error) bool {
	var no *key.BadRequest
	return errors.As(err, &no) && no.NotFound
}

// stored is stored_key_count of a's KME.
func (s *site) stored(a interface {
	Status(ctx context.Context, peer string) (key.SupplyStatus, error)
},
) int {
	s.t.Helper()
	st, err := a.Status(s.t.Context(), "b-te")
	if err != nil {
		s.t.Fatal(err)
	}
	return st.StoredKeyCount
}

// refusals goes through the table. Of ks, which a-te was given, b-te has fetched
// the first.
func (s *site) refusals(ks []key.SupplyKey) {
	t := s.t
	t.Helper()
	s.qipsec("pki", "issue", "--ca", filepath.Join(s.dir, "ca"), "--out", s.path(1, "pki"), "sae", "stranger")
	s.qipsec("pki", "issue", "--ca", filepath.Join(s.dir, "ca"), "--out", s.path(1, "pki"), "sae", "b-other")
	other := filepath.Join(s.dir, "other")
	s.qipsec("init", "--pair", "a", "b", "--here", "--no-ipsec", "--out", other)
	id := func(n int) string { return `{"key_IDs":[{"key_ID":"` + ks[n].ID.String() + `"}]}` }
	const (
		size8    = "size shall be a multiple of 8"
		sizes    = "size shall be between 64 and 4096"
		numbers  = "number shall be between 1 and 128"
		notFound = "one or more keys specified are not found on KME"
	)
	te := func(n int) string { return s.path(n, "pki", "saes", names[n]+"-te") }
	for _, c := range []struct {
		name       string
		node       int
		cert       string
		call, body string
		status     int // 0: TLS fails
		message    string
	}{
		{"no certificate", 0, "", "b-te/status", "", 0, ""},
		{"a certificate of another CA", 0, filepath.Join(other, "a", "pki", "saes", "a-te"), "b-te/status", "", 0, ""},
		{"a node's certificate", 0, s.path(0, "pki", "km"), "b-te/status", "", 0, ""},
		{"the KME's own certificate", 0, s.path(0, "pki", "kme"), "b-te/status", "", 0, ""},
		{"an SAE that is in no table", 0, s.path(1, "pki", "stranger"), "b-te/enc_keys", "{}", 401, ""},
		{"an SAE of the other node", 0, te(1), "b-te/enc_keys", "{}", 401, ""},
		{"a peer that is in no table", 0, te(0), "nobody/enc_keys", "{}", 401, ""},
		{"keys of others", 1, s.path(1, "pki", "stranger"), "a-te/dec_keys", id(1), 401, ""},
		{"keys of another SAE of the master's", 1, s.path(1, "pki", "b-other"), "a-te/dec_keys", id(1), 401, ""},
		{"size 0", 0, te(0), "b-te/enc_keys", `{"size":0}`, 400, "size shall not be 0"},
		{"size 7", 0, te(0), "b-te/enc_keys", `{"size":7}`, 400, size8},
		{"size 257", 0, te(0), "b-te/enc_keys", `{"size":257}`, 400, size8},
		{"size above max", 0, te(0), "b-te/enc_keys", `{"size":4104}`, 400, sizes},
		{"number 0", 0, te(0), "b-te/enc_keys", `{"number":0}`, 400, numbers},
		{"number above max", 0, te(0), "b-te/enc_keys", `{"number":129}`, 400, numbers},
		{"additional slaves", 0, te(0), "b-te/enc_keys", `{"additional_slave_SAE_IDs":["x"]}`, 400, ""},
		{"malformed", 0, te(0), "b-te/enc_keys", `{"size":`, 400, ""},
		{"huge", 0, te(0), "b-te/enc_keys", `{"extension_optional":[{"x":"` + strings.Repeat("x", 1<<17) + `"}]}`, 400, "request body shall not exceed 65536 bytes"},
		{"second dec_keys", 1, te(1), "a-te/dec_keys", id(0), 400, notFound},
		{"dec_keys at the wrong KME", 0, te(0), "b-te/dec_keys", id(1), 400, notFound},
		{"unknown id", 1, te(1), "a-te/dec_keys", `{"key_IDs":[{"key_ID":"9f8b2d6e-1111-8abc-8def-0123456789ab"}]}`, 400, notFound},
		{"duplicate ids", 1, te(1), "a-te/dec_keys", `{"key_IDs":[{"key_ID":"` + ks[1].ID.String() + `"},{"key_ID":"` + ks[1].ID.String() + `"}]}`, 400, ""},
		{"no ids", 1, te(1), "a-te/dec_keys", `{"key_IDs":[]}`, 400, ""},
	} {
		status, body, err := s.raw(c.node, c.cert, c.call, c.body)
		if c.status == 0 {
			if err == nil {
				t.Errorf("%s: answered %d %s", c.name, status, body)
			}
			continue
		}
		var e struct{ Message string }
		text := json.Unmarshal([]byte(body), &e) == nil && e.Message != "" && (c.message == "" || e.Message == c.message)
		if c.status == http.StatusUnauthorized {
			text = body == "" // which tells a stranger nothing
		}
		if err != nil || status != c.status || !text {
			t.Errorf("%s: %v, %d %s; want %d %s", c.name, err, status, body, c.status, c.message)
		}
	}
}

// raw makes one call over a connection of its own.
func (s *site) raw(node int, cert, call, body string) (int, string, error) {
	s.t.Helper()
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: x509.NewCertPool()}
	ca, err := os.ReadFile(s.path(node, "pki", "sae-ca.crt"))
	if err != nil || !cfg.RootCAs.AppendCertsFromPEM(ca) {
		s.t.Fatalf("CA: %v", err)
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert+".crt", cert+".key")
		if err != nil {
			s.t.Fatal(err)
		}
		// Shown whatever CAs the server asks for.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	verb := http.MethodPost
	if body == "" {
		verb = http.MethodGet
	}
	r, err := http.NewRequestWithContext(ctx, verb, fmt.Sprintf("https://%s:8442/api/v1/keys/%s", s.ip[node], call), strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	tr := &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, string(b), err
}
