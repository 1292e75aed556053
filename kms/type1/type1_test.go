package type1

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

var (
	poolID = uuid.MustParse("6d7b2a3e-6a0e-4c3b-9b1e-0f1e2d3c4b5a")
	other  = uuid.MustParse("6d7b2a3e-6a0e-4c3b-9b1e-0f1e2d3c4b5b")
	link   = Link{From: uuid.MustParse("11111111-6a0e-4c3b-9b1e-0f1e2d3c4b5a"), To: uuid.MustParse("22222222-6a0e-4c3b-9b1e-0f1e2d3c4b5a")}
	keyID  = key.ID(uuid.MustParse("33333333-6a0e-8c3b-9b1e-0f1e2d3c4b5a"))
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// recorder is the agent and the KSA: it notes what arrived and answers with
// what the test put there.
type recorder struct {
	mu   sync.Mutex
	peer string
	got  any
	err  error
	busy chan struct{} // if set: entered, then closed by the test
}

func (r *recorder) note(peer string, got any) error {
	if r.busy != nil {
		r.busy <- struct{}{}
		<-r.busy
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peer, r.got = peer, got
	return r.err
}

var (
	wantValidate = ValidateResponse{Results: []ValidateResult{{Seq: 3, Verdict: Agreed, Tag: bytes.Repeat([]byte{9}, 16)}, {Seq: 4, Verdict: Never}}}
	wantLease    = LeaseResponse{Mark: Position(key.At(3, 8)), Missing: []uint64{3}}
	wantBurn     = BurnResponse{Keep: []key.ID{keyID}}
	wantSync     = SyncResponse{SyncState{Instance: link.To, Generation: 4, PeerInstance: link.From, PeerGeneration: 3, Mark: Position(key.At(3, 8)), NewestSeq: 9, Received: []Range{}, Active: []Range{{3, 5}, {7, 7}}}}
	wantWant     = WantResponse{Giving: 300}
	wantSettled  = SettledResponse{KeyIDs: []key.ID{keyID}, UpTo: 1<<52 + 1, More: true, Held: []key.ID{{7}}}
	aNotice      = Notice{Pool: poolID, Position: Position(key.At(3, 2)), KeyID: keyID, MasterSAE: "sae-a", SlaveSAEs: []string{"sae-b"}, SizeBits: 256, TTLSeconds: 60}
)

func (r *recorder) Validate(_ context.Context, peer string, q ValidateRequest) (ValidateResponse, error) {
	return wantValidate, r.note(peer, q)
}

func (r *recorder) Lease(_ context.Context, peer string, q LeaseRequest) (LeaseResponse, error) {
	return wantLease, r.note(peer, q)
}

func (r *recorder) Burn(_ context.Context, peer string, q BurnRequest) (BurnResponse, error) {
	return wantBurn, r.note(peer, q)
}

func (r *recorder) Sync(_ context.Context, peer string, q SyncRequest) (SyncResponse, error) {
	return wantSync, r.note(peer, q)
}

func (r *recorder) Want(_ context.Context, peer string, q WantRequest) (WantResponse, error) {
	return wantWant, r.note(peer, q)
}

func (r *recorder) SupplyNotice(_ context.Context, peer string, q NoticeRequest) error {
	return r.note(peer, q)
}

func (r *recorder) PullNotice(_ context.Context, peer string, q PullRequest) (PullResponse, error) {
	return PullResponse{Notices: []Notice{aNotice}}, r.note(peer, q)
}

func (r *recorder) PullSettled(_ context.Context, peer string, q SettledRequest) (SettledResponse, error) {
	return wantSettled, r.note(peer, q)
}

// fixture is node b's handler behind TLS, and node a's way to it.
type fixture struct {
	rec    *recorder
	srv    *httptest.Server
	dir    string
	ca     *pki.CA
	mu     sync.Mutex
	events []string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	ca, err := pki.NewCA("km", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{rec: &recorder{}, dir: t.TempDir(), ca: ca}
	cred, err := ca.Credential()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.dir, "ca.crt"), cred.Cert, 0o644); err != nil {
		t.Fatal(err)
	}
	h, err := NewHandler(HandlerOptions{
		Agent: f.rec, Supply: f.rec, Peer: pki.NodeFromRequest, Log: discard(), MaxBody: 1 << 16, MaxInFlight: 1,
		PeerOf: func(p uuid.UUID) (string, bool) { return "a", p == poolID },
		Event: func(code, _, _ string, _ ...slog.Attr) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.events = append(f.events, code)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	f.srv = httptest.NewUnstartedServer(h)
	f.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if f.srv.TLS, err = pki.Server(f.files(t, "b", pki.KindNode), discard()); err != nil {
		t.Fatal(err)
	}
	f.srv.StartTLS()
	t.Cleanup(f.srv.Close)
	return f
}

func (f *fixture) files(t *testing.T, name string, kind pki.Kind) pki.Files {
	t.Helper()
	cred, err := f.ca.Issue(pki.Request{Kind: kind, Name: name, IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := cred.Write(f.dir, name, true); err != nil {
		t.Fatal(err)
	}
	return pki.Files{CA: filepath.Join(f.dir, "ca.crt"), Cert: filepath.Join(f.dir, name+".crt"), Key: filepath.Join(f.dir, name+".key")}
}

func (f *fixture) tls(t *testing.T, name string, kind pki.Kind) *tls.Config {
	t.Helper()
	c, err := pki.NodeClient(f.files(t, name, kind), "b", discard())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (f *fixture) client(t *testing.T, name string) *Client {
	t.Helper()
	c, err := NewClient(ClientOptions{URL: f.srv.URL, TLS: f.tls(t, name, pki.KindNode), Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func sampleRequests() (ValidateRequest, LeaseRequest, BurnRequest, SyncRequest) {
	return ValidateRequest{Pool: poolID, Link: link, Algorithm: "poly1305", Items: []ValidateItem{{3, bytes.Repeat([]byte{7}, 16)}, {4, bytes.Repeat([]byte{8}, 16)}}, Destroyed: []uint64{2}},
		LeaseRequest{Pool: poolID, Link: link, Generation: 3, Purpose: PurposeSupply, After: Position(key.At(3, 0)), Mark: Position(key.At(4, 6)), Floor: Position(key.At(3, 0)), Seqs: []uint64{3, 4}},
		BurnRequest{Pool: poolID, Link: link, Generation: 3, UpTo: Position(key.At(3, 0))},
		SyncRequest{Pool: poolID, SyncState: SyncState{Instance: link.From, Generation: 3, PeerInstance: link.To, PeerGeneration: 2, NewestSeq: 4, Received: []Range{{4, 4}}, Active: []Range{{1, 2}}}}
}

func sampleWant() WantRequest {
	return WantRequest{Pool: poolID, Link: link, Keys: 500, Left: 12, Used: 9000, Floor: Position(key.At(4, 5))}
}

// TestCalls sends every message over TLS and compares both directions.
func TestCalls(t *testing.T) {
	f := newFixture(t)
	c := f.client(t, "a")
	v, l, b, s := sampleRequests()
	n, p, e := NoticeRequest{Notices: []Notice{aNotice}}, PullRequest{KeyIDs: []key.ID{keyID}}, SettledRequest{UpTo: 1 << 52, Due: []key.ID{keyID}}
	w := sampleWant()
	tests := []struct {
		name       string
		sent, want any
		call       func(context.Context) (any, error)
	}{
		{"validateKey", v, wantValidate, func(ctx context.Context) (any, error) { return c.Validate(ctx, v) }},
		{"lease", l, wantLease, func(ctx context.Context) (any, error) { return c.Lease(ctx, l) }},
		{"burn", b, wantBurn, func(ctx context.Context) (any, error) { return c.Burn(ctx, b) }},
		{"sync", s, wantSync, func(ctx context.Context) (any, error) { return c.Sync(ctx, s) }},
		{"want", w, wantWant, func(ctx context.Context) (any, error) { return c.Want(ctx, w) }},
		{"supplyNotice", n, nil, func(ctx context.Context) (any, error) { return nil, c.SupplyNotice(ctx, n) }},
		{"pullNotice", p, PullResponse{Notices: []Notice{aNotice}}, func(ctx context.Context) (any, error) { return c.PullNotice(ctx, p) }},
		{"pullSettled", e, wantSettled, func(ctx context.Context) (any, error) { return c.PullSettled(ctx, e) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.call(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("answer %+v, want %+v", got, tt.want)
			}
			if f.rec.peer != "a" || !reflect.DeepEqual(f.rec.got, tt.sent) {
				t.Errorf("arrived from %q: %+v, want %+v", f.rec.peer, f.rec.got, tt.sent)
			}
		})
	}
	for _, want := range []error{&Problem{NotValidated, "seq 4"}, &Problem{Conflict, "x"}, &Problem{AlgorithmMismatch, "y"}} {
		f.rec.err = want
		_, err := c.Lease(t.Context(), l)
		var got *Problem
		if !errors.As(err, &got) || *got != *want.(*Problem) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	f.rec.err = errors.New("a secret of this node")
	if _, err := c.Lease(t.Context(), l); CodeOf(err) != Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("an internal error became %v", err)
	}
}

func TestAuthorisation(t *testing.T) {
	f := newFixture(t)
	v, l, _, _ := sampleRequests()
	if _, err := f.client(t, "c").Lease(t.Context(), l); CodeOf(err) != NotAuthorised {
		t.Errorf("a node that is not the pool's other end: %v", err)
	}
	v.Pool = other
	if _, err := f.client(t, "a").Validate(t.Context(), v); CodeOf(err) != NotAuthorised {
		t.Errorf("an unknown pool: %v", err)
	}
	mixed := NoticeRequest{Notices: []Notice{aNotice, aNotice}}
	mixed.Notices[1].Pool = other
	if err := f.client(t, "a").SupplyNotice(t.Context(), mixed); CodeOf(err) != NotAuthorised {
		t.Errorf("one foreign pool among the notices: %v", err)
	}
	if f.rec.got != nil {
		t.Errorf("a refused request reached the agent: %+v", f.rec.got)
	}
	if want := []string{"TYPE1_NOT_AUTHORISED", "TYPE1_NOT_AUTHORISED", "TYPE1_NOT_AUTHORISED"}; !reflect.DeepEqual(f.events, want) {
		t.Errorf("events %v, want %v", f.events, want)
	}
	// An SAE's certificate, of the same CA, names no node.
	conf := f.tls(t, "sae-a", pki.KindSAE)
	c, err := NewClient(ClientOptions{URL: f.srv.URL, TLS: conf})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Lease(t.Context(), l); CodeOf(err) != Unauthenticated {
		t.Errorf("an SAE's certificate: %v", err)
	}
	conf = conf.Clone()
	conf.GetClientCertificate, conf.ClientSessionCache = nil, nil
	if c, err = NewClient(ClientOptions{URL: f.srv.URL, TLS: conf}); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Lease(t.Context(), l); err == nil || CodeOf(err) != "" {
		t.Errorf("no certificate: %v", err)
	}
}

func TestMalformed(t *testing.T) {
	f := newFixture(t)
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: f.tls(t, "a", pki.KindNode)}}
	defer h.CloseIdleConnections()
	_, l, _, _ := sampleRequests()
	good, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	sub := func(old, repl string) string {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("%q is not in %s", old, good)
		}
		return strings.Replace(string(good), old, repl, 1)
	}
	tests := []struct {
		name, method, path, body string
		status                   int
	}{
		{"good", "POST", PathLease, string(good), 200},
		{"get", "GET", PathLease, "", 404},
		{"path", "POST", "/type1/v1/other", string(good), 404},
		{"empty", "POST", PathLease, "", 400},
		{"truncated", "POST", PathLease, string(good[:len(good)-1]), 400},
		{"two values", "POST", PathLease, string(good) + "{}", 400},
		{"unknown field", "POST", PathLease, sub(`{`, `{"x":1,`), 400},
		{"too large", "POST", PathLease, strings.Repeat(" ", 1<<16) + string(good), 400},
		{"mark below after", "POST", PathLease, sub(`"mark":"4/6"`, `"mark":"2/6"`), 400},
		{"position with sign", "POST", PathLease, sub(`"4/6"`, `"+4/6"`), 400},
		{"position out of range", "POST", PathLease, sub(`"4/6"`, `"4/1048576"`), 400},
		{"purpose", "POST", PathLease, sub(`"supply"`, `"other"`), 400},
		{"seqs fall", "POST", PathLease, sub(`[3,4]`, `[4,3]`), 400},
		{"seq outside", "POST", PathLease, sub(`[3,4]`, `[3,5]`), 400},
		{"no instance", "POST", PathLease, sub(link.From.String(), uuid.Nil.String()), 400},
		{"tag size", "POST", PathValidateKey, `{"pool":"` + poolID.String() + `","from":"` + link.From.String() + `","to":"` + link.To.String() + `","algorithm":"poly1305","items":[{"seq":1,"tag":"AAAA"}]}`, 400},
		{"ranges overlap", "POST", PathSync, `{"pool":"` + poolID.String() + `","instance":"` + link.From.String() + `","active":[[1,3],[3,4]]}`, 400},
		{"generation", "POST", PathSync, `{"pool":"` + poolID.String() + `","instance":"` + link.From.String() + `","generation":9223372036854775808}`, 400},
		{"range reversed", "POST", PathSync, `{"pool":"` + poolID.String() + `","instance":"` + link.From.String() + `","active":[[3,1]]}`, 400},
		{"notice with no SAE", "POST", PathSupplyNotice, `{"notices":[{"pool":"` + poolID.String() + `"}]}`, 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, f.srv.URL+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := h.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			b, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != tt.status {
				t.Fatalf("HTTP %d %s, %v, want %d", resp.StatusCode, b, err, tt.status)
			}
			if tt.status == 200 {
				return
			}
			var w wireProblem
			if err := json.Unmarshal(b, &w); err != nil || w.Status != tt.status || !strings.HasPrefix(w.Type, typePrefix) ||
				resp.Header.Get("Content-Type") != "application/problem+json" {
				t.Fatalf("not a problem of RFC 9457: %s", b)
			}
		})
	}
}

func TestOverload(t *testing.T) {
	f := newFixture(t)
	f.rec.busy = make(chan struct{})
	_, l, _, _ := sampleRequests()
	done := make(chan error, 1)
	slow := f.client(t, "a")
	go func() {
		_, err := slow.Lease(t.Context(), l)
		done <- err
	}()
	<-f.rec.busy // the only slot is taken
	if _, err := f.client(t, "a").Lease(t.Context(), l); CodeOf(err) != Overloaded {
		t.Errorf("a second request at once: %v", err)
	}
	close(f.rec.busy)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestAnswers gives the client answers that no handler of ours gives.
func TestAnswers(t *testing.T) {
	var status int
	var body string
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	defer srv.Close()
	c, err := NewClient(ClientOptions{URL: srv.URL, Transport: srv.Client().Transport, MaxBody: 1000})
	if err != nil {
		t.Fatal(err)
	}
	long, err := NewClient(ClientOptions{URL: srv.URL, Transport: srv.Client().Transport})
	if err != nil {
		t.Fatal(err)
	}
	_, l, _, _ := sampleRequests()
	for name, tt := range map[string]struct {
		status int
		body   string
		code   Code
	}{
		"too large":           {200, `{"mark":"3/8"}` + strings.Repeat(" ", 1000), ""},
		"unknown field":       {200, `{"mark":"3/8","x":1}`, ""},
		"empty":               {200, ``, ""},
		"missing falls":       {200, `{"mark":"3/8","missing":[4,3]}`, ""},
		"html":                {502, `<html>`, Internal},
		"unknown problem":     {409, `{"type":"urn:q-ipsec:problem:moon","status":409}`, Internal},
		"status and type":     {500, `{"type":"urn:q-ipsec:problem:conflict","status":500}`, Internal},
		"redirect":            {302, ``, Internal},
		"problem":             {409, `{"type":"urn:q-ipsec:problem:conflict","detail":"a\nb` + strings.Repeat("x", 300) + `"}`, Conflict},
		"success with status": {204, ``, Internal},
	} {
		status, body = tt.status, tt.body
		_, err := c.Lease(t.Context(), l)
		if err == nil || CodeOf(err) != tt.code {
			t.Errorf("%s: %v, want code %q", name, err, tt.code)
		}
		if err != nil && (strings.Contains(err.Error(), "\n") || len(err.Error()) > 512) {
			t.Errorf("%s: the peer's text goes to our log: %q", name, err)
		}
	}
	text := func(r SettledResponse) string {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for name, answer := range map[string]string{
		"negative": `{"key_ids":[],"up_to":-1,"more":false}`, "unknown field": `{"key_ids":[],"up_to":1,"more":false,"x":1}`, "more after nothing": `{"key_ids":[],"up_to":1,"more":true}`,
		"too many": text(SettledResponse{KeyIDs: make([]key.ID, MaxSettled+1)}), "too many held": text(SettledResponse{Held: make([]key.ID, MaxSettled+1)}),
	} {
		status, body = 200, answer
		if _, err := long.PullSettled(t.Context(), SettledRequest{}); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := (&SettledRequest{Due: make([]key.ID, MaxSettled+1)}).check(); err == nil {
		t.Error("a question about too many keys is taken")
	}
	l.Mark = 0
	if _, err := c.Lease(t.Context(), l); err == nil || CodeOf(err) != "" {
		t.Errorf("an invalid request was sent: %v", err)
	}
	for _, u := range []string{"", "http://127.0.0.1:1", "https://127.0.0.1:1/x", "://"} {
		if _, err := NewClient(ClientOptions{URL: u, TLS: &tls.Config{}}); err == nil {
			t.Errorf("address %q was taken", u)
		}
	}
}

func TestCallEndsWithContextAndTimeout(t *testing.T) {
	hang := make(chan struct{})
	srv := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		select {
		case <-hang:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler) // no answer
	}))
	defer srv.Close()
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	defer close(hang)
	_, l, _, _ := sampleRequests()
	c, err := NewClient(ClientOptions{URL: srv.URL, Transport: srv.Client().Transport, Timeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Lease(t.Context(), l); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent peer: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Lease(ctx, l); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
}

func TestRanges(t *testing.T) {
	seqs := []uint64{1, 2, 3, 7, 9, 10}
	rs := Ranges(seqs)
	if want := []Range{{1, 3}, {7, 7}, {9, 10}}; !reflect.DeepEqual(rs, want) {
		t.Fatal(rs)
	}
	in := map[uint64]bool{}
	for _, s := range seqs {
		in[s] = true
	}
	for s := range uint64(13) {
		if Contains(rs, s) != in[s] {
			t.Errorf("Contains(%d) is not %v", s, in[s])
		}
	}
	if b, err := json.Marshal(SyncState{Received: Ranges(nil)}); err != nil || !bytes.Contains(b, []byte(`"received":[]`)) {
		t.Errorf("%s, %v", b, err)
	}
}

// FuzzRequests feeds every request's decoder; what it takes must come out the
// same after a second trip.
func FuzzRequests(f *testing.F) {
	v, l, b, s := sampleRequests()
	for i, m := range []any{v, l, b, s, NoticeRequest{Notices: []Notice{aNotice}}, PullRequest{KeyIDs: []key.ID{keyID}}, SettledRequest{UpTo: 7, Due: []key.ID{{7}}}, sampleWant()} {
		text, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), text)
	}
	f.Fuzz(func(t *testing.T, kind uint8, in []byte) {
		fresh := func() request {
			return []request{&ValidateRequest{}, &LeaseRequest{}, &BurnRequest{}, &SyncRequest{}, &NoticeRequest{}, &PullRequest{}, &SettledRequest{}, &WantRequest{}}[kind%8]
		}
		m := fresh()
		if decode(in, m) != nil || m.check() != nil {
			return
		}
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		again := fresh()
		if err := decode(text, again); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if err := again.check(); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if second, err := json.Marshal(again); err != nil || !bytes.Equal(second, text) {
			t.Fatalf("%s became %s, %v", text, second, err)
		}
	})
}

// FuzzAnswers feeds the client's decoders.
func FuzzAnswers(f *testing.F) {
	for i, m := range []any{wantValidate, wantLease, wantBurn, wantSync, PullResponse{Notices: []Notice{aNotice}}, wantSettled, wantWant} {
		text, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), uint16(200), text)
	}
	f.Add(uint8(0), uint16(409), []byte(`{"type":"urn:q-ipsec:problem:conflict","detail":"x"}`))
	f.Fuzz(func(t *testing.T, kind uint8, status uint16, in []byte) {
		if status != 200 {
			if s := readProblem(int(status), in).Error(); strings.ContainsAny(s, "\n\r\x00") || len(s) > 400 {
				t.Fatalf("unfit for a log: %q", s)
			}
			return
		}
		m := []interface{ check() error }{&ValidateResponse{}, &LeaseResponse{}, &BurnResponse{}, &SyncResponse{}, &PullResponse{}, &SettledResponse{}, &WantResponse{}}[kind%7]
		if decode(in, m) == nil {
			_ = m.check()
		}
	})
}
