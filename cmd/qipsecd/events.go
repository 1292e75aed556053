package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

const (
	ringSize   = 4096
	queueSize  = 1 << 16 // usage rows and events on their way to the store
	batchSize  = 4096    // rows written in one transaction
	flushEvery = time.Second
	flushGrace = 3 * time.Second // for what is left at the end
	maxLines   = 20              // of one kind of event in the log, in one second
)

// journal is what the recorder needs of the store.
type journal interface {
	Record(ctx context.Context, events []store.Event) error
	AppendEvent(ctx context.Context, e store.LogEvent) error
}

// recorder takes the events of all agents: it logs them, keeps the latest for
// the operator and writes them to the store in the background, so that no agent
// waits for a disk.
type recorder struct {
	log  *slog.Logger
	ring *operator.Ring

	mu    sync.Mutex    // one flush at a time
	store journal       // nil while this process has no inventory
	rest  []store.Event // rows that the server was not there for

	usage  chan store.Event
	events chan store.LogEvent
	lost   atomic.Int64 // rows that found the queue full
	lines  throttle
}

// throttle bounds what a feeder or peer gone wild can write into the log. The
// events themselves are all kept, as far as their queues go.
type throttle struct {
	mu     sync.Mutex
	second int64
	n      map[string]int // lines by event code
}

// pass says whether an event may be logged, and whether it is the last one of
// its code for this second.
func (t *throttle) pass(code string, now time.Time) (ok, last bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := now.Unix(); t.n == nil || s != t.second {
		t.second, t.n = s, map[string]int{}
	}
	t.n[code]++
	return t.n[code] <= maxLines, t.n[code] == maxLines
}

func newRecorder(log *slog.Logger) *recorder {
	return &recorder{
		log: log, ring: operator.NewRing(ringSize),
		usage: make(chan store.Event, queueSize), events: make(chan store.LogEvent, ringSize),
	}
}

// add takes one event.
func (r *recorder) add(e operator.Event) {
	e.Time = time.Now()
	r.ring.Add(e)
	about := e.Text
	if who := strings.TrimSpace(e.Connection + " " + e.Peer); who != "" {
		about = who + ": " + e.Text
	}
	select {
	case r.events <- store.LogEvent{Time: e.Time, Severity: store.Severity(e.Severity), Code: e.Code, Source: e.Source, Text: about, Action: e.Action}:
	default:
		r.lost.Add(1)
	}
}

// source gives the events of one part of the node (kma.Events and the like).
func (r *recorder) source(name string) source { return source{r, name} }

type source struct {
	r    *recorder
	name string
}

// Event logs and records.
func (s source) Event(code, severity, text string, attrs ...slog.Attr) {
	e := operator.Event{Severity: severity, Code: code, Source: s.name}
	var b strings.Builder
	b.WriteString(text)
	args := []any{"event", code, "severity", severity, "source", s.name}
	for _, a := range attrs {
		if a.Key == "peer" {
			e.Peer = a.Value.String()
		} else {
			fmt.Fprintf(&b, ", %s %s", a.Key, a.Value)
		}
		args = append(args, a)
	}
	e.Text = b.String()
	level := slog.LevelWarn
	if severity == string(store.SeverityRun) {
		level = slog.LevelInfo
	}
	ok, last := s.r.lines.pass(code, time.Now())
	if last {
		args = append(args, "further", "those of this second are among the events only: qipsec events")
	}
	if ok {
		s.r.log.Log(context.Background(), level, text, args...) // the context carries nothing for a handler
	}
	s.r.add(e)
}

// ikeSource is the source of the events of package ike.
const ikeSource = "ike"

// ikeEvents takes the events of package ike, which logs them itself.
type ikeEvents struct{ *recorder }

// Event records. A rekeying is kept in memory only: there are so many that they
// would push everything else out of the store, whose usage history has their keys.
func (r ikeEvents) Event(e ike.Event) {
	ev := operator.Event{Severity: e.Severity.String(), Code: e.Code, Source: ikeSource, Connection: e.Connection, Text: e.Text, Action: e.Action}
	if e.Code == ike.EventRekeyed {
		ev.Time = time.Now()
		r.ring.Add(ev)
		return
	}
	r.add(ev)
}

