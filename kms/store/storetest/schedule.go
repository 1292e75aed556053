package storetest

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// model is the simplest inventory that keeps the promise: a list of keys.
type model struct {
	blocks map[uint64]*modelBlock
	newest uint64
	mark   map[store.Side]key.Position // durable
	spent  map[store.Side]key.Position // of this process: read, given up, or marked before it began
	out    map[key.Position]bool       // came out of Load, ever
}

type modelBlock struct {
	count  int
	active bool
}

func sideOf(i int) store.Side { // the suite's pools are the master's
	if i%2 == 0 {
		return store.Own
	}
	return store.Peer
}

// keys lists what Load must give.
func (m *model) keys(side store.Side, from, to key.Position) map[key.Position]bool {
	want := map[key.Position]bool{}
	for seq, b := range m.blocks {
		for i := range b.count {
			if p := key.At(seq, uint32(i)); b.active && sideOf(i) == side && p > from && p <= to {
				want[p] = true
			}
		}
	}
	return want
}

// sorted lists the active keys above side's mark in order.
func (m *model) sorted(side store.Side) []key.Position {
	return slices.Sorted(maps.Keys(m.keys(side, m.mark[side], ^key.Position(0))))
}

// levels counts keys above the marks.
func (m *model) levels() (received, active, own int) {
	for seq, b := range m.blocks {
		for i := range b.count {
			switch side := sideOf(i); {
			case key.At(seq, uint32(i)) <= m.mark[side]:
			case !b.active:
				received++
			default:
				active++
				if side == store.Own {
					own++
				}
			}
		}
	}
	return received, active, own
}

func (m *model) begin() {
	m.spent = map[store.Side]key.Position{store.Own: m.mark[store.Own], store.Peer: m.mark[store.Peer]}
}

