// Package storetest is the conformance suite of kms/store: what every backend
// must do, seen through the exported API alone.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// Open opens the store whose files are in dir, making it if dir is empty.
type Open func(ctx context.Context, dir string) (*store.Store, error)

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for name, f := range map[string]func(*testing.T, *bench){
		"Pools": pools, "Blocks": blocks, "Order": order, "Lease": lease, "LoadOnce": loadOnce, "Reopen": reopen, "AdoptMark": adoptMark, "Expire": expire,
		"PeerGeneration": peerGeneration, "Destroy": destroy, "Ratchet": ratchet, "History": history, "Events": events, "Find": find,
		"Generation": generation, "RawUse": rawUse, "Closed": closed, "Cancelled": cancelled, "Concurrency": concurrency,
	} {
		t.Run(name, func(t *testing.T) { f(t, newBench(t, open)) })
	}
	for seed := range uint64(8) {
		t.Run(fmt.Sprintf("RawSchedule/%d", seed), func(t *testing.T) { rawSchedule(t, newBench(t, open), rand.New(rand.NewPCG(seed, 8)), 300) })
		t.Run(fmt.Sprintf("Schedule/%d", seed), func(t *testing.T) { schedule(t, newBench(t, open), rand.New(rand.NewPCG(seed, 7)), 250) })
	}
}

