package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// ratchetChunk is how many blocks one transaction of a ratchet treats; others
// get their turn in between.
const ratchetChunk = 256

// Ratchet moves the store to the next epoch: it wraps the surviving blocks'
// keys under the next data key, seals those that were read from anew without
// the keys read, and replaces the root file. When it returns nil, no copy of the
// database gives back any key that was read or destroyed before the call.
// After an error, or a crash, the same step is finished by the next call, or by
// Open. If the root file's directory cannot be written to, nothing is changed.
// Keys of a lease that Advance recorded and Load has yet to read survive.
func (s *Store) Ratchet(ctx context.Context) error {
	select {
	case s.ratcheting <- struct{}{}:
		defer func() { <-s.ratcheting }()
	case <-ctx.Done():
		return fmt.Errorf("store: wait for another ratchet: %w", ctx.Err())
	}
	for {
		more, err := s.ratchetStep(ctx)
		if err != nil || !more {
			return err
		}
	}
}

// ratchetStep does one chunk, or, when no block is left at the old epoch, the
// end.
func (s *Store) ratchetStep(ctx context.Context) (more bool, err error) {
	if err := s.acquire(ctx); err != nil {
		return false, err
	}
	defer s.release()
	if s.epoch == s.root.epoch {
		if err := tryRoot(s.opt.files, s.opt.RootFile); err != nil {
			return false, err // nothing was changed
		}
	}
	s.epoch = s.root.epoch + 1 // from here on nothing is sealed under the old one
	n := 0
	for _, p := range s.pools {
		done, err := s.ratchetPool(ctx, p, ratchetChunk-n)
		if err != nil {
			return false, err
		}
		if n += done; n >= ratchetChunk {
			return true, nil
		}
	}
	return false, s.ratchetEnd(ctx)
}

// ratchetPool treats up to limit blocks of p in one transaction.
func (s *Store) ratchetPool(ctx context.Context, p *pool, limit int) (int, error) {
	type change struct {
		at  int
		now *header
	}
	var changes []change
	var gone []*header
	var found []*damage
	err := s.write(ctx, fmt.Sprintf("ratchet pool %s to epoch %d", p.info.ID, s.epoch), func(tx *sql.Tx) (err error) {
		if gone, err = s.dropDone(ctx, tx, p); err != nil {
			return err
		}
		for i, old := range p.blocks {
			if old.epoch == s.epoch || p.done(old) || len(changes)+len(found) >= limit {
				continue
			}
			h, err := s.renew(ctx, tx, p, old)
			var d *damage
			if errors.As(err, &d) {
				found = append(found, d)
				continue
			}
			if err != nil {
				return fmt.Errorf("%s: %w", where(old.pool, old.seq), err)
			}
			changes = append(changes, change{i, h})
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	s.mem.Lock()
	for _, c := range changes {
		p.blocks[c.at] = c.now
	}
	s.mem.Unlock()
	s.forget(p, gone...)
	return len(changes) + len(found), s.giveUp(ctx, p, found)
}

// renew seals old under the current epoch within tx: the block key only if no
// key was read since the boxes were sealed, else the boxes too.
func (s *Store) renew(ctx context.Context, tx *sql.Tx, p *pool, old *header) (*header, error) {
	h := *old
	if p.alive(old, p.spent) == p.alive(old, old.cut) {
		if err := s.rewrap(old, &h); errors.Is(err, ErrDamaged) {
			return nil, &damage{old, err}
		} else if err != nil {
			return nil, err
		}
		return &h, updateBlock(ctx, tx, &h)
	}
	k, err := key.Random(rand.Reader, 32)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	fresh, err := newAEAD(k.Bytes())
	if err != nil {
		return nil, err
	}
	h.generation, h.cut = s.generation, p.spent
	live := func(i int) bool {
		pos := key.At(h.seq, uint32(i))
		return p.info.owner(Own).Owns(pos) && pos > h.cut[0] || p.info.owner(Peer).Owns(pos) && pos > h.cut[1]
	}
	first := p.cutParts(&h)
	if _, err := tx.ExecContext(ctx, `DELETE FROM part WHERE pool = $1 AND seq = $2 AND part < $3`, h.pool[:], int64(h.seq), first); err != nil {
		return nil, err
	}
	err = s.openParts(ctx, tx, old, first, h.parts()-1, func(part int, ids, keys []byte) error {
		for at := range h.size(part) {
			if !live(part*partKeys + at) {
				clear(keys[at*key.MasterSize : (at+1)*key.MasterSize])
			}
		}
		return oneRow(tx.ExecContext(ctx, `UPDATE part SET box = $1 WHERE pool = $2 AND seq = $3 AND part = $4`,
			seal(fresh, keys, h.partAAD(s.uuid, part, ids)), h.pool[:], int64(h.seq), part))
	})
	if err != nil {
		return nil, err
	}
	if err := s.wrapKey(&h, k); err != nil {
		return nil, err
	}
	return &h, updateBlock(ctx, tx, &h)
}

// ratchetEnd brings the other rows to the new epoch, replaces the root file and
// forgets the old root.
func (s *Store) ratchetEnd(ctx context.Context) error {
	err := s.write(ctx, fmt.Sprintf("end ratchet to epoch %d", s.epoch), func(tx *sql.Tx) error {
		for _, p := range s.pools {
			if err := s.putPool(ctx, tx, &p.info); err != nil {
				return err
			}
		}
		return s.putNode(ctx, tx)
	})
	if err != nil {
		return err
	}
	next, err := s.root.next()
	if err != nil {
		return err
	}
	late, err := replaceRoot(s.opt.files, s.opt.RootFile, next)
	if err != nil {
		next.secret.Wipe()
		return err
	}
	if late != nil {
		s.opt.Log.Warn("store: the old root's bytes may still be on the disk", "err", late)
	}
	s.root.secret.Wipe()
	delete(s.data, s.root.epoch)
	s.root = next
	s.sinceRatchet = 0
	s.mem.Lock()
	s.stats.Ratchets++
	s.mem.Unlock()
	return nil
}
