package store

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Side says whose mark or keys are meant: this node's or the peer's.
type Side uint8

// The two sides of a pool; their numbers are on disk.
const (
	Own  Side = 1
	Peer Side = 2
)

// String is "own" or "peer".
func (s Side) String() string {
	switch s {
	case Own:
		return "own"
	case Peer:
		return "peer"
	}
	return fmt.Sprintf("side(%d)", uint8(s))
}

// at is the side's place in arrays.
func (s Side) at() int { return int(s) - 1 }

func (s Side) check() error {
	if s != Own && s != Peer {
		return fmt.Errorf("store: %s is no side", s)
	}
	return nil
}

// PoolInfo is a pool's state. Counts are of keys above their owner's mark.
type PoolInfo struct {
	ID             uuid.UUID
	Peer           string // node name
	Role           key.Role
	Class          key.Class
	NewestSeq      uint64       // of any block ever stored here
	Mark, PeerMark key.Position // ours and the peer's
	PeerGeneration uint64       // highest one known
	Received       int          // keys of both owners, the peer has not agreed yet
	Active         int          // keys of both owners, agreed
	OwnActive      int          // the part of Active that is ours to lease
}

// mark is the pool's mark of side.
func (p *PoolInfo) mark(side Side) key.Position {
	if side == Own {
		return p.Mark
	}
	return p.PeerMark
}

func (p *PoolInfo) setMark(side Side, m key.Position) {
	if side == Own {
		p.Mark = m
	} else {
		p.PeerMark = m
	}
}

// owner is the role that owns side's keys.
func (p *PoolInfo) owner(side Side) key.Role {
	if side == Own {
		return p.Role
	}
	return p.Role.Other()
}

// pool is what memory knows of a pool.
type pool struct {
	info PoolInfo
	// spent, by side: up to here keys were read, or given up, in this process or
	// before it. Never goes back, never above the mark.
	spent  [2]key.Position
	blocks []*header // by seq; a header is replaced, never changed

	floor   [2]key.Position // by side: the marks when this process began
	raw     [2]raw
	entries []entry // the ledger's, by serial
	sum     string  // their digest as it was read
}

// find gives the place of seq in p.blocks.
func (p *pool) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(p.blocks, seq, func(h *header, s uint64) int {
		switch {
		case h.seq < s:
			return -1
		case h.seq > s:
			return 1
		}
		return 0
	})
}

// owned counts the indices in [lo, hi) that role owns.
func owned(role key.Role, lo, hi int) int {
	if lo >= hi {
		return 0
	}
	if role == key.Master {
		return (hi+1)/2 - (lo+1)/2
	}
	return hi/2 - lo/2
}

// after is the first index of h above position m, h.count if there is none.
func (h *header) after(m key.Position) int {
	switch {
	case m.Seq() < h.seq:
		return 0
	case m.Seq() > h.seq:
		return h.count
	}
	return min(int(m.Index())+1, h.count)
}

// firstOwned is the first index from i on that role owns.
func firstOwned(role key.Role, i int) int {
	if (i%2 == 0) == (role == key.Master) {
		return i
	}
	return i + 1
}

// cutParts counts the parts at the beginning of h that hold no key above cut:
// their rows are gone.
func (p *pool) cutParts(h *header) int {
	first := min(firstOwned(p.info.owner(Own), h.after(h.cut[0])), firstOwned(p.info.owner(Peer), h.after(h.cut[1])), h.count)
	return first / partKeys
}

// left counts h's keys that role owns above m.
func (h *header) left(role key.Role, m key.Position) int { return owned(role, h.after(m), h.count) }

// alive counts h's keys, of both owners, above marks given by side.
func (p *pool) alive(h *header, marks [2]key.Position) int {
	return h.left(p.info.owner(Own), marks[0]) + h.left(p.info.owner(Peer), marks[1])
}

// done reports whether no key of h will ever be read again.
func (p *pool) done(h *header) bool { return p.alive(h, p.spent) == 0 }

// count fills in the levels.
func (p *pool) count() {
	p.info.Received, p.info.Active, p.info.OwnActive = 0, 0, 0
	marks := [2]key.Position{p.info.Mark, p.info.PeerMark}
	for _, h := range p.blocks {
		n := p.alive(h, marks)
		switch h.state {
		case key.Received:
			p.info.Received += n
		case key.Active:
			p.info.Active += n
			p.info.OwnActive += h.left(p.info.Role, p.info.Mark)
		}
	}
}

// poolOf gives the pool; the caller has the turn.
func (s *Store) poolOf(id uuid.UUID) (*pool, error) {
	p := s.pools[id]
	if p == nil {
		return nil, fmt.Errorf("store: pool %s: %w", id, ErrNoPool)
	}
	return p, nil
}