// NewBlock makes a block of n keys whose bytes and ids follow from pool, seq and
// index, so that Bytes can tell them; the test wipes it at its end.
func NewBlock(t testing.TB, pool uuid.UUID, seq uint64, n int) store.Block {
	t.Helper()
	plain := make([]byte, 0, n*key.MasterSize)
	ids := make([]key.ID, n)
	for i := range n {
		plain = append(plain, Bytes(pool, seq, i)...)
		ids[i] = ID(pool, seq, i)
	}
	m, err := key.Take(plain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	b := store.Block{Pool: pool, Seq: seq, Class: key.Direct, NoPad: seq%3 == 0, Keys: m, IDs: ids, Algorithm: "poly1305", Bytes: n*key.MasterSize + 96}
	b.TagM[0], b.TagS[0], b.Digest[0] = byte(seq), byte(seq+1), byte(seq+2)
	return b
}

// Bytes are the bytes of a test key.
func Bytes(pool uuid.UUID, seq uint64, index int) []byte {
	r := rand.NewChaCha8([32]byte(append(pool[:], fmt.Sprintf("%08d%08d", seq, index)...)))
	b := make([]byte, key.MasterSize)
	_, _ = r.Read(b) // never fails
	return b
}

// ID is the Key-ID of a test key.
func ID(pool uuid.UUID, seq uint64, index int) key.ID {
	return key.DeriveID([]byte("test"), pool, seq, uint32(index))
}

// bench is one test's store.
type bench struct {
	*store.Store
	t    *testing.T
	ctx  context.Context
	dir  string
	open Open
	pool uuid.UUID
}

func newBench(t *testing.T, open Open) *bench {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	b := &bench{t: t, ctx: ctx, dir: t.TempDir() + "/store", open: open, pool: uuid.UUID{15: 1}}
	b.start()
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	b.must(b.EnsurePool(ctx, b.pool, "bob", key.Master, key.Direct))
	return b
}

func (b *bench) start() {
	b.t.Helper()
	s, err := b.open(b.ctx, b.dir)
	b.must(err)
	b.Store = s
}

func (b *bench) restart() {
	b.t.Helper()
	b.must(b.Close())
	b.start()
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) want(err, target error) {
	b.t.Helper()
	if !errors.Is(err, target) {
		b.t.Errorf("error %v, want %v", err, target)
	}
}

// put stores blocks of n keys, received or active.
func (b *bench) put(state key.State, n int, seqs ...uint64) {
	b.t.Helper()
	for _, seq := range seqs {
		b.must(b.PutBlock(b.ctx, NewBlock(b.t, b.pool, seq, n)))
		if state == key.Active {
			b.must(b.Activate(b.ctx, b.pool, seq))
		}
	}
}

func (b *bench) info() store.PoolInfo {
	b.t.Helper()
	p, err := b.Pool(b.ctx, b.pool)
	b.must(err)
	return p
}

// levels compares received, active and own active keys.
func (b *bench) levels(received, active, own int) {
	b.t.Helper()
	if p := b.info(); p.Received != received || p.Active != active || p.OwnActive != own {
		b.t.Errorf("levels: received %d, active %d, own %d; want %d, %d, %d", p.Received, p.Active, p.OwnActive, received, active, own)
	}
}

// load reads a range, checks every byte, and gives the positions.
func (b *bench) load(side store.Side, from, to key.Position) []key.Position {
	b.t.Helper()
	keys, err := b.Load(b.ctx, b.pool, side, from, to)
	b.must(err)
	list := make([]key.Position, 0, len(keys))
	for _, k := range keys {
		list = append(list, k.Position)
		b.check(k)
	}
	return list
}

func (b *bench) check(k store.LeasedKey) {
	b.t.Helper()
	defer k.Material.Wipe()
	seq, i := k.Position.Seq(), int(k.Position.Index())
	if !bytes.Equal(k.Material.Bytes(), Bytes(b.pool, seq, i)) {
		b.t.Errorf("key %s has other bytes than were stored", k.Position)
	}
	if k.ID != ID(b.pool, seq, i) || k.Class != key.Direct || k.NoPad != (seq%3 == 0) {
		b.t.Errorf("key %s: %s, %s, NoPad %v", k.Position, k.ID, k.Class, k.NoPad)
	}
}

func pools(t *testing.T, b *bench) {
	other := uuid.UUID{15: 2}
	b.must(b.EnsurePool(b.ctx, other, "alice", key.Slave, key.Relayed))
	b.must(b.EnsurePool(b.ctx, other, "alice", key.Slave, key.Relayed))
	b.want(b.EnsurePool(b.ctx, other, "carol", key.Slave, key.Relayed), store.ErrConflict)
	b.want(b.EnsurePool(b.ctx, other, "alice", key.Master, key.Relayed), store.ErrConflict)
	b.want(b.EnsurePool(b.ctx, other, "alice", key.Slave, key.Direct), store.ErrConflict)
	for name, err := range map[string]error{
		"nil id":   b.EnsurePool(b.ctx, uuid.Nil, "x", key.Slave, key.Direct),
		"no peer":  b.EnsurePool(b.ctx, uuid.UUID{3}, "", key.Slave, key.Direct),
		"long":     b.EnsurePool(b.ctx, uuid.UUID{3}, strings.Repeat("x", 33), key.Slave, key.Direct),
		"no role":  b.EnsurePool(b.ctx, uuid.UUID{3}, "x", 0, key.Direct),
		"no class": b.EnsurePool(b.ctx, uuid.UUID{3}, "x", key.Slave, 0),
	} {
		if err == nil {
			t.Errorf("a pool with %s was made", name)
		}
	}
	_, err := b.Pool(b.ctx, uuid.UUID{9})
	b.want(err, store.ErrNoPool)
	b.restart()
	list, err := b.Pools(b.ctx)
	b.must(err)
	want := []store.PoolInfo{{ID: other, Peer: "alice", Role: key.Slave, Class: key.Relayed}, {ID: b.pool, Peer: "bob", Role: key.Master, Class: key.Direct}}
	if len(list) != 2 || list[0] != want[0] || list[1] != want[1] {
		t.Errorf("pools %+v, want %+v", list, want)
	}
}

func blocks(t *testing.T, b *bench) {
	b.put(key.Received, 5, 1, 4)
	b.levels(10, 0, 0)
	for _, seq := range []uint64{0, 1, 3, 4} {
		if err := b.PutBlock(b.ctx, NewBlock(t, b.pool, seq, 2)); seq > 0 && !errors.Is(err, store.ErrOldSeq) || err == nil {
			t.Errorf("seq %d: %v", seq, err)
		}
	}
	b.want(b.PutBlock(b.ctx, NewBlock(t, uuid.UUID{9}, 9, 2)), store.ErrNoPool)
	for name, change := range map[string]func(*store.Block){
		"too few bytes": func(x *store.Block) { x.IDs = append(x.IDs, key.ID{1}) }, "no keys": func(x *store.Block) { x.IDs, x.Keys = nil, nil },
		"repeated id": func(x *store.Block) { x.IDs[1] = x.IDs[0] }, "zero id": func(x *store.Block) { x.IDs[1] = key.ID{} },
		"no class": func(x *store.Block) { x.Class = 0 }, "seq too large": func(x *store.Block) { x.Seq = key.MaxSeq + 1 },
		"long algorithm": func(x *store.Block) { x.Algorithm = strings.Repeat("x", 33) }, "negative size": func(x *store.Block) { x.Bytes = -1 },
	} {
		x := NewBlock(t, b.pool, 9, 2)
		change(&x)
		if err := b.PutBlock(b.ctx, x); err == nil {
			t.Errorf("a block with %s was stored", name)
		}
	}
	for range 2 { // from memory, then from disk
		list, err := b.Blocks(b.ctx, b.pool)
		b.must(err)
		if len(list) != 2 {
			t.Fatalf("blocks %+v", list)
		}
		if a := list[1].Age; a <= 0 || a > time.Hour {
			t.Errorf("a new block is %v old", a)
		}
		list[1].Age = 0
		x := NewBlock(t, b.pool, 4, 5)
		if want := (store.BlockInfo{
			Seq: 4, State: key.Received, Class: x.Class, Count: 5, Left: 5, TagM: x.TagM, TagS: x.TagS,
			Digest: x.Digest, Algorithm: x.Algorithm, Bytes: x.Bytes, NoPad: x.NoPad,
		}); list[1] != want || list[0].Seq != 1 {
			t.Errorf("block %+v, want %+v", list[1], want)
		}
		b.restart()
	}
	if p := b.info(); p.NewestSeq != 4 {
		t.Errorf("newest seq %d after a restart", p.NewestSeq)
	}
}

func order(t *testing.T, b *bench) {
	b.put(key.Received, 4, 1, 2, 3)
	b.want(b.Activate(b.ctx, b.pool, 2), store.ErrOrder)
	b.want(b.Activate(b.ctx, b.pool, 7), store.ErrNoBlock)
	b.must(b.Activate(b.ctx, b.pool, 1))
	b.must(b.Activate(b.ctx, b.pool, 1))
	b.must(b.Destroy(b.ctx, b.pool, 2, key.Destroyed, "peer has none"))
	b.must(b.Activate(b.ctx, b.pool, 3))
	b.levels(0, 8, 4)
	b.restart()
	b.levels(0, 8, 4)
	if n := len(b.history(store.HistoryQuery{Pool: b.pool, At: key.At(1, 0)})); n != 2 {
		t.Errorf("%d history rows of block 1, want received and active once each", n)
	}
}

func lease(t *testing.T, b *bench) {
	if _, n, err := b.NextLease(b.ctx, b.pool, 10); n != 0 || err != nil {
		t.Errorf("a lease of an empty pool: %d, %v", n, err)
	}
	b.put(key.Active, 5, 1, 2)
	b.put(key.Received, 5, 3)
	for _, tc := range []struct {
		max, n int
		mark   key.Position
	}{{1, 1, key.At(1, 0)}, {2, 2, key.At(1, 2)}, {3, 3, key.At(1, 4)}, {4, 4, key.At(2, 0)}, {6, 6, key.At(2, 4)}, {99, 6, key.At(2, 4)}, {0, 0, 0}} {
		if mark, n, err := b.NextLease(b.ctx, b.pool, tc.max); mark != tc.mark || n != tc.n || err != nil {
			t.Errorf("lease of %d: %s, %d, %v; want %s, %d", tc.max, mark, n, err, tc.mark, tc.n)
		}
	}
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 2), "lease", b.Generation()))
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 2), "lease", b.Generation()))
	b.levels(5, 8, 4)
	b.must(b.Advance(b.ctx, b.pool, store.Peer, key.At(1, 3), "lease", 7))
	b.levels(5, 6, 4)
	if mark, n, _ := b.NextLease(b.ctx, b.pool, 2); mark != key.At(2, 0) || n != 2 {
		t.Errorf("the next lease: %s, %d", mark, n)
	}
	b.want(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 1), "lease", b.Generation()), store.ErrBackwards)
	b.want(b.Advance(b.ctx, b.pool, store.Peer, key.At(1, 2), "lease", 7), store.ErrBackwards)
	b.want(b.Advance(b.ctx, b.pool, store.Peer, key.At(4, 0), "lease", 7), store.ErrAhead)
	b.want(b.Advance(b.ctx, uuid.UUID{9}, store.Peer, 1, "lease", 7), store.ErrNoPool)
	if b.Advance(b.ctx, b.pool, 0, key.At(2, 0), "lease", 7) == nil {
		t.Error("Advance took side 0")
	}
	b.restart()
	if p := b.info(); p.Mark != key.At(1, 2) || p.PeerMark != key.At(1, 3) || p.PeerGeneration != 7 {
		t.Errorf("after a restart: %+v", p)
	}
}

