package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// fakeJournal keeps what is written.
type fakeJournal struct {
	mu     sync.Mutex
	rows   []store.Event
	events []store.LogEvent
	err    error
}

func (f *fakeJournal) Record(_ context.Context, e []store.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.rows = append(f.rows, e...)
	}
	return f.err
}

func (f *fakeJournal) AppendEvent(_ context.Context, e store.LogEvent) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.events = append(f.events, e)
	}
	return f.err
}

func TestRecorderWritesAllBeforeItEnds(t *testing.T) {
	var log strings.Builder
	f := &fakeJournal{}
	r := newRecorder(slog.New(slog.NewTextHandler(&log, nil)))
	r.keep(f)
	pool, id := uuid.New(), key.ID(uuid.New())
	for i, kind := range []ksa.EventKind{ksa.Supplied, ksa.Fetched, ksa.Stranded, ksa.Stranded} {
		r.supply(ksa.Event{Kind: kind, Own: i%3 == 0, Peer: "b", MasterSAE: "m", SlaveSAE: "s", Pool: pool, Position: key.At(1, 2), KeyID: id, Why: "expired"})
	}
	for range batchSize { // more than one transaction
		r.supply(ksa.Event{Kind: ksa.Supplied, Pool: pool})
	}
	r.supply(ksa.Event{Kind: ksa.Refused, Peer: "b", Why: "not its own"})
	r.source("kma").Event("LOW", "alarm", "few keys", slog.String("peer", "b"), slog.Int("keys", 3))
	ikeEvents{r}.Event(ike.Event{Severity: ike.Run, Code: ike.EventUp, Connection: "a-b", Text: "up", Action: "none"})
	ikeEvents{r}.Event(ike.Event{Severity: ike.Run, Code: ike.EventRekeyed, Connection: "a-c", Text: "in memory only"})

	ctx, cancel := context.WithCancel(t.Context())
	cancel() // what is queued is written nevertheless
	if err := r.run(ctx); err != nil {
		t.Fatal(err)
	}
	if len(f.rows) != 4+batchSize {
		t.Fatalf("%d rows", len(f.rows))
	}
	for i, want := range []struct {
		side  store.Side
		state key.State
	}{{store.Own, key.Supplied}, {store.Peer, key.Supplied}, {store.Peer, key.Stranded}, {store.Own, key.Stranded}} {
		if e := f.rows[i]; e.Side != want.side || e.State != want.state || e.ID != id || e.Pool != pool || e.First != key.At(1, 2) || e.Count != 1 || !strings.HasPrefix(e.Detail, "m to s") {
			t.Errorf("row %d: %+v", i, e)
		}
	}
	if len(f.events) != 3 || f.events[0].Code != "KSA_REFUSED" || f.events[1].Text != "b: few keys, keys 3" || f.events[2].Severity != store.SeverityRun || f.events[2].Action != "none" {
		t.Errorf("events: %+v", f.events)
	}
	latest := r.ring.Latest(10, about("a-b"))
	if len(latest) != 1 || latest[0].Code != ike.EventUp {
		t.Errorf("ring: %+v", latest)
	}
	if latest := r.ring.Latest(10, about("a-c")); len(latest) != 1 || latest[0].Time.IsZero() {
		t.Errorf("ring: %+v", latest)
	}
	if alarms := r.ring.Latest(10, func(e operator.Event) bool { return e.Severity == "alarm" }); len(alarms) != 2 || alarms[0].Peer != "b" {
		t.Errorf("alarms: %+v", alarms)
	}
	if got := log.String(); strings.Count(got, "few keys") != 1 || !strings.Contains(got, "level=WARN") || strings.Contains(got, "up") {
		t.Errorf("log: %s", got)
	}
}

func TestRecorderNeverBlocksAndTellsOfGaps(t *testing.T) {
	var log strings.Builder
	f := &fakeJournal{}
	r := newRecorder(slog.New(slog.NewTextHandler(&log, nil)))
	r.keep(f)
	for range queueSize + 5 {
		r.supply(ksa.Event{Kind: ksa.Supplied})
	}
	r.flush(t.Context())
	if len(f.rows) != queueSize || !strings.Contains(log.String(), "rows=5") {
		t.Errorf("%d rows written, log: %s", len(f.rows), &log)
	}
	f.err = errors.New("the disk is full")
	r.supply(ksa.Event{Kind: ksa.Supplied})
	r.flush(t.Context())
	if !strings.Contains(log.String(), "the disk is full") {
		t.Errorf("log: %s", &log)
	}
}

