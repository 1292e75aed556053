package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/kma"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/qkdsim/control"
)

// link plays a device at the far end of the control interface.
type link struct {
	mu    sync.Mutex
	s     control.Status
	down  bool
	asked int
	did   string
}

func (l *link) Status() control.Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.s
}
func (l *link) Generate(n int) error { l.asked += n; return nil }
func (l *link) Init()                { l.did += "init " }
func (l *link) Stop()                { l.did += "stop " }

func TestDeviceOverItsControl(t *testing.T) {
	l := &link{}
	h := control.NewHandler(func(*http.Request) (string, error) { return "a", nil }, map[string]control.Device{"a": l}, quiet())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.mu.Lock()
		down := l.down
		l.mu.Unlock()
		if down {
			panic(http.ErrAbortHandler)
		}
		h.ServeHTTP(w, r)
	}))
	defer srv.Close()
	r := newRecorder(quiet())
	pool := uuid.New()
	q := qkde{control.NewClient(srv.URL, srv.Client())}
	d := &devices{events: r.source("qkde"), byPool: map[uuid.UUID]kma.QKDE{pool: q}, state: map[uuid.UUID]operator.Device{}}
	if d.last(pool) != nil || d.control(uuid.New()) != nil {
		t.Error("a device from nowhere")
	}
	for i, c := range []struct {
		say      control.Status
		down     bool
		state    string
		severity string // of the event; empty: none
	}{
		{say: control.Status{State: "generating", QBER: 0.02, Rate: 1000}, state: "running", severity: "run"},
		{say: control.Status{State: "generating", QBER: 0.03, Rate: 900}, state: "running"},
		{say: control.Status{State: "aborted", QBER: 0.2}, state: "aborted", severity: "alarm"},
		{say: control.Status{State: "outage"}, state: "link down", severity: "fault"},
		{down: true, state: unreachable, severity: "fault"},
		{down: true, state: unreachable},
		{say: control.Status{State: "stopped"}, state: "stopped", severity: "run"},
		{say: control.Status{State: "stopped", Alarms: []string{"qber"}}, state: "stopped", severity: "alarm"},
		{say: control.Status{State: "dreaming"}, state: "dreaming", severity: "fault"},
	} {
		before := len(r.ring.Latest(100, about("")))
		l.mu.Lock()
		l.s, l.down = c.say, c.down
		l.mu.Unlock()
		d.ask(t.Context(), pool, q)
		if got := d.last(pool); got == nil || got.State != c.state || got.QBER != c.say.QBER || got.Rate != c.say.Rate {
			t.Errorf("%d: %+v", i, got)
		}
		events := r.ring.Latest(100, about(""))
		switch {
		case c.severity == "" && len(events) != before:
			t.Errorf("%d: an event without a change: %+v", i, events[0])
		case c.severity != "" && (len(events) != before+1 || events[0].Severity != c.severity || !strings.Contains(events[0].Text, c.state)):
			t.Errorf("%d: want %s, got %+v", i, c.severity, events)
		}
	}
	if err := errors.Join(q.Generate(t.Context(), 1000), q.Init(t.Context()), q.Stop(t.Context())); err != nil || l.asked != 1000 || l.did != "init stop " {
		t.Errorf("%v: %d bytes, %s", err, l.asked, l.did)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.run(ctx); err != nil {
		t.Error(err)
	}
}
