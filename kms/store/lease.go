package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// NextLease says which mark would lease up to max of this node's active keys,
// and how many keys n that is; n is 0 if there are none. It changes nothing.
func (s *Store) NextLease(ctx context.Context, pool uuid.UUID, max int) (mark key.Position, n int, err error) {
	if err := s.usable(); err != nil {
		return 0, 0, err
	}
	s.mem.RLock()
	defer s.mem.RUnlock()
	p := s.pools[pool]
	if p == nil {
		return 0, 0, fmt.Errorf("store: pool %s: %w", pool, ErrNoPool)
	}
	mark = p.info.Mark
	for _, h := range p.blocks {
		left := h.left(p.info.Role, p.info.Mark)
		if h.state != key.Active || left == 0 || n >= max {
			continue
		}
		take := min(left, max-n)
		i := firstOwned(p.info.Role, h.after(p.info.Mark))
		mark = key.At(h.seq, uint32(i+2*(take-1)))
		n += take
	}
	return mark, n, ctx.Err()
}

// Advance raises side's mark to mark, durably when it returns, with a history
// row that names purpose and generation. The keys in between may then be read,
// once, by Load. For the peer's side, generation is the peer's: it is kept, and
// a lower one than known is ErrOldGeneration. Repeating a call is no error and
// writes nothing. ErrBackwards below the mark, ErrAhead above NewestSeq.
func (s *Store) Advance(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, purpose string, generation uint64) error {
	if err := side.check(); err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	p, err := s.poolOf(pool)
	if err != nil {
		return err
	}
	old := p.info.mark(side)
	info, what, err := p.info.advance(side, mark, generation)
	if err != nil {
		return err
	}
	if mark == old {
		if err := p.raw[side.at()].repeated(p.spent[side.at()], mark, purpose); err != nil {
			return fmt.Errorf("store: %s: %w", what, err)
		}
	}
	if info == p.info {
		return nil
	}
	ev := Event{Side: side, State: key.Leased, First: old + 1, Last: mark, Detail: fmt.Sprintf("%s, generation %d", purpose, generation)}
	for _, h := range p.blocks {
		if h.state == key.Active {
			ev.Count += h.left(info.owner(side), old) - h.left(info.owner(side), mark)
		}
	}
	if err := s.setMarks(ctx, p, info, what, ev, p.spent); err != nil {
		return err
	}
	if mark > old {
		p.raw[side.at()].leased(old, mark, purpose)
	}
	return nil
}

// advance gives the row with side's mark raised to mark, and words for that.
func (p PoolInfo) advance(side Side, mark key.Position, generation uint64) (_ PoolInfo, what string, err error) {
	old := p.mark(side)
	what = fmt.Sprintf("%s mark %s of pool %s", side, mark, p.ID)
	switch {
	case mark < old:
		return p, what, fmt.Errorf("store: %s: %w: it is %s", what, ErrBackwards, old)
	case mark > old && mark.Seq() > p.NewestSeq:
		return p, what, fmt.Errorf("store: %s: %w: the newest seq here is %d", what, ErrAhead, p.NewestSeq)
	case side == Peer && generation < p.PeerGeneration:
		return p, what, fmt.Errorf("store: %s: %w: %d, known is %d", what, ErrOldGeneration, generation, p.PeerGeneration)
	}
	p.setMark(side, mark)
	if side == Peer {
		p.PeerGeneration = generation
	}
	return p, what, nil
}

// AdoptMark gives up, durably, every key of side up to mark that was not read
// yet: the mark is raised if it is lower, and Load never gives those keys. It is
// for SYNC, when the peer knows a higher mark (the alarm is the caller's), and
// for a lease that is abandoned. It gives the number of stored keys given up.
func (s *Store) AdoptMark(ctx context.Context, pool uuid.UUID, side Side, mark key.Position) (int, error) {
	if err := side.check(); err != nil {
		return 0, err
	}
	if mark.Seq() > key.MaxSeq {
		return 0, fmt.Errorf("store: mark %s is out of range", mark)
	}
	if err := s.acquire(ctx); err != nil {
		return 0, err
	}
	defer s.release()
	p, err := s.poolOf(pool)
	if err != nil {
		return 0, err
	}
	n, err := s.forgo(ctx, p, p.info, side, mark, Event{State: key.Destroyed, Detail: "given up: mark adopted"})
	if err == nil {
		p.raw[side.at()].abandoned(mark) // what was read, too: its lease is over
	}
	return n, err
}

// Expire gives up, durably, every key of side up to mark that was not read yet, as
// expired: the mark is raised as by Advance, with the same errors, and Load never
// gives those keys. It gives the number of keys. Repeating a call is no error.
func (s *Store) Expire(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, generation uint64) (int, error) {
	if err := side.check(); err != nil {
		return 0, err
	}
	if err := s.acquire(ctx); err != nil {
		return 0, err
	}
	defer s.release()
	p, err := s.poolOf(pool)
	if err != nil {
		return 0, err
	}
	info, _, err := p.info.advance(side, mark, generation)
	if err != nil {
		return 0, err
	}
	return s.forgo(ctx, p, info, side, mark, Event{State: key.Expired, Detail: fmt.Sprintf("expired, generation %d", generation)})
}

