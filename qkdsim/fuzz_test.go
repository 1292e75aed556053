package qkdsim

import (
	"math"
	"strings"
	"testing"
)

// A state file gives the seq that was written or none: one that is read as less
// would have seq numbers used twice.
func FuzzSeq(f *testing.F) {
	for _, s := range []string{"1\n", "18446744073709551615", "18446744073709551616", "-1", "0x10", "1 2", "", " 7 "} {
		f.Add([]byte(s), uint64(math.MaxUint64))
	}
	f.Fuzz(func(t *testing.T, b []byte, seq uint64) {
		if got, err := parseSeq(formatSeq(seq)); err != nil || got != seq {
			t.Fatalf("%d is read back as %d, %v", seq, got, err)
		}
		got, err := parseSeq(b)
		if err != nil {
			return
		}
		if strings.Trim(strings.TrimSpace(string(b)), "0123456789") != "" {
			t.Fatalf("%q is read as %d", b, got)
		}
		if again, err := parseSeq(formatSeq(got)); err != nil || again != got {
			t.Fatalf("%q: %d becomes %d, %v", b, got, again, err)
		}
	})
}
