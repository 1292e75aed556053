package twonodes

import (
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// With all load at one node, its SAE can have nearly all keys of the pool, and the
// SAE at the other node gets each of them.
func TestLopsidedLoad(t *testing.T) {
	t.Parallel()
	const files, perFile, number = 4, 1000, 40
	for node := range 2 {
		t.Run(names[node], func(t *testing.T) {
			s := newSite(t, 8+node, "intake_interval = \"50ms\"\nlease = 64\n")
			s.up()
			for range files {
				if err := s.feed(perFile); err != nil {
					t.Fatal(err)
				}
			}
			s.supplying()
			l := newLedger()
			m, sl := s.te(node), s.te(1-node)
			defer m.Close()
			defer sl.Close()
			for n := 0; n < files*perFile*9/10; n += number {
				s.pairEqual(l, node, number, m, sl)
			}
			if ks, err := s.te(1-node).GetKey(t.Context(), teOf(node), 1, 256); err != nil {
				t.Errorf("the node that gave has kept nothing for itself: %v", err)
			} else {
				key.WipeAll(ks)
			}
			for _, f := range l.list() {
				t.Error(f)
			}
			s.agree()
		})
	}
}