// schedule runs random calls, right and wrong ones, against store and model.
func schedule(t *testing.T, b *bench, r *rand.Rand, steps int) {
	m := &model{blocks: map[uint64]*modelBlock{}, mark: map[store.Side]key.Position{}, out: map[key.Position]bool{}}
	m.begin()
	for range steps {
		switch r.IntN(12) {
		case 0, 1:
			m.put(b, r)
		case 2, 3:
			m.activate(b, r)
		case 4, 5, 6:
			m.advance(b, r)
			if r.IntN(2) == 0 {
				m.load(b, r)
			}
		case 7, 8:
			m.load(b, r)
		case 9:
			switch r.IntN(3) {
			case 0:
				m.destroy(b, r)
			case 1:
				if r.IntN(3) == 0 {
					m.expire(b, r)
				} else {
					m.adopt(b, r)
				}
			default:
				b.must(b.EnsurePool(b.ctx, b.pool, "bob", key.Master, key.Direct))
			}
		case 10:
			b.must(b.Ratchet(b.ctx))
		case 11:
			b.restart()
			m.begin()
		}
		b.levels(m.levels())
		if p := b.info(); p.Mark != m.mark[store.Own] || p.PeerMark != m.mark[store.Peer] || p.NewestSeq != m.newest {
			t.Fatalf("pool %+v, model %v, newest %d", p, m.mark, m.newest)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("%d keys came out, %d blocks went in", len(m.out), m.newest)
	if len(m.out) < 20 {
		t.Error("too few keys came out for the schedule to show anything")
	}
}

func (m *model) put(b *bench, r *rand.Rand) {
	seq := m.newest + uint64(r.IntN(3)) // 0: an old one
	n := 1 + r.IntN(40)
	if r.IntN(8) == 0 {
		n = []int{1, 2047, 2048, 2049, 4097}[r.IntN(5)]
	}
	err := b.PutBlock(b.ctx, NewBlock(b.t, b.pool, max(seq, 1), n))
	if seq = max(seq, 1); seq <= m.newest {
		b.want(err, store.ErrOldSeq)
		return
	}
	b.must(err)
	m.newest = seq
	m.blocks[seq] = &modelBlock{count: n}
}

// pick gives a block that may exist.
func (m *model) pick(r *rand.Rand) uint64 {
	if m.newest > 6 {
		return m.newest - uint64(r.IntN(6))
	}
	return 1 + uint64(r.IntN(6))
}

// gone reports whether the store has, or may have, dropped a block as used up.
func (m *model) gone(seq uint64, marks map[store.Side]key.Position) bool {
	blk := m.blocks[seq]
	if blk == nil {
		return true
	}
	for i := range blk.count {
		if key.At(seq, uint32(i)) > marks[sideOf(i)] {
			return false
		}
	}
	return true
}

func (m *model) activate(b *bench, r *rand.Rand) {
	seq := m.pick(r)
	if next := m.oldestReceived(); next > 0 && r.IntN(4) > 0 {
		seq = next
	}
	oldest := seq
	for s, blk := range m.blocks {
		if !blk.active && !m.gone(s, m.spent) && s < oldest {
			oldest = s
		}
	}
	blk := m.blocks[seq]
	err := b.Activate(b.ctx, b.pool, seq)
	switch {
	case m.gone(seq, m.spent) && (errors.Is(err, store.ErrNoBlock) || blk != nil):
	case blk == nil:
		b.want(err, store.ErrNoBlock)
	case !blk.active && oldest < seq:
		b.want(err, store.ErrOrder)
	case errors.Is(err, store.ErrOrder) && !blk.active && m.usedUpBefore(seq):
	default:
		b.must(err)
		blk.active = true
	}
}

func (m *model) oldestReceived() (seq uint64) {
	for s, blk := range m.blocks {
		if !blk.active && (seq == 0 || s < seq) {
			seq = s
		}
	}
	return seq
}

// usedUpBefore reports whether a received block before seq has no key left to
// read but may still be listed: it is dropped with the next change of a mark.
func (m *model) usedUpBefore(seq uint64) bool {
	for s, blk := range m.blocks {
		if s < seq && !blk.active && m.gone(s, m.spent) {
			return true
		}
	}
	return false
}

// position gives one near a block's keys, or near the mark.
func (m *model) position(r *rand.Rand, side store.Side) key.Position {
	switch r.IntN(4) {
	case 0:
		return m.mark[side] + key.Position(r.IntN(5))
	case 1:
		return key.At(m.newest/2+uint64(r.IntN(2+int(m.newest))), uint32(r.IntN(50)))
	}
	seq := m.pick(r)
	if blk := m.blocks[seq]; blk != nil {
		return key.At(seq, uint32(r.IntN(blk.count)))
	}
	return key.At(seq, uint32(r.IntN(50)))
}

func (m *model) advance(b *bench, r *rand.Rand) {
	side := store.Side(1 + r.IntN(2))
	mark := m.position(r, side)
	if side == store.Own && r.IntN(3) > 0 {
		ask := 1 + r.IntN(30)
		next, n, err := b.NextLease(b.ctx, b.pool, ask)
		b.must(err)
		_, _, own := m.levels()
		if got := len(m.keys(side, m.mark[side], next)); n != min(ask, own) || got != n || n > 0 && sideOf(int(next.Index())) != side {
			b.t.Fatalf("NextLease(%d) = %s, %d; the model has %d up to there, %d in all", ask, next, n, got, own)
		}
		mark = next
	} else if next := m.sorted(side); len(next) > 0 && r.IntN(6) > 0 {
		mark = next[r.IntN(min(len(next), 25))]
	}
	err := b.Advance(b.ctx, b.pool, side, mark, "lease", 1)
	switch {
	case mark < m.mark[side]:
		b.want(err, store.ErrBackwards)
	case mark > m.mark[side] && mark.Seq() > m.newest:
		b.want(err, store.ErrAhead)
	default:
		b.must(err)
		m.mark[side] = mark
	}
}

func (m *model) load(b *bench, r *rand.Rand) {
	side := store.Side(1 + r.IntN(2))
	from, to := m.spent[side], m.mark[side]
	if r.IntN(3) == 0 {
		from, to = m.position(r, side), m.position(r, side)
	}
	keys, err := b.Load(b.ctx, b.pool, side, from, to)
	switch {
	case from >= to:
		if err == nil {
			b.t.Fatal("an empty range was read")
		}
		return
	case from < m.spent[side]:
		b.want(err, store.ErrSpent)
		return
	case to > m.mark[side]:
		b.want(err, store.ErrAhead)
		return
	}
	b.must(err)
	want := m.keys(side, from, to)
	if len(keys) != len(want) {
		b.t.Fatalf("%s (%s, %s]: %d keys, want %d", side, from, to, len(keys), len(want))
	}
	for i, k := range keys {
		b.check(k)
		if !want[k.Position] || m.out[k.Position] || i > 0 && keys[i-1].Position >= k.Position {
			b.t.Fatalf("key %s: wanted %v, came out before %v", k.Position, want[k.Position], m.out[k.Position])
		}
		m.out[k.Position] = true
	}
	m.spent[side] = to
}

func (m *model) destroy(b *bench, r *rand.Rand) {
	seq := m.pick(r)
	used := m.gone(seq, m.spent)
	err := b.Destroy(b.ctx, b.pool, seq, key.Expired, "age")
	if m.blocks[seq] == nil || used && err != nil {
		b.want(err, store.ErrNoBlock)
		return
	}
	b.must(err)
	delete(m.blocks, seq)
}

func (m *model) expire(b *bench, r *rand.Rand) {
	side := store.Side(1 + r.IntN(2))
	mark := m.mark[side] + key.Position(r.IntN(20))
	if r.IntN(8) == 0 {
		mark = m.mark[side] - key.Position(r.IntN(2)) // a repeat, or backwards
	}
	want := len(m.keys(side, m.spent[side], mark))
	n, err := b.Expire(b.ctx, b.pool, side, mark, 1)
	switch {
	case mark < m.mark[side]:
		b.want(err, store.ErrBackwards)
		return
	case mark > m.mark[side] && mark.Seq() > m.newest:
		b.want(err, store.ErrAhead)
		return
	}
	b.must(err)
	if n < want { // those that are received go with them
		b.t.Fatalf("%d keys expired, at least %d were there", n, want)
	}
	m.mark[side], m.spent[side] = mark, max(m.spent[side], mark)
}

func (m *model) adopt(b *bench, r *rand.Rand) {
	side := store.Side(1 + r.IntN(2))
	mark := m.mark[side] + key.Position(r.IntN(20))
	if r.IntN(8) == 0 {
		mark = m.position(r, side)
	}
	_, err := b.AdoptMark(b.ctx, b.pool, side, mark)
	b.must(err)
	m.mark[side] = max(m.mark[side], mark)
	m.spent[side] = max(m.spent[side], mark)
}
