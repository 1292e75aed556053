package site

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// world is the km CA and the certificates of one site and of others.
type world struct {
	t   *testing.T
	dir string
	ca  *pki.CA
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ca, err := pki.NewCA("km", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cred, err := ca.Credential()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t, t.TempDir(), ca}
	w.write("ca.crt", cred.Cert)
	return w
}

func (w *world) write(name string, b []byte) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), b, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) files(kind pki.Kind, name string) pki.Files {
	w.t.Helper()
	cred, err := w.ca.Issue(pki.Request{Kind: kind, Name: name}, time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	w.write(name+".crt", cred.Cert)
	w.write(name+".key", cred.Key)
	return pki.Files{CA: filepath.Join(w.dir, "ca.crt"), Cert: filepath.Join(w.dir, name+".crt"), Key: filepath.Join(w.dir, name+".key")}
}

// member is one machine of node b: its KSA gives key n as bytes of value n.
type member struct {
	srv  *httptest.Server
	addr netip.AddrPort

	mu     sync.Mutex
	leads  bool
	err    error
	block  chan struct{} // if set, calls wait for it
	calls  []string
	events []string
}

func (w *world) member() *member {
	w.t.Helper()
	m := &member{leads: true}
	h, err := NewHandler(HandlerOptions{
		Node: "b", Supplier: m, Peer: pki.NodeFromRequest, Log: discard(),
		Leads: func() (time.Time, bool) { return time.Unix(1e9, 0), m.isLeader() },
		Event: func(code, severity, _ string, attrs ...slog.Attr) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.events = append(m.events, fmt.Sprint(code, severity, attrs))
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	m.srv = httptest.NewUnstartedServer(h)
	m.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if m.srv.TLS, err = pki.Server(w.files(pki.KindNode, "b"), discard()); err != nil {
		w.t.Fatal(err)
	}
	m.srv.StartTLS()
	w.t.Cleanup(m.srv.Close)
	m.addr = netip.MustParseAddrPort(m.srv.Listener.Addr().String())
	return m
}

func (w *world) client(f pki.Files, members ...netip.AddrPort) *Client {
	w.t.Helper()
	t, err := pki.NodeClient(f, "b", discard())
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := NewClient(ClientOptions{Members: members, TLS: t, Local: func(netip.AddrPort) netip.Addr { return netip.Addr{} }})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(c.Close)
	return c
}

func (m *member) isLeader() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leads
}

func (m *member) note(call string) error {
	m.mu.Lock()
	block := m.block
	m.mu.Unlock()
	if block != nil {
		<-block
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.leads {
		return ErrStandby
	}
	m.calls = append(m.calls, call)
	return m.err
}

func (m *member) seen() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.Join(m.calls, "; ")
}

func (m *member) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

func idOf(n int) key.ID { return key.ID(uuid.UUID{0: byte(n), 15: 7}) }

func keysOf(number, size int) (out []key.SupplyKey) {
	for i := range number {
		m, err := key.Take(bytes.Repeat([]byte{byte(i + 1)}, size))
		if err != nil {
			panic(err)
		}
		out = append(out, key.SupplyKey{ID: idOf(i + 1), Class: key.Direct, Material: m})
	}
	return out
}

func (m *member) GetKey(_ context.Context, master, slave string, number, sizeBits int) ([]key.SupplyKey, error) {
	if err := m.note(fmt.Sprint("GetKey ", master, " ", slave, " ", number, " ", sizeBits)); err != nil {
		return nil, err
	}
	return keysOf(number, 32), nil
}

func (m *member) GetKeyWithID(_ context.Context, slave, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error) {
	if err := m.note(fmt.Sprint("GetKeyWithID ", slave, " ", master, " ", ids, " ", sizeBits)); err != nil {
		return nil, err
	}
	return keysOf(len(ids), 32), nil
}

func (m *member) Status(_ context.Context, caller, peer string) (key.SupplyStatus, error) {
	return key.SupplyStatus{SourceKME: "b", MasterSAE: caller, SlaveSAE: peer, StoredKeyCount: 42}, m.note("Status " + caller + " " + peer)
}

func (m *member) Usage(_ context.Context, sae, peer string, reports []key.UsageReport) error {
	return m.note(fmt.Sprint("Usage ", sae, " ", peer, " ", reports))
}

// All four calls arrive as they were made, and what comes back is what was given.
func TestCalls(t *testing.T) {
	w := newWorld(t)
	m := w.member()
	c := w.client(w.files(pki.KindNode, "b"), m.addr)
	ctx := t.Context()
	ks, err := c.GetKey(ctx, "b-te", "a-te", 3, 256)
	if err != nil || len(ks) != 3 {
		t.Fatal(len(ks), err)
	}
	for i, k := range ks {
		if k.ID != idOf(i+1) || k.Class != key.Direct || !bytes.Equal(k.Material.Bytes(), bytes.Repeat([]byte{byte(i + 1)}, 32)) {
			t.Errorf("key %d: %v %v", i, k.ID, k.Class)
		}
		runtime.KeepAlive(k.Material)
	}
	key.WipeAll(ks)
	ids := []key.ID{idOf(1), idOf(2)}
	if ks, err = c.GetKeyWithID(ctx, "b-te", "a-te", ids, 0); err != nil || len(ks) != 2 || ks[1].ID != ids[1] {
		t.Fatal(err)
	}
	key.WipeAll(ks)
	s, err := c.Status(ctx, "b-te", "a-te")
	if err != nil || s.StoredKeyCount != 42 || s.MasterSAE != "b-te" {
		t.Errorf("%+v, %v", s, err)
	}
	if err := c.Usage(ctx, "b-te", "a-te", []key.UsageReport{{ID: idOf(1), Usage: key.Used, Bytes: 9}}); err != nil {
		t.Error(err)
	}
	want := fmt.Sprint("GetKey b-te a-te 3 256; GetKeyWithID b-te a-te ", ids, " 0; Status b-te a-te; Usage b-te a-te ", []key.UsageReport{{ID: idOf(1), Usage: key.Used, Bytes: 9}})
	if m.seen() != want {
		t.Errorf("arrived: %s\nwant:    %s", m.seen(), want)
	}
	// Keys that were not asked for are not taken.
	if ks, err := c.GetKeyWithID(ctx, "b-te", "a-te", []key.ID{idOf(2)}, 0); err == nil {
		t.Errorf("another key came: %v", ks[0].ID)
	}
	if _, err := c.GetKey(ctx, "b-te", "a-te", 1, 512); err == nil {
		t.Error("a key of another size came")
	}
}

// The leader's refusals arrive as they were, and nobody else is asked after one.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	m, second := w.member(), w.member()
	c := w.client(w.files(pki.KindNode, "b"), m.addr, second.addr)
	for _, want := range []error{
		key.ErrUnauthorised,
		&key.BadRequest{Message: "size shall be a multiple of 8", Details: []key.Detail{{Name: "a", Value: "b"}}},
		&key.BadRequest{Message: "not found", NotFound: true},
		&key.Unavailable{RetryAfter: 1500 * time.Millisecond, Err: errors.New("no key")},
		errors.New("a bug"),
	} {
		m.set(func() { m.err = want })
		_, err := c.GetKey(t.Context(), "b-te", "a-te", 1, 256)
		var bad, wantBad *key.BadRequest
		var no, wantNo *key.Unavailable
		switch {
		case errors.Is(want, key.ErrUnauthorised):
			if !errors.Is(err, want) {
				t.Errorf("%v", err)
			}
		case errors.As(want, &wantBad):
			if !errors.As(err, &bad) || !reflect.DeepEqual(bad, wantBad) {
				t.Errorf("%v, want %v", err, want)
			}
		case errors.As(want, &wantNo):
			if !errors.As(err, &no) || no.RetryAfter != wantNo.RetryAfter {
				t.Errorf("%v, want %v", err, want)
			}
		default:
			if !errors.As(err, &no) || strings.Contains(err.Error(), "a bug") {
				t.Errorf("%v", err)
			}
		}
	}
	if second.seen() != "" {
		t.Errorf("another member was asked after the leader's word: %s", second.seen())
	}
}

// A call goes on from who certainly did nothing, and from nobody else.
func TestMembersInTurn(t *testing.T) {
	w := newWorld(t)
	first, second := w.member(), w.member()
	off, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := netip.MustParseAddrPort(off.Addr().String())
	if err := off.Close(); err != nil {
		t.Fatal(err)
	}
	c := w.client(w.files(pki.KindNode, "b"), gone, first.addr, second.addr)
	first.set(func() { first.leads = false })
	get := func() error {
		ks, err := c.GetKey(t.Context(), "b-te", "a-te", 1, 256)
		key.WipeAll(ks)
		return err
	}
	for range 2 {
		if err := get(); err != nil {
			t.Fatal(err)
		}
	}
	if at, since, ok := c.Leader(t.Context()); !ok || at != second.addr || since.Unix() != 1e9 {
		t.Errorf("leader: %v %v %v", at, since, ok)
	}
	second.set(func() { second.leads = false })
	var no *key.Unavailable
	if err := get(); !errors.As(err, &no) || no.RetryAfter <= 0 {
		t.Errorf("nobody leads: %v", err)
	}
	if at, _, ok := c.Leader(t.Context()); ok {
		t.Errorf("nobody leads, but %v is said to", at)
	}
	first.set(func() { first.leads = true })
	if err := get(); err != nil {
		t.Errorf("another one leads: %v", err)
	}
	// One that dies over a call may have supplied: nobody else is asked.
	second.set(func() { second.leads = true })
	block := make(chan struct{})
	first.set(func() { first.block = block })
	had := second.seen()
	done := make(chan error)
	go func() { done <- get() }()
	time.Sleep(50 * time.Millisecond) // if it is shorter than the way there, the call is repeated rightly
	first.srv.CloseClientConnections()
	if err := <-done; !errors.As(err, &no) {
		t.Errorf("cut off: %v", err)
	}
	close(block)
	if second.seen() != had {
		t.Error("a call that may have supplied was made again")
	}
	if err := get(); err != nil || second.seen() == had {
		t.Errorf("the next call: %v", err)
	}
}

// Only a member's certificate opens the channel, whatever the caller says.
func TestStrangers(t *testing.T) {
	w := newWorld(t)
	m := w.member()
	for _, f := range []pki.Files{w.files(pki.KindNode, "a"), w.files(pki.KindSAE, "b-te")} {
		c := w.client(f, m.addr)
		var no *key.Unavailable
		if _, err := c.GetKey(t.Context(), "b-te", "a-te", 1, 256); !errors.As(err, &no) {
			t.Errorf("%s: %v", f.Cert, err)
		}
		if _, _, ok := c.Leader(t.Context()); ok {
			t.Errorf("%s is told who leads", f.Cert)
		}
	}
	if m.seen() != "" {
		t.Errorf("strangers were served: %s", m.seen())
	}
	if len(m.events) != 4 || !strings.Contains(m.events[0], "SITE_NOT_AUTHORISEDalarm") || !strings.Contains(m.events[0], "peer=a") {
		t.Errorf("events: %q", m.events)
	}
	// A certificate of another CA does not get as far.
	other := newWorld(t)
	f := other.files(pki.KindNode, "b")
	f.CA = filepath.Join(w.dir, "ca.crt")
	if _, err := w.client(f, m.addr).GetKey(t.Context(), "b-te", "a-te", 1, 256); err == nil || len(m.events) != 4 {
		t.Errorf("another CA: %v", err)
	}
	// And a member calls nobody but a member.
	peer := httptest.NewUnstartedServer(http.NotFoundHandler())
	peer.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	var err error
	if peer.TLS, err = pki.Server(w.files(pki.KindNode, "c"), discard()); err != nil {
		t.Fatal(err)
	}
	peer.StartTLS()
	defer peer.Close()
	c := w.client(w.files(pki.KindNode, "b"), netip.MustParseAddrPort(peer.Listener.Addr().String()))
	if _, err := c.GetKey(t.Context(), "b-te", "a-te", 1, 256); err == nil || !strings.Contains(err.Error(), "certificate") && !strings.Contains(err.Error(), "answered") {
		t.Errorf("another node's server: %v", err)
	}
}

// What is no call of this version does not reach the KSA.
func TestHostileBodies(t *testing.T) {
	m := &member{leads: true}
	h, err := NewHandler(HandlerOptions{
		Node: "b", Supplier: m, Leads: func() (time.Time, bool) { return time.Time{}, true }, Log: discard(),
		Peer: func(*http.Request) (string, error) { return "b", nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, body string
		status     int
	}{
		{pathGetKey, `{"sae":"b-te","peer":"a-te","number":1}`, 200},
		{pathGetKey, `{"sae":"","peer":"a-te","number":1}`, 400},
		{pathGetKey, `{"sae":"b-te","peer":"` + strings.Repeat("x", 65) + `"}`, 400},
		{pathGetKey, `{"sae":"b-te","peer":"a-te","number":1e3}`, 400},
		{pathGetKey, `{"sae":"b-te","peer":"a-te","number":9223372036854775808}`, 400},
		{pathGetKey, `{"sae":"b-te","peer":"a-te","node":"a"}`, 400},
		{pathGetKey, `{"sae":"b-te","peer":"a-te"} {}`, 400},
		{pathGetKey, `[]`, 400},
		{pathGetKey, ``, 400},
		{pathGetKey, `{"sae":"b-te","peer":"a-te"` + strings.Repeat(" ", maxRequest) + `}`, 400},
		{pathGetKeyWithID, `{"sae":"b-te","peer":"a-te","key_ids":["x"]}`, 400},
		{pathGetKeyWithID, `{"sae":"b-te","peer":"a-te","key_ids":[` + strings.TrimSuffix(strings.Repeat(`"`+idOf(1).String()+`",`, maxKeys+1), ",") + `]}`, 400},
		{pathUsage, `{"sae":"b-te","peer":"a-te","reports":[{"key_id":"","usage":"used"}]}`, 400},
		{Prefix + "keys", `{}`, 404},
	} {
		m.calls = nil
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, c.path, strings.NewReader(c.body)))
		if rec.Code != c.status || (c.status == 200) != (len(m.calls) == 1) {
			t.Errorf("%s %.60q: status %d, want %d; calls %q", c.path, c.body, rec.Code, c.status, m.calls)
		}
		if c.status != 200 {
			var r refusal
			if err := decode(rec.Body.Bytes(), &r); err != nil || r.Code != malformed {
				t.Errorf("%s: %+v, %v", c.path, r, err)
			}
		}
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, pathGetKey, nil))
	if rec.Code == 200 {
		t.Error("GET gives keys")
	}
}

