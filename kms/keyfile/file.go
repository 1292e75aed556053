package keyfile

import (
	"crypto/sha256"
	"crypto/sha3"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Version is the only version of the format.
const Version = 1

// The hash algorithms of a QKD-Key file.
const (
	SHA256   = "sha-256"
	SHA3_256 = "sha3-256" //nolint:revive // the algorithm's own spelling
)

// SecretSize is the size of Km, Ks and Kid each, in bytes.
const SecretSize = 32

// Trailer is how many bytes at the end of the key data are never master keys:
// Km | Ks | Kid.
const Trailer = 3 * SecretSize

// DefaultMaxSize is the largest text of a QKD-Key file unless configured
// otherwise, in bytes.
const DefaultMaxSize = 16 << 20

// Header is all of a QKD-Key file but its key data and hash.
type Header struct {
	Pair          uuid.UUID // qkd_pair_id
	QKD           uuid.UUID // qkd_id
	PeerQKD       uuid.UUID // peer_qkd_id
	Role          key.Role
	Seq           uint64
	Created       time.Time
	QBER          float64
	KeyLength     int // bytes of key data; Encode sets it from Data
	HashAlgorithm string
}

// File is a QKD-Key file. Whoever has it owns Data and wipes it.
type File struct {
	Header
	Data *key.Material // master keys | Km | Ks | Kid
}

// Wipe wipes Data. It may be called again, and on nil.
func (f *File) Wipe() {
	if f != nil {
		f.Data.Wipe()
	}
}

// Parts are the pieces of the key data, borrowed from it.
type Parts struct {
	Keys []byte // n * key.MasterSize
	Km   []byte // one-time MAC key of M102, master to slave, SecretSize bytes
	Ks   []byte // the same, slave to master
	Kid  []byte // makes the Key-IDs (key.DeriveID)
}

// Split cuts key data. It fails if the size is none a QKD-Key file can have.
func Split(data []byte) (Parts, error) {
	if err := checkLength(len(data)); err != nil {
		return Parts{}, err
	}
	n := len(data) - Trailer
	t := data[n:]
	return Parts{Keys: data[:n:n], Km: t[:32:32], Ks: t[32:64:64], Kid: t[64:96:96]}, nil
}

func checkLength(n int) error {
	const max = (int(key.MaxIndex)+1)*key.MasterSize + Trailer
	if n%key.MasterSize != 0 || n <= Trailer || n > max {
		return bad(BadLength, "key_length", "%d is not a multiple of %d above %d and at most %d", n, key.MasterSize, Trailer, max)
	}
	return nil
}

// sum hashes data. The result is as telling as the key data: wipe it.
func sum(algorithm string, data []byte) ([32]byte, error) {
	switch algorithm {
	case SHA256:
		return sha256.Sum256(data), nil
	case SHA3_256:
		return sha3.Sum256(data), nil
	}
	return [32]byte{}, checkHash(algorithm)
}

func checkHash(algorithm string) error {
	switch algorithm {
	case SHA256, SHA3_256:
		return nil
	case "sha-1", "sha1", "SHA-1", "SHA1":
		return bad(SHA1, "hash_algorithm", "use sha-256 or sha3-256")
	}
	return bad(UnknownHash, "hash_algorithm", "use sha-256 or sha3-256")
}

// check holds for what Decode gives and for what Encode takes.
func (h *Header) check() error {
	switch {
	case h.Pair == uuid.Nil:
		return bad(BadField, "qkd_pair_id", "the nil UUID names no pair")
	case h.QKD == uuid.Nil:
		return bad(BadField, "qkd_id", "the nil UUID names no device")
	case h.PeerQKD == uuid.Nil:
		return bad(BadField, "peer_qkd_id", "the nil UUID names no device")
	case h.QKD == h.PeerQKD:
		return bad(BadField, "peer_qkd_id", "is the same device as qkd_id")
	case h.Role != key.Master && h.Role != key.Slave:
		return bad(BadField, "role", "neither master nor slave")
	case h.Seq < 1 || h.Seq > key.MaxSeq:
		return bad(BadField, "seq", "not between 1 and %d", key.MaxSeq)
	case h.Created.IsZero():
		return bad(BadField, "created", "no time")
	case !(h.QBER >= 0 && h.QBER <= 1):
		return bad(BadField, "qber", "not between 0 and 1")
	}
	if err := checkHash(h.HashAlgorithm); err != nil {
		return err
	}
	return checkLength(h.KeyLength)
}

// String names the file, with no key byte.
func (h *Header) String() string { return fmt.Sprintf("%s seq %d", h.Pair, h.Seq) }
