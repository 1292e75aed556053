package key

import "fmt"

// IndexBits is how many low bits of a Position hold the index within a file.
const IndexBits = 20

// Limits of what a Position can name.
const (
	MaxSeq   uint64 = 1<<(63-IndexBits) - 1 // so that a Position fits SQL's signed 64 bits
	MaxIndex uint32 = 1<<IndexBits - 1      // 1,048,575 keys of 32 bytes in one file
)

// MasterSize is the size of every master key, in bytes (paper, table 11: master
// keys have one size, KSA derives the size asked for).
const MasterSize = 32

// Position is a master key's place in its pool: the QKD-Key file's seq, then
// its index in that file, as one number. A pool's keys become active in the
// order of their Positions on both sides, so "all keys up to h" means the same
// keys to both. Zero is before the first key.
type Position uint64

// At makes a Position. It panics if seq or index is out of range: parsers of
// outside bytes check MaxSeq and MaxIndex first.
func At(seq uint64, index uint32) Position {
	if seq > MaxSeq || index > MaxIndex {
		panic(fmt.Sprintf("key: position (%d, %d) out of range", seq, index))
	}
	return Position(seq<<IndexBits | uint64(index))
}

// Seq is the QKD-Key file's sequence number.
func (p Position) Seq() uint64 { return uint64(p) >> IndexBits }

// Index is the key's number within its file, from 0.
func (p Position) Index() uint32 { return uint32(p) & MaxIndex }

// String is "seq/index".
func (p Position) String() string { return fmt.Sprintf("%d/%d", p.Seq(), p.Index()) }

// Role is a node's part in a QKD pair. The master starts M102.
type Role uint8

// The two roles of a pair.
const (
	Master Role = 1
	Slave  Role = 2
)

// String is "master" or "slave".
func (r Role) String() string {
	switch r {
	case Master:
		return "master"
	case Slave:
		return "slave"
	}
	return fmt.Sprintf("role(%d)", uint8(r))
}

// ParseRole is the inverse of String.
func ParseRole(s string) (Role, error) {
	switch s {
	case "master":
		return Master, nil
	case "slave":
		return Slave, nil
	}
	return 0, fmt.Errorf("key: role %q is neither master nor slave", s)
}

// Other is the peer's role.
func (r Role) Other() Role { return Master + Slave - r }

// Owns is the owner rule: the pair's master owns the keys of even index, the
// slave those of odd index. Only the owner decides a key's use and expiry, so
// both ends may supply keys at once without asking each other. What is neither
// master nor slave owns nothing.
func (r Role) Owns(p Position) bool {
	switch r {
	case Master:
		return p.Index()%2 == 0
	case Slave:
		return p.Index()%2 == 1
	}
	return false
}
