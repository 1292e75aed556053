package kma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// TestLopsidedLoad: with all load at one node, that node can use nearly all keys
// of the pool, and each of them is at the other one.
func TestLopsidedLoad(t *testing.T) {
	for _, who := range []string{"a", "b"} {
		t.Run(who, func(t *testing.T) {
			w := newWorld(t, nil)
			l := newLedger(w)
			w.both(l.keep)
			busy, idle := w.a, w.b
			if who == "b" {
				busy, idle = w.b, w.a
			}
			const files, keys = 10, 60
			for seq := uint64(1); seq <= files; seq++ {
				w.feed(seq, keys, nil)
			}
			w.want("agreement", func() bool { return w.info(busy).NewestSeq == files && w.agreed() })
			taken, given := 0, 0
			w.want("nine tenths of the keys at one node", func() bool {
				for {
					k, err := l.take(t.Context(), busy)
					if err != nil {
						return taken > files*keys*9/10
					}
					if !l.claim(idle, k) {
						t.Errorf("key %s is not at the other side", k.Position)
					}
					k.Material.Wipe()
					taken++
					if idle.role.Owns(k.Position) {
						given++
					}
				}
			})
			t.Logf("%d keys of %d, %d of them given", taken, files*keys, given)
			k, err := l.take(t.Context(), idle)
			if err != nil {
				t.Fatalf("the node that gave has kept nothing for itself: %v", err)
			}
			if !l.claim(busy, k) {
				t.Errorf("key %s is not at the other side", k.Position)
			}
			k.Material.Wipe()
			if n := len(busy.events.codes) + len(idle.events.codes); n > 0 {
				t.Errorf("events: %v, %v", busy.events.codes, idle.events.codes)
			}
		})
	}
}

// TestEvenLoad: two nodes that use their keys equally fast and run dry do not give
// away what they need themselves.
func TestEvenLoad(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	const files, keys = 10, 60
	for seq := uint64(1); seq <= files; seq++ {
		w.feed(seq, keys, nil)
	}
	w.want("agreement", func() bool { return w.info(w.b).NewestSeq == files && w.agreed() })
	taken := map[*node]int{}
	w.want("all keys", func() bool {
		for _, n := range []*node{w.a, w.b} {
			if k, err := l.take(t.Context(), n); err == nil {
				taken[n]++
				l.claim(w.other(n), k)
				k.Material.Wipe()
			}
		}
		return taken[w.a]+taken[w.b] == files*keys
	})
	if taken[w.a] < files*keys*2/5 || taken[w.b] < files*keys*2/5 {
		t.Errorf("of %d keys, a took %d and b %d", files*keys, taken[w.a], taken[w.b])
	}
}

