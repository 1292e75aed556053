package kma

import (
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// BenchmarkReformat is the work per byte of key data between codec and store.
func BenchmarkReformat(b *testing.B) {
	for _, alg := range []string{Poly1305, SHA256} {
		b.Run(alg, func(b *testing.B) {
			f := sampleFile(b, key.Master, 1, counting(32768))
			defer f.Wipe()
			b.SetBytes(int64(f.Data.Len()))
			for b.Loop() {
				blk, err := reformat(f, key.Direct, alg)
				if err != nil {
					b.Fatal(err)
				}
				blk.Keys.Wipe()
			}
		})
	}
}
