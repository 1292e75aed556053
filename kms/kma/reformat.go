package kma

import (
	"crypto/sha256"
	"crypto/sha3"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/google/uuid"
	//lint:ignore SA1019 deprecated for misuse only; the package comment says why it is right here
	"golang.org/x/crypto/poly1305"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
)

// reformat makes the store's block of a QKD-Key file (paper, F201): master keys,
// Key-IDs and the tags of M102. f is borrowed; the caller wipes Block.Keys.
func reformat(f *keyfile.File, class key.Class, algorithm string) (Block, error) {
	p, err := keyfile.Split(f.Data.Bytes())
	if err != nil {
		return Block{}, err
	}
	b := Block{Pool: f.Pair, Seq: f.Seq, Class: class, Algorithm: algorithm, Bytes: f.Data.Len()}
	switch algorithm {
	case Poly1305:
		head := header('M', f.Pair, f.Seq, f.Data.Len())
		b.TagM = tag(p.Km, head, p.Keys, p.Ks, p.Kid)
		head[0] = 'S'
		b.TagS = tag(p.Ks, head, p.Keys, p.Kid)
	case SHA256, SHA3:
		b.NoPad = true
		h := newHash(algorithm)
		h.Write([]byte("Q-IPsec v1 M102"))
		h.Write(header('D', f.Pair, f.Seq, f.Data.Len())[1:])
		h.Write(f.Data.Bytes())
		h.Sum(b.Digest[:0])
	default:
		return Block{}, fmt.Errorf("kma: M102 algorithm %q is unknown", algorithm)
	}
	b.IDs = key.DeriveIDs(p.Kid, f.Pair, f.Seq, len(p.Keys)/key.MasterSize)
	if b.Keys, err = key.New(len(p.Keys)); err != nil {
		return Block{}, err
	}
	copy(b.Keys.Bytes(), p.Keys)
	return b, nil
}

// header is direction | pair | seq | length.
func header(direction byte, pair uuid.UUID, seq uint64, length int) []byte {
	b := make([]byte, 0, 1+16+8+8)
	b = append(b, direction)
	b = append(b, pair[:]...)
	b = binary.BigEndian.AppendUint64(b, seq)
	return binary.BigEndian.AppendUint64(b, uint64(length))
}

func tag(k []byte, parts ...[]byte) (out [16]byte) {
	mac := poly1305.New((*[32]byte)(k))
	for _, p := range parts {
		_, _ = mac.Write(p) // never fails
	}
	mac.Sum(out[:0])
	return out
}

func newHash(algorithm string) hash.Hash {
	if algorithm == SHA3 {
		return sha3.New256()
	}
	return sha256.New()
}

// proof is what the given side ('M' or 'S') sends in M102 for a block.
func proof(b *BlockInfo, direction byte) []byte {
	switch {
	case b.Algorithm != Poly1305:
		h := newHash(b.Algorithm)
		h.Write([]byte{direction})
		h.Write(b.Digest[:])
		return h.Sum(nil)
	case direction == 'M':
		return b.TagM[:]
	}
	return b.TagS[:]
}

// proves compares a peer's proof, in constant time.
func proves(b *BlockInfo, direction byte, got []byte) bool {
	return subtle.ConstantTimeCompare(proof(b, direction), got) == 1
}

// sameBytes reports whether two blocks of one seq came from the same key data.
func sameBytes(b *Block, i *BlockInfo) bool {
	return b.Algorithm == i.Algorithm && b.Bytes == i.Bytes &&
		subtle.ConstantTimeCompare(b.TagM[:], i.TagM[:])&subtle.ConstantTimeCompare(b.TagS[:], i.TagS[:])&
			subtle.ConstantTimeCompare(b.Digest[:], i.Digest[:]) == 1
}
