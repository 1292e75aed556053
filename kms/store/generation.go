package store

import (
	"context"
	"database/sql"
	"fmt"
	"math"
)

// Generation is the number of this start: higher than at every earlier Open of
// this database, and than those of a database it replaced as long as the wall
// clock did not go back. RaiseGeneration makes it higher still.
func (s *Store) Generation() uint64 {
	s.mem.RLock()
	defer s.mem.RUnlock()
	return s.generation
}

// RaiseGeneration makes the generation higher than above, durably, unless it is
// already, and returns it. It is for SYNC, when a peer knows a later start of
// this node than the store does: the store was restored from a copy.
func (s *Store) RaiseGeneration(ctx context.Context, above uint64) (uint64, error) {
	if above >= math.MaxInt64 { // SQL's integers are signed
		return 0, fmt.Errorf("store: generation %d is out of range", above)
	}
	if err := s.acquire(ctx); err != nil {
		return 0, err
	}
	defer s.release()
	old := s.generation
	if old > above {
		return old, nil
	}
	s.setGeneration(above + 1)
	if err := s.write(ctx, fmt.Sprintf("raise the generation above %d", above), func(tx *sql.Tx) error { return s.putNode(ctx, tx) }); err != nil {
		s.setGeneration(old)
		return 0, err
	}
	return above + 1, nil
}

// setGeneration is for whoever has the turn.
func (s *Store) setGeneration(g uint64) {
	s.mem.Lock()
	defer s.mem.Unlock()
	s.generation = g
}
