package storetest

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// use is one of a few uses, so that random ones meet.
func use(i int) key.RawUse {
	return key.RawUse{Purpose: key.RawPurpose(1 + i%2), Batch: uuid.UUID{15: byte(1 + i/8)}, Attempt: uint32(i / 4 % 2), Hop: uint16(i), Direction: key.Direction(1 + i/2%2)}
}

func rng(seq uint64, first, last uint32) key.Range {
	return key.Range{First: key.At(seq, first), Last: key.At(seq, last)}
}

// rawLease leases and reads for raw use.
func (b *bench) rawLease(side store.Side, from, to key.Position) {
	b.t.Helper()
	b.must(b.Advance(b.ctx, b.pool, side, to, store.PurposeRaw, 1))
	keys, err := b.LoadRaw(b.ctx, b.pool, side, from, to)
	b.must(err)
	for _, k := range keys {
		b.check(k)
	}
}

// rawUse is the ledger's contract, call by call.
func rawUse(t *testing.T, b *bench) {
	b.put(key.Active, 40, 1, 2, 3) // NewBlock makes block 3 NoPad
	bind := func(g key.Range, u key.RawUse) error {
		return b.Bind(b.ctx, b.pool, store.Own, key.Binding{Range: g, RawUse: u})
	}
	// A lease is for one purpose.
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 8), "supply", 1))
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 18), store.PurposeRaw, 1))
	_, err := b.LoadRaw(b.ctx, b.pool, store.Own, 0, key.At(1, 8))
	b.want(err, store.ErrPurpose)
	_, err = b.Load(b.ctx, b.pool, store.Own, 0, key.At(1, 18))
	b.want(err, store.ErrPurpose)
	b.want(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 18), "supply", 1), store.ErrPurpose)
	b.want(bind(rng(1, 10, 12), use(0)), store.ErrNotLeased)
	b.load(store.Own, 0, key.At(1, 8))
	b.rawLease(store.Own, key.At(1, 8), key.At(1, 18))
	b.want(bind(rng(1, 2, 4), use(0)), store.ErrNotLeased)
	b.want(bind(rng(1, 8, 12), use(0)), store.ErrNotLeased)
	b.want(bind(rng(1, 16, 20), use(0)), store.ErrNotLeased)
	for name, err := range map[string]error{
		"nothing": b.Bind(b.ctx, b.pool, store.Own), "empty": bind(rng(1, 12, 10), use(0)), "two blocks": bind(key.Range{First: key.At(1, 12), Last: key.At(2, 12)}, use(0)),
		"the peer's": bind(rng(1, 11, 13), use(0)), "no use": bind(rng(1, 10, 12), key.RawUse{}), "no side": b.Bind(b.ctx, b.pool, 0, key.Binding{Range: rng(1, 10, 12), RawUse: use(0)}),
	} {
		if err == nil {
			t.Errorf("%s was bound", name)
		}
	}
	// Bound once: the same again stands, all else is refused.
	b.must(bind(rng(1, 10, 12), use(0)))
	b.must(bind(rng(1, 10, 12), use(0)))
	b.want(bind(rng(1, 10, 12), use(1)), store.ErrBound)
	b.want(bind(rng(1, 10, 10), use(0)), store.ErrBound)
	b.want(bind(rng(1, 12, 14), use(2)), store.ErrBound)
	// All or none.
	b.want(b.Bind(b.ctx, b.pool, store.Own, key.Binding{Range: rng(1, 14, 14), RawUse: use(3)}, key.Binding{Range: rng(1, 12, 12), RawUse: use(4)}), store.ErrBound)
	b.want(b.Bind(b.ctx, b.pool, store.Own, key.Binding{Range: rng(1, 14, 14), RawUse: use(3)}, key.Binding{Range: rng(1, 14, 14), RawUse: use(3)}), store.ErrBound)
	b.must(b.Bind(b.ctx, b.pool, store.Own, key.Binding{Range: rng(1, 14, 14), RawUse: use(3)}, key.Binding{Range: rng(1, 16, 18), RawUse: use(4)}))
	// Settled: gone from the ledger, refused all the same.
	b.must(b.Settle(b.ctx, b.pool, store.Own, use(0), key.RawUsed, ""))
	b.want(b.Settle(b.ctx, b.pool, store.Own, use(0), key.RawUsed, ""), store.ErrNotBound)
	b.want(b.Settle(b.ctx, b.pool, store.Peer, use(3), key.RawBurned, "x"), store.ErrNotBound)
	b.want(bind(rng(1, 10, 12), use(0)), store.ErrBound)
	if ev := b.history(store.HistoryQuery{Pool: b.pool, At: key.At(1, 12), Limit: 1}); len(ev) != 1 || ev[0].State != key.Supplied || ev[0].Count != 2 || ev[0].Side != store.Own {
		t.Errorf("history %+v", ev)
	}
	// The two sides are apart; keys that were agreed on with a hash are unfit.
	b.rawLease(store.Peer, 0, key.At(1, 9))
	b.must(b.Bind(b.ctx, b.pool, store.Peer, key.Binding{Range: rng(1, 1, 9), RawUse: use(3)}))
	b.rawLease(store.Own, key.At(1, 18), key.At(3, 10))
	b.want(bind(rng(3, 0, 2), use(5)), store.ErrUnfit)
	// A lease that is abandoned cannot be bound.
	_, err = b.AdoptMark(b.ctx, b.pool, store.Own, key.At(2, 10))
	b.must(err)
	b.want(bind(rng(2, 8, 10), use(6)), store.ErrNotLeased)
	// What expires was not read yet: keys in memory are the holder's as before.
	_, err = b.Expire(b.ctx, b.pool, store.Own, key.At(3, 30), 1)
	b.must(err)
	b.must(bind(rng(2, 12, 14), use(6)))
	b.must(b.Ratchet(b.ctx))
	rawRestart(t, b)
}

