package ike

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// An authenticated peer that names one random Key-ID after another is refused
// at the bound, and the Key-IDs remembered by then stay so.
func TestUsedKeyIDsAreBounded(t *testing.T) {
	b := &Broker{used: map[key.ID]time.Time{}, now: time.Now}
	id := func(n int) (id key.ID) {
		binary.BigEndian.PutUint64(id[:], uint64(n+1))
		return id
	}
	for n := range maxUsed {
		if err := b.markUsed(id(n)); err != nil {
			t.Fatalf("Key-ID %d: %v", n, err)
		}
	}
	if err := b.markUsed(id(maxUsed)); err == nil || len(b.used) != maxUsed {
		t.Errorf("one above the bound: %v, %d remembered", err, len(b.used))
	}
	if err := b.markUsed(id(0)); err == nil {
		t.Error("a remembered Key-ID was taken again")
	}
}
