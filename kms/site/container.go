package site

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Keys on the wire: for each one its Key-ID (16 bytes), class (1), length in bytes
// (2, big endian) and the key. Nothing else: the length of the answer is that of
// HTTP.
const keyHeader = 16 + 1 + 2

// maxKeyBytes bounds one key.
const maxKeyBytes = 512

// container writes keys, which stay the caller's. The caller wipes the buffer.
func container(keys []key.SupplyKey) []byte {
	n := 0
	for _, k := range keys {
		n += keyHeader + k.Material.Len()
	}
	b := make([]byte, 0, n)
	for _, k := range keys {
		b = append(append(b, k.ID[:]...), byte(k.Class))
		b = binary.BigEndian.AppendUint16(b, uint16(k.Material.Len()))
		b = append(b, k.Material.Bytes()...)
		runtime.KeepAlive(k.Material)
	}
	return b
}

// parseContainer reads keys and keeps nothing of b; on error there is nothing to
// wipe.
func parseContainer(b []byte) (keys []key.SupplyKey, err error) {
	defer func() {
		if err != nil {
			key.WipeAll(keys)
			keys = nil
		}
	}()
	for len(b) > 0 {
		if len(b) < keyHeader || len(keys) == maxKeys {
			return keys, errors.New("site: an answer with keys is cut off or too long")
		}
		k := key.SupplyKey{ID: key.ID(b[:16]), Class: key.Class(b[16])}
		n := int(binary.BigEndian.Uint16(b[17:]))
		b = b[keyHeader:]
		if k.ID.IsZero() || k.Class > key.Direct || n < 1 || n > maxKeyBytes || n > len(b) {
			return keys, errors.New("site: an answer with keys has one that cannot be")
		}
		if k.Material, err = key.New(n); err != nil {
			return keys, fmt.Errorf("site: %w", err)
		}
		copy(k.Material.Bytes(), b[:n])
		runtime.KeepAlive(k.Material)
		b = b[n:]
		keys = append(keys, k)
	}
	return keys, nil
}

// checkKeys compares keys with what was asked for: so many, of that size unless it
// is 0, and with these ids if there are any.
func checkKeys(keys []key.SupplyKey, number, sizeBits int, ids []key.ID) error {
	if len(keys) != number {
		return fmt.Errorf("site: asked for %d keys, got %d", number, len(keys))
	}
	for i, k := range keys {
		if n := 8 * k.Material.Len(); sizeBits != 0 && n != sizeBits {
			return fmt.Errorf("site: key %s has %d bits, not %d", k.ID, n, sizeBits)
		}
		if ids != nil && k.ID != ids[i] {
			return fmt.Errorf("site: key %s came for %s", k.ID, ids[i])
		}
	}
	return nil
}