func TestWhatIsGiven(t *testing.T) {
	s := newSlaveWith(t, nil, func(o *Options) { o.LeaseSize, o.MaxHeld = 100, 1000 })
	p := s.ag.pools[pairID]
	ask := func(keys, left, used int) int {
		t.Helper()
		r, err := s.ag.Want(t.Context(), "a", type1.WantRequest{Pool: pairID, Link: s.link(), Keys: keys, Left: left, Used: used})
		if err != nil {
			t.Fatal(err)
		}
		return r.Giving
	}
	for _, tt := range []struct {
		name                string
		active, own         int // here
		reserve, used, held int
		keys, left, theirs  int // of the peer
		want                int
	}{
		{"what is asked for", 500, 100, 0, 0, 0, 100, 0, 900, 100},
		{"all that is on disk", 50, 100, 0, 0, 0, 100, 0, 900, 50},
		{"nothing is left", 0, 100, 0, 0, 0, 100, 0, 900, 0},
		{"the reserve stays", 500, 100, 550, 0, 0, 100, 0, 900, 50},
		{"no more than the reserve is there", 500, 100, 600, 0, 0, 100, 0, 900, 0},
		{"what was used lately stays", 500, 100, 0, 580, 0, 100, 0, 90000, 20},
		{"both use as much", 300, 100, 0, 50, 0, 1000, 0, 50, 200},
		{"and the peer has as much", 300, 100, 0, 50, 0, 1000, 400, 50, 0},
		{"the peer uses three times as much", 300, 100, 0, 50, 0, 1000, 0, 150, 300},
		{"our own lease comes first", 500, 50, 0, 0, 0, 100, 0, 900, 0},
		{"a message is bounded", 5000, 100, 0, 0, 0, 5000, 0, 900, 800},
		{"so is what is held", 5000, 100, 0, 0, 970, 5000, 0, 900, 30},
	} {
		p.mu.Lock()
		p.active, p.own, p.usage = tt.active, make([]LeasedKey, tt.own), usage{now: tt.used, since: time.Now()}
		p.a.o.Reserve, p.size = tt.reserve, 100
		clear(p.held)
		for i := range tt.held {
			p.held[key.At(9, uint32(i))] = LeasedKey{}
		}
		p.mu.Unlock()
		if got := ask(tt.keys, tt.left, tt.theirs); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
	p.mu.Lock()
	p.own, p.active, p.giving = nil, 0, 0
	clear(p.held)
	p.mu.Unlock()
	if _, err := s.ag.Want(t.Context(), "a", type1.WantRequest{Pool: pairID, Link: type1.Link{From: uuid.New(), To: s.it}, Keys: 1}); code(err) != type1.NotSynced {
		t.Errorf("a stranger: %v", err)
	}
}

func TestUsage(t *testing.T) {
	at := time.Now()
	u := usage{}
	u.turn(at)
	u.now = 5
	for _, tt := range []struct {
		after time.Duration
		want  int
	}{{usageSpan / 2, 5}, {usageSpan, 5}, {usageSpan * 3 / 2, 5}, {2 * usageSpan, 0}, {50 * usageSpan, 0}} {
		if u.turn(at.Add(tt.after)); u.lately() != tt.want {
			t.Errorf("after %v: %d, want %d", tt.after, u.lately(), tt.want)
		}
	}
	u.now = 3
	if u.turn(at.Add(52 * usageSpan)); u.lately() != 0 {
		t.Errorf("much later: %d", u.lately())
	}
}

// give sends the slave a transfer of the master's keys.
func (s *slave) give(t *testing.T, after, mark key.Position, seqs ...uint64) (type1.LeaseResponse, error) {
	t.Helper()
	return s.leaseFor(t, type1.PurposeTransfer, after, mark, seqs...)
}

// takeAll takes what there is, without waiting, and gives it by index.
func (s *slave) takeAll(t *testing.T) map[uint32]Key {
	t.Helper()
	got := map[uint32]Key{}
	for {
		k, err := s.ag.pools[pairID].take()
		if err != nil {
			return got
		}
		t.Cleanup(k.Material.Wipe)
		got[k.Position.Index()] = k
	}
}

// TestTransferTaken: given keys are the taker's to hand out, once, and nobody can
// claim them there.
func TestTransferTaken(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 20)
	at := func(i uint32) key.Position { return key.At(1, i) }
	if _, err := s.give(t, 0, at(6), 1); code(err) != type1.NotValidated {
		t.Errorf("a block not validated: %v", err)
	}
	s.verdicts(t, one)
	for range 2 { // the repeat changes nothing
		if r, err := s.give(t, 0, at(6), 1); err != nil || r.Mark != type1.Position(at(6)) || r.Missing != nil {
			t.Fatalf("a transfer: %+v, %v", r, err)
		}
	}
	if i := s.info(s.b); i.PeerMark != at(6) {
		t.Errorf("the peer's mark is not on disk: %+v", i)
	}
	got := s.takeAll(t)
	if len(got) != 4 {
		t.Errorf("%d keys, not 0, 2, 4 and 6", len(got))
	}
	for i, k := range got {
		if i%2 != 0 || k.ID != one.IDs[i] || !bytes.Equal(k.Material.Bytes(), one.Keys.Bytes()[i*32:i*32+32]) {
			t.Errorf("key %d is wrong", i)
		}
		if _, _, err := s.ag.Claim("a", pairID, at(i), one.IDs[i]); !errors.Is(err, ErrGone) {
			t.Errorf("key %d can be claimed where it is handed out: %v", i, err)
		}
	}
	if _, err := s.give(t, 0, at(6), 1); err != nil {
		t.Error(err)
	}
	if got := s.takeAll(t); len(got) > 0 {
		t.Errorf("a repeat gave %d keys again", len(got))
	}
	if _, err := s.give(t, at(4), at(10), 1); code(err) != type1.Conflict {
		t.Errorf("a transfer that reaches back: %v", err)
	}
}

