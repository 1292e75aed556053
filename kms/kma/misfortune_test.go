package kma

import (
	"context"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

func misfortune(t *testing.T, seed uint64, kills int) {
	r := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, func(o *Options) { o.RatchetKeys = 100 })
	l := newLedger(w)
	w.both(l.keep)
	const seqs = 25
	for s := uint64(1); s <= seqs; s++ { // all of truth, before anyone reads it
		w.feed(s, 20+r.IntN(30), func(n *node, data []byte) bool {
			switch r.IntN(12) {
			case 0:
				data[r.IntN(len(data))] ^= 1
			case 1:
				return false
			}
			return true
		})
	}
	w.line.set(seed, 0.15)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	pauses := []int{2000, 2000}
	if busy := r.IntN(3); busy < 2 { // else: both alike
		pauses[1-busy], pauses[busy] = 40_000, 200 // one gives what the other lacks
	}
	for i, n := range []*node{w.a, w.b} {
		mine := rand.New(rand.NewPCG(seed, uint64(100+i)))
		wg.Go(func() { consume(ctx, w, l, n, mine, pauses[i]) })
	}
	for range kills {
		time.Sleep(time.Duration(r.IntN(150)) * time.Millisecond)
		n := w.a
		if r.IntN(2) == 0 {
			n = w.b
		}
		w.kill(n)
		if r.IntN(3) == 0 { // both at once
			w.kill(w.other(n))
			w.start(w.other(n), l.keep)
		}
		w.start(n, l.keep)
	}
	time.Sleep(100 * time.Millisecond)
	cancel()
	wg.Wait()
	w.line.set(seed, 0)
	w.line.wg.Wait()
	w.feed(seqs+1, 40, nil) // what was missing at one side up to here will never come
	w.want("agreement", func() bool {
		return w.info(w.a).NewestSeq == seqs+1 && w.info(w.b).NewestSeq == seqs+1 && w.agreed()
	})
	l.mu.Lock()
	taken, given := len(l.m), l.given
	l.mu.Unlock()
	t.Logf("%d keys taken, %d of them given; a: %s; b: %s", taken, given, w.describe(w.a), w.describe(w.b))
	// And it goes on: what is left can be taken and claimed.
	for _, n := range []*node{w.a, w.b} {
		l.drain(n)
	}
}

// consume plays SAEs at n: keys are taken, noticed or not, claimed at once,
// later or never, sometimes put back. It pauses for as many microseconds at most.
func consume(ctx context.Context, w *world, l *ledger, n *node, r *rand.Rand, pause int) {
	var later []Key
	for ctx.Err() == nil {
		time.Sleep(time.Duration(r.IntN(pause)) * time.Microsecond)
		k, err := l.take(ctx, n)
		if err != nil {
			continue
		}
		switch r.IntN(4) {
		case 0:
		case 1:
			l.notice(k)
			later = append(later, k)
		default:
			l.notice(k)
			l.claim(w.other(n), k)
		}
		k.Material.Wipe()
		if len(later) > 5 {
			l.claim(w.other(n), later[0])
			later = later[1:]
		}
	}
	for _, k := range later {
		l.claim(w.other(n), k)
	}
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func restoreTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	copyTree(t, from, to)
}
