package store

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// ExportQuery selects rows of history and events; zero fields select all. Events
// belong to no pool: a query that names one selects history only.
type ExportQuery struct {
	Pool     uuid.UUID
	From, To time.Time // From on, before To
}

// exportPage is how many rows one statement reads.
const exportPage = 1000

func (q *ExportQuery) times() (from, to int64) {
	from, to = math.MinInt64, math.MaxInt64
	if !q.From.IsZero() {
		from = q.From.UnixMicro()
	}
	if !q.To.IsZero() {
		to = q.To.UnixMicro()
	}
	return from, to
}

// eachHistory calls f for every row of q, oldest first, with a page of rows in
// memory at a time.
func (s *Store) eachHistory(ctx context.Context, q ExportQuery, f func(Event) error) error {
	from, to := q.times()
	all := 0
	if q.Pool == uuid.Nil {
		all = 1
	}
	return eachPage(func(after int64) ([]Event, error) {
		return rowsOf(ctx, s.src(), "history", scanHistory, `SELECT `+historyColumns+` FROM history WHERE serial > $1 AND time >= $2 AND time < $3 AND ($4 = 1 OR pool = $5)
			ORDER BY serial LIMIT $6`, after, from, to, all, q.Pool[:], exportPage)
	}, func(e Event) int64 { return e.Serial }, f)
}

// eachEvent is eachHistory for the node's events.
func (s *Store) eachEvent(ctx context.Context, q ExportQuery, f func(LogEvent) error) error {
	from, to := q.times()
	return eachPage(func(after int64) ([]LogEvent, error) {
		return rowsOf(ctx, s.src(), "events", scanEvent, `SELECT `+eventColumns+` FROM event WHERE serial > $1 AND time >= $2 AND time < $3 ORDER BY serial LIMIT $4`,
			after, from, to, exportPage)
	}, func(e LogEvent) int64 { return e.Serial }, f)
}

// eachPage calls f for every row of the pages, until one is not full or cannot be
// read whole; page gives the rows after a serial.
func eachPage[R any](page func(after int64) ([]R, error), serial func(R) int64, f func(R) error) error {
	for after := int64(math.MinInt64); ; {
		rows, err := page(after)
		for _, r := range rows {
			if err := f(r); err != nil {
				return err
			}
			after = serial(r)
		}
		if err != nil || len(rows) < exportPage {
			return err
		}
	}
}

// Export writes history and then events to w as lines of JSON, oldest first,
// and gives their number. It changes nothing, needs no root file and works
// beside a running daemon.
func Export(ctx context.Context, opt Options, q ExportQuery, w io.Writer) (n int, err error) {
	s, l, _, err := openLook(ctx, opt)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.endLook(l)) }()
	out := bufio.NewWriter(w)
	n, err = s.writeLogs(ctx, q, out)
	if err != nil {
		return n, err
	}
	if err := out.Flush(); err != nil {
		return n, fmt.Errorf("store: write: %w", err)
	}
	return n, nil
}

// writeLogs writes one line for each row of q.
func (s *Store) writeLogs(ctx context.Context, q ExportQuery, w io.Writer) (n int, err error) {
	enc := json.NewEncoder(w)
	put := func(l logLine) error {
		if err := enc.Encode(l); err != nil {
			return fmt.Errorf("store: write: %w", err)
		}
		n++
		return nil
	}
	err = s.eachHistory(ctx, q, func(e Event) error { return put(historyLine(e)) })
	if err == nil && q.Pool == uuid.Nil {
		err = s.eachEvent(ctx, q, func(e LogEvent) error { return put(eventLine(e)) })
	}
	return n, err
}

// logLine is one row of history or events as JSON: the members of its kind.
type logLine struct {
	Kind   string    `json:"kind"` // "history" or "event"
	Serial int64     `json:"serial"`
	Time   time.Time `json:"time"`

	Pool   string `json:"pool,omitempty"`
	Side   string `json:"side,omitempty"` // "own" or "peer"; none: both
	First  string `json:"first,omitempty"`
	Last   string `json:"last,omitempty"`
	KeyID  string `json:"key_id,omitempty"`
	State  string `json:"state,omitempty"`
	Count  int    `json:"count,omitempty"`
	Detail string `json:"detail,omitempty"`

	Severity string `json:"severity,omitempty"`
	Code     string `json:"code,omitempty"`
	Source   string `json:"source,omitempty"`
	Text     string `json:"text,omitempty"`
	Action   string `json:"action,omitempty"`
}

const (
	kindHistory = "history"
	kindEvent   = "event"
)

func historyLine(e Event) logLine {
	l := logLine{
		Kind: kindHistory, Serial: e.Serial, Time: e.Time, Pool: e.Pool.String(), First: e.First.String(), Last: e.Last.String(),
		State: e.State.String(), Count: e.Count, Detail: e.Detail,
	}
	if e.Side != 0 {
		l.Side = e.Side.String()
	}
	if !e.ID.IsZero() {
		l.KeyID = e.ID.String()
	}
	return l
}

func eventLine(e LogEvent) logLine {
	return logLine{
		Kind: kindEvent, Serial: e.Serial, Time: e.Time, Severity: string(e.Severity), Code: e.Code, Source: e.Source, Text: e.Text, Action: e.Action,
	}
}

// event is the inverse of eventLine.
func (l *logLine) event() LogEvent {
	return LogEvent{Time: l.Time, Severity: Severity(l.Severity), Code: l.Code, Source: l.Source, Text: l.Text, Action: l.Action}
}

// history is the inverse of historyLine.
func (l *logLine) history() (e Event, err error) {
	e = Event{Time: l.Time, Count: l.Count, Detail: l.Detail}
	var errs [4]error
	e.Pool, errs[0] = uuid.Parse(l.Pool)
	e.First, errs[1] = parsePosition(l.First)
	e.Last, errs[2] = parsePosition(l.Last)
	if l.KeyID != "" {
		e.ID, errs[3] = key.ParseID(l.KeyID)
	}
	if err := errors.Join(errs[:]...); err != nil {
		return e, err
	}
	switch l.Side {
	case "":
	case Own.String():
		e.Side = Own
	case Peer.String():
		e.Side = Peer
	default:
		return e, fmt.Errorf("side %q is unknown", l.Side)
	}
	for v := key.Received; v <= key.Stranded; v++ {
		if v.String() == l.State {
			e.State = v
			return e, nil
		}
	}
	return e, fmt.Errorf("state %q is unknown", l.State)
}

// parsePosition is the inverse of Position.String.
func parsePosition(t string) (key.Position, error) {
	s, i, ok := strings.Cut(t, "/")
	seq, err1 := strconv.ParseUint(s, 10, 64)
	index, err2 := strconv.ParseUint(i, 10, 32)
	if !ok || err1 != nil || err2 != nil || seq > key.MaxSeq || index > uint64(key.MaxIndex) {
		return 0, fmt.Errorf("position %q is not seq/index in range", t)
	}
	return key.At(seq, uint32(index)), nil
}
