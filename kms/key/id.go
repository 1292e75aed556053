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
	mac := hmac.New(sha256.New, kid)
	mac.Write([]byte("Q-IPsec v1 key-id"))
	mac.Write(pair[:])
	var n [12]byte
	binary.BigEndian.PutUint64(n[:8], seq)
	binary.BigEndian.PutUint32(n[8:], index)
	mac.Write(n[:])
	var id ID
	copy(id[:], mac.Sum(nil))
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id
}
