package ike

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/key"
)

// world drives a pair by random steps and keeps what a correct broker must
// never break.
type world struct {
	p    *pair
	r    *rand.Rand
	turn sync.Mutex // of the charon that comes

	mu    sync.Mutex
	spent map[key.ID]int // SENT answered
	tries []*try         // SENT, not finished
}

func newWorld(t *testing.T, seed uint64) *world {
	return &world{p: newPair(t, nil), r: rand.New(rand.NewPCG(seed, 1)), spent: map[key.ID]int{}}
}

func (w *world) pick() *try {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.tries) == 0 {
		return nil
	}
	i := rand.IntN(len(w.tries))
	r := w.tries[i]
	w.tries = append(w.tries[:i], w.tries[i+1:]...)
	return r
}

// step does one thing that charon, the peer, the key source or time may do.
// Refusals are part of the game; only the invariants count.
func (w *world) step(n int, uid uint32) {
	a, b := w.p.a, w.p.b
	switch {
	case n < 35:
		id, err := a.getKey(uid)
		if err != nil || n < 8 {
			return
		}
		r := newTry(uid, uid)
		if a.sent(r, id) != nil {
			return
		}
		w.mu.Lock()
		w.spent[id]++
		w.tries = append(w.tries, r)
		w.mu.Unlock()
	case n < 70:
		r := w.pick()
		if r == nil {
			return
		}
		rb, err := b.bind(r, true, nil)
		if err != nil || rb.install(true, nil) != nil {
			return
		}
		if n < 40 { // charon did not acknowledge
			m := rb.addSA(false)
			if _, err := b.AddSA(context.Background(), m); err == nil {
				b.Rollback(context.Background(), said(m))
			}
			return
		}
		_ = rb.install(false, nil)
		ib, err := a.bind(r, false, nil)
		if err == nil && n >= 45 {
			_ = ib.both()
			_ = ib.install(true, nil) // a token used again
		}
	case n < 80:
		a.End(context.Background(), a.sa(uid))
	case n < 83: // one charon says hello after the other
		w.turn.Lock()
		defer w.turn.Unlock()
		a.Gone(a.inst)
		a.serve(a.inst)
	case n < 88:
		a.sweep()
		b.sweep()
	case n < 96:
		a.clock.add(time.Duration(1<<(n-80)) * time.Millisecond)
	case n < 98:
		w.p.kms.set(func(k *kms) { k.err = errors.New("down") })
	default:
		w.p.kms.set(func(k *kms) { k.err = nil })
		a.clock.add(backOffMax)
	}
}

// check compares the broker's books with one another and with the world.
func (w *world) check(t *testing.T) {
	t.Helper()
	a := w.p.a
	a.mu.Lock()
	defer a.mu.Unlock()
	cs := a.conns["link"]
	if cs.held != len(a.pending) || len(a.bySA)+len(cs.free) != len(a.pending) {
		t.Errorf("held %d, pending %d, of IKE_SAs %d, free %d", cs.held, len(a.pending), len(a.bySA), len(cs.free))
	}
	for sa, p := range a.bySA {
		if p.sa != sa || a.pending[p.id] != p || p.material.Len() == 0 {
			t.Errorf("reservation of %v: %+v", sa, p)
		}
	}
	for _, p := range cs.free {
		if p.sent || (p.sa != plugin.SA{}) || w.spent[p.id] > 0 {
			t.Errorf("a free key is not free: %+v", p)
		}
	}
	for id, n := range w.spent {
		if n > 1 {
			t.Errorf("Key-ID %s was spent %d times", id, n)
		}
	}
	for _, e := range []*end{a, w.p.b} {
		seen := map[string]bool{}
		for _, fp := range e.sad.seen {
			if seen[fp] {
				t.Errorf("end %s: a key was installed twice", e.name)
			}
			seen[fp] = true
		}
	}
	if len(a.tokens) > 2*len(a.bounds) {
		t.Errorf("%d tokens of %d CHILD_SAs", len(a.tokens), len(a.bounds))
	}
}

// Whatever the order of events: no key is used twice, none leaks, all are wiped
// (newPair checks that at the end).
func TestRandomSchedules(t *testing.T) {
	installs := 0
	for seed := range uint64(16) {
		w := newWorld(t, seed)
		for range 400 {
			w.step(w.r.IntN(100), w.r.Uint32N(6)+1)
		}
		w.check(t)
		installs += len(w.p.a.sad.seen)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if installs < 200 {
		t.Errorf("only %d SAs were installed: the schedules do not reach the end", installs)
	}
}

// The same from many threads at once, as charon's workers do.
func TestConcurrentSchedules(t *testing.T) {
	w := newWorld(t, 0)
	var all sync.WaitGroup
	for i := range uint64(16) {
		all.Go(func() {
			r := rand.New(rand.NewPCG(i, 2))
			for range 300 {
				w.step(r.IntN(100), r.Uint32N(8)+1)
			}
		})
	}
	all.Wait()
	w.check(t)
	if len(w.p.a.sad.seen) == 0 {
		t.Error("no SA was installed")
	}
}

// Run sweeps by itself and wipes everything when it ends.
func TestBrokerRun(t *testing.T) {
	p := newPair(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.a.Run(ctx) }()
	p.a.mustKey(1)
	p.a.clock.add(KME{}.reserve())
	eventually(t, "the expired key is dropped", func() bool {
		p.a.mu.Lock()
		defer p.a.mu.Unlock()
		return len(p.a.pending) == 0
	})
	p.a.mustKey(2)
	cancel()
	if err := <-done; err != nil || p.kms.leaks() != 0 {
		t.Errorf("%v, %d keys left", err, p.kms.leaks())
	}
}

// eventually polls ok for up to ten seconds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("not within 10 s: %s", what)
}
