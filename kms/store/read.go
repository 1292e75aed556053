package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// readAll fills memory from the database and verifies every pool and
// block row. What was spent stays spent. Blocks that do not hold are in memory
// too, and in found.
func (s *Store) readAll(ctx context.Context, q querier) (found []*damage, err error) {
	pools, err := s.readPools(ctx, q)
	if err != nil {
		return nil, err
	}
	if err := s.readLedger(ctx, q, pools); err != nil {
		return nil, err
	}
	if found, err = s.readBlocks(ctx, q, pools); err != nil {
		return nil, err
	}
	bad, err := s.readParts(ctx, q, pools)
	if err != nil {
		return nil, err
	}
	for _, b := range bad {
		known := false
		for _, f := range found {
			known = known || f.h == b.h
		}
		if !known {
			found = append(found, b)
		}
	}
	for table, next := range map[string]*int64{"history": &s.historyNext, "event": &s.eventNext} {
		var last sql.NullInt64
		if err := q.QueryRowContext(ctx, `SELECT max(serial) FROM `+table).Scan(&last); err != nil {
			return nil, fmt.Errorf("read %s: %w", table, explain(err))
		}
		*next = max(*next, last.Int64+1)
	}
	s.mem.Lock()
	for id, p := range pools {
		if old := s.pools[id]; old != nil {
			p.carry(old, s.ledgerFirst)
		}
		p.count()
	}
	s.pools = pools
	s.mem.Unlock()
	return found, nil
}

// reload reads memory anew after a commit of unknown outcome. A mark that turns
// out raised may be read up to: that it was raised by this process, and not by one
// that took over, is what write checks.
func (s *Store) reload(ctx context.Context) error {
	var found []*damage
	err := s.write(ctx, "read anew after a failed commit", func(tx *sql.Tx) (err error) {
		n, err := s.readNode(ctx, tx, false) // it is ours: locked and checked
		if err != nil {
			return err
		}
		s.setGeneration(max(s.generation, n.generation))
		found, err = s.readAll(ctx, tx)
		return err
	})
	if err != nil {
		return err
	}
	s.stale = false
	for _, d := range found {
		if err := s.giveUp(ctx, s.pools[d.h.pool], []*damage{d}); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) readPools(ctx context.Context, q querier) (_ map[uuid.UUID]*pool, err error) {
	rows, err := q.QueryContext(ctx, `SELECT id, peer, role, class, newest_seq, own_mark, peer_mark, peer_generation, epoch, ledger, proof FROM pool`)
	if err != nil {
		return nil, fmt.Errorf("read pools: %w", explain(err))
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	pools := map[uuid.UUID]*pool{}
	var bad []error // of every row that does not hold; they are in pools, too
	for rows.Next() {
		p := &pool{}
		i := &p.info
		var id, proof []byte
		var epoch uint64
		if err := rows.Scan(&id, &i.Peer, &i.Role, &i.Class, &i.NewestSeq, &i.Mark, &i.PeerMark, &i.PeerGeneration, &epoch, &p.sum, &proof); err != nil {
			bad = append(bad, fmt.Errorf("read pools: %w: %w", err, ErrDamaged))
			continue
		}
		copy(i.ID[:], id)
		pools[i.ID] = p
		a, err := s.ring(epoch)
		if err == nil {
			err = unseal(a, proof, nil, i.rowAAD(s.uuid, epoch, p.sum))
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("row of pool %s: %w: %w; its marks cannot be believed: move database and root file away to start with empty pools", i.ID, err, ErrDamaged))
			continue
		}
		s.epoch = max(s.epoch, epoch)
	}
	if err := rows.Err(); err != nil {
		bad = append(bad, fmt.Errorf("read pools: %w", explain(err)))
	}
	return pools, errors.Join(bad...)
}

func (s *Store) readBlocks(ctx context.Context, q querier, pools map[uuid.UUID]*pool) (found []*damage, err error) {
	rows, err := q.QueryContext(ctx, `SELECT pool, seq, state, class, no_pad, key_count, byte_count, algorithm, tag_m, tag_s, digest,
		own_cut, peer_cut, generation, epoch, wrap, taken_in FROM block ORDER BY pool, seq`)
	if err != nil {
		return nil, fmt.Errorf("read blocks: %w", explain(err))
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		h := &header{}
		var id, tagM, tagS, digest []byte
		if err := rows.Scan(&id, &h.seq, &h.state, &h.class, &h.noPad, &h.count, &h.bytes, &h.algorithm, &tagM, &tagS, &digest,
			&h.cut[0], &h.cut[1], &h.generation, &h.epoch, &h.wrap, &h.takenIn); err != nil {
			return nil, fmt.Errorf("read blocks: %w: %w", err, ErrDamaged)
		}
		copy(h.pool[:], id)
		copy(h.tagM[:], tagM)
		copy(h.tagS[:], tagS)
		copy(h.digest[:], digest)
		p := pools[h.pool]
		if p == nil {
			return nil, fmt.Errorf("%s: its pool is missing: %w", where(h.pool, h.seq), ErrDamaged)
		}
		p.blocks = append(p.blocks, h)
		k, err := s.unwrapKey(h)
		switch {
		case errors.Is(err, ErrDamaged):
			// Nothing of the row can be believed; what describes it must not panic.
			h.count = min(max(h.count, 1), int(key.MaxIndex)+1)
			h.seq = min(h.seq, key.MaxSeq)
			found = append(found, &damage{h, err})
		case err != nil:
			return nil, err
		default:
			k.Wipe()
			s.epoch = max(s.epoch, h.epoch)
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read blocks: %w", explain(err))
	}
	return found, nil
}

// readParts checks that every part is there in its right size; whether it opens
// shows when it is read.
func (s *Store) readParts(ctx context.Context, q querier, pools map[uuid.UUID]*pool) (found []*damage, err error) {
	rows, err := q.QueryContext(ctx, `SELECT pool, seq, part, length(ids), length(box) FROM part ORDER BY pool, seq, part`)
	if err != nil {
		return nil, fmt.Errorf("read parts: %w", explain(err))
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	have := map[*header]int{} // parts in order, from the first that is not cut out
	for rows.Next() {
		var id []byte
		var seq uint64
		var part, ids, box int
		if err := rows.Scan(&id, &seq, &part, &ids, &box); err != nil {
			return nil, fmt.Errorf("read parts: %w: %w", err, ErrDamaged)
		}
		var u uuid.UUID
		copy(u[:], id)
		p := pools[u]
		if p == nil {
			return nil, fmt.Errorf("part of %s: its pool is missing: %w", where(u, seq), ErrDamaged)
		}
		i, ok := p.find(seq)
		if !ok {
			return nil, fmt.Errorf("part of %s: its block is missing: %w", where(u, seq), ErrDamaged)
		}
		h := p.blocks[i]
		n := h.size(part)
		if n > 0 && ids == n*16 && box == n*key.MasterSize+boxOverhead {
			have[h]++
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read parts: %w", explain(err))
	}
	for _, p := range pools {
		for _, h := range p.blocks {
			if want := h.parts() - p.cutParts(h); have[h] != want {
				found = append(found, &damage{h, fmt.Errorf("%d sound parts, want %d", have[h], want)})
			}
		}
	}
	return found, nil
}
