package kma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

func rawUse(batch byte, p key.RawPurpose) key.RawUse {
	return key.RawUse{Purpose: p, Batch: uuid.UUID{15: batch}, Attempt: 1, Hop: 1, Direction: key.Forward}
}

// takeRaw asks until there are keys.
func (w *world) takeRaw(n *node, wants ...RawWant) (got []RawKeys) {
	w.t.Helper()
	w.want("raw keys", func() (ok bool) {
		var err error
		got, err = n.cur.Load().agent.TakeRaw(w.t.Context(), w.other(n).name, wants...)
		if err != nil && !errors.Is(err, ErrEmpty) && !errors.Is(err, ErrNotSynced) {
			w.t.Fatal(err)
		}
		return err == nil
	})
	return got
}

func bindings(keys []RawKeys) (list []key.Binding) {
	for _, k := range keys {
		list = append(list, k.Binding)
	}
	return list
}

func wipeRaw(keys []RawKeys) {
	for _, k := range keys {
		k.Material.Wipe()
	}
}

// TestRawKeys: what one side takes for a use the other one can debit for it,
// once, and gets the same bytes; nothing of it can be supplied.
func TestRawKeys(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 90, nil)
	w.feed(2, 90, nil)
	w.want("agreement", w.agreed)
	got := w.takeRaw(w.a, RawWant{rawUse(1, key.Pad), 50}, RawWant{rawUse(1, key.MAC), 3}) // over both blocks
	n := 0
	for _, k := range got {
		data := w.truth[k.First.Seq()]
		for i := range k.Count() {
			at := (int(k.First.Index()) + 2*i) * key.MasterSize
			if !bytes.Equal(k.Material.Bytes()[i*key.MasterSize:(i+1)*key.MasterSize], data[at:at+key.MasterSize]) {
				t.Errorf("key %d of %s has other bytes than the QKD link made", i, k.Range)
			}
		}
		n += k.Count()
	}
	if n != 53 || len(got) < 3 || got[len(got)-1].Purpose != key.MAC || got[len(got)-1].Count() != 3 {
		t.Errorf("%d keys in %d parts", n, len(got))
	}
	b, list := w.b.cur.Load(), bindings(got)
	debit := func(peer string, list ...key.Binding) ([]RawKeys, error) {
		return b.agent.DebitRaw(t.Context(), peer, pairID, list...)
	}
	if _, err := debit("c", list...); !errors.Is(err, ErrGone) {
		t.Errorf("debited by another node: %v", err)
	}
	if _, err := debit("a", append(list[:1:1], list[0])...); !errors.Is(err, ErrGone) {
		t.Errorf("one range twice in a message: %v", err)
	}
	beyond := list[0]
	beyond.First, beyond.Last = key.At(2, 88), key.At(2, 88)
	if _, err := debit("a", list[0], beyond); !errors.Is(err, ErrGone) {
		t.Errorf("with a key that was not leased: %v", err)
	}
	mine, err := debit("a", list...) // the failures before have cost nothing
	if err != nil {
		t.Fatal(err)
	}
	for i := range mine {
		if mine[i].Binding != got[i].Binding || !mine[i].Material.Equal(got[i].Material) {
			t.Errorf("%s differs at the two nodes", got[i].Range)
		}
	}
	wipeRaw(append(got, mine...))
	if _, err := debit("a", list...); !errors.Is(err, ErrGone) {
		t.Errorf("debited twice: %v", err)
	}
	for _, k := range got {
		for pos := k.First; pos <= k.Last; pos += 2 {
			id := key.DeriveID(w.truth[pos.Seq()][90*key.MasterSize+64:], pairID, pos.Seq(), pos.Index())
			if _, _, err := b.agent.Claim("a", pairID, pos, id); !errors.Is(err, ErrGone) {
				t.Errorf("a raw key was claimed: %v", err)
			}
		}
	}
	for _, n := range []*node{w.a, w.b} {
		bound, err := n.cur.Load().inv.Bindings(t.Context(), pairID)
		if err != nil || len(bound) != len(list) {
			t.Errorf("%s has %d ranges bound, want %d, %v", n.name, len(bound), len(list), err)
		}
	}
	a := w.a.cur.Load().agent
	if err := a.SettleRaw(t.Context(), pairID, Own, rawUse(1, key.Pad), key.RawUsed, ""); err != nil {
		t.Error(err)
	}
	l.drain(w.a) // what is left is supplied: key by key it is not what was taken
	if _, err := a.TakeRaw(t.Context(), "c", RawWant{rawUse(2, key.Pad), 1}); !errors.Is(err, ErrNoPool) {
		t.Errorf("with nobody: %v", err)
	}
	for _, n := range []int{0, -1, maxRaw + 1} {
		if _, err := a.TakeRaw(t.Context(), "b", RawWant{rawUse(2, key.Pad), n}); err == nil || errors.Is(err, ErrEmpty) {
			t.Errorf("%d keys: %v", n, err)
		}
	}
}

