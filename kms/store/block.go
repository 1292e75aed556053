package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// partKeys is how many keys one sealed part of a block holds (64 KiB): what a
// small lease from a large block has to read and open.
const partKeys = 2048

// maxAlgorithm bounds Block.Algorithm, in bytes.
const maxAlgorithm = 32

// Block is one QKD-Key file's keys on their way into the store.
type Block struct {
	Pool       uuid.UUID
	Seq        uint64 // from 1
	Class      key.Class
	NoPad      bool          // its keys never become one-time pads (hash validation)
	Keys       *key.Material // n*32 bytes, borrowed
	IDs        []key.ID      // n
	TagM, TagS [16]byte      // M102's tags of master and slave
	Digest     [32]byte      // zero unless Algorithm is a hash
	Algorithm  string        // of M102
	Bytes      int           // key data of the file, spent on tags and ids too
}

// BlockInfo is what is known of a block without opening it.
type BlockInfo struct {
	Seq        uint64
	State      key.State
	Class      key.Class
	Count      int // keys, in total
	Left       int // keys above the marks
	TagM, TagS [16]byte
	Digest     [32]byte
	Algorithm  string
	Bytes      int
	NoPad      bool
	Age        time.Duration // since PutBlock, by the store's clock
}

func (b *Block) check() error {
	n := len(b.IDs)
	switch {
	case b.Seq < 1 || b.Seq > key.MaxSeq:
		return fmt.Errorf("seq is not between 1 and %d", key.MaxSeq)
	case n < 1 || n > int(key.MaxIndex)+1:
		return fmt.Errorf("%d keys: not between 1 and %d", n, int(key.MaxIndex)+1)
	case b.Keys.Len() != n*key.MasterSize:
		return fmt.Errorf("%d key bytes for %d Key-IDs", b.Keys.Len(), n)
	case b.Class < key.Derived || b.Class > key.Direct:
		return fmt.Errorf("%s is unknown", b.Class)
	case len(b.Algorithm) > maxAlgorithm:
		return fmt.Errorf("algorithm name has %d bytes, at most %d", len(b.Algorithm), maxAlgorithm)
	case !utf8.ValidString(b.Algorithm) || strings.ContainsRune(b.Algorithm, 0):
		return errors.New("algorithm name is no text")
	case b.Bytes < 0:
		return fmt.Errorf("%d bytes of key data", b.Bytes)
	}
	seen := make(map[key.ID]struct{}, n)
	for i, id := range b.IDs {
		if _, twice := seen[id]; twice || id.IsZero() {
			return fmt.Errorf("Key-ID %s at index %d is zero or repeated", id, i)
		}
		seen[id] = struct{}{}
	}
	return nil
}

// where names a block in errors.
func where(pool uuid.UUID, seq uint64) string { return fmt.Sprintf("block %d of pool %s", seq, pool) }

