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
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// ledger is what the SAEs of both sides saw, and judges it.
type ledger struct {
	w     *world
	mu    sync.Mutex
	m     map[key.ID]*entry
	given int // keys taken by the node that does not own them
}

type entry struct {
	pos            key.Position
	taken, claimed int
	noticed        bool // the other side has a notice
	gone           bool // and asked in vain, or has it
}

func newLedger(w *world) *ledger { return &ledger{w: w, m: map[key.ID]*entry{}} }

// check compares a key with what the QKD link made.
func (l *ledger) check(pos key.Position, m *key.Material) {
	data := l.w.truth[pos.Seq()]
	at := int(pos.Index()) * key.MasterSize
	if at+key.MasterSize > len(data)-keyfile.Trailer || !bytes.Equal(data[at:at+key.MasterSize], m.Bytes()) {
		l.w.t.Errorf("key %s has other bytes than the QKD link made", pos)
	}
}

// take plays GetKey at n.
func (l *ledger) take(ctx context.Context, n *node) (Key, error) {
	p := n.cur.Load()
	if p == nil {
		return Key{}, errDead
	}
	k, err := p.agent.Take(ctx, l.w.other(n).name)
	if err != nil {
		return k, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.check(k.Position, k.Material)
	if !n.role.Owns(k.Position) {
		l.given++
	}
	e := l.m[k.ID]
	if e == nil {
		e = &entry{pos: k.Position}
		l.m[k.ID] = e
	}
	if e.taken++; e.taken > 1 || e.pos != k.Position {
		l.w.t.Errorf("Key-ID %s taken %d times, at %s and %s", k.ID, e.taken, e.pos, k.Position)
	}
	return k, nil
}

func (l *ledger) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.m)
}

// notice plays the arrival of the supply notice at the other side.
func (l *ledger) notice(k Key) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.m[k.ID].noticed = true
}

// keep is KeepOnBurn.
func (l *ledger) keep(_ uuid.UUID, upTo key.Position) []key.ID {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []key.ID
	for id, e := range l.m {
		if e.noticed && !e.gone && e.pos <= upTo {
			out = append(out, id)
		}
	}
	return out
}

// claim plays GetKeyWithID at n and reports whether the key was there.
func (l *ledger) claim(n *node, k Key) bool {
	p := n.cur.Load()
	if p == nil {
		return false
	}
	m, _, err := p.agent.Claim(l.w.other(n).name, pairID, k.Position, k.ID)
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.m[k.ID]
	e.gone = true
	if err != nil {
		if !errors.Is(err, ErrGone) {
			l.w.t.Errorf("Claim: %v", err)
		}
		return false
	}
	defer m.Wipe()
	l.check(k.Position, m)
	if e.claimed++; e.claimed > 1 {
		l.w.t.Errorf("Key-ID %s claimed %d times", k.ID, e.claimed)
	}
	return true
}

// drain takes every key that n can still give; each must be at the other side. It
// counts those that n owns: the other side may give some besides.
func (l *ledger) drain(n *node) (count int) {
	l.w.want("an empty pool", func() bool {
		for {
			k, err := l.take(l.w.t.Context(), n)
			if err != nil {
				p := n.cur.Load().agent.pools[pairID]
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.synced && p.active == 0 && len(p.own) == 0 && !p.leasing
			}
			if n.role.Owns(k.Position) {
				count++
			}
			if !l.claim(l.w.other(n), k) {
				l.w.t.Errorf("key %s is not at the other side", k.Position)
			}
			k.Material.Wipe()
		}
	})
	return count
}