func loadOnce(t *testing.T, b *bench) {
	b.put(key.Active, 6, 1, 2)
	m := key.At(2, 2)
	_, err := b.Load(b.ctx, b.pool, store.Own, 0, m)
	b.want(err, store.ErrAhead)
	b.must(b.Advance(b.ctx, b.pool, store.Own, m, "lease", b.Generation()))
	_, err = b.Load(b.ctx, b.pool, store.Own, 0, m+1)
	b.want(err, store.ErrAhead)
	_, err = b.Load(b.ctx, b.pool, store.Peer, 0, m)
	b.want(err, store.ErrAhead)
	if got := b.load(store.Own, 0, key.At(1, 3)); fmt.Sprint(got) != "[1/0 1/2]" {
		t.Errorf("loaded %v", got)
	}
	for _, from := range []key.Position{0, key.At(1, 2)} {
		_, err = b.Load(b.ctx, b.pool, store.Own, from, m)
		b.want(err, store.ErrSpent)
	}
	if _, err = b.Load(b.ctx, b.pool, store.Own, m, m); err == nil {
		t.Error("an empty range was read")
	}
	if got := b.load(store.Own, key.At(1, 3), m); fmt.Sprint(got) != "[1/4 2/0 2/2]" {
		t.Errorf("loaded %v", got)
	}
	_, err = b.Load(b.ctx, b.pool, store.Own, key.At(1, 3), m)
	b.want(err, store.ErrSpent)
	b.must(b.Advance(b.ctx, b.pool, store.Peer, key.At(2, 5), "lease", 1))
	if got := b.load(store.Peer, key.At(1, 1), key.At(2, 5)); fmt.Sprint(got) != "[1/3 1/5 2/1 2/3 2/5]" {
		t.Errorf("loaded %v", got)
	}
	_, err = b.Load(b.ctx, b.pool, store.Peer, 0, key.At(1, 1)) // skipped: given up
	b.want(err, store.ErrSpent)
}

