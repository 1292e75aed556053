package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Event is one row of the usage history: what became of a range of keys, or of
// one. It holds positions and Key-IDs, never key bytes.
type Event struct {
	Serial      int64     // set by the store, rising
	Time        time.Time // set by the store if zero; kept to the microsecond
	Pool        uuid.UUID
	Side        Side         // whose keys; 0 for those of both owners
	First, Last key.Position // the range, both ends included; equal for one key
	ID          key.ID       // of one key; zero for a range
	State       key.State    // what the keys became
	Count       int          // how many keys that were
	Detail      string       // purpose or reason, cut at 512 bytes
}

// HistoryQuery selects events; zero fields select all. The newest come first.
type HistoryQuery struct {
	Pool   uuid.UUID
	ID     key.ID
	At     key.Position // events whose range holds it; needs Pool
	Before int64        // serials below it: the next page
	Limit  int          // rows, 1 to 10,000; 0 is 100
}

// Limits of the logs.
const (
	defaultHistoryRows = 1_000_000
	defaultEventRows   = 10_000
	maxDetail          = 512
	maxLimit           = 10_000
)

// clip bounds a text and keeps it valid UTF-8 without NUL, which not every
// database takes.
func clip(t string) string {
	t = strings.ReplaceAll(strings.ToValidUTF8(t, "?"), "\x00", "?")
	if len(t) <= maxDetail {
		return t
	}
	t = t[:maxDetail]
	for !utf8.ValidString(t) {
		t = t[:len(t)-1]
	}
	return t
}

// note writes history rows within tx and deletes the oldest.
func (s *Store) note(ctx context.Context, tx *sql.Tx, events ...Event) error {
	if len(events) == 0 {
		return nil
	}
	stmt, err := tx.PrepareContext(ctx, `INSERT INTO history (serial, time, pool, side, first_pos, last_pos, key_id, state, key_count, detail)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`)
	if err != nil {
		return fmt.Errorf("history: %w", err)
	}
	defer stmt.Close()
	for _, e := range events {
		if e.Time.IsZero() {
			e.Time = s.opt.Now()
		}
		id := []byte{}
		if !e.ID.IsZero() {
			id = e.ID[:]
		}
		if _, err := stmt.ExecContext(ctx, s.historyNext, e.Time.UnixMicro(), e.Pool[:], int64(e.Side), int64(e.First), int64(e.Last),
			id, int64(e.State), int64(e.Count), clip(e.Detail)); err != nil {
			return fmt.Errorf("history: %w", err)
		}
		s.historyNext++
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM history WHERE serial < $1`, s.historyNext-int64(s.opt.HistoryRows)); err != nil {
		return fmt.Errorf("prune history: %w", err)
	}
	return nil
}

// Record adds events in one transaction.
func (s *Store) Record(ctx context.Context, events []Event) error {
	if len(events) == 0 {
		return nil
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	return s.write(ctx, "record history", func(tx *sql.Tx) error { return s.note(ctx, tx, events...) })
}

// limit is the number of rows asked for, or an error.
func limit(n int) (int, error) {
	if n == 0 {
		return 100, nil
	}
	if n < 0 || n > maxLimit {
		return 0, fmt.Errorf("store: limit %d is not between 1 and %d", n, maxLimit)
	}
	return n, nil
}

// History gives the events that q selects, newest first.
func (s *Store) History(ctx context.Context, q HistoryQuery) (list []Event, err error) {
	if err := s.usable(); err != nil {
		return nil, err
	}
	n, err := limit(q.Limit)
	if err != nil {
		return nil, err
	}
	where, args := []string{"1 = 1"}, []any{}
	and := func(condition string, arg any) {
		args = append(args, arg)
		where = append(where, fmt.Sprintf(condition, len(args)))
	}
	if q.Pool != uuid.Nil {
		and("pool = $%d", q.Pool[:])
	}
	if !q.ID.IsZero() {
		and("key_id = $%d", q.ID[:])
	}
	if q.At != 0 {
		and("first_pos <= $%[1]d AND last_pos >= $%[1]d", int64(q.At))
	}
	if q.Before != 0 {
		and("serial < $%d", q.Before)
	}
	return rowsOf(ctx, s.r, "history", scanHistory, `SELECT `+historyColumns+` FROM history
		WHERE `+strings.Join(where, " AND ")+` ORDER BY serial DESC LIMIT `+strconv.Itoa(n), args...)
}

// rowsOf reads all rows of a query; what names them in errors. With an error come
// those that were read before it.
func rowsOf[R any](ctx context.Context, q querier, what string, scan func(*sql.Rows) (R, error), query string, args ...any) (list []R, err error) {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("store: read %s: %w", what, explain(err))
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		r, err := scan(rows)
		if err != nil {
			return list, fmt.Errorf("store: read %s: %w", what, err)
		}
		list = append(list, r)
	}
	if err := rows.Err(); err != nil {
		return list, fmt.Errorf("store: read %s: %w", what, explain(err))
	}
	return list, nil
}

// historyColumns are what scanHistory reads.
const historyColumns = "serial, time, pool, side, first_pos, last_pos, key_id, state, key_count, detail"

func scanHistory(rows *sql.Rows) (Event, error) {
	var e Event
	var micro int64
	var pool, id []byte
	if err := rows.Scan(&e.Serial, &micro, &pool, &e.Side, &e.First, &e.Last, &id, &e.State, &e.Count, &e.Detail); err != nil {
		return e, err
	}
	e.Time = time.UnixMicro(micro).UTC()
	copy(e.Pool[:], pool)
	copy(e.ID[:], id)
	return e, nil
}
