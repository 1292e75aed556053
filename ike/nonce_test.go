package ike

import (
	"bytes"
	"crypto/rand"
	"errors"
	"testing"
	"testing/iotest"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

func TestNonceLayout(t *testing.T) {
	id := key.ID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	ni, err := BuildNonce(bytes.NewReader(bytes.Repeat([]byte{0xaa}, 32)), id)
	if err != nil {
		t.Fatal(err)
	}
	want := append(bytes.Repeat([]byte{0xaa}, 32), "Q-IPsec\x01"...)
	want = append(want, id[:]...)
	if !bytes.Equal(ni, want) || len(ni) != 56 || NonceSize != 56 {
		t.Errorf("Ni is %x", ni)
	}
	if got, ok := ParseNonce(ni); !ok || got != id {
		t.Errorf("ParseNonce: %s, %v", got, ok)
	}
	for i := range len(ni) {
		short := ni[:i]
		if _, ok := ParseNonce(short); ok {
			t.Errorf("a nonce of %d bytes was taken", i)
		}
	}
	for i := 32; i < 40; i++ {
		bad := bytes.Clone(ni)
		bad[i] ^= 1
		if _, ok := ParseNonce(bad); ok {
			t.Errorf("magic with byte %d changed was taken", i)
		}
	}
	if _, ok := ParseNonce(append(bytes.Clone(ni), 0)); ok {
		t.Error("a nonce of 57 bytes was taken")
	}
	if _, ok := ParseNonce(append(bytes.Clone(ni[:40]), make([]byte, 16)...)); ok {
		t.Error("the nil Key-ID was taken")
	}
	if _, err := BuildNonce(iotest.ErrReader(errors.New("no entropy")), id); err == nil {
		t.Error("a nonce without random bytes")
	}
}

func FuzzParseNonce(f *testing.F) {
	good, _ := BuildNonce(rand.Reader, key.ID{1})
	f.Add(good)
	f.Add([]byte{})
	f.Add(good[:55])
	f.Fuzz(func(t *testing.T, b []byte) {
		id, ok := ParseNonce(b)
		if !ok {
			if !id.IsZero() {
				t.Errorf("a Key-ID without ok: %s", id)
			}
			return
		}
		again, err := BuildNonce(bytes.NewReader(b), id)
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x was read, but is built as %x, %v", b, again, err)
		}
	})
}