func TestOneKeyEndToEnd(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 64, nil)
	w.feed(2, 7, nil)
	w.want("agreement", w.agreed)
	for i, n := range []*node{w.a, w.b, w.a, w.b} {
		var k Key
		w.want("a key", func() bool {
			var err error
			k, err = l.take(t.Context(), n)
			return err == nil
		})
		if k.Class != key.Direct || k.Pool != pairID {
			t.Errorf("key %d: %+v", i, k)
		}
		peer := w.other(n)
		if _, _, err := peer.cur.Load().agent.Claim("c", pairID, k.Position, k.ID); !errors.Is(err, ErrGone) {
			t.Errorf("claimed for the wrong peer: %v", err)
		}
		if _, _, err := peer.cur.Load().agent.Claim(n.name, pairID, k.Position, key.ID{1}); !errors.Is(err, ErrGone) {
			t.Errorf("claimed under another Key-ID: %v", err)
		}
		if !l.claim(peer, k) {
			t.Errorf("key %s is not at the other side", k.Position)
		}
		if _, _, err := peer.cur.Load().agent.Claim(n.name, pairID, k.Position, k.ID); !errors.Is(err, ErrGone) {
			t.Errorf("claimed twice: %v", err)
		}
		k.Material.Wipe()
	}
	for _, n := range []*node{w.a, w.b} {
		if _, err := n.cur.Load().agent.Take(t.Context(), "c"); !errors.Is(err, ErrNoPool) {
			t.Errorf("key for a stranger: %v", err)
		}
		if len(n.events.codes) > 0 {
			t.Errorf("events at %s on a good day: %v", n.name, n.events.codes)
		}
	}
}

// TestEveryKeyOnce drains the pool: each key is taken once on the owner's side
// and can be claimed on the other.
func TestEveryKeyOnce(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	total := 0
	for seq := uint64(1); seq <= 5; seq++ {
		w.feed(seq*3, int(seq)*11, nil) // gaps are allowed
		total += int(seq) * 11
	}
	w.want("agreement", w.agreed)
	n := 0
	w.want("all keys", func() bool {
		for _, node := range []*node{w.a, w.b} {
			for {
				k, err := l.take(t.Context(), node)
				if err != nil {
					break
				}
				if !l.claim(w.other(node), k) {
					t.Errorf("key %s is not at the other side", k.Position)
				}
				k.Material.Wipe()
				n++
			}
		}
		return n >= total
	})
	if n != total {
		t.Errorf("%d keys of %d", n, total)
	}
	if _, err := l.take(t.Context(), w.a); !errors.Is(err, ErrEmpty) {
		t.Errorf("an empty pool gives %v", err)
	}
	w.want("empty stores", func() bool { return w.info(w.a).Active == 0 && w.info(w.b).Active == 0 && w.agreed() })
}

func TestPutBack(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 100, nil)
	w.want("agreement", w.agreed)
	a := w.a.cur.Load().agent
	var k Key
	w.want("a key", func() (ok bool) {
		var err error
		k, err = a.Take(t.Context(), "b")
		return err == nil
	})
	id := k.ID
	a.PutBack(k)
	k, err := a.Take(t.Context(), "b")
	if err != nil || k.ID != id {
		t.Errorf("the next key is %s, %v, not the one put back", k.ID, err)
	}
	// The peer restarts: what it held is gone, so the key must not come back.
	w.kill(w.b)
	w.start(w.b, l.keep)
	w.want("agreement", w.agreed)
	a.PutBack(k)
	if k.Material.Len() != 0 {
		t.Error("a key of a burned lease was put back")
	}
}

// TestBothAtFullSpeed is the deadlock of two KMEs that serve at once
// (docs/architecture.md): both sides take as fast as they can while files come
// in, and every key is claimed on the other side.
func TestBothAtFullSpeed(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.LeaseSize = 64; o.RatchetKeys = 500 })
	l := newLedger(w)
	w.both(l.keep)
	const files, keys, workers = 30, 200, 4
	for seq := uint64(1); seq <= files; seq++ {
		w.feed(seq, keys, nil)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for _, n := range []*node{w.a, w.b} {
		for range workers {
			wg.Go(func() {
				for ctx.Err() == nil && l.len() < files*keys {
					k, err := l.take(ctx, n)
					if err != nil {
						continue
					}
					if !l.claim(w.other(n), k) {
						t.Errorf("key %s is not at the other side", k.Position)
					}
					k.Material.Wipe()
				}
			})
		}
	}
	wg.Wait()
	if ctx.Err() != nil {
		t.Fatalf("not done in time:\na: %s\nb: %s", w.describe(w.a), w.describe(w.b))
	}
}