func reopen(t *testing.T, b *bench) {
	b.put(key.Active, 6, 1)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 2), "lease", b.Generation()))
	b.must(b.Advance(b.ctx, b.pool, store.Peer, key.At(1, 1), "lease", 1))
	b.restart() // nothing was read
	for _, side := range []store.Side{store.Own, store.Peer} {
		_, err := b.Load(b.ctx, b.pool, side, 0, key.At(1, 1))
		b.want(err, store.ErrSpent)
	}
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 5), "lease", b.Generation()))
	if got := b.load(store.Own, key.At(1, 2), key.At(1, 5)); fmt.Sprint(got) != "[1/4]" {
		t.Errorf("loaded %v", got)
	}
	b.must(b.Advance(b.ctx, b.pool, store.Peer, key.At(1, 5), "lease", 1))
	b.restart()
	if list, err := b.Blocks(b.ctx, b.pool); err != nil || len(list) != 0 {
		t.Errorf("a block below both marks is still there: %+v, %v", list, err)
	}
	b.levels(0, 0, 0)
	b.want(b.PutBlock(b.ctx, NewBlock(t, b.pool, 1, 3)), store.ErrOldSeq)
}

func adoptMark(t *testing.T, b *bench) {
	b.put(key.Active, 6, 1, 2)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 2), "lease", b.Generation()))
	n, err := b.AdoptMark(b.ctx, b.pool, store.Own, key.At(1, 4))
	b.must(err)
	if n != 3 || b.info().Mark != key.At(1, 4) {
		t.Errorf("adopted: %d keys burned, mark %s", n, b.info().Mark)
	}
	_, err = b.Load(b.ctx, b.pool, store.Own, 0, key.At(1, 2))
	b.want(err, store.ErrSpent)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(2, 0), "lease", b.Generation()))
	if got := b.load(store.Own, key.At(1, 4), key.At(2, 0)); fmt.Sprint(got) != "[2/0]" {
		t.Errorf("loaded %v", got)
	}
	if n, err = b.AdoptMark(b.ctx, b.pool, store.Own, key.At(1, 0)); n != 0 || err != nil || b.info().Mark != key.At(2, 0) {
		t.Errorf("a lower mark was adopted: %d, %v, %s", n, err, b.info().Mark)
	}
	// An abandoned lease: marked, never read.
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(2, 2), "lease", b.Generation()))
	if n, err = b.AdoptMark(b.ctx, b.pool, store.Own, key.At(2, 2)); n != 1 || err != nil {
		t.Errorf("abandoned: %d, %v", n, err)
	}
	_, err = b.Load(b.ctx, b.pool, store.Own, key.At(2, 0), key.At(2, 2))
	b.want(err, store.ErrSpent)
	// A peer that knows more than we have ever seen.
	n, err = b.AdoptMark(b.ctx, b.pool, store.Peer, key.At(9, 9))
	if n != 6 || err != nil || b.info().PeerMark != key.At(9, 9) {
		t.Errorf("peer's mark: %d, %v, %s", n, err, b.info().PeerMark)
	}
	b.restart()
	if p := b.info(); p.Mark != key.At(2, 2) || p.PeerMark != key.At(9, 9) {
		t.Errorf("after a restart: %+v", p)
	}
	if _, err := b.AdoptMark(b.ctx, b.pool, store.Own, ^key.Position(0)); err == nil {
		t.Error("a mark out of range was adopted")
	}
}