// A server that is away for a while takes nothing out of the history; what is left
// when another process has the inventory is said to be lost.
func TestRecorderOfAMember(t *testing.T) {
	var log strings.Builder
	f := &fakeJournal{err: store.ErrUnreachable}
	r := newRecorder(slog.New(slog.NewTextHandler(&log, nil)))
	r.source("site").Event("BEFORE", "run", "in memory only")
	r.flush(t.Context()) // nowhere to yet
	r.keep(f)
	const n = batchSize + 3
	for range n {
		r.supply(ksa.Event{Kind: ksa.Supplied})
	}
	r.source("site").Event("WHILE", "run", "kept")
	for range 3 {
		r.flush(t.Context())
	}
	f.err = nil
	r.flush(t.Context())
	if len(f.rows) != n || len(f.events) != 1 || f.events[0].Code != "WHILE" || strings.Contains(log.String(), "gap") {
		t.Errorf("%d rows of %d, events %v, log %s", len(f.rows), n, f.events, &log)
	}
	r.supply(ksa.Event{Kind: ksa.Supplied})
	r.keep(nil)
	r.flush(t.Context())
	if r.keep(f); !strings.Contains(log.String(), "rows=1") {
		t.Errorf("log: %s", &log)
	}
	r.flush(t.Context())
	if len(f.rows) != n {
		t.Error("a row of one reign was written in the next one")
	}
}

// storm reports another event whenever one was written.
type storm struct {
	*fakeJournal
	r     *recorder
	after int // events written in all
}

func (s *storm) AppendEvent(ctx context.Context, e store.LogEvent) error {
	if s.after++; s.after < 1000 {
		s.r.source("kma").Event("KEYFILE_REFUSED", "fault", "again")
	}
	return s.fakeJournal.AppendEvent(ctx, e)
}

// A storm of events does not keep the usage history from being written.
func TestUsageIsWrittenInAStormOfEvents(t *testing.T) {
	r := newRecorder(quiet())
	s := &storm{fakeJournal: &fakeJournal{}, r: r}
	r.keep(s)
	r.source("kma").Event("KEYFILE_REFUSED", "fault", "first")
	r.flush(t.Context())
	if s.after != 1 || len(r.events) != 1 {
		t.Errorf("one round has written %d events, %d wait", s.after, len(r.events))
	}
}

func TestRecorderLogsWithinBounds(t *testing.T) {
	var log strings.Builder
	f := &fakeJournal{}
	r := newRecorder(slog.New(slog.NewTextHandler(&log, nil)))
	r.keep(f)
	const n = 3000
	began := time.Now()
	for range n {
		r.source("kma").Event("KEYFILE_REFUSED", "fault", "a file was refused")
	}
	seconds := int(time.Since(began).Seconds()) + 2 // that the events may lie in
	r.source("kma").Event("STORE_RESTORED", "alarm", "another kind of event")
	r.flush(t.Context())
	if lines := strings.Count(log.String(), "KEYFILE_REFUSED"); lines < maxLines || lines > seconds*maxLines {
		t.Errorf("%d lines for %d events", lines, n)
	}
	if !strings.Contains(log.String(), "qipsec events") || !strings.Contains(log.String(), "STORE_RESTORED") {
		t.Errorf("log: %s", &log)
	}
	if len(f.events) != n+1 {
		t.Errorf("%d events stored", len(f.events))
	}
}

func TestUsageReportsAreEvents(t *testing.T) {
	r := newRecorder(slog.New(slog.DiscardHandler))
	id := key.ID{1}
	if err := r.reports(t.Context(), "a-te", "b-te", []key.UsageReport{{ID: id, Usage: key.Retired, Bytes: 12345}}); err != nil {
		t.Fatal(err)
	}
	got := r.ring.Latest(10, func(operator.Event) bool { return true })
	if len(got) != 1 || got[0].Code != "KEY_RETIRED" || !strings.Contains(got[0].Text, id.String()) || !strings.Contains(got[0].Text, "12345") {
		t.Errorf("events %+v", got)
	}
}