// TestGivenKeysOfAReset: a new session wipes given keys, and those taken from
// before it do not come back.
func TestGivenKeysOfAReset(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 40)
	s.verdicts(t, one)
	if _, err := s.give(t, 0, key.At(1, 10), 1); err != nil {
		t.Fatal(err)
	}
	old, err := s.ag.pools[pairID].take()
	if err != nil {
		t.Fatal(err)
	}
	s.me = uuid.New()
	s.sync(t, s.me, 5, type1.SyncState{NewestSeq: 100, Mark: type1.Position(key.At(1, 10)), Active: []type1.Range{{First: 1, Last: 1}}})
	if _, err := s.give(t, key.At(1, 10), key.At(1, 14), 1); err != nil {
		t.Fatal(err)
	}
	s.ag.PutBack(old)
	if old.Material.Len() != 0 {
		t.Error("a given key of the session before was put back")
	}
	fresh, err := s.ag.pools[pairID].take()
	if err != nil || fresh.Position != key.At(1, 12) {
		t.Fatalf("%+v, %v", fresh, err)
	}
	s.ag.PutBack(fresh)
	if got := s.takeAll(t); len(got) != 2 {
		t.Errorf("%d keys after one was put back, want 2", len(got))
	}
}

// TestFloorsByOwner: a given key that waits to be taken lowers the floor that
// WANT tells, not that of our leases; below a floor nothing is put back.
func TestFloorsByOwner(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 40)
	s.verdicts(t, one)
	if _, err := s.give(t, 0, key.At(1, 10), 1); err != nil {
		t.Fatal(err)
	}
	p := s.ag.pools[pairID]
	taken, err := p.take()
	if err != nil {
		t.Fatal(err)
	}
	if f := p.usedUpTo(key.Slave, key.At(1, 9)); f != key.At(1, 9) {
		t.Errorf("given keys lower the floor of ours to %s", f)
	}
	r, err := p.openWant(t.Context())
	if err != nil || r.Floor != type1.Position(key.At(1, 1)) || r.Left != 5+20 {
		t.Errorf("%+v, %v", r, err)
	}
	s.ag.PutBack(taken)
	if taken.Material.Len() != 0 {
		t.Error("a key was put back that the peer was told is used")
	}
	s.takeAll(t)
	if r, err := p.openWant(t.Context()); err != nil || r.Floor != type1.Position(key.At(1, 10)) {
		t.Errorf("%+v, %v", r, err)
	}
}

// giver is node b alone with leased keys of its own in memory; the test plays the
// master, whose answers it gives.
type giver struct {
	*slave
	one Block
	out *recorder
	p   *pool
}

// recorder is a peer that notes the leases and answers as it is told.
type recorder struct {
	Peer
	driven chan struct{} // closed when the agent's own loop is stuck for good
	mu     sync.Mutex
	got    []type1.LeaseRequest
	answer func(type1.LeaseRequest) (type1.LeaseResponse, error)
}

func (r *recorder) Sync(ctx context.Context, _ type1.SyncRequest) (type1.SyncResponse, error) {
	close(r.driven)
	<-ctx.Done()
	return type1.SyncResponse{}, ctx.Err()
}

func (r *recorder) Lease(_ context.Context, q type1.LeaseRequest) (type1.LeaseResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, q)
	return r.answer(q)
}

// newGiver makes one that has 8 keys in its lease and 24 on disk. Nothing drives
// it but the test.
func newGiver(t *testing.T, keep func(uuid.UUID, key.Position) []key.ID) *giver {
	t.Helper()
	g := &giver{out: &recorder{driven: make(chan struct{})}}
	g.slave = newSlaveWith(t, keep, func(o *Options) {
		o.LeaseSize = 8
		o.Peers["a"] = g.out
	})
	g.one = g.file(t, 1, 64)
	g.verdicts(t, g.one)
	g.p = g.ag.pools[pairID]
	<-g.out.driven
	g.synced()
	g.answer(nil)
	if _, _, err := g.p.refill(t.Context()); err != nil {
		t.Fatal(err)
	}
	return g
}

// synced has the giver's own SYNC and BURN answered.
func (g *giver) synced() {
	g.p.mu.Lock()
	defer g.p.mu.Unlock()
	g.p.synced, g.p.burnDue = true, false
}

func (g *giver) answer(err error, missing ...uint64) {
	g.out.mu.Lock()
	defer g.out.mu.Unlock()
	g.out.answer = func(q type1.LeaseRequest) (type1.LeaseResponse, error) {
		return type1.LeaseResponse{Mark: q.Mark, Missing: missing}, err
	}
}

