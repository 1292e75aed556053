package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// Severity of a node's event (the paper's F302).
type Severity string

// The three severities.
const (
	SeverityAlarm Severity = "alarm"
	SeverityFault Severity = "fault"
	SeverityRun   Severity = "run"
)

// LogEvent is something that happened on the node. Texts are cut at 512 bytes.
type LogEvent struct {
	Serial   int64     // set by the store, rising
	Time     time.Time // set by the store if zero; kept to the microsecond
	Severity Severity
	Code     string // fixed name, such as store-block-damaged
	Source   string // part of the node
	Text     string
	Action   string // what was done about it
}

// EventQuery selects events; zero fields select all. The newest come first.
type EventQuery struct {
	Severity Severity
	Code     string
	Before   int64 // serials below it: the next page
	Limit    int   // rows, 1 to 10,000; 0 is 100
}

// append writes an event within tx and deletes the oldest.
func (s *Store) append(ctx context.Context, tx *sql.Tx, e LogEvent) error {
	if e.Severity != SeverityAlarm && e.Severity != SeverityFault && e.Severity != SeverityRun {
		return fmt.Errorf("event %s: severity %q is unknown", e.Code, e.Severity)
	}
	if e.Time.IsZero() {
		e.Time = s.opt.Now()
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO event (serial, time, severity, code, source, message, action) VALUES ($1, $2, $3, $4, $5, $6, $7)`,
		s.eventNext, e.Time.UnixMicro(), string(e.Severity), clip(e.Code), clip(e.Source), clip(e.Text), clip(e.Action)); err != nil {
		return fmt.Errorf("event: %w", err)
	}
	s.eventNext++
	if _, err := tx.ExecContext(ctx, `DELETE FROM event WHERE serial < $1`, s.eventNext-int64(s.opt.EventRows)); err != nil {
		return fmt.Errorf("prune events: %w", err)
	}
	return nil
}

// AppendEvent adds one event, durably.
func (s *Store) AppendEvent(ctx context.Context, e LogEvent) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	return s.write(ctx, "append event", func(tx *sql.Tx) error { return s.append(ctx, tx, e) })
}

// Events gives the events that q selects, newest first.
func (s *Store) Events(ctx context.Context, q EventQuery) (list []LogEvent, err error) {
	if err := s.usable(); err != nil {
		return nil, err
	}
	n, err := limit(q.Limit)
	if err != nil {
		return nil, err
	}
	if q.Before == 0 {
		q.Before = 1<<63 - 1
	}
	return rowsOf(ctx, s.r, "events", scanEvent, `SELECT `+eventColumns+` FROM event
		WHERE serial < $1 AND ($2 = '' OR severity = $2) AND ($3 = '' OR code = $3) ORDER BY serial DESC LIMIT $4`,
		q.Before, string(q.Severity), q.Code, n)
}

// eventColumns are what scanEvent reads.
const eventColumns = "serial, time, severity, code, source, message, action"

func scanEvent(rows *sql.Rows) (LogEvent, error) {
	var e LogEvent
	var micro int64
	if err := rows.Scan(&e.Serial, &micro, &e.Severity, &e.Code, &e.Source, &e.Text, &e.Action); err != nil {
		return e, err
	}
	e.Time = time.UnixMicro(micro).UTC()
	return e, nil
}