// PutBlock stores b sealed, in state received, and raises the pool's NewestSeq,
// durably when it returns. ErrOldSeq if b.Seq is not above NewestSeq; b.Keys
// stays the caller's.
func (s *Store) PutBlock(ctx context.Context, b Block) error {
	if err := b.check(); err != nil {
		return fmt.Errorf("store: %s: %w", where(b.Pool, b.Seq), err)
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	p, err := s.poolOf(b.Pool)
	if err != nil {
		return err
	}
	if b.Seq <= p.info.NewestSeq {
		return fmt.Errorf("store: %s: %w (%d)", where(b.Pool, b.Seq), ErrOldSeq, p.info.NewestSeq)
	}
	h := &header{
		pool: b.Pool, seq: b.Seq, state: key.Received, class: b.Class, noPad: b.NoPad, count: len(b.IDs), bytes: b.Bytes,
		algorithm: b.Algorithm, tagM: b.TagM, tagS: b.TagS, digest: b.Digest, generation: s.generation, takenIn: s.clock.now(),
	}
	k, err := key.Random(rand.Reader, 32)
	if err != nil {
		return err
	}
	defer k.Wipe()
	if err := s.wrapKey(h, k); err != nil {
		return err
	}
	info := p.info
	info.NewestSeq = b.Seq
	err = s.write(ctx, "store "+where(b.Pool, b.Seq), func(tx *sql.Tx) error {
		if err := insertBlock(ctx, tx, h); err != nil {
			return err
		}
		if err := s.insertParts(ctx, tx, h, k, b); err != nil {
			return err
		}
		if err := s.putPool(ctx, tx, &info); err != nil {
			return err
		}
		return s.note(ctx, tx, h.event(key.Received, h.count, b.Algorithm))
	})
	if err != nil {
		return err
	}
	s.mem.Lock()
	p.info = info
	p.blocks = append(p.blocks, h)
	p.count()
	s.stats.BlocksPut++
	s.mem.Unlock()
	return nil
}

func insertBlock(ctx context.Context, tx *sql.Tx, h *header) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO block (pool, seq, state, class, no_pad, key_count, byte_count, algorithm, tag_m, tag_s, digest,
		own_cut, peer_cut, generation, epoch, wrap, taken_in) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)`,
		h.pool[:], int64(h.seq), int64(h.state), int64(h.class), int64(flag(h.noPad)), int64(h.count), int64(h.bytes), h.algorithm,
		h.tagM[:], h.tagS[:], h.digest[:], int64(h.cut[0]), int64(h.cut[1]), int64(h.generation), int64(h.epoch), h.wrap, h.takenIn)
	return err
}

// updateBlock writes what can change of a header.
func updateBlock(ctx context.Context, tx *sql.Tx, h *header) error {
	return oneRow(tx.ExecContext(ctx, `UPDATE block SET state = $1, own_cut = $2, peer_cut = $3, generation = $4, epoch = $5, wrap = $6 WHERE pool = $7 AND seq = $8`,
		int64(h.state), int64(h.cut[0]), int64(h.cut[1]), int64(h.generation), int64(h.epoch), h.wrap, h.pool[:], int64(h.seq)))
}

func deleteBlock(ctx context.Context, tx *sql.Tx, pool uuid.UUID, seq uint64) error {
	if _, err := tx.ExecContext(ctx, `DELETE FROM part WHERE pool = $1 AND seq = $2`, pool[:], int64(seq)); err != nil {
		return err
	}
	return oneRow(tx.ExecContext(ctx, `DELETE FROM block WHERE pool = $1 AND seq = $2`, pool[:], int64(seq)))
}

func (s *Store) insertParts(ctx context.Context, tx *sql.Tx, h *header, k *key.Material, b Block) error {
	a, err := newAEAD(k.Bytes())
	if err != nil {
		return err
	}
	for part := 0; part*partKeys < h.count; part++ {
		lo, hi := part*partKeys, min((part+1)*partKeys, h.count)
		ids := make([]byte, 0, (hi-lo)*16)
		for _, id := range b.IDs[lo:hi] {
			ids = append(ids, id[:]...)
		}
		box := seal(a, b.Keys.Bytes()[lo*key.MasterSize:hi*key.MasterSize], h.partAAD(s.uuid, part, ids))
		if _, err := tx.ExecContext(ctx, `INSERT INTO part (pool, seq, part, ids, box) VALUES ($1, $2, $3, $4, $5)`,
			h.pool[:], int64(h.seq), part, ids, box); err != nil {
			return err
		}
	}
	return nil
}

// event is the history row of a change of a whole block.
func (h *header) event(state key.State, keys int, detail string) Event {
	return Event{Pool: h.pool, First: key.At(h.seq, 0), Last: key.At(h.seq, uint32(h.count-1)), State: state, Count: keys, Detail: detail}
}

// blockOf gives the header and its place; the caller has the turn.
func (s *Store) blockOf(id uuid.UUID, seq uint64) (*pool, int, error) {
	p, err := s.poolOf(id)
	if err != nil {
		return nil, 0, err
	}
	i, ok := p.find(seq)
	if !ok {
		return nil, 0, fmt.Errorf("store: %s: %w", where(id, seq), ErrNoBlock)
	}
	return p, i, nil
}

// Activate makes a received block active, durably. A block that is active
// already is no error. ErrOrder while an older block of the pool is received:
// keys become active in the order of seq on both sides.
func (s *Store) Activate(ctx context.Context, pool uuid.UUID, seq uint64) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	p, i, err := s.blockOf(pool, seq)
	if err != nil {
		return err
	}
	old := p.blocks[i]
	if old.state == key.Active {
		return nil
	}
	for _, o := range p.blocks[:i] {
		if o.state == key.Received {
			return fmt.Errorf("store: %s: %w: block %d is %s", where(pool, seq), ErrOrder, o.seq, o.state)
		}
	}
	h := *old
	h.state = key.Active
	if err := s.rewrap(old, &h); err != nil {
		return fmt.Errorf("store: %s: %w", where(pool, seq), err)
	}
	err = s.write(ctx, "activate "+where(pool, seq), func(tx *sql.Tx) error {
		if err := updateBlock(ctx, tx, &h); err != nil {
			return err
		}
		return s.note(ctx, tx, h.event(key.Active, h.count, ""))
	})
	if err != nil {
		return err
	}
	s.mem.Lock()
	p.blocks[i] = &h
	p.count()
	s.mem.Unlock()
	return nil
}

// Destroy removes a block, whatever its state; its keys end as state (Destroyed,
// Expired or Compromised) for the reason why. What was leased from it before is
// not touched. From the next Ratchet on the keys are beyond recovery.
func (s *Store) Destroy(ctx context.Context, pool uuid.UUID, seq uint64, state key.State, why string) error {
	if state != key.Destroyed && state != key.Expired && state != key.Compromised {
		return fmt.Errorf("store: %s: no block ends as %s", where(pool, seq), state)
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	p, i, err := s.blockOf(pool, seq)
	if err != nil {
		return err
	}
	h := p.blocks[i]
	left := p.alive(h, [2]key.Position{p.info.Mark, p.info.PeerMark})
	err = s.write(ctx, "destroy "+where(pool, seq), func(tx *sql.Tx) error {
		if err := deleteBlock(ctx, tx, pool, seq); err != nil {
			return err
		}
		return s.note(ctx, tx, h.event(state, left, why))
	})
	if err != nil {
		return err
	}
	s.forget(p, h)
	return nil
}

// forget takes headers out of memory, after they left the database.
func (s *Store) forget(p *pool, gone ...*header) {
	if len(gone) == 0 {
		return
	}
	s.mem.Lock()
	p.blocks = slices.DeleteFunc(p.blocks, func(h *header) bool { return slices.Contains(gone, h) })
	p.count()
	s.mem.Unlock()
}

// dropDone deletes, within tx, the blocks of p of which no key will be read
// again, and gives them for forget.
func (s *Store) dropDone(ctx context.Context, tx *sql.Tx, p *pool) ([]*header, error) {
	var gone []*header
	for _, h := range p.blocks {
		if !p.done(h) {
			continue
		}
		if err := deleteBlock(ctx, tx, h.pool, h.seq); err != nil {
			return nil, err
		}
		if err := s.note(ctx, tx, h.event(key.Destroyed, 0, "block used up")); err != nil {
			return nil, err
		}
		gone = append(gone, h)
	}
	return gone, nil
}

// dropAll deletes, within tx, every block of p, and gives them for forget.
func (s *Store) dropAll(ctx context.Context, tx *sql.Tx, p *pool) ([]*header, error) {
	for _, h := range p.blocks {
		if err := deleteBlock(ctx, tx, h.pool, h.seq); err != nil {
			return nil, err
		}
		left := p.alive(h, [2]key.Position{p.info.Mark, p.info.PeerMark})
		if err := s.note(ctx, tx, h.event(key.Destroyed, left, "given up: the database is on another server")); err != nil {
			return nil, err
		}
	}
	return slices.Clone(p.blocks), nil
}

// Blocks lists a pool's blocks by seq, from memory.
func (s *Store) Blocks(ctx context.Context, pool uuid.UUID) ([]BlockInfo, error) {
	if err := s.usable(); err != nil {
		return nil, err
	}
	s.mem.RLock()
	defer s.mem.RUnlock()
	p := s.pools[pool]
	if p == nil {
		return nil, fmt.Errorf("store: pool %s: %w", pool, ErrNoPool)
	}
	list, now := make([]BlockInfo, 0, len(p.blocks)), s.clock.now()
	for _, h := range p.blocks {
		list = append(list, BlockInfo{
			Seq: h.seq, State: h.state, Class: h.class, Count: h.count, Left: p.alive(h, [2]key.Position{p.info.Mark, p.info.PeerMark}),
			TagM: h.tagM, TagS: h.tagS, Digest: h.digest, Algorithm: h.algorithm, Bytes: h.bytes, NoPad: h.noPad, Age: h.age(now),
		})
	}
	return list, ctx.Err()
}