// rawRestart is what is left of rawUse after a restart.
func rawRestart(t *testing.T, b *bench) {
	b.restart()
	list, err := b.Bindings(b.ctx, b.pool)
	b.must(err)
	want := []store.Bound{
		{Side: store.Own, Binding: key.Binding{Range: rng(1, 14, 14), RawUse: use(3)}, Spent: true},
		{Side: store.Own, Binding: key.Binding{Range: rng(1, 16, 18), RawUse: use(4)}, Spent: true},
		{Side: store.Peer, Binding: key.Binding{Range: rng(1, 1, 9), RawUse: use(3)}, Spent: true},
		{Side: store.Own, Binding: key.Binding{Range: rng(2, 12, 14), RawUse: use(6)}, Spent: true},
	}
	if len(list) != len(want) {
		t.Fatalf("%+v, want %+v", list, want)
	}
	for i := range want {
		if list[i] != want[i] {
			t.Errorf("%+v, want %+v", list[i], want[i])
		}
	}
	for _, g := range []key.Range{rng(1, 14, 14), rng(2, 20, 22), rng(1, 2, 2)} {
		b.want(b.Bind(b.ctx, b.pool, store.Own, key.Binding{Range: g, RawUse: use(3)}), store.ErrSpent)
	}
	b.want(b.Settle(b.ctx, b.pool, store.Own, use(3), key.RawUsed, ""), store.ErrSpent)
	b.must(b.Settle(b.ctx, b.pool, store.Own, use(3), key.RawBurned, "restart"))
	if ev := b.history(store.HistoryQuery{Pool: b.pool, At: key.At(1, 14), Limit: 1}); len(ev) != 1 || ev[0].State != key.Destroyed {
		t.Errorf("history %+v", ev)
	}
	b.restart()
	if list, err := b.Bindings(b.ctx, b.pool); err != nil || len(list) != 3 {
		t.Errorf("%+v, %v", list, err)
	}
}

// life is what a key has been used for, ever.
type life struct {
	supply, read bool
	bound        *key.RawUse
}

// rawModel remembers every key that came out and every use that was granted.
type rawModel struct {
	lives  map[store.Side]map[key.Position]*life
	mark   map[store.Side]key.Position
	read   map[store.Side]key.Position
	raw    map[store.Side]bool // purpose of the lease that is not read yet
	seq    uint64
	open   map[store.Side]map[key.RawUse]int // bound and not settled, by how many ranges
	before map[store.Side]map[key.RawUse]int // of them, by former processes
	bound  int
	ours   map[store.Side]map[key.Position]bool // read raw in this process, fit
}

