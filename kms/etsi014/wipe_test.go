package etsi014

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// oneKey gives everybody the same key and keeps hold of its Materials.
type oneKey struct{ given []*key.Material }

func (s *oneKey) GetKey(context.Context, string, string, int, int) ([]key.SupplyKey, error) {
	m, err := key.Take(bytes.Repeat([]byte{0xa5, 0x17}, 16))
	if err != nil {
		return nil, err
	}
	s.given = append(s.given, m)
	return []key.SupplyKey{{ID: key.ID{1}, Material: m}}, nil
}

func (s *oneKey) GetKeyWithID(ctx context.Context, _, _ string, _ []key.ID, _ int) ([]key.SupplyKey, error) {
	return s.GetKey(ctx, "", "", 1, 256)
}

func (s *oneKey) Status(context.Context, string, string) (key.SupplyStatus, error) {
	return key.SupplyStatus{}, errors.New("disk on fire at /secret/path")
}

func (s *oneKey) Usage(context.Context, string, string, []key.UsageReport) error { return nil }

// keeper is a ResponseWriter that keeps the very slice it is given.
type keeper struct {
	httptest.ResponseRecorder
	kept []byte
	text string
}

func (k *keeper) Write(b []byte) (int, error) {
	k.kept, k.text = b, string(b)
	return len(b), nil
}

func newTestHandler(t *testing.T, log io.Writer) (*Handler, *oneKey) {
	t.Helper()
	s := &oneKey{}
	h, err := NewHandler(Options{
		Supplier: s, Identity: func(*http.Request) (string, error) { return "a1", nil },
		RetryWindow: time.Minute, Log: slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h, s
}

// After a call the handler's buffer and Materials are wiped, and the log has
// nothing of the key in any spelling.
func TestHandlerWipes(t *testing.T) {
	var log bytes.Buffer
	h, s := newTestHandler(t, &log)
	for _, path := range []string{"b1/enc_keys", "b1/dec_keys?key_ID=01000000-0000-0000-0000-000000000000"} {
		for range 2 { // the second dec_keys is a replay
			w := &keeper{ResponseRecorder: *httptest.NewRecorder()}
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, prefix+path, nil)
			r.TLS = &tls.ConnectionState{PeerCertificates: nil}
			h.ServeHTTP(w, r)
			if !strings.Contains(w.text, "pRelF6UXpRelF6UX") {
				t.Fatalf("answer %q", w.text)
			}
			if !bytes.Equal(w.kept, make([]byte, len(w.kept))) {
				t.Error("the buffer is not wiped")
			}
		}
	}
	for _, m := range s.given {
		if m.Len() != 0 {
			t.Error("a Material is not wiped")
		}
	}
	k := bytes.Repeat([]byte{0xa5, 0x17}, 16)
	for _, s := range []string{base64.StdEncoding.EncodeToString(k)[:12], hex.EncodeToString(k)[:12], string(k[:6])} {
		if strings.Contains(log.String(), s) {
			t.Errorf("the log has %q", s)
		}
	}
	if !strings.Contains(log.String(), "GetKeyWithID") {
		t.Error("the log has nothing")
	}
}

// A fault of ours is 503, and says nothing of itself.
func TestInnerFault(t *testing.T) {
	var log bytes.Buffer
	h, _ := newTestHandler(t, &log)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, prefix+"b1/status", nil))
	if w.Code != 503 || w.Body.String() != `{"message":"error on server side"}` || w.Header().Get("Retry-After") == "" {
		t.Errorf("%d %s %v", w.Code, w.Body, w.Header())
	}
	if !strings.Contains(log.String(), "disk on fire") {
		t.Error("the log does not say why")
	}
}

// Nobody learns anything without an identity, not even what calls there are.
func TestIdentityComesFirst(t *testing.T) {
	h, _ := newTestHandler(t, io.Discard)
	for _, id := range []func(*http.Request) (string, error){
		func(*http.Request) (string, error) { return "", nil },
		func(*http.Request) (string, error) { return "a1", errors.New("certificate is for two SAEs") },
	} {
		h.o.Identity = id
		for _, path := range []string{"/", prefix + "b1/enc_keys", prefix + "b1/nonsense"} {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPatch, path, nil))
			if w.Code != 401 || w.Body.Len() != 0 {
				t.Errorf("%s: %d %s", path, w.Code, w.Body)
			}
		}
	}
}

