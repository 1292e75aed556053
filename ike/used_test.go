package ike

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// An authenticated peer that names one random Key-ID after another is refused
// at the bound, and the Key-IDs remembered by then stay so. It takes the room of no
// other peer, nor of our own keys; what is too old makes room again.
func TestUsedKeyIDsAreBounded(t *testing.T) {
	c := newClock()
	e := newEnd(t, "a", "b", newKMS(), c, nil)
	b, wild, other := e.Broker, e.conns["link"], &connState{Connection: Connection{Name: "other"}}
	id := func(n int) (id key.ID) {
		binary.BigEndian.PutUint64(id[:], uint64(n+1))
		return id
	}
	for n := range maxUsed {
		if err := b.markUsed(wild, id(n)); err != nil {
			t.Fatalf("Key-ID %d: %v", n, err)
		}
	}
	if err := b.markUsed(wild, id(maxUsed)); err == nil || len(b.used) != maxUsed {
		t.Errorf("one above the bound: %v, %d remembered", err, len(b.used))
	}
	for _, cs := range []*connState{wild, other} {
		if err := b.markUsed(cs, id(0)); err == nil || !strings.Contains(err.Error(), "used before") {
			t.Errorf("a remembered Key-ID was taken again: %v", err)
		}
	}
	if err := b.markUsed(other, id(maxUsed)); err != nil || other.used != 1 {
		t.Errorf("another peer's Key-ID: %v", err)
	}
	if err := e.sent(newTry(1, 2), e.mustKey(1)); err != nil {
		t.Errorf("a key of our own: %v", err)
	}
	c.add(usedTTL)
	b.sweep()
	if wild.used != 0 || other.used != 0 || len(b.used) != 0 {
		t.Errorf("after %v %d, %d and %d are remembered", usedTTL, wild.used, other.used, len(b.used))
	}
	if err := b.markUsed(wild, id(maxUsed+1)); err != nil {
		t.Error(err)
	}
}
