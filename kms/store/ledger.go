package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Raw use is that of a key's own bytes, as a one-time pad or a one-time MAC key;
// all other use derives from it. No key may serve both, nor serve raw twice. A
// lease is for one or the other (PurposeRaw), which decides whether Load or
// LoadRaw gives its keys. What LoadRaw gave may be used only after Bind has
// written down, durably, for what: the ledger. An entry is
//
//	bound --Settle--> used or burned
//
// and leaves the ledger when it is settled; the history keeps what became of it.
// The ledger holds no more than what is bound: what was settled, or leased and
// never bound, is refused because this process remembers that it is gone, and
// the next because it lies below the mark. A bound range of a former process is
// spent: its keys were in that process's memory only, it can only be burned.
//
// Entries are not sealed one by one. The pool's proof covers a digest of all of
// the pool's; whatever was changed, added or removed, Open refuses it as it does
// a changed pool row.

// PurposeRaw is the purpose of a lease whose keys LoadRaw gives.
const PurposeRaw = "raw"

// What callers of the ledger tell apart.
var (
	ErrPurpose   = errors.New("range was leased for another purpose")
	ErrNotLeased = errors.New("range was not read for raw use by this process")
	ErrUnfit     = errors.New("keys must not be used raw")
	ErrBound     = errors.New("range is bound, or was, to its only use")
	ErrNotBound  = errors.New("nothing is bound to this use")
)

// Bound is an entry of the ledger.
type Bound struct {
	Side Side
	key.Binding
	Spent bool // by a former process: to be burned
}

// Limits of the ledger.
const (
	maxBind  = 1024   // bindings of one Bind
	maxBound = 10_000 // open bindings of one pool
	maxSpans = 10_000 // of one side that are remembered
)

// entry is a row of the ledger.
type entry struct {
	serial int64
	side   Side
	key.Binding
}

