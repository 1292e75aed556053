package ksa

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// ledger is what all SAEs of a test got: each id at most once per side, with
// the same bytes.
type ledger struct {
	mu   sync.Mutex
	side [2]map[key.ID]string
}

func newLedger() *ledger {
	return &ledger{side: [2]map[key.ID]string{make(map[key.ID]string), make(map[key.ID]string)}}
}

func (l *ledger) note(t *testing.T, side int, keys []key.SupplyKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range keys {
		if _, ok := l.side[side][k.ID]; ok {
			t.Errorf("key %s was supplied twice on side %d", k.ID, side)
		}
		l.side[side][k.ID] = string(k.Material.Bytes())
		if other, ok := l.side[1-side][k.ID]; ok && other != l.side[side][k.ID] {
			t.Errorf("key %s differs between the sides", k.ID)
		}
		k.Material.Wipe()
	}
}

// Both nodes supply at full speed at once, while notices get lost, come late
// and twice, and every slave asks twice at the same time.
func TestBothSidesAtOnce(t *testing.T) {
	const perSide, workers = 2000, 8
	a, b := twoSites(t, perSide, nil)
	for _, p := range []*fakePeers{a.peers, b.peers} {
		p.send = func(ns []Notice) ([]Notice, error) {
			switch rand.IntN(4) {
			case 0:
				return nil, errors.New("lost")
			case 1:
				return ns[:rand.IntN(len(ns)+1)], errors.New("acknowledgement lost")
			case 2:
				return append(ns, ns...), nil
			}
			return ns, nil
		}
	}
	a.run(t)
	b.run(t)
	l := newLedger()
	var wg sync.WaitGroup
	serve := func(side int, from, to *site, master, slave string) {
		for {
			keys, err := from.GetKey(t.Context(), master, slave, 1+rand.IntN(3), 256)
			if errors.Is(err, errEmpty) {
				return
			}
			if err != nil {
				t.Errorf("GetKey: %v", err)
				return
			}
			id := ids(keys)
			l.note(t, side, keys)
			var won atomic.Int32
			var twin sync.WaitGroup
			for range 2 {
				twin.Go(func() {
					got, err := to.GetKeyWithID(t.Context(), slave, master, id, 256)
					if err == nil {
						won.Add(1)
						l.note(t, 1-side, got)
					} else if kind(err) != "not found" {
						t.Errorf("GetKeyWithID: %v", err)
					}
				})
			}
			twin.Wait()
			if won.Load() != 1 {
				t.Errorf("%d of two fetches of the same keys succeeded", won.Load())
			}
		}
	}
	for range workers {
		wg.Go(func() { serve(0, a, b, "a1", "b1") })
		wg.Go(func() { serve(1, b, a, "b1", "a1") })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(60 * time.Second):
		t.Fatal("deadlock: not done in a minute")
	}
	for side, s := range []*site{a, b} {
		own, remote := s.keys.left()
		if own > 2 || s.keys.unwiped() != 0 {
			t.Errorf("side %d: %d own keys left, %d master keys unwiped", side, own, s.keys.unwiped())
		}
		otherOwn, _ := []*site{b, a}[side].keys.left()
		if remote != otherOwn {
			t.Errorf("side %d holds %d keys of the peer, which has %d", side, remote, otherOwn)
		}
		if len(l.side[side]) < 2*perSide-4 {
			t.Errorf("side %d got %d keys of %d", side, len(l.side[side]), 2*perSide)
		}
	}
}

// Batches that share keys, in any order, do not lock each other up, and each
// key goes to one of them.
func TestOverlappingBatches(t *testing.T) {
	a, b := twoSites(t, 64, nil)
	x := mustGet(t, a, "a1", "b1", 64, 256)
	id := ids(x)
	l := newLedger()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 50 {
				p := rand.Perm(len(id))[:1+rand.IntN(3)]
				batch := make([]key.ID, len(p))
				for i, j := range p {
					batch[i] = id[j]
				}
				got, err := b.GetKeyWithID(t.Context(), "b1", "a1", batch, 0)
				if err == nil {
					l.note(t, 1, got)
				} else if kind(err) != "not found" {
					t.Errorf("GetKeyWithID: %v", err)
				}
			}
		})
	}
	wg.Wait()
	for _, i := range id { // what nobody got is still to be had
		if _, ok := l.side[1][i]; !ok {
			if _, err := fetch(t, b, "b1", "a1", []key.ID{i}, 0); err != nil {
				t.Errorf("key %s is lost: %v", i, err)
			}
		}
	}
	if b.keys.unwiped() != 0 {
		t.Error("master keys are left in memory")
	}
}

// The peer's burns race with fetches and expiry: a key is fetched or gone, never
// both, and in the end nothing at or below the mark is left.
func TestBurnRaces(t *testing.T) {
	const n = 1500
	a, b := twoSites(t, n, func(o *Options) { o.TTL = time.Minute })
	b.wait = 0 // a burn must not always come first
	a.peers.send = func(ns []Notice) ([]Notice, error) {
		if rand.IntN(2) == 0 {
			return nil, errors.New("lost") // and for the burned ones, for ever
		}
		return ns, nil
	}
	end := a.run(t)
	l := newLedger()
	given := make(chan key.ID, 64)
	var wg sync.WaitGroup
	var fetched, gone, issued atomic.Int32
	wg.Go(func() {
		defer close(given)
		for range n {
			issued.Add(1)
			keys, err := a.GetKey(t.Context(), "a1", "b1", 1, 256)
			if err != nil {
				t.Errorf("GetKey: %v", err)
				return
			}
			id := keys[0].ID
			l.note(t, 0, keys)
			given <- id
		}
	})
	for range 4 {
		wg.Go(func() {
			for id := range given {
				if rand.IntN(8) == 0 {
					continue // an SAE that never asks
				}
				got, err := b.GetKeyWithID(t.Context(), "b1", "a1", []key.ID{id}, 0)
				switch kind(err) {
				case "ok":
					fetched.Add(1)
					l.note(t, 1, got)
				case "not found":
					gone.Add(1)
				default:
					t.Errorf("GetKeyWithID: %v", err)
				}
			}
		})
	}
	stop := make(chan struct{})
	var burner sync.WaitGroup
	burner.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			// Up to about where the slaves are: node a owns every other key.
			b.keys.burn(key.At(1, uint32(max(0, 2*issued.Load()-rand.Int32N(300)))), b.KeepOnBurn)
			b.sweep(b.clock())
		}
	})
	wg.Wait()
	close(stop)
	burner.Wait()
	end() // no notice comes after the last sweep
	b.keys.burn(key.At(1, 2*n), b.KeepOnBurn)
	b.advance(2 * time.Minute)
	b.sweep(b.clock())
	b.keys.burn(key.At(1, 2*n), b.KeepOnBurn)
	if _, remote := b.keys.left(); remote != 0 || b.keys.unwiped() != 0 || b.in.n["a"].Load() != 0 {
		t.Errorf("%d keys left, %d unwiped, %d notices", remote, b.keys.unwiped(), b.in.n["a"].Load())
	}
	if fetched.Load() == 0 || gone.Load() == 0 {
		t.Errorf("%d fetched, %d gone: the race did not happen", fetched.Load(), gone.Load())
	}
	t.Logf("%d fetched, %d gone, %d stranded", fetched.Load(), gone.Load(), b.count(Stranded))
}