// supply takes the events of the KSA: rows of the usage history, and refusals.
func (r *recorder) supply(e ksa.Event) {
	row := store.Event{
		Time: time.Now(), Pool: e.Pool, First: e.Position, Last: e.Position, ID: e.KeyID, Count: 1,
		Side: store.Peer, State: key.Supplied, Detail: e.MasterSAE + " to " + e.SlaveSAE,
	}
	if e.Own {
		row.Side = store.Own
	}
	switch e.Kind {
	case ksa.Supplied, ksa.Fetched:
	case ksa.Stranded:
		row.State, row.Detail = key.Stranded, row.Detail+": "+e.Why
	default:
		s := r.source("ksa")
		s.Event("KSA_"+strings.ToUpper(string(e.Kind)), "alarm", e.Why, slog.String("peer", e.Peer), slog.String("master_sae", e.MasterSAE), slog.String("key", e.KeyID.String()))
		return
	}
	r.log.Debug("key "+string(e.Kind), "key", e.KeyID, "peer", e.Peer, "master_sae", e.MasterSAE, "slave_sae", e.SlaveSAE)
	select {
	case r.usage <- row:
	default:
		r.lost.Add(1)
	}
}

// reports takes what an SAE says of its keys (the paper's F205), as events: it
// is the SAE's word, not the inventory's, and no row of the usage history.
func (r *recorder) reports(_ context.Context, sae, peer string, reports []key.UsageReport) error {
	s := r.source("sae")
	for _, u := range reports {
		s.Event("KEY_"+strings.ToUpper(string(u.Usage)), string(store.SeverityRun), "an SAE reports on a key it was supplied",
			slog.String("sae", sae), slog.String("with", peer), slog.String("key", u.ID.String()), slog.Uint64("bytes", u.Bytes))
	}
	return nil
}

// keep has all from now on written to s; nil for to nowhere, once what is queued is
// written.
func (r *recorder) keep(s journal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.store = s
}

// run writes to the store until ctx ends, then what is left.
func (r *recorder) run(ctx context.Context) error {
	t := time.NewTicker(flushEvery)
	defer t.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-t.C:
			r.flush(ctx)
		}
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushGrace)
	defer cancel()
	r.flush(end)
	return nil
}

// flush writes all that is queued now, in batches. Events of a process that has no
// inventory are in memory only.
func (r *recorder) flush(ctx context.Context) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.store == nil {
		for len(r.events) > 0 {
			<-r.events
		}
		if n := len(r.rest) + len(r.usage); n > 0 {
			r.log.Error("usage history has a gap: another process has the inventory", "rows", n)
			for r.rest = nil; len(r.usage) > 0; {
				<-r.usage
			}
		}
		return
	}
	if n := r.lost.Swap(0); n > 0 {
		r.log.Error("usage history has a gap: the store was too slow", "rows", n)
	}
	for len(r.rest)+len(r.usage) > 0 && ctx.Err() == nil {
		rows := r.rest
		if r.rest = nil; rows == nil {
			rows = make([]store.Event, 0, min(batchSize, len(r.usage)))
		}
		for len(rows) < cap(rows) {
			rows = append(rows, <-r.usage)
		}
		if err := r.store.Record(ctx, rows); errors.Is(err, store.ErrUnreachable) {
			r.rest = slices.Clip(rows) // for the next time
			return
		} else if err != nil {
			r.log.Error("usage history has a gap", "rows", len(rows), "err", err)
			return
		}
	}
	// No more than there are now: each costs a sync of the disk, and a storm of
	// them must not keep the usage history waiting.
	for n := len(r.events); n > 0 && ctx.Err() == nil; n-- {
		if err := r.store.AppendEvent(ctx, <-r.events); err != nil {
			r.log.Error("event not stored", "err", err)
			return
		}
	}
}