// Keys that were agreed on with a hash never become pads, and asking for some
// costs none.
func TestRawNeedsFitKeys(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Pools[0].Algorithm = SHA256 })
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 90, nil)
	w.want("agreement", w.agreed)
	if _, err := w.a.cur.Load().agent.TakeRaw(t.Context(), "b", RawWant{rawUse(1, key.Pad), 1}); !errors.Is(err, ErrNoPool) {
		t.Errorf("error %v", err)
	}
	left := 0
	w.want("all 45 keys for supply", func() bool { left += l.drain(w.a); return left == 45 })
}

// A node that asks for no raw keys leases none: a peer of an older release would
// not know them.
func TestNoRawLeaseUnasked(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	var mu sync.Mutex
	purposes := map[string]int{}
	w.a.tune = func(o *Options) { o.Peers["b"] = leaseSpy{o.Peers["b"], &mu, purposes} }
	w.both(l.keep)
	w.feed(1, 200, nil)
	w.want("agreement", w.agreed)
	l.drain(w.a)
	mu.Lock()
	defer mu.Unlock()
	if purposes[type1.PurposeSupply] == 0 || purposes[type1.PurposeRaw] != 0 {
		t.Errorf("leases %v", purposes)
	}
}

type leaseSpy struct {
	Peer
	mu       *sync.Mutex
	purposes map[string]int
}

func (p leaseSpy) Lease(ctx context.Context, r type1.LeaseRequest) (type1.LeaseResponse, error) {
	p.mu.Lock()
	p.purposes[r.Purpose]++
	p.mu.Unlock()
	return p.Peer.Lease(ctx, r)
}

// rawBook is every key that was used raw, on either side.
type rawBook struct {
	w     *world
	l     *ledger
	mu    sync.Mutex
	taken map[key.Position]key.RawUse
	debit map[key.Position]key.RawUse
	whys  map[string]int // of refusals
}

func (b *rawBook) note(book map[key.Position]key.RawUse, keys []RawKeys) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, k := range keys {
		for i, pos := 0, k.First; pos <= k.Last; i, pos = i+1, pos+2 {
			if u, twice := book[pos]; twice {
				b.w.t.Errorf("key %s was used raw twice: %s, %s", pos, u, k.RawUse)
			}
			book[pos] = k.RawUse
			data, at := b.w.truth[pos.Seq()], int(pos.Index())*key.MasterSize
			if !bytes.Equal(k.Material.Bytes()[i*key.MasterSize:(i+1)*key.MasterSize], data[at:at+key.MasterSize]) {
				b.w.t.Errorf("key %s has other bytes than the QKD link made", pos)
			}
		}
	}
}

func (b *rawBook) debits() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.debit)
}

// relay plays a relay at n: it takes pads, and the other side debits them, at
// once, twice, or never.
func (b *rawBook) relay(ctx context.Context, n *node, r *rand.Rand, batch *int) {
	for ctx.Err() == nil {
		time.Sleep(time.Duration(r.IntN(4000)) * time.Microsecond)
		from, to := n.cur.Load(), b.w.other(n).cur.Load()
		if from == nil || to == nil {
			continue
		}
		b.mu.Lock()
		*batch++
		u := rawUse(byte(*batch), key.Pad)
		u.Attempt = uint32(*batch)
		b.mu.Unlock()
		mac := u
		mac.Purpose = key.MAC
		got, err := from.agent.TakeRaw(ctx, b.w.other(n).name, RawWant{u, 1 + r.IntN(5)}, RawWant{mac, 1})
		if err != nil {
			b.mu.Lock()
			b.whys[err.Error()]++
			b.mu.Unlock()
			continue
		}
		b.note(b.taken, got)
		list := bindings(got)
		wipeRaw(got)
		for range r.IntN(3) {
			mine, err := to.agent.DebitRaw(ctx, n.name, pairID, list...)
			if err == nil {
				b.note(b.debit, mine)
				wipeRaw(mine)
			}
		}
		end := key.RawEnd(1 + r.IntN(2))
		_ = from.agent.SettleRaw(ctx, pairID, Own, u, end, "test") // the process may be gone
	}
}

