package store

import (
	"context"
	"crypto/subtle"
	"database/sql"
	"errors"
	"fmt"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// damage is a block that cannot be opened. Its keys are lost; it is given up.
type damage struct {
	h     *header
	cause error
}

func (d *damage) Error() string { return fmt.Sprintf("%s: %v", where(d.h.pool, d.h.seq), d.cause) }

func (d *damage) Unwrap() []error { return []error{d.cause, ErrDamaged} }

// partOf is the part that holds index i, and where in it.
func partOf(i int) (part, at int) { return i / partKeys, i % partKeys }

// size is how many keys part holds.
func (h *header) size(part int) int { return min(partKeys, h.count-part*partKeys) }

// parts is how many parts h was cut into.
func (h *header) parts() int { return (h.count + partKeys - 1) / partKeys }

// openParts opens the parts lo..hi of h in order and hands each one's keys and
// ids to use; the keys are wiped when use returns. A block that does not open
// gives a *damage; other errors are the database's.
func (s *Store) openParts(ctx context.Context, q querier, h *header, lo, hi int, use func(part int, ids, keys []byte) error) error {
	a, err := s.blockAEAD(h)
	if errors.Is(err, ErrDamaged) {
		return &damage{h, err}
	}
	if err != nil {
		return err
	}
	for part := lo; part <= hi; part++ {
		var ids, box []byte
		err := q.QueryRowContext(ctx, `SELECT ids, box FROM part WHERE pool = $1 AND seq = $2 AND part = $3`,
			h.pool[:], int64(h.seq), part).Scan(&ids, &box)
		if errors.Is(err, sql.ErrNoRows) {
			return &damage{h, fmt.Errorf("part %d is missing", part)}
		}
		if err != nil {
			return explain(err)
		}
		if len(ids) != h.size(part)*16 {
			return &damage{h, fmt.Errorf("part %d has %d bytes of Key-IDs for %d keys", part, len(ids), h.size(part))}
		}
		keys, err := key.New(h.size(part) * key.MasterSize)
		if err != nil {
			return err
		}
		if err = unseal(a, box, keys.Bytes(), h.partAAD(s.uuid, part, ids)); err != nil {
			err = &damage{h, fmt.Errorf("part %d: %w", part, err)}
		} else {
			err = use(part, ids, keys.Bytes())
		}
		keys.Wipe()
		if err != nil {
			return err
		}
	}
	return nil
}

// isZero reports whether a key was cut out of its part.
func isZero(k []byte) bool {
	var zero [key.MasterSize]byte
	return subtle.ConstantTimeCompare(k, zero[:]) == 1
}

// giveUp removes damaged blocks for good, with an alarm: their keys end as
// Compromised on this side, as somebody or something changed them.
func (s *Store) giveUp(ctx context.Context, p *pool, found []*damage) error {
	if len(found) == 0 {
		return nil
	}
	gone := make([]*header, 0, len(found))
	err := s.write(ctx, "give up damaged blocks", func(tx *sql.Tx) error {
		for _, d := range found {
			if err := s.giveUpIn(ctx, tx, d); err != nil {
				return err
			}
			gone = append(gone, d.h)
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.forget(p, gone...)
	s.mem.Lock()
	s.stats.Damaged += len(gone)
	s.mem.Unlock()
	for _, d := range found {
		s.opt.Log.Error("store: damaged block given up", "pool", d.h.pool, "peer", p.info.Peer, "seq", d.h.seq, "keys", d.h.count, "err", d.cause)
	}
	return nil
}

func (s *Store) giveUpIn(ctx context.Context, tx *sql.Tx, d *damage) error {
	if err := deleteBlock(ctx, tx, d.h.pool, d.h.seq); err != nil {
		return err
	}
	if err := s.note(ctx, tx, d.h.event(key.Compromised, 0, "damaged on disk: "+d.cause.Error())); err != nil {
		return err
	}
	return s.append(ctx, tx, LogEvent{
		Severity: SeverityAlarm, Code: "store-block-damaged", Source: "store",
		Text: d.Error(), Action: "block given up",
	})
}