// stub answers in place of the network.
type stub func(*http.Request) (*http.Response, error)

func (s stub) RoundTrip(r *http.Request) (*http.Response, error) { return s(r) }

func TestClientWipes(t *testing.T) {
	c, err := NewClient(ClientConfig{URL: "https://kme", TLS: &tls.Config{}})
	if err != nil {
		t.Fatal(err)
	}
	c.http.Transport = stub(func(r *http.Request) (*http.Response, error) {
		if r.GetBody != nil {
			t.Error("the request can be sent again")
		}
		body := `{"keys":[]} secret`
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body))}, nil
	})
	for _, fails := range []error{nil, errors.New("not what was asked for")} {
		var kept []byte
		err = c.call(t.Context(), http.MethodPost, "b1", "enc_keys", nil, []byte("{}"), 100, func(b []byte) error {
			kept = b
			if !bytes.Contains(b, []byte("secret")) {
				t.Errorf("got %q", b)
			}
			return fails
		})
		if !errors.Is(err, fails) || len(kept) == 0 || !bytes.Equal(kept, make([]byte, len(kept))) {
			t.Errorf("after %v: error %v, buffer %q", fails, err, kept)
		}
	}
}

// watched is a context that tells when somebody waits for its end, once.
type watched struct {
	context.Context
	waits chan struct{}
}

func (w watched) Done() <-chan struct{} {
	close(w.waits)
	return w.Context.Done()
}

func TestRetries(t *testing.T) {
	c := newRetries(time.Hour)
	defer c.close()
	k := [32]byte{1}
	entered, release := make(chan struct{}), make(chan struct{})
	got := make(chan string, 1)
	go func() {
		b, err := c.do(t.Context(), k, func() ([]byte, error) {
			close(entered)
			<-release
			return []byte("answer"), nil
		})
		if err != nil {
			t.Error(err)
		}
		got <- string(b)
	}()
	<-entered
	never := func() ([]byte, error) {
		t.Error("the call was made twice")
		return nil, nil
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if b, err := c.do(gone, k, never); !errors.Is(err, context.Canceled) || b != nil {
		t.Errorf("while it is under way: %q, %v", b, err)
	}
	twin := watched{t.Context(), make(chan struct{})}
	go func() {
		b, err := c.do(twin, k, never)
		if err != nil {
			t.Error(err)
		}
		got <- string(b)
	}()
	<-twin.waits
	close(release)
	for range 2 {
		if s := <-got; s != "answer" {
			t.Errorf("two at once: %q", s)
		}
	}
	b, err := c.do(t.Context(), k, never)
	if err != nil || string(b) != "answer" {
		t.Errorf("again: %q, %v", b, err)
	}
	clear(b) // as the handler does
	if b, _ := c.do(t.Context(), k, never); string(b) != "answer" {
		t.Errorf("after the copy was wiped: %q", b)
	}
	if b, err := c.do(t.Context(), [32]byte{2}, func() ([]byte, error) { return nil, key.ErrUnauthorised }); !errors.Is(err, key.ErrUnauthorised) || b != nil {
		t.Errorf("a refusal: %q, %v", b, err)
	}
	if b, err := c.do(t.Context(), [32]byte{2}, func() ([]byte, error) { return []byte("later"), nil }); err != nil || string(b) != "later" {
		t.Errorf("a refusal is kept: %q, %v", b, err)
	}
	kept := c.m[k].body
	c.drop(k, c.m[k]) // its time is over
	if kept.Len() != 0 {
		t.Error("an answer is not wiped when its time is over")
	}
	calls := 0
	for i := range maxAnswers + 5 {
		for range 2 {
			if _, err := c.do(t.Context(), [32]byte{3, byte(i), byte(i >> 8)}, func() ([]byte, error) { calls++; return []byte("x"), nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(c.m) != maxAnswers || calls <= maxAnswers+5 {
		t.Errorf("%d answers kept, %d calls", len(c.m), calls)
	}
	kept = c.m[[32]byte{2}].body
	c.close()
	if kept.Len() != 0 || len(c.m) != 0 {
		t.Error("answers are not wiped at the end")
	}
}