// ask has the peer want n keys.
func (g *giver) ask(t *testing.T, n int) {
	t.Helper()
	r, err := g.ag.Want(t.Context(), "a", type1.WantRequest{Pool: pairID, Link: g.link(), Keys: n, Used: 1000})
	if err != nil || r.Giving != n {
		t.Fatalf("%+v, %v", r, err)
	}
}

func (g *giver) claim(t *testing.T, i uint32) bool {
	t.Helper()
	m, _, err := g.ag.Claim("a", pairID, key.At(1, i), g.one.IDs[i])
	m.Wipe()
	return err == nil
}

// TestGive: what is given is on disk before the peer hears of it, is held and never
// handed out from then on, and is sent until it is acknowledged.
func TestGive(t *testing.T) {
	g := newGiver(t, nil)
	g.ask(t, 4)
	lost := errors.New("lost")
	g.answer(lost)
	for range 3 {
		if _, _, err := g.p.refill(t.Context()); !errors.Is(err, lost) {
			t.Fatal(err)
		}
	}
	first := g.out.got[1]
	if first.Purpose != type1.PurposeTransfer || first.After != type1.Position(key.At(1, 15)) || first.Mark != type1.Position(key.At(1, 23)) || first.Floor != type1.Position(key.At(1, 0)) {
		t.Errorf("%+v", first)
	}
	for _, q := range g.out.got[2:] {
		if fmt.Sprint(q) != fmt.Sprint(first) {
			t.Errorf("a repeat differs: %+v", q)
		}
	}
	if i := g.info(g.b); i.Mark != key.At(1, 23) {
		t.Errorf("the mark is not on disk: %+v", i)
	}
	if !g.claim(t, 17) || g.claim(t, 17) {
		t.Error("a given key cannot be claimed once")
	}
	g.answer(nil)
	if again, _, err := g.p.refill(t.Context()); err != nil || !again || g.p.pending != nil {
		t.Errorf("acknowledged: %v, %v, %v", again, err, g.p.pending)
	}
	for i := range g.takeAll(t) {
		if i > 15 {
			t.Errorf("key %d was given and is handed out", i)
		}
	}
	if !g.claim(t, 23) {
		t.Error("a given key is gone after the acknowledgement")
	}
}

// TestGiveRefused: keys of a transfer that the peer does not take are nobody's any
// more, nor are those of a block that it does not have.
func TestGiveRefused(t *testing.T) {
	g := newGiver(t, nil)
	g.ask(t, 4)
	g.answer(&type1.Problem{Code: type1.NotValidated})
	if _, wait, err := g.p.refill(t.Context()); err != nil || wait == 0 || g.p.pending == nil {
		t.Errorf("not validated: %v, %v", wait, err)
	}
	if !g.claim(t, 17) {
		t.Error("a key that is still to be given was destroyed")
	}
	g.answer(&type1.Problem{Code: type1.Conflict})
	if _, _, err := g.p.refill(t.Context()); err != nil || g.p.pending != nil {
		t.Fatal(err)
	}
	if g.claim(t, 19) {
		t.Error("a key of a transfer in conflict is still held")
	}
	g.ask(t, 4)
	g.answer(nil, 1)
	if _, _, err := g.p.refill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if g.claim(t, 25) || g.events.count("LEASE_MISSING") != 1 || g.info(g.b).Active != 0 {
		t.Errorf("a block that the peer does not have: %+v, %v", g.info(g.b), g.events.codes)
	}
}

// TestGiveOfAFormerSession: if the session changes before the answer, the peer may
// have supplied some of the keys: they stay until its BURN.
func TestGiveOfAFormerSession(t *testing.T) {
	for name, answer := range map[string]error{"acknowledged": nil, "conflict": &type1.Problem{Code: type1.Conflict}} {
		t.Run(name, func(t *testing.T) {
			g := newGiver(t, nil)
			g.ask(t, 4)
			g.out.mu.Lock()
			g.out.answer = func(q type1.LeaseRequest) (type1.LeaseResponse, error) {
				g.me = uuid.New()
				g.sync(t, g.me, 6, type1.SyncState{NewestSeq: 100, PeerMark: q.Mark, Active: []type1.Range{{First: 1, Last: 1}}})
				return type1.LeaseResponse{Mark: q.Mark}, answer
			}
			g.out.mu.Unlock()
			_, _, err := g.p.refill(t.Context())
			if g.p.pending != nil || answer == nil && !errors.Is(err, errChanged) {
				t.Errorf("%v", err)
			}
			if !g.claim(t, 17) {
				t.Error("a key that the peer may have supplied was destroyed before the BURN")
			}
			if _, err := g.ag.Burn(t.Context(), "a", type1.BurnRequest{Pool: pairID, Link: g.link(), Generation: 6}); err != nil {
				t.Fatal(err)
			}
			if g.claim(t, 19) {
				t.Error("a given key outlived the BURN")
			}
		})
	}
}