func TestMismatchDestroysBoth(t *testing.T) {
	const size = 8*key.MasterSize + keyfile.Trailer
	for name, at := range map[string]int{"key": 5, "Km": size - 96, "Ks": size - 64, "Kid": size - 1} {
		for _, alg := range []string{Poly1305, SHA256, SHA3} {
			t.Run(name+" "+alg, func(t *testing.T) {
				w := newWorld(t, func(o *Options) { o.Pools[0].Algorithm = alg })
				l := newLedger(w)
				w.both(l.keep)
				w.feed(1, 8, func(n *node, data []byte) bool {
					if n == w.b {
						data[at] ^= 1
					}
					return true
				})
				w.feed(2, 8, nil)
				w.want("both seqs", func() bool { return w.agreed() && w.info(w.a).NewestSeq == 2 && w.info(w.b).NewestSeq == 2 })
				w.want("keys of the good seq", func() bool {
					k, err := l.take(t.Context(), w.a)
					if err == nil && k.Position.Seq() != 2 {
						t.Errorf("a key of the bad seq: %s", k.Position)
					}
					return err == nil && l.claim(w.b, k)
				})
				if w.a.events.count("M102_MISMATCH") != 1 || w.b.events.count("M102_MISMATCH") != 1 {
					t.Errorf("events %v and %v", w.a.events.codes, w.b.events.codes)
				}
			})
		}
	}
}

// TestHashKeysNeverPad: keys validated by a hash are marked.
func TestHashKeysNeverPad(t *testing.T) {
	data := make([]byte, 4*key.MasterSize+keyfile.Trailer)
	for alg, want := range map[string]bool{Poly1305: false, SHA256: true, SHA3: true} {
		f := sampleFile(t, key.Master, 1, data)
		b, err := reformat(f, key.Direct, alg)
		if err != nil {
			t.Fatal(err)
		}
		b.Keys.Wipe()
		if b.NoPad != want || (b.Digest != [32]byte{}) != want {
			t.Errorf("%s: NoPad %v", alg, b.NoPad)
		}
	}
}

// TestFileMissingAtOneSide: a seq that the other side skipped can never be
// agreed; later ones are not held up.
func TestFileMissingAtOneSide(t *testing.T) {
	for _, lacks := range []string{"a", "b"} {
		t.Run(lacks, func(t *testing.T) {
			w := newWorld(t, nil)
			l := newLedger(w)
			w.both(l.keep)
			w.feed(1, 4, nil)
			w.feed(2, 4, func(n *node, _ []byte) bool { return n.name != lacks })
			has := w.other(w.a)
			if lacks == "b" {
				has = w.a
			}
			w.want("seq 2 waits", func() bool { return w.info(has).NewestSeq == 2 && w.info(has).Received == 4 })
			w.feed(3, 4, nil)
			w.want("agreement on 1 and 3", func() bool { return w.info(w.a).NewestSeq == 3 && w.info(w.b).NewestSeq == 3 && w.agreed() })
			if has.events.count("M102_NEVER") != 1 {
				t.Errorf("events %v", has.events.codes)
			}
		})
	}
}

func TestAlgorithmsDiffer(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.b.tune = func(o *Options) { o.Pools[0].Algorithm = SHA3 }
	w.both(l.keep)
	w.feed(1, 4, nil)
	w.want("alarms", func() bool {
		return w.a.events.count("M102_ALGORITHM") > 0 && w.b.events.count("M102_ALGORITHM") > 0
	})
	if w.info(w.a).Active+w.info(w.b).Active != 0 {
		t.Error("keys became active")
	}
	if a, b := w.a.events.count("M102_ALGORITHM"), w.b.events.count("M102_ALGORITHM"); a != 1 || b != 1 {
		t.Errorf("%d and %d alarms for one fault", a, b)
	}
}

// TestAlgorithmChanged: blocks taken in under another algorithm than the two
// ends have now cannot be agreed, and do not stand in the way of later ones.
func TestAlgorithmChanged(t *testing.T) {
	for name, both := range map[string]bool{"master had taken it in": false, "both had": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			l := newLedger(w)
			w.start(w.a, l.keep)
			w.feed(1, 4, nil)
			w.want("the master's file", func() bool { return w.info(w.a).Received == 4 })
			w.halt(w.a)
			if both {
				w.start(w.b, l.keep)
				w.want("the slave's file", func() bool { return w.info(w.b).Received == 4 })
				w.halt(w.b)
			}
			tune := func(o *Options) { o.Pools[0].Algorithm = SHA3 }
			w.a.tune, w.b.tune = tune, tune
			w.both(l.keep)
			w.feed(2, 40, nil)
			w.want("seq 2 active, nothing left of seq 1", func() bool {
				a, b := w.info(w.a), w.info(w.b)
				return a.Received+b.Received == 0 && w.agreed() && w.a.events.count("M102_ALGORITHM") == 1
			})
			w.want("a key", func() bool {
				k, err := l.take(t.Context(), w.a)
				return err == nil && k.Position.Seq() == 2 && l.claim(w.b, k)
			})
		})
	}
}