// rawSchedule runs random calls, right and wrong ones, with restarts between
// any two of them. No key is ever bound to two uses, nor bound and read for
// supply; what is granted or refused is what the model says.
func rawSchedule(t *testing.T, b *bench, r *rand.Rand, steps int) {
	m := &rawModel{
		lives: map[store.Side]map[key.Position]*life{store.Own: {}, store.Peer: {}}, mark: map[store.Side]key.Position{}, read: map[store.Side]key.Position{},
		raw: map[store.Side]bool{}, open: map[store.Side]map[key.RawUse]int{store.Own: {}, store.Peer: {}}, before: map[store.Side]map[key.RawUse]int{store.Own: {}, store.Peer: {}},
		ours: map[store.Side]map[key.Position]bool{store.Own: {}, store.Peer: {}},
	}
	restarts := 0
	for range steps {
		side := store.Side(1 + r.IntN(2))
		switch r.IntN(12) {
		case 0:
			m.seq++
			b.put(key.Active, 50+r.IntN(40), m.seq)
		case 1, 2, 3:
			m.lease(b, r, side)
		case 4, 5, 6, 7, 8:
			m.bind(b, r, side)
		case 9:
			m.settle(b, r, side)
		case 10:
			b.must(b.Ratchet(b.ctx))
		default:
			if r.IntN(5) == 0 {
				b.restart()
				restarts++
				m.begin()
			}
		}
		n := 0
		for _, uses := range m.open {
			for _, c := range uses {
				n += c
			}
		}
		if list, err := b.Bindings(b.ctx, b.pool); err != nil || len(list) != n {
			t.Fatalf("%d bindings, the model has %d, %v", len(list), n, err)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("%d ranges bound, %d restarts", m.bound, restarts)
	if m.bound < 10 || restarts == 0 {
		t.Error("the schedule shows nothing")
	}
}

// begin forgets what a process knows.
func (m *rawModel) begin() {
	for _, side := range []store.Side{store.Own, store.Peer} {
		m.read[side] = m.mark[side]
		m.ours[side] = map[key.Position]bool{}
		for u, n := range m.open[side] {
			m.before[side][u] = n
		}
	}
}

// lease advances for either purpose and reads, sometimes as the other.
func (m *rawModel) lease(b *bench, r *rand.Rand, side store.Side) {
	if m.read[side] == m.mark[side] {
		if m.seq == 0 {
			return
		}
		at := m.mark[side]
		to := at + key.Position(2+r.IntN(24))
		if at.Index() > 60 || at == 0 {
			if at.Seq() == m.seq {
				return
			}
			to = key.At(at.Seq()+1, uint32(r.IntN(24)))
		}
		m.raw[side] = r.IntN(3) > 0
		b.must(b.Advance(b.ctx, b.pool, side, to, purpose(m.raw[side]), 1))
		m.mark[side] = to
		if r.IntN(3) == 0 {
			return // read later, or never
		}
	}
	asRaw := m.raw[side] != (r.IntN(4) == 0)
	load := b.Load
	if asRaw {
		load = b.LoadRaw
	}
	keys, err := load(b.ctx, b.pool, side, m.read[side], m.mark[side])
	if asRaw != m.raw[side] {
		b.want(err, store.ErrPurpose)
		return
	}
	b.must(err)
	m.read[side] = m.mark[side]
	for _, k := range keys {
		if m.lives[side][k.Position] != nil {
			b.t.Fatalf("key %s came out twice", k.Position)
		}
		m.lives[side][k.Position] = &life{supply: !asRaw, read: true}
		if asRaw && !k.NoPad {
			m.ours[side][k.Position] = true
		}
		b.check(k)
	}
}

func purpose(raw bool) string {
	if raw {
		return store.PurposeRaw
	}
	return "supply"
}

// bind tries a range near the mark, of which the model knows whether it is free.
func (m *rawModel) bind(b *bench, r *rand.Rand, side store.Side) {
	if m.seq == 0 {
		return
	}
	seq, first := 1+uint64(r.IntN(int(m.seq))), uint32(2*r.IntN(30)+int(side)-1)
	var can []key.Position
	for p := range m.ours[side] {
		if m.lives[side][p].bound == nil {
			can = append(can, p)
		}
	}
	if slices.Sort(can); len(can) > 0 && r.IntN(3) > 0 {
		p := can[r.IntN(len(can))]
		seq, first = p.Seq(), p.Index()
	}
	g := rng(seq, first, first+uint32(2*r.IntN(4)))
	u := use(r.IntN(16))
	ok, held := true, false
	for p := g.First; p <= g.Last; p += 2 {
		l := m.lives[side][p]
		ok = ok && m.ours[side][p] && l.bound == nil
		held = held || l != nil && l.bound != nil
	}
	err := b.Bind(b.ctx, b.pool, side, key.Binding{Range: g, RawUse: u})
	if !ok {
		if m.stands(b, side, g, u) {
			b.must(err)
			return
		}
		refused := errors.Is(err, store.ErrBound) || errors.Is(err, store.ErrSpent) || errors.Is(err, store.ErrNotLeased) || errors.Is(err, store.ErrUnfit)
		if !refused || held && !errors.Is(err, store.ErrBound) && !errors.Is(err, store.ErrSpent) && !errors.Is(err, store.ErrUnfit) {
			b.t.Fatalf("%s %s as %s: %v", side, g, u, err)
		}
		return
	}
	b.must(err)
	for p := g.First; p <= g.Last; p += 2 {
		l := m.lives[side][p]
		if l.supply || l.bound != nil {
			b.t.Fatalf("key %s was bound though it had been used", p)
		}
		l.bound = &u
	}
	m.open[side][u]++
	m.bound++
}

// stands reports whether the store lists just this as bound by this process.
func (m *rawModel) stands(b *bench, side store.Side, g key.Range, u key.RawUse) bool {
	list, err := b.Bindings(b.ctx, b.pool)
	b.must(err)
	for _, e := range list {
		if e == (store.Bound{Side: side, Binding: key.Binding{Range: g, RawUse: u}}) {
			return *m.lives[side][g.First].bound == u
		}
	}
	return false
}

func (m *rawModel) settle(b *bench, r *rand.Rand, side store.Side) {
	u, end := use(r.IntN(16)), key.RawEnd(1+r.IntN(2))
	err := b.Settle(b.ctx, b.pool, side, u, end, "test")
	switch {
	case m.open[side][u] == 0:
		b.want(err, store.ErrNotBound)
		return
	case end == key.RawUsed && m.before[side][u] > 0:
		b.want(err, store.ErrSpent)
		return
	}
	b.must(err)
	delete(m.open[side], u)
	delete(m.before[side], u)
}