// TestNoLeaseBeforeBurn: after the peer's process has changed, no lease goes out
// until our BURN was answered: it would be burned at the peer, and handed out here.
func TestNoLeaseBeforeBurn(t *testing.T) {
	g := newGiver(t, nil)
	g.me = uuid.New()
	g.sync(t, g.me, 6, type1.SyncState{NewestSeq: 100, PeerMark: type1.Position(key.At(1, 15)), Active: []type1.Range{{First: 1, Last: 1}}})
	sent := len(g.out.got)
	if _, _, err := g.p.refill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(g.out.got) > sent || g.info(g.b).Mark != key.At(1, 15) {
		t.Errorf("%d leases, mark %s", len(g.out.got)-sent, g.info(g.b).Mark)
	}
	g.synced()
	if _, _, err := g.p.refill(t.Context()); err != nil || len(g.out.got) != sent+1 {
		t.Errorf("%d leases once synchronised, %v", len(g.out.got)-sent, err)
	}
}

// TestBurnByOwner: BURN takes the sender's own keys up to its mark, and of those
// that were given to it the ones from before this session; notices keep both.
func TestBurnByOwner(t *testing.T) {
	var noticed []key.ID
	g := newGiver(t, func(uuid.UUID, key.Position) []key.ID { return noticed })
	give := func() {
		g.ask(t, 3)
		if _, _, err := g.p.refill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	give() // 17, 19, 21
	if _, err := g.lease(t, 0, key.At(1, 30), 1); err != nil {
		t.Fatal(err)
	}
	// In its session, a BURN of the peer's takes nothing that it was given there.
	burn := func(generation uint64, upTo key.Position) {
		t.Helper()
		if _, err := g.ag.Burn(t.Context(), "a", type1.BurnRequest{Pool: pairID, Link: g.link(), Generation: generation, UpTo: type1.Position(upTo)}); err != nil {
			t.Fatal(err)
		}
	}
	burn(5, key.At(1, 24))
	if !g.claim(t, 17) || g.claim(t, 10) || !g.claim(t, 26) {
		t.Error("a BURN in the session went by position only")
	}
	// A new process of the peer's; it is given more before its BURN comes.
	g.me = uuid.New()
	g.sync(t, g.me, 6, type1.SyncState{NewestSeq: 100, Mark: type1.Position(key.At(1, 30)), PeerMark: type1.Position(key.At(1, 21)), Active: []type1.Range{{First: 1, Last: 1}}})
	g.synced()
	if _, _, err := g.p.refill(t.Context()); err != nil { // our lease, 23 to 37
		t.Fatal(err)
	}
	give() // 39, 41, 43
	noticed = []key.ID{g.one.IDs[21], g.one.IDs[28]}
	burn(6, key.At(1, 63))
	for i, want := range map[uint32]bool{19: false, 21: true, 28: true, 30: false, 39: true, 43: true} {
		if g.claim(t, i) != want {
			t.Errorf("key %d after the BURN: held %v, want %v", i, !want, want)
		}
	}
}

// TestSweepOfGivenKeys: given keys that the peer used long ago without a notice go,
// by the floor that WANT told.
func TestSweepOfGivenKeys(t *testing.T) {
	g := newGiver(t, nil)
	g.ask(t, 6) // 17 to 27
	if _, _, err := g.p.refill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := g.ag.Want(t.Context(), "a", type1.WantRequest{Pool: pairID, Link: g.link(), Keys: 1, Floor: type1.Position(key.At(1, 21))}); err != nil {
		t.Fatal(err)
	}
	g.p.sweep(t.Context(), time.Now().Add(g.ag.o.NoticeLife/2))
	if !g.claim(t, 17) {
		t.Error("a key was swept that may still be claimed")
	}
	g.p.sweep(t.Context(), time.Now().Add(2*g.ag.o.NoticeLife))
	if g.claim(t, 19) || g.claim(t, 21) || !g.claim(t, 23) {
		t.Error("the sweep did not take the given keys up to the floor")
	}
}