// No more calls are under way than have room.
func TestInFlight(t *testing.T) {
	m := &member{leads: true, block: make(chan struct{})}
	h, err := NewHandler(HandlerOptions{
		Node: "b", Supplier: m, Leads: func() (time.Time, bool) { return time.Time{}, true }, Log: discard(),
		Peer: func(*http.Request) (string, error) { return "b", nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	codes := make(chan int, inFlight+1)
	for range inFlight + 1 {
		go func() {
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, pathStatus, strings.NewReader(`{"sae":"b-te","peer":"a-te"}`)))
			codes <- rec.Code
		}()
	}
	if code := <-codes; code != http.StatusServiceUnavailable {
		t.Errorf("first answer: %d", code)
	}
	close(m.block)
	for range inFlight {
		if code := <-codes; code != http.StatusOK {
			t.Errorf("answer: %d", code)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		`{"sae":"b-te","peer":"a-te","number":1,"size_bits":256}`, `{"sae":"b-te","peer":"a-te","key_ids":["11111111-1111-4111-8111-111111111111"]}`,
		`{"sae":"b-te","peer":"a-te","reports":[{"key_id":"11111111-1111-4111-8111-111111111111","usage":"used","bytes":1}]}`, `{}`, ``, `[]`, `{"sae":null}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRequest(b)
		if err != nil {
			return
		}
		if r.SAE == "" || len(r.SAE) > maxSAE || r.Peer == "" || len(r.Peer) > maxSAE || len(r.KeyIDs) > maxKeys || len(r.Reports) > maxKeys {
			t.Errorf("taken: %+v", r)
		}
	})
}

func FuzzContainer(f *testing.F) {
	ks := keysOf(3, 32)
	f.Add(container(ks))
	key.WipeAll(ks)
	f.Add([]byte{})
	f.Add(make([]byte, keyHeader))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parseContainer(b)
		if err != nil {
			if keys != nil {
				t.Error("an error and keys")
			}
			return
		}
		if again := container(keys); !bytes.Equal(again, b) {
			t.Errorf("%d bytes were taken and are %d now", len(b), len(again))
		}
		if err := checkKeys(keys, len(keys), 0, nil); err != nil {
			t.Error(err)
		}
		key.WipeAll(keys)
	})
}

// Answers that no member gives are errors, and nothing of them is used.
func TestHostileAnswers(t *testing.T) {
	w := newWorld(t)
	var answer func(http.ResponseWriter)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		answer(rw)
	}))
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	var err error
	if srv.TLS, err = pki.Server(w.files(pki.KindNode, "b"), discard()); err != nil {
		t.Fatal(err)
	}
	srv.StartTLS()
	defer srv.Close()
	c := w.client(w.files(pki.KindNode, "b"), netip.MustParseAddrPort(srv.Listener.Addr().String()))
	for name, f := range map[string]func(http.ResponseWriter){
		"no keys":   func(http.ResponseWriter) {},
		"two keys":  func(w http.ResponseWriter) { _, _ = w.Write(container(keysOf(2, 32))) },
		"short key": func(w http.ResponseWriter) { _, _ = w.Write(container(keysOf(1, 31))) },
		"cut off":   func(w http.ResponseWriter) { _, _ = w.Write(container(keysOf(1, 32))[:40]) },
		"too long":  func(w http.ResponseWriter) { _, _ = w.Write(make([]byte, maxAnswer+1)) },
		"no length": func(w http.ResponseWriter) { w.(http.Flusher).Flush(); _, _ = w.Write(container(keysOf(1, 32))) },
		"status":    func(w http.ResponseWriter) { w.WriteHeader(http.StatusTeapot) },
		"redirect": func(w http.ResponseWriter) {
			w.Header().Set("Location", "/")
			w.WriteHeader(http.StatusTemporaryRedirect)
		},
		"retry": func(w http.ResponseWriter) { refuse(w, 503, refusal{Code: unavailable, RetryAfterMS: -5}) },
		"code":  func(w http.ResponseWriter) { refuse(w, 503, refusal{Code: "own"}) },
	} {
		answer = f
		ks, err := c.GetKey(t.Context(), "b-te", "a-te", 1, 256)
		var no *key.Unavailable
		if !errors.As(err, &no) || no.RetryAfter < 0 || ks != nil {
			t.Errorf("%s: %d keys, %v", name, len(ks), err)
		}
	}
}