// TestNoSupplyWithoutPeer: neither before the first sync nor from a lease that
// was not acknowledged.
func TestNoSupplyWithoutPeer(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.SilentAfter = 10 * time.Millisecond })
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 200, nil)
	w.want("agreement", w.agreed)
	w.kill(w.b)
	w.kill(w.a)
	w.start(w.a, l.keep)
	w.want("an alarm that the peer is silent", func() bool { return w.a.events.count("PEER_SILENT") > 0 })
	if _, err := l.take(t.Context(), w.a); !errors.Is(err, ErrNotSynced) {
		t.Errorf("a key while the peer is silent: %v", err)
	}
	if w.info(w.a).OwnActive == 0 {
		t.Error("nothing was there to refuse")
	}
	w.start(w.b, l.keep)
	w.want("a key again", func() bool {
		k, err := l.take(t.Context(), w.a)
		return err == nil && l.claim(w.b, k)
	})
}

// TestBurnKeepsNoticed: the slave side of a crash. What has a notice stays
// obtainable, once; the rest is gone.
func TestBurnKeepsNoticed(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 64, nil)
	w.want("agreement", w.agreed)
	var ks []Key
	w.want("four keys", func() bool {
		if k, err := l.take(t.Context(), w.a); err == nil {
			ks = append(ks, k)
		}
		return len(ks) == 4
	})
	l.notice(ks[0])
	l.notice(ks[2])
	w.kill(w.a)
	w.start(w.a, l.keep)
	w.want("agreement", w.agreed)
	for i, k := range ks {
		if got, want := l.claim(w.b, k), i%2 == 0; got != want {
			t.Errorf("key %d after the burn: obtainable %v, want %v", i, got, want)
		}
		k.Material.Wipe()
	}
}

// TestPeerRestartBurnsOurLease: the peer's copies of our lease are gone with its
// process, so none of it may be handed out.
func TestPeerRestartBurnsOurLease(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 200, nil)
	w.want("a lease", func() bool { lv, _ := w.a.cur.Load().agent.Level("b"); return lv.Leased > 8 })
	w.kill(w.b)
	w.start(w.b, l.keep)
	w.want("agreement", func() bool { return w.agreed() && w.a.cur.Load().agent.pools[pairID].met(w.b) })
	if n := l.drain(w.a); n == 0 || n > 100-8 {
		t.Errorf("%d keys after the restart, of 100 with at least 8 burned", n)
	}
}

// met reports whether p has met the process that n runs.
func (p *pool) met(n *node) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peerInstance == n.cur.Load().agent.instance
}

// lateAnswer holds back the answer to the first lease until after has run.
type lateAnswer struct {
	Peer
	once  *sync.Once
	after func()
}

func (p lateAnswer) Lease(ctx context.Context, r type1.LeaseRequest) (type1.LeaseResponse, error) {
	out, err := p.Peer.Lease(ctx, r)
	if err == nil {
		p.once.Do(p.after)
	}
	return out, err
}

// TestAcknowledgedByFormerProcess: the peer acknowledges a lease, dies, starts
// and is met, and only then its acknowledgement arrives.
func TestAcknowledgedByFormerProcess(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	ready, restarted := make(chan struct{}), make(chan struct{})
	w.a.tune = func(o *Options) {
		o.Peers["b"] = lateAnswer{o.Peers["b"], &sync.Once{}, func() {
			<-ready
			defer close(restarted)
			w.kill(w.b)
			w.start(w.b, l.keep)
			p := w.a.cur.Load().agent.pools[pairID]
			for end := time.Now().Add(10 * time.Second); !p.met(w.b) && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
		}}
	}
	w.both(l.keep)
	close(ready)
	w.feed(1, 200, nil)
	<-restarted
	w.want("agreement", w.agreed)
	w.want("a lease", func() bool { lv, _ := w.a.cur.Load().agent.Level("b"); return lv.Leased > 0 })
	if n := l.drain(w.a); n == 0 || n > 100-16 {
		t.Errorf("%d keys, of 100 with 16 burned", n)
	}
}