// TestRawMisfortune: whatever is lost on the line and whenever either side is
// killed, no key is used raw twice, nor raw and by supply, on either side or by
// both, and in the end both sides agree.
func TestRawMisfortune(t *testing.T) {
	seed := uint64(envInt(t, "SEED", int(time.Now().UnixNano())))
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	w := newWorld(t, func(o *Options) { o.RatchetKeys = 100 })
	l := newLedger(w)
	w.both(l.keep)
	const seqs = 25
	for s := uint64(1); s <= seqs; s++ {
		w.feed(s, 200+r.IntN(100), nil)
	}
	w.line.set(seed, 0.1)
	book := &rawBook{w: w, l: l, taken: map[key.Position]key.RawUse{}, debit: map[key.Position]key.RawUse{}, whys: map[string]int{}}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	batch := 0
	for i, n := range []*node{w.a, w.b} {
		mine, other := rand.New(rand.NewPCG(seed, uint64(200+i))), rand.New(rand.NewPCG(seed, uint64(300+i)))
		wg.Go(func() { consume(ctx, w, l, n, mine, 2000) })
		wg.Go(func() { book.relay(ctx, n, other, &batch) })
	}
	// A kill comes after keys were debited once more, or at any moment: before the
	// nodes have met, perhaps.
	progress := func() {
		before := book.debits()
		w.want("raw keys, by relays beside SAEs", func() bool { return book.debits() > before })
	}
	for i := range 7 {
		if i%3 > 0 {
			progress()
		}
		time.Sleep(time.Duration(r.IntN(200)) * time.Millisecond)
		n := []*node{w.a, w.b}[r.IntN(2)]
		w.kill(n)
		w.start(n, l.keep)
	}
	progress()
	cancel()
	wg.Wait()
	w.line.set(seed, 0)
	w.line.wg.Wait()
	w.feed(seqs+1, 40, nil)
	w.want("agreement", func() bool {
		return w.info(w.a).NewestSeq == seqs+1 && w.info(w.b).NewestSeq == seqs+1 && w.agreed()
	})
	for _, n := range []*node{w.a, w.b} { // and it goes on
		for range 50 {
			w.want("a key", func() bool {
				k, err := l.take(t.Context(), n)
				if err == nil {
					k.Material.Wipe()
				}
				return err == nil
			})
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, e := range l.m {
		if u, ok := book.taken[e.pos]; ok {
			t.Errorf("key %s (%s) was supplied and used as %s", e.pos, id, u)
		}
		if u, ok := book.debit[e.pos]; ok {
			t.Errorf("key %s (%s) was supplied and debited as %s", e.pos, id, u)
		}
	}
	for pos, u := range book.debit {
		if book.taken[pos] != u {
			t.Errorf("key %s was debited as %s, taken as %s", pos, u, book.taken[pos])
		}
	}
	what := fmt.Sprintf("%d keys supplied, %d taken raw, %d debited", len(l.m), len(book.taken), len(book.debit))
	t.Log(what, book.whys)
	if len(l.m) == 0 || len(book.taken) == 0 || len(book.debit) == 0 {
		t.Error("the run shows nothing: " + what)
	}
}

// TestRepeatNamesItsPurpose: a lease whose acknowledgement was lost is answered
// again, whatever its purpose; the same range for another purpose is a conflict.
func TestRepeatNamesItsPurpose(t *testing.T) {
	for _, purpose := range []string{type1.PurposeSupply, type1.PurposeTransfer, type1.PurposeRaw, type1.PurposeExpired} {
		t.Run(purpose, func(t *testing.T) {
			w := newWorld(t, nil)
			l := newLedger(w)
			w.both(l.keep)
			w.feed(1, 200, nil)
			w.want("agreement", w.agreed)
			w.want("a lease", func() bool { return w.info(w.b).PeerMark > 0 })
			w.want("agreement", w.agreed)
			a, b := w.a.cur.Load(), w.b.cur.Load()
			p := a.agent.pools[pairID]
			p.mu.Lock()
			link := p.link()
			p.mu.Unlock()
			mark := w.info(w.b).PeerMark
			r := type1.LeaseRequest{
				Pool: pairID, Link: link, Generation: a.inv.Generation(), Purpose: purpose,
				After: type1.Position(mark), Mark: type1.Position(mark + 8), Floor: type1.Position(mark), Seqs: []uint64{1},
			}
			if purpose == type1.PurposeExpired {
				r.Seqs = []uint64{}
			}
			for i := range 2 {
				if _, err := b.agent.Lease(t.Context(), "a", r); err != nil {
					t.Fatalf("call %d: %v", i+1, err)
				}
			}
			for _, other := range []string{type1.PurposeSupply, type1.PurposeTransfer, type1.PurposeRaw} {
				q := r
				if q.Purpose, q.Seqs = other, []uint64{1}; other == purpose {
					continue
				}
				if _, err := b.agent.Lease(t.Context(), "a", q); type1.CodeOf(err) != type1.Conflict {
					t.Errorf("again as %s: %v", other, err)
				}
			}
		})
	}
}