// forgo makes info the pool's row, with side's mark raised to mark if it is lower,
// and gives up the keys up to there, with ev. It gives their number.
func (s *Store) forgo(ctx context.Context, p *pool, info PoolInfo, side Side, mark key.Position, ev Event) (int, error) {
	spent := p.spent
	if mark > info.mark(side) {
		info.setMark(side, mark)
	}
	if mark <= spent[side.at()] {
		return 0, nil
	}
	for _, h := range p.blocks {
		ev.Count += h.left(info.owner(side), spent[side.at()]) - h.left(info.owner(side), mark)
	}
	ev.Side, ev.First, ev.Last = side, spent[side.at()]+1, mark
	spent[side.at()] = mark
	if err := s.setMarks(ctx, p, info, fmt.Sprintf("give up %s keys up to %s of pool %s", side, mark, info.ID), ev, spent); err != nil {
		return ev.Count, err
	}
	p.raw[side.at()].read(mark)
	return ev.Count, nil
}

// setMarks makes info the pool's row and spent what is spent, with ev unless
// its range is empty, and drops what is used up.
func (s *Store) setMarks(ctx context.Context, p *pool, info PoolInfo, what string, ev Event, spent [2]key.Position) error {
	ev.Pool = info.ID
	after := &pool{info: info, spent: spent, blocks: p.blocks}
	var gone []*header
	err := s.write(ctx, what, func(tx *sql.Tx) (err error) {
		if err := s.putPool(ctx, tx, &info); err != nil {
			return err
		}
		if ev.First <= ev.Last {
			if err := s.note(ctx, tx, ev); err != nil {
				return err
			}
		}
		gone, err = s.dropDone(ctx, tx, after)
		return err
	})
	if err != nil {
		return err
	}
	s.mem.Lock()
	p.info, p.spent = info, spent
	p.count()
	s.mem.Unlock()
	s.forget(p, gone...)
	return nil
}

// LeasedKey is one key in memory after its lease.
type LeasedKey struct {
	ID       key.ID
	Position key.Position
	Class    key.Class
	NoPad    bool
	Material *key.Material // 32 bytes, the caller owns and wipes it
}

// Load reads the keys of side's owner in (from, to], of active blocks, in the
// order of their positions. A range is read once: to must not be above the
// mark (ErrAhead), and from not below anything that was read, given up, or
// marked before this process began (ErrSpent). What lies between the last range
// and from is given up. A block that turns out damaged is left out and
// destroyed with an alarm event; an error leaves the range unread.
func (s *Store) Load(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position) ([]LeasedKey, error) {
	return s.load(ctx, pool, side, from, to, false)
}

// load is Load, or LoadRaw.
func (s *Store) load(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position, forRaw bool) ([]LeasedKey, error) {
	if err := side.check(); err != nil {
		return nil, err
	}
	if err := s.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.release()
	p, err := s.poolOf(pool)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("read %s keys (%s, %s] of pool %s", side, from, to, pool)
	switch {
	case from >= to:
		return nil, fmt.Errorf("store: %s: empty range", what)
	case from < p.spent[side.at()]:
		return nil, fmt.Errorf("store: %s: %w: up to %s", what, ErrSpent, p.spent[side.at()])
	case to > p.info.mark(side):
		return nil, fmt.Errorf("store: %s: %w: the mark is %s", what, ErrAhead, p.info.mark(side))
	}
	if err := p.raw[side.at()].allows(from, to, forRaw); err != nil {
		return nil, fmt.Errorf("store: %s: %w", what, err)
	}
	var keys []LeasedKey
	var found []*damage
	for _, h := range p.blocks {
		if h.state != key.Active {
			continue
		}
		got, err := s.loadBlock(ctx, h, p.info.owner(side), from, to)
		var d *damage
		if errors.As(err, &d) {
			found = append(found, d)
		} else if err != nil {
			wipeAll(keys)
			return nil, fmt.Errorf("store: %s: %w", what, err)
		}
		keys = append(keys, got...)
	}
	if err := s.giveUp(ctx, p, found); err != nil {
		wipeAll(keys)
		return nil, err
	}
	s.mem.Lock()
	p.spent[side.at()] = to
	p.raw[side.at()].read(to)
	if forRaw {
		p.raw[side.at()].gave(keys)
	}
	s.stats.KeysRead += len(keys)
	s.mem.Unlock()
	s.sinceRatchet += len(keys)
	return keys, nil
}

func wipeAll(keys []LeasedKey) {
	for _, k := range keys {
		k.Material.Wipe()
	}
}

// loadBlock gives role's keys of h in (from, to], all or none.
func (s *Store) loadBlock(ctx context.Context, h *header, role key.Role, from, to key.Position) (keys []LeasedKey, err error) {
	lo, hi := h.after(from), h.after(to) // indices [lo, hi)
	if owned(role, lo, hi) == 0 {
		return nil, nil
	}
	lo = firstOwned(role, lo)
	if firstOwned(role, hi-1) == hi {
		hi-- // the last one is not role's
	}
	defer func() {
		if err != nil {
			wipeAll(keys)
			keys = nil
		}
	}()
	first, _ := partOf(lo)
	last, _ := partOf(hi - 1)
	keys = make([]LeasedKey, 0, owned(role, lo, hi))
	err = s.openParts(ctx, s.r, h, first, last, func(part int, ids, plain []byte) error {
		for i := max(lo, part*partKeys); i < min(hi, (part+1)*partKeys); i++ {
			pos := key.At(h.seq, uint32(i))
			if !role.Owns(pos) {
				continue
			}
			_, at := partOf(i)
			k := plain[at*key.MasterSize : (at+1)*key.MasterSize]
			if isZero(k) {
				return &damage{h, fmt.Errorf("the key at index %d was cut out", i)}
			}
			m, err := key.New(key.MasterSize)
			if err != nil {
				return err
			}
			copy(m.Bytes(), k)
			keys = append(keys, LeasedKey{ID: key.ID(ids[at*16 : at*16+16]), Position: pos, Class: h.class, NoPad: h.noPad, Material: m})
		}
		return nil
	})
	return keys, err
}
