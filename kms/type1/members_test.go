package type1

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// machine is one of several of node b.
type machine struct {
	srv   *httptest.Server
	calls atomic.Int64
	does  atomic.Pointer[http.HandlerFunc]
}

func (f *fixture) machine(t *testing.T) *machine {
	t.Helper()
	m := &machine{}
	m.set(StandingBy)
	m.srv = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.calls.Add(1)
		(*m.does.Load())(w, r)
	}))
	m.srv.Config.ErrorLog = f.srv.Config.ErrorLog
	m.srv.TLS = f.srv.TLS.Clone()
	m.srv.StartTLS()
	t.Cleanup(m.srv.Close)
	return m
}

func (m *machine) set(f http.HandlerFunc) { m.does.Store(&f) }

// A client finds the machine that has the inventory, stays with it, and makes no
// call again that may have been acted on.
func TestClientOfSeveralMachines(t *testing.T) {
	f := newFixture(t)
	one, two := f.machine(t), f.machine(t)
	c, err := NewClient(ClientOptions{URL: one.srv.URL, More: []string{two.srv.URL, "https://127.0.0.1:1"}, TLS: f.tls(t, "a", pki.KindNode), Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func() error { _, err := c.PullSettled(t.Context(), SettledRequest{}); return err }
	works := f.srv.Config.Handler.ServeHTTP

	if err := ask(); err == nil || one.calls.Load() != 1 || two.calls.Load() != 1 {
		t.Fatalf("nobody has the inventory: %v, %d and %d calls", err, one.calls.Load(), two.calls.Load())
	}
	two.set(works)
	for range 3 {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
	if n := one.calls.Load(); n > 2 {
		t.Errorf("the one that stands by is called %d times", n)
	}
	// A refusal is an answer.
	had := one.calls.Load()
	two.set(func(w http.ResponseWriter, _ *http.Request) { writeProblem(w, &Problem{NotSynced, ""}) })
	if err := ask(); !errors.Is(err, &Problem{Code: NotSynced}) || one.calls.Load() != had {
		t.Errorf("%v, %d calls", err, one.calls.Load()-had)
	}
	// One that dies over a call may have acted on it.
	one.set(works)
	two.set(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	if err := ask(); err == nil || one.calls.Load() != had {
		t.Errorf("cut off: %v, the call was made again %d times", err, one.calls.Load()-had)
	}
	if err := ask(); err != nil || one.calls.Load() != had+1 {
		t.Errorf("the next call: %v", err)
	}
	if _, err := NewClient(ClientOptions{URL: one.srv.URL, More: []string{"http://x"}, TLS: f.tls(t, "a", pki.KindNode)}); err == nil || !strings.Contains(err.Error(), "http://x") {
		t.Errorf("a bad address: %v", err)
	}
}