// TestRestoredStore puts an older copy of one node's disk back. The peer's sync
// finds it: the mark is adopted, nothing is supplied twice.
func TestRestoredStore(t *testing.T) {
	for _, who := range []string{"a", "b"} {
		t.Run(who, func(t *testing.T) {
			w := newWorld(t, nil)
			l := newLedger(w)
			w.both(l.keep)
			n := w.a
			if who == "b" {
				n = w.b
			}
			w.feed(1, 600, nil)
			w.want("agreement", w.agreed)
			takeSome := func() {
				for _, x := range []*node{w.a, w.b} {
					got := 0
					w.want("20 keys", func() bool {
						k, err := l.take(t.Context(), x)
						if err != nil {
							return false
						}
						l.claim(w.other(x), k)
						k.Material.Wipe()
						got++
						return got == 20
					})
				}
			}
			takeSome()
			w.halt(n)
			saved := t.TempDir()
			copyTree(t, n.dir, saved)
			w.start(n, l.keep)
			w.want("agreement", w.agreed)
			takeSome()
			w.feed(2, 600, nil)
			w.want("agreement on seq 2", func() bool { return w.info(w.b).NewestSeq == 2 && w.agreed() })
			takeSome()
			w.halt(n)
			restoreTree(t, saved, n.dir)
			w.start(n, l.keep)
			w.want("agreement", w.agreed)
			if n.events.count("STORE_RESTORED") == 0 {
				t.Errorf("no alarm: %v", n.events.codes)
			}
			w.feed(3, 600, nil)
			w.want("agreement on seq 3", func() bool { return w.info(w.b).NewestSeq == 3 && w.agreed() })
			takeSome()
		})
	}
}

// TestRestoredManyStartsBack: a store that was started less often than the peer
// knows is not refused until it was started often enough; its generation goes past
// what the peer knows, once, with one alarm. A peer that only restarts knows our
// generation, too, and is none.
func TestRestoredManyStartsBack(t *testing.T) {
	for _, who := range []string{"a", "b"} {
		t.Run(who, func(t *testing.T) {
			w := newWorld(t, nil)
			l := newLedger(w)
			w.both(l.keep)
			n := w.a
			if who == "b" {
				n = w.b
			}
			lease := func(seq uint64) {
				w.feed(seq, 600, nil)
				w.want("agreement", func() bool { return w.info(n).NewestSeq == seq && w.agreed() && w.info(n).Mark.Seq() > 0 })
			}
			lease(1)
			w.halt(n)
			saved := t.TempDir()
			copyTree(t, n.dir, saved)
			for range 4 {
				w.start(n, l.keep)
				w.want("agreement", func() bool { return w.agreed() && w.info(n).Mark == w.info(w.other(n)).PeerMark })
				w.halt(n)
			}
			if n.events.count("STORE_RESTORED") != 0 {
				t.Fatalf("an alarm without a restore: %v", n.events.codes)
			}
			known := w.info(w.other(n)).PeerGeneration
			restoreTree(t, saved, n.dir)
			w.start(n, l.keep)
			w.want("agreement", w.agreed)
			if g := n.cur.Load().inv.Generation(); g <= known || n.events.count("STORE_RESTORED") == 0 {
				t.Errorf("generation %d, the peer had known %d; events %v", g, known, n.events.codes)
			}
			w.kill(w.other(n))
			w.start(w.other(n), l.keep)
			before := n.events.count("STORE_RESTORED")
			w.want("agreement", func() bool { return w.agreed() && n.cur.Load().agent.pools[pairID].met(w.other(n)) })
			if after := n.events.count("STORE_RESTORED"); after != before {
				t.Errorf("the peer's restart gave %d alarms", after-before)
			}
		})
	}
}

// TestMisfortune is the property that all rests on: whatever is lost, repeated
// or delayed, and whenever either side is killed, no key is taken or claimed
// twice, none has other bytes, and in the end both sides agree.
func TestMisfortune(t *testing.T) {
	seed := uint64(envInt(t, "SEED", int(time.Now().UnixNano())))
	kills := envInt(t, "COUNT", 20)
	const perRound = 7
	for round := 0; round*perRound < kills; round++ {
		t.Run(fmt.Sprint("seed ", seed+uint64(round)), func(t *testing.T) { misfortune(t, seed+uint64(round), min(perRound, kills-round*perRound)) })
	}
}
