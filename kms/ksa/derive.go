package ksa

import (
	"crypto/hkdf"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// label is the HKDF salt that parts this use of a master key from every other.
const label = "Q-IPsec v1 KSA"

// Derive makes the session key of sizeBits bits (a multiple of 8) that the
// SAEs master and slaves get from one master key (paper, table 11: master keys
// have one size, the KSA derives the size asked for):
//
//	HKDF-SHA-512 (RFC 5869), IKM = the master key's 32 bytes,
//	salt = "Q-IPsec v1 KSA" (14 bytes, no terminator), L = sizeBits / 8,
//	info = field(Key-ID, 16 bytes) | field(master SAE id)
//	     | field(slave SAE id) for each slave, sorted by bytes
//	     | field(sizeBits as 4 bytes, big-endian)
//	field(x) = length of x as 2 bytes, big-endian | x
//
// First, second and last field are fixed, so info has one reading. m stays the
// caller's, who also owns the result. More than 256 bits have the strength of
// 256.
func Derive(m *key.Material, id key.ID, master string, slaves []string, sizeBits int) (*key.Material, error) {
	if m.Len() != key.MasterSize {
		return nil, fmt.Errorf("ksa: derive %s: master key has %d bytes, not %d", id, m.Len(), key.MasterSize)
	}
	prk, err := hkdf.Extract(sha512.New, m.Bytes(), []byte(label))
	runtime.KeepAlive(m)
	defer clear(prk)
	if err != nil {
		return nil, fmt.Errorf("ksa: derive %s: %w", id, err)
	}
	okm, err := hkdf.Expand(sha512.New, prk, info(id, master, slaves, sizeBits), sizeBits/8)
	if err != nil {
		return nil, fmt.Errorf("ksa: derive %s: %w", id, err)
	}
	return key.Take(okm)
}

func info(id key.ID, master string, slaves []string, sizeBits int) string {
	b := make([]byte, 0, 128)
	b = field(b, string(id[:]))
	b = field(b, master)
	if len(slaves) > 1 {
		slaves = slices.Sorted(slices.Values(slaves))
	}
	for _, s := range slaves {
		b = field(b, s)
	}
	b = binary.BigEndian.AppendUint16(b, 4)
	b = binary.BigEndian.AppendUint32(b, uint32(sizeBits))
	return string(b)
}

func field(b []byte, x string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(x))), x...)
}
