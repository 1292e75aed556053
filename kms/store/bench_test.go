package store

import (
	"path/filepath"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// One QKD-Key file's life: stored, activated, leased by both sides, read.
func BenchmarkBlock(b *testing.B) {
	for name, n := range map[string]int{"1000keys": 1000, "10000keys": 10000} {
		b.Run(name, func(b *testing.B) {
			s, ctx := filled(b, testOptions(filepath.Join(b.TempDir(), "s")), 1), testContext(b)
			var from [2]key.Position
			seq := uint64(1)
			for b.Loop() {
				seq++
				b.StopTimer()
				blk := testBlock(b, seq, n)
				b.StartTimer()
				must(b, s.PutBlock(ctx, blk))
				must(b, s.Activate(ctx, testPool, seq))
				for _, side := range []Side{Own, Peer} {
					to := key.At(seq, uint32(n-1))
					must(b, s.Advance(ctx, testPool, side, to, "lease", 1))
					keys, err := s.Load(ctx, testPool, side, from[side.at()], to)
					must(b, err)
					wipeAll(keys)
					from[side.at()] = to
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "keys/s")
		})
	}
}

// Storing alone: 10,000 keys.
func BenchmarkPutBlock(b *testing.B) {
	s, ctx := filled(b, testOptions(filepath.Join(b.TempDir(), "s")), 1), testContext(b)
	seq := uint64(1)
	for b.Loop() {
		seq++
		b.StopTimer()
		blk := testBlock(b, seq, 10000)
		b.StartTimer()
		must(b, s.PutBlock(ctx, blk))
	}
}

// A lease of 512 keys from blocks of 10,000: what a busy KSA asks for.
func BenchmarkLease(b *testing.B) {
	s, ctx := filled(b, testOptions(filepath.Join(b.TempDir(), "s")), 1), testContext(b)
	from, seq := key.Position(0), uint64(1)
	for b.Loop() {
		mark, n, err := s.NextLease(ctx, testPool, 512)
		must(b, err)
		if n < 512 {
			b.StopTimer()
			seq++
			must(b, s.PutBlock(ctx, testBlock(b, seq, 10000)))
			must(b, s.Activate(ctx, testPool, seq))
			b.StartTimer()
			continue
		}
		must(b, s.Advance(ctx, testPool, Own, mark, "lease", 1))
		keys, err := s.Load(ctx, testPool, Own, from, mark)
		must(b, err)
		wipeAll(keys)
		from = mark
	}
}

// A ratchet over 2,000 blocks of 500 keys.
func BenchmarkRatchet(b *testing.B) {
	s, ctx := filled(b, testOptions(filepath.Join(b.TempDir(), "s")), 1), testContext(b)
	for seq := uint64(2); seq <= 2000; seq++ {
		must(b, s.PutBlock(ctx, testBlock(b, seq, 500)))
	}
	for b.Loop() {
		must(b, s.Ratchet(ctx))
	}
}
