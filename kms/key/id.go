package key

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
)

// ID is a Key-ID: a UUID (RFC 9562), 16 bytes, public. It travels in Ni and in
// ETSI GS QKD 014 containers.
type ID [16]byte

// ParseID reads the 36-character text form (RFC 9562 section 4) in either
// case. Other forms that some libraries take (braces, urn:, no hyphens) are
// refused, so that one key has one spelling on every interface.
func ParseID(s string) (ID, error) {
	if len(s) != 36 {
		return ID{}, fmt.Errorf("key: Key-ID has %d characters, a UUID has 36", len(s))
	}
	u, err := uuid.Parse(s)
	if err != nil {
		return ID{}, fmt.Errorf("key: Key-ID is not a UUID: %w", err)
	}
	return ID(u), nil
}

// String is the lower-case text form.
func (id ID) String() string { return uuid.UUID(id).String() }

// IsZero reports whether id is the nil UUID, which names no key.
func (id ID) IsZero() bool { return id == ID{} }

// MarshalText is String as bytes.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText is ParseID.
func (id *ID) UnmarshalText(b []byte) error {
	v, err := ParseID(string(b))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// DeriveID gives the Key-ID of master key number index of the QKD-Key file
// (pair, seq): a UUIDv8 (RFC 9562 section 5.8) cut from
//
//	HMAC-SHA-256(kid, "Q-IPsec v1 key-id" | pair | seq | index)
//
// with seq as 8 and index as 4 bytes, big-endian. Both ends derive the same ID
// from the same file; nobody without kid can predict or link one (decision
// 0001). The caller owns and wipes kid (32 bytes).
func DeriveID(kid []byte, pair uuid.UUID, seq uint64, index uint32) ID {
	return deriveIDs(kid, pair, seq, index, 1)[0]
}

// DeriveIDs gives the Key-IDs of the indices 0 to n-1, as DeriveID does; n is at
// most MaxIndex+1. The caller owns and wipes kid.
func DeriveIDs(kid []byte, pair uuid.UUID, seq uint64, n int) []ID {
	return deriveIDs(kid, pair, seq, 0, n)
}

func deriveIDs(kid []byte, pair uuid.UUID, seq uint64, first uint32, n int) []ID {
	const label = "Q-IPsec v1 key-id"
	msg := make([]byte, 0, len(label)+len(pair)+8+4)
	msg = append(msg, label...)
	msg = append(msg, pair[:]...)
	msg = binary.BigEndian.AppendUint64(msg, seq)
	mac := hmac.New(sha256.New, kid)
	ids := make([]ID, n)
	var sum [sha256.Size]byte
	for i := range ids {
		mac.Reset()
		mac.Write(binary.BigEndian.AppendUint32(msg, first+uint32(i)))
		copy(ids[i][:], mac.Sum(sum[:0]))
		ids[i][6] = ids[i][6]&0x0f | 0x80
		ids[i][8] = ids[i][8]&0x3f | 0x80
	}
	return ids
}