// digest is what the pool's proof covers of its ledger: empty if that is.
func digest(entries []entry) string {
	if len(entries) == 0 {
		return ""
	}
	h := sha256.New()
	b := make([]byte, 0, 64)
	be := binary.BigEndian
	for i := range entries {
		e := &entries[i]
		b = be.AppendUint64(b[:0], uint64(e.serial))
		b = append(b, byte(e.side), byte(e.Purpose), byte(e.Direction))
		b = be.AppendUint64(b, uint64(e.First))
		b = be.AppendUint64(b, uint64(e.Last))
		b = append(b, e.Batch[:]...)
		b = be.AppendUint32(b, e.Attempt)
		b = be.AppendUint16(b, e.Hop)
		_, _ = h.Write(b) // never fails (hash.Hash)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Bind writes down, durably when it returns, what ranges of side's keys that
// LoadRaw gave are used for: all of them or none. Whoever holds the keys calls
// it before the first of their bytes is used. The same binding again, while
// it stands, is no error in the same process, so that a call whose outcome is
// unknown can be repeated; it is for the one caller who holds the keys. Errors:
// ErrBound if any key is bound, or was, to this or another use; ErrSpent if it
// was leased by a former process; ErrNotLeased; ErrUnfit for keys that are not
// of class direct or were agreed on with a hash.
func (s *Store) Bind(ctx context.Context, pool uuid.UUID, side Side, list ...key.Binding) error {
	if err := side.check(); err != nil {
		return err
	}
	if len(list) == 0 || len(list) > maxBind {
		return fmt.Errorf("store: %d bindings: not between 1 and %d", len(list), maxBind)
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	p, err := s.poolOf(pool)
	if err != nil {
		return err
	}
	spans, added := slices.Clone(p.raw[side.at()].spans), []entry{}
	for _, b := range list {
		if err := b.Check(p.info.owner(side)); err != nil {
			return fmt.Errorf("store: bind %s keys of pool %s: %w", side, pool, err)
		}
		if s.stands(p, side, b) {
			continue
		}
		if spans, err = p.claim(side, spans, b.Range); err != nil {
			return fmt.Errorf("store: bind %s keys %s of pool %s as %s: %w", side, b.Range, pool, b.RawUse, err)
		}
		added = append(added, entry{s.ledgerNext + int64(len(added)), side, b})
	}
	if len(added) == 0 {
		return nil
	}
	if len(p.entries)+len(added) > maxBound {
		return fmt.Errorf("store: pool %s has %d bound ranges: settle some first", pool, len(p.entries))
	}
	entries := append(slices.Clip(p.entries), added...)
	err = s.setLedger(ctx, p, fmt.Sprintf("bind %s keys of pool %s", side, pool), entries, func(tx *sql.Tx) error {
		rows := make([]Event, len(added))
		for i, e := range added {
			_, err := tx.ExecContext(ctx, `INSERT INTO ledger (pool, serial, side, first_pos, last_pos, purpose, batch, attempt, hop, direction)
				VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`, pool[:], e.serial, int64(side), int64(e.First), int64(e.Last),
				int64(e.Purpose), e.Batch[:], int64(e.Attempt), int64(e.Hop), int64(e.Direction))
			if err != nil {
				return err
			}
			rows[i] = e.event(pool, key.Leased, "bound as ")
		}
		return s.note(ctx, tx, rows...)
	})
	if err != nil {
		return err
	}
	p.raw[side.at()].spans = spans
	s.ledgerNext += int64(len(added))
	return nil
}

func (e *entry) event(pool uuid.UUID, state key.State, what string) Event {
	return Event{Pool: pool, Side: e.side, First: e.First, Last: e.Last, State: state, Count: e.Count(), Detail: what + e.RawUse.String()}
}

// stands reports whether just this was bound by this process.
func (s *Store) stands(p *pool, side Side, b key.Binding) bool {
	return slices.ContainsFunc(p.entries, func(e entry) bool { return e.side == side && e.Binding == b && e.serial >= s.ledgerFirst })
}

// setLedger makes entries p's ledger, and its proof, with what fn writes.
func (s *Store) setLedger(ctx context.Context, p *pool, what string, entries []entry, fn func(*sql.Tx) error) error {
	err := s.write(ctx, what, func(tx *sql.Tx) error {
		if err := fn(tx); err != nil {
			return err
		}
		return s.putPoolWith(ctx, tx, &p.info, digest(entries))
	})
	if err != nil {
		return err
	}
	s.mem.Lock()
	p.entries = entries
	s.mem.Unlock()
	return nil
}

// Settle ends what is bound to use, durably, on one side: RawUsed once the bytes
// did their work, RawBurned if they never will, for the reason why. What a former
// process has bound can only be burned (ErrSpent). ErrNotBound if nothing is
// bound to use, or no longer.
func (s *Store) Settle(ctx context.Context, pool uuid.UUID, side Side, use key.RawUse, end key.RawEnd, why string) error {
	if err := side.check(); err != nil {
		return err
	}
	if end != key.RawUsed && end != key.RawBurned {
		return fmt.Errorf("store: settle %s: no binding ends as %d", use, end)
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	p, err := s.poolOf(pool)
	if err != nil {
		return err
	}
	var rest, ended []entry
	for _, e := range p.entries {
		if e.side != side || e.RawUse != use {
			rest = append(rest, e)
			continue
		}
		if end == key.RawUsed && e.serial < s.ledgerFirst {
			return fmt.Errorf("store: %s keys %s of pool %s, %s: %w: burn it", side, e.Range, pool, use, ErrSpent)
		}
		ended = append(ended, e)
	}
	if len(ended) == 0 {
		return fmt.Errorf("store: %s keys of pool %s, %s: %w", side, pool, use, ErrNotBound)
	}
	return s.setLedger(ctx, p, fmt.Sprintf("settle %s of pool %s", use, pool), rest, func(tx *sql.Tx) error {
		rows := make([]Event, len(ended))
		for i, e := range ended {
			if err := oneRow(tx.ExecContext(ctx, `DELETE FROM ledger WHERE pool = $1 AND serial = $2`, pool[:], e.serial)); err != nil {
				return err
			}
			rows[i] = e.event(pool, key.Supplied, "used as ")
			if end == key.RawBurned {
				rows[i] = e.event(pool, key.Destroyed, "burned, "+why+": ")
			}
		}
		return s.note(ctx, tx, rows...)
	})
}

// Bindings lists what is bound in a pool, in the order in which it was, from
// memory.
func (s *Store) Bindings(ctx context.Context, pool uuid.UUID) ([]Bound, error) {
	s.mem.RLock()
	defer s.mem.RUnlock()
	p := s.pools[pool]
	if p == nil {
		return nil, fmt.Errorf("store: pool %s: %w", pool, ErrNoPool)
	}
	list := make([]Bound, len(p.entries))
	for i, e := range p.entries {
		list[i] = Bound{e.side, e.Binding, e.serial < s.ledgerFirst}
	}
	return list, ctx.Err()
}

// readLedger fills the pools' ledgers and holds them against the digests that
// the pools' proofs cover.
func (s *Store) readLedger(ctx context.Context, q querier, pools map[uuid.UUID]*pool) (err error) {
	rows, err := q.QueryContext(ctx, `SELECT pool, serial, side, first_pos, last_pos, purpose, batch, attempt, hop, direction FROM ledger ORDER BY pool, serial`)
	if err != nil {
		return fmt.Errorf("read ledger: %w", explain(err))
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var e entry
		var id, batch []byte
		if err := rows.Scan(&id, &e.serial, &e.side, &e.First, &e.Last, &e.Purpose, &batch, &e.Attempt, &e.Hop, &e.Direction); err != nil {
			return fmt.Errorf("read ledger: %w: %w", err, ErrDamaged)
		}
		var u uuid.UUID
		copy(u[:], id)
		copy(e.Batch[:], batch)
		p := pools[u]
		if p == nil {
			return fmt.Errorf("ledger entry of pool %s: that pool is missing: %w", u, ErrDamaged)
		}
		p.entries = append(p.entries, e)
		s.ledgerNext = max(s.ledgerNext, e.serial+1)
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read ledger: %w", explain(err))
	}
	var bad []error
	for _, p := range pools {
		if digest(p.entries) != p.sum {
			bad = append(bad, fmt.Errorf("ledger of pool %s: entries were changed, added or removed: %w; move database and root file away to start with empty pools", p.info.ID, ErrDamaged))
		}
	}
	return errors.Join(bad...)
}