func peerGeneration(t *testing.T, b *bench) {
	b.put(key.Active, 6, 1)
	b.must(b.Advance(b.ctx, b.pool, store.Peer, 0, "sync", 5))
	if g := b.info().PeerGeneration; g != 5 {
		t.Errorf("generation %d", g)
	}
	b.want(b.Advance(b.ctx, b.pool, store.Peer, key.At(1, 1), "lease", 4), store.ErrOldGeneration)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 0), "lease", 1))
	b.restart()
	if p := b.info(); p.PeerGeneration != 5 || p.PeerMark != 0 {
		t.Errorf("after a restart: %+v", p)
	}
}

func destroy(t *testing.T, b *bench) {
	b.put(key.Active, 6, 1, 2)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 2), "lease", b.Generation()))
	for _, s := range []key.State{key.Received, key.Active, key.Leased, key.Supplied, key.Stranded, 0} {
		if b.Destroy(b.ctx, b.pool, 1, s, "") == nil {
			t.Errorf("a block ended as %s", s)
		}
	}
	b.must(b.Destroy(b.ctx, b.pool, 1, key.Compromised, "tags differ"))
	b.want(b.Destroy(b.ctx, b.pool, 1, key.Destroyed, "again"), store.ErrNoBlock)
	if got := b.load(store.Own, 0, key.At(1, 2)); len(got) != 0 {
		t.Errorf("keys of a destroyed block: %v", got)
	}
	b.levels(0, 6, 3)
	ev := b.history(store.HistoryQuery{At: key.At(1, 5), Limit: 1})
	if len(ev) != 1 || ev[0].State != key.Compromised || ev[0].Count != 4 || ev[0].Detail != "tags differ" {
		t.Errorf("history %+v", ev)
	}
	b.restart()
	b.levels(0, 6, 3)
}

func ratchet(t *testing.T, b *bench) {
	b.put(key.Active, 4500, 1) // three parts
	b.put(key.Active, 6, 2)
	b.put(key.Received, 6, 3)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 4200), "lease", b.Generation()))
	b.must(b.Advance(b.ctx, b.pool, store.Peer, key.At(1, 4111), "lease", 1))
	own := b.load(store.Own, 0, key.At(1, 4100))
	b.load(store.Peer, 0, key.At(1, 4111))
	for i := range 3 {
		b.must(b.Ratchet(b.ctx))
		st, err := b.Stats(b.ctx)
		b.must(err)
		if st.Epoch != uint64(i+2) || st.SinceRatchet != 0 || st.Damaged != 0 {
			t.Errorf("stats %+v", st)
		}
	}
	// The rest of a lease under way survives.
	if rest := b.load(store.Own, key.At(1, 4100), key.At(1, 4200)); len(own)+len(rest) != 2101 {
		t.Errorf("%d and %d keys around a ratchet", len(own), len(rest))
	}
	b.restart()
	b.must(b.Ratchet(b.ctx))
	b.must(b.Activate(b.ctx, b.pool, 3))
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(3, 4), "lease", b.Generation()))
	b.must(b.Advance(b.ctx, b.pool, store.Peer, key.At(3, 5), "lease", 1))
	if got := b.load(store.Own, key.At(1, 4200), key.At(3, 4)); len(got) != 149+3+3 {
		t.Errorf("%d own keys after ratchets", len(got))
	}
	if got := b.load(store.Peer, key.At(1, 4111), key.At(3, 5)); len(got) != 194+3+3 {
		t.Errorf("%d peer keys after ratchets", len(got))
	}
	b.must(b.Ratchet(b.ctx))
	if list, err := b.Blocks(b.ctx, b.pool); len(list) != 0 || err != nil {
		t.Errorf("blocks left: %+v, %v", list, err)
	}
}

