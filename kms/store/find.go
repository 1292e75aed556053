package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// KeyInfo says where a key is, without its bytes.
type KeyInfo struct {
	ID       key.ID
	Pool     uuid.UUID
	Position key.Position
	Class    key.Class
	Side     Side      // its owner
	State    key.State // Leased at or below its owner's mark, unless the history knows more
	NoPad    bool
	Stored   bool // its block is still in the database
}

// Find looks a Key-ID up in every block, then in the history. It reads all
// Key-IDs: for operators, not for supply. ErrNotFound.
func (s *Store) Find(ctx context.Context, id key.ID) (KeyInfo, error) {
	if id.IsZero() {
		return KeyInfo{}, fmt.Errorf("store: Key-ID %s: %w", id, ErrNotFound)
	}
	if err := s.usable(); err != nil {
		return KeyInfo{}, err
	}
	found, err := s.scan(ctx, id)
	if err != nil {
		return KeyInfo{}, err
	}
	events, err := s.History(ctx, HistoryQuery{ID: id, Limit: 1})
	if err != nil {
		return KeyInfo{}, err
	}
	if len(events) == 1 {
		e := events[0]
		if !found.Stored {
			found = KeyInfo{ID: id, Pool: e.Pool, Position: e.First, Side: e.Side}
		}
		found.State = e.State
	} else if !found.Stored {
		return KeyInfo{}, fmt.Errorf("store: Key-ID %s: %w", id, ErrNotFound)
	}
	return found, nil
}

// scan looks for id among the blocks; Stored says whether it is there.
func (s *Store) scan(ctx context.Context, id key.ID) (info KeyInfo, err error) {
	rows, err := s.r.QueryContext(ctx, `SELECT pool, seq, part, ids FROM part`)
	if err != nil {
		return info, fmt.Errorf("store: look for a key: %w", explain(err))
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var pool, ids []byte
		var seq uint64
		var part int
		if err := rows.Scan(&pool, &seq, &part, &ids); err != nil {
			return info, fmt.Errorf("store: look for a key: %w", err)
		}
		for at := 0; at+16 <= len(ids); at += 16 {
			if bytes.Equal(ids[at:at+16], id[:]) {
				return s.describe(id, pool, seq, part*partKeys+at/16), nil
			}
		}
	}
	if err := rows.Err(); err != nil {
		return info, fmt.Errorf("store: look for a key: %w", explain(err))
	}
	return info, nil
}

// describe fills in what memory knows of a key that was found on disk.
func (s *Store) describe(id key.ID, pool []byte, seq uint64, index int) KeyInfo {
	s.mem.RLock()
	defer s.mem.RUnlock()
	var u uuid.UUID
	copy(u[:], pool)
	p := s.pools[u]
	if p == nil {
		return KeyInfo{}
	}
	i, ok := p.find(seq)
	if !ok || index >= p.blocks[i].count {
		return KeyInfo{} // dropped since the row was read
	}
	h := p.blocks[i]
	info := KeyInfo{ID: id, Pool: u, Position: key.At(seq, uint32(index)), Class: h.class, State: h.state, NoPad: h.noPad, Side: Peer, Stored: true}
	if p.info.Role.Owns(info.Position) {
		info.Side = Own
	}
	if info.Position <= p.info.mark(info.Side) {
		info.State = key.Leased
	}
	return info
}

// Stats counts since Open, and what is there now.
type Stats struct {
	Generation   uint64
	Epoch        uint64 // of the root file
	Pools        int
	Blocks       int
	Keys         int // above the marks
	BlocksPut    int
	KeysRead     int
	SinceRatchet int // keys read since the last Ratchet
	Ratchets     int
	Damaged      int // blocks given up
}

// Stats gives the store's counters. It waits for the change that runs.
func (s *Store) Stats(ctx context.Context) (Stats, error) {
	if err := s.acquire(ctx); err != nil {
		return Stats{}, err
	}
	defer s.release()
	st := s.stats
	st.Generation, st.Epoch, st.SinceRatchet = s.generation, s.root.epoch, s.sinceRatchet
	st.Pools = len(s.pools)
	for _, p := range s.pools {
		st.Blocks += len(p.blocks)
		st.Keys += p.info.Received + p.info.Active
	}
	return st, nil
}