// putPool writes p's row with a proof of the current epoch.
func (s *Store) putPool(ctx context.Context, tx *sql.Tx, p *PoolInfo) error {
	return s.putPoolWith(ctx, tx, p, digest(s.pools[p.ID].entries))
}

// putPoolWith is putPool with the digest of another ledger than memory's.
func (s *Store) putPoolWith(ctx context.Context, tx *sql.Tx, p *PoolInfo, ledger string) error {
	a, err := s.ring(s.epoch)
	if err != nil {
		return err
	}
	res, err := tx.ExecContext(ctx, `UPDATE pool SET newest_seq = $1, own_mark = $2, peer_mark = $3, peer_generation = $4, epoch = $5, ledger = $6, proof = $7 WHERE id = $8`,
		int64(p.NewestSeq), int64(p.Mark), int64(p.PeerMark), int64(p.PeerGeneration), int64(s.epoch), ledger, seal(a, nil, p.rowAAD(s.uuid, s.epoch, ledger)), p.ID[:])
	return oneRow(res, err)
}

// oneRow fails unless the statement changed exactly one row.
func oneRow(res sql.Result, err error) error {
	if err != nil {
		return err
	}
	n, err := res.RowsAffected()
	if err == nil && n != 1 {
		err = fmt.Errorf("%d rows where one should be: %w", n, ErrDamaged)
	}
	return err
}

// EnsurePool makes the pool that this node shares with peer (a node name of at
// most 32 bytes) unless it is there. It fails with ErrConflict if it is there
// with another peer, role or class.
func (s *Store) EnsurePool(ctx context.Context, id uuid.UUID, peer string, role key.Role, class key.Class) error {
	if id == uuid.Nil || peer == "" || len(peer) > 32 || strings.ContainsRune(peer, 0) || !utf8.ValidString(peer) ||
		role != key.Master && role != key.Slave || class < key.Derived || class > key.Direct {
		return fmt.Errorf("store: pool %s with %q, %s, %s: a field is out of range", id, peer, role, class)
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	if p := s.pools[id]; p != nil {
		if i := p.info; i.Peer != peer || i.Role != role || i.Class != class {
			return fmt.Errorf("store: pool %s is with %s as %s, class %s, not with %s as %s, class %s: %w",
				id, i.Peer, i.Role, i.Class, peer, role, class, ErrConflict)
		}
		return nil
	}
	p := &pool{info: PoolInfo{ID: id, Peer: peer, Role: role, Class: class}}
	err := s.write(ctx, "make pool "+id.String(), func(tx *sql.Tx) error { return s.insertPool(ctx, tx, &p.info) })
	if err != nil {
		return err
	}
	s.mem.Lock()
	s.pools[id] = p
	s.mem.Unlock()
	return nil
}

// insertPool makes i's row, without marks.
func (s *Store) insertPool(ctx context.Context, tx *sql.Tx, i *PoolInfo) error {
	a, err := s.ring(s.epoch)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO pool (id, peer, role, class, newest_seq, own_mark, peer_mark, peer_generation, epoch, proof)
		VALUES ($1, $2, $3, $4, $5, 0, 0, $6, $7, $8)`, i.ID[:], i.Peer, int64(i.Role), int64(i.Class), int64(i.NewestSeq), int64(i.PeerGeneration),
		int64(s.epoch), seal(a, nil, i.rowAAD(s.uuid, s.epoch, "")))
	return err
}

// Pool gives one pool's state from memory; ErrNoPool.
func (s *Store) Pool(ctx context.Context, id uuid.UUID) (PoolInfo, error) {
	if err := s.usable(); err != nil {
		return PoolInfo{}, err
	}
	s.mem.RLock()
	defer s.mem.RUnlock()
	if p := s.pools[id]; p != nil {
		return p.info, ctx.Err()
	}
	return PoolInfo{}, fmt.Errorf("store: pool %s: %w", id, ErrNoPool)
}

// Pools gives every pool's state from memory, ordered by peer, then id.
func (s *Store) Pools(ctx context.Context) ([]PoolInfo, error) {
	if err := s.usable(); err != nil {
		return nil, err
	}
	s.mem.RLock()
	defer s.mem.RUnlock()
	list := make([]PoolInfo, 0, len(s.pools))
	for _, p := range s.pools {
		list = append(list, p.info)
	}
	slices.SortFunc(list, func(a, b PoolInfo) int {
		if c := strings.Compare(a.Peer, b.Peer); c != 0 {
			return c
		}
		return strings.Compare(a.ID.String(), b.ID.String())
	})
	return list, ctx.Err()
}