func (b *bench) history(q store.HistoryQuery) []store.Event {
	b.t.Helper()
	list, err := b.History(b.ctx, q)
	b.must(err)
	return list
}

func history(t *testing.T, b *bench) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	b.put(key.Active, 4, 1)
	batch := []store.Event{
		{Time: at, Pool: b.pool, Side: store.Own, First: key.At(1, 0), Last: key.At(1, 0), ID: ID(b.pool, 1, 0), State: key.Supplied, Count: 1, Detail: strings.Repeat("ä", 600)},
		{Pool: b.pool, Side: store.Peer, First: key.At(1, 1), Last: key.At(1, 3), State: key.Stranded, Count: 2, Detail: "burn"},
	}
	b.must(b.Record(b.ctx, batch))
	b.must(b.Record(b.ctx, nil))
	b.restart()
	got := b.history(store.HistoryQuery{ID: ID(b.pool, 1, 0)})
	if len(got) != 1 || !got[0].Time.Equal(at) || got[0].Detail != strings.Repeat("ä", 256) || got[0].State != key.Supplied || got[0].First != key.At(1, 0) {
		t.Errorf("by id: %+v", got)
	}
	if got = b.history(store.HistoryQuery{Pool: b.pool, At: key.At(1, 2)}); len(got) != 3 || got[0].State != key.Stranded || got[2].State != key.Received {
		t.Errorf("by position: %+v", got)
	}
	if got = b.history(store.HistoryQuery{Limit: 2}); len(got) != 2 {
		t.Fatalf("limit: %+v", got)
	}
	if next := b.history(store.HistoryQuery{Before: got[1].Serial}); len(next) != 2 || next[0].State != key.Active {
		t.Errorf("next page: %+v", next)
	}
	if got = b.history(store.HistoryQuery{Pool: uuid.UUID{9}}); len(got) != 0 {
		t.Errorf("another pool's: %+v", got)
	}
	if _, err := b.History(b.ctx, store.HistoryQuery{Limit: -1}); err == nil {
		t.Error("a negative limit was taken")
	}
}

func events(t *testing.T, b *bench) {
	b.must(b.AppendEvent(b.ctx, store.LogEvent{Severity: store.SeverityAlarm, Code: "a", Source: "kma", Text: "x", Action: "y"}))
	b.must(b.AppendEvent(b.ctx, store.LogEvent{Severity: store.SeverityRun, Code: "b"}))
	if b.AppendEvent(b.ctx, store.LogEvent{Severity: "loud"}) == nil {
		t.Error("an unknown severity was taken")
	}
	b.restart()
	for _, tc := range []struct {
		q    store.EventQuery
		want string
	}{
		{store.EventQuery{}, "ba"},
		{store.EventQuery{Limit: 1}, "b"},
		{store.EventQuery{Code: "a"}, "a"},
		{store.EventQuery{Severity: store.SeverityRun}, "b"},
		{store.EventQuery{Severity: store.SeverityFault}, ""},
	} {
		list, err := b.Events(b.ctx, tc.q)
		b.must(err)
		got := ""
		for _, e := range list {
			got += e.Code
		}
		if got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.q, got, tc.want)
		}
	}
	list, err := b.Events(b.ctx, store.EventQuery{Code: "a"})
	b.must(err)
	if e := list[0]; e.Source != "kma" || e.Text != "x" || e.Action != "y" || e.Time.IsZero() {
		t.Errorf("event %+v", e)
	}
	if next, err := b.Events(b.ctx, store.EventQuery{Before: list[0].Serial}); err != nil || len(next) != 0 {
		t.Errorf("before the first: %+v, %v", next, err)
	}
}

func find(t *testing.T, b *bench) {
	b.put(key.Active, 2100, 1)
	b.put(key.Received, 4, 2)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 0), "lease", 1))
	for _, tc := range []struct {
		seq   uint64
		index int
		side  store.Side
		state key.State
	}{{1, 0, store.Own, key.Leased}, {1, 1, store.Peer, key.Active}, {1, 2099, store.Peer, key.Active}, {2, 2, store.Own, key.Received}} {
		got, err := b.Find(b.ctx, ID(b.pool, tc.seq, tc.index))
		b.must(err)
		if got.Position != key.At(tc.seq, uint32(tc.index)) || got.Side != tc.side || got.State != tc.state || !got.Stored || got.Pool != b.pool {
			t.Errorf("%d/%d: %+v", tc.seq, tc.index, got)
		}
	}
	_, err := b.Find(b.ctx, ID(b.pool, 3, 0))
	b.want(err, store.ErrNotFound)
	_, err = b.Find(b.ctx, key.ID{})
	b.want(err, store.ErrNotFound)
	b.must(b.Destroy(b.ctx, b.pool, 2, key.Destroyed, ""))
	b.must(b.Record(b.ctx, []store.Event{{Pool: b.pool, Side: store.Own, First: key.At(2, 2), Last: key.At(2, 2), ID: ID(b.pool, 2, 2), State: key.Supplied, Count: 1}}))
	if got, err := b.Find(b.ctx, ID(b.pool, 2, 2)); err != nil || got.Stored || got.State != key.Supplied || got.Position != key.At(2, 2) {
		t.Errorf("from the history: %+v, %v", got, err)
	}
}

func expire(t *testing.T, b *bench) {
	b.put(key.Active, 10, 1)
	b.want(func() error { _, err := b.Expire(b.ctx, b.pool, store.Own, key.At(2, 0), 1); return err }(), store.ErrAhead)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 2), "lease", 1))
	for i, want := range []int{4, 0} { // 0, 2, 4 and 6, of which none was read; then the repeat
		if n, err := b.Expire(b.ctx, b.pool, store.Own, key.At(1, 6), 1); err != nil || n != want {
			t.Errorf("call %d: %d keys expired, %v; want %d", i, n, err, want)
		}
	}
	b.want(func() error { _, err := b.Expire(b.ctx, b.pool, store.Own, key.At(1, 4), 1); return err }(), store.ErrBackwards)
	if n, err := b.Expire(b.ctx, b.pool, store.Peer, key.At(1, 3), 7); err != nil || n != 2 || b.info().PeerGeneration != 7 {
		t.Errorf("the peer's: %d, %v, %+v", n, err, b.info())
	}
	b.want(func() error { _, err := b.Expire(b.ctx, b.pool, store.Peer, key.At(1, 5), 6); return err }(), store.ErrOldGeneration)
	_, err := b.Load(b.ctx, b.pool, store.Own, 0, key.At(1, 6))
	b.want(err, store.ErrSpent)
	b.levels(0, 4, 1)
	rows, err := b.History(b.ctx, store.HistoryQuery{Pool: b.pool, Limit: 2})
	b.must(err)
	for i, want := range []store.Event{{Side: store.Peer, Count: 2}, {Side: store.Own, Count: 4}} {
		if r := rows[i]; r.State != key.Expired || r.Side != want.Side || r.Count != want.Count {
			t.Errorf("history: %+v", r)
		}
	}
	b.restart()
	b.levels(0, 4, 1)
}

func generation(t *testing.T, b *bench) {
	id := b.UUID()
	for range 3 {
		g := b.Generation()
		b.restart()
		if b.Generation() <= g || b.UUID() != id {
			t.Errorf("generation %d after %d, store %s after %s", b.Generation(), g, b.UUID(), id)
		}
	}
	g := b.Generation()
	for above, want := range map[uint64]uint64{0: g, g - 1: g} {
		got, err := b.RaiseGeneration(b.ctx, above)
		b.must(err)
		if got != want || b.Generation() != want {
			t.Errorf("raised above %d: %d, %d, want %d", above, got, b.Generation(), want)
		}
	}
	got, err := b.RaiseGeneration(b.ctx, g+10)
	b.must(err)
	if got != g+11 || b.Generation() != got {
		t.Errorf("raised above %d: %d, %d", g+10, got, b.Generation())
	}
	b.must(b.Ratchet(b.ctx))
	b.restart()
	if b.Generation() <= got {
		t.Errorf("generation %d after one that was raised to %d", b.Generation(), got)
	}
	if _, err := b.RaiseGeneration(b.ctx, 1<<63); err == nil {
		t.Error("a generation that no database can hold was taken")
	}
}

func closed(t *testing.T, b *bench) {
	b.must(b.Close())
	b.must(b.Close())
	b.want(b.PutBlock(b.ctx, NewBlock(t, b.pool, 1, 2)), store.ErrClosed)
	b.want(b.Ratchet(b.ctx), store.ErrClosed)
	_, err := b.Load(b.ctx, b.pool, store.Own, 0, 1)
	b.want(err, store.ErrClosed)
}

// A cancelled call changes nothing or all, and the store goes on.
func cancelled(t *testing.T, b *bench) {
	ctx, cancel := context.WithCancel(b.ctx)
	cancel()
	b.want(b.PutBlock(ctx, NewBlock(t, b.pool, 1, 2)), context.Canceled)
	b.want(b.Ratchet(ctx), context.Canceled)
	b.put(key.Active, 4, 1)
	b.levels(0, 4, 2)
	b.want(b.Advance(ctx, b.pool, store.Own, key.At(1, 2), "lease", 1), context.Canceled)
	b.must(b.Advance(b.ctx, b.pool, store.Own, key.At(1, 2), "lease", 1))
	_, err := b.Load(ctx, b.pool, store.Own, 0, key.At(1, 2))
	b.want(err, context.Canceled)
	if got := b.load(store.Own, 0, key.At(1, 2)); len(got) != 2 {
		t.Errorf("loaded %v after a cancelled try", got)
	}
}

// Intake, leases of both sides, ratchets and questions at once: every key comes
// out once.
func concurrency(t *testing.T, b *bench) {
	const perBlock, blocks = 300, 12
	c := &collector{seen: map[key.Position]int{}}
	var work, noise sync.WaitGroup
	work.Go(func() {
		for seq := uint64(1); seq <= blocks; seq++ {
			if err := errors.Join(b.PutBlock(b.ctx, NewBlock(t, b.pool, seq, perBlock)), b.Activate(b.ctx, b.pool, seq)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	work.Go(func() {
		last := key.At(blocks, perBlock-2)
		c.lease(b, store.Own, last, func() (key.Position, bool) {
			mark, n, err := b.NextLease(b.ctx, b.pool, 64)
			return mark, err == nil && n > 0
		})
	})
	work.Go(func() { // the peer leases half a block at a time
		next := key.At(1, perBlock/2)
		c.lease(b, store.Peer, key.At(blocks, perBlock-1), func() (mark key.Position, ok bool) {
			list, err := b.Blocks(b.ctx, b.pool)
			if mark = next; err != nil || !active(list, mark.Seq()) {
				return 0, false
			}
			if next = key.At(mark.Seq(), perBlock-1); mark == next {
				next = key.At(mark.Seq()+1, perBlock/2)
			}
			return mark, true
		})
	})
	stop := make(chan struct{})
	noise.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			_, err := b.Find(b.ctx, ID(b.pool, 1, 1))
			if errors.Is(err, store.ErrNotFound) {
				err = nil
			}
			if err := errors.Join(b.Ratchet(b.ctx), b.Record(b.ctx, []store.Event{{Pool: b.pool, State: key.Supplied}}), err); err != nil {
				t.Error(err)
				return
			}
		}
	})
	work.Wait()
	close(stop)
	noise.Wait()
	if len(c.seen) != perBlock*blocks {
		t.Errorf("%d keys came out, %d went in", len(c.seen), perBlock*blocks)
	}
	for pos, n := range c.seen {
		if n != 1 {
			t.Errorf("key %s came out %d times", pos, n)
		}
	}
}

// collector counts how often each key came out.
type collector struct {
	mu   sync.Mutex
	seen map[key.Position]int
}

// lease takes side's keys up to last, asking next for marks.
func (c *collector) lease(b *bench, side store.Side, last key.Position, next func() (key.Position, bool)) {
	for from := key.Position(0); from < last; {
		mark, ok := next()
		if !ok {
			if b.ctx.Err() != nil {
				b.t.Error(b.ctx.Err())
				return
			}
			time.Sleep(time.Millisecond) // until intake has stored more
			continue
		}
		if err := b.Advance(b.ctx, b.pool, side, mark, "lease", 1); err != nil {
			b.t.Error(err)
			return
		}
		keys, err := b.Load(b.ctx, b.pool, side, from, mark)
		if err != nil {
			b.t.Error(err)
			return
		}
		c.mu.Lock()
		for _, k := range keys {
			c.seen[k.Position]++
			b.check(k)
		}
		c.mu.Unlock()
		from = mark
	}
}

func active(list []store.BlockInfo, seq uint64) bool {
	for _, i := range list {
		if i.Seq == seq {
			return i.State == key.Active
		}
	}
	return false
}
