package ike

import (
	"bytes"
	"fmt"
	"io"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Sizes of Ni, in bytes: random(32) | magic(8) | Key-ID(16). 32 random bytes are
// half the key of the largest PRF (RFC 7296 section 2.10); the Key-ID is public
// and does not count. They come first because AES-XCBC and AES-CMAC PRFs key
// with the first 8 bytes of a nonce only.
const (
	NonceSize   = nonceRandom + len(nonceMagic) + len(key.ID{})
	nonceRandom = 32
	nonceMagic  = "Q-IPsec\x01"
)

// BuildNonce gives an Ni that carries id, with 32 bytes read from random.
func BuildNonce(random io.Reader, id key.ID) ([]byte, error) {
	ni := make([]byte, nonceRandom, NonceSize)
	if _, err := io.ReadFull(random, ni); err != nil {
		return nil, fmt.Errorf("ike: random part of Ni: %w", err)
	}
	ni = append(ni, nonceMagic...)
	return append(ni, id[:]...), nil
}

// ParseNonce gives the Key-ID that ni carries; ok is false for a nonce without
// one, such as any stock implementation's.
func ParseNonce(ni []byte) (id key.ID, ok bool) {
	if len(ni) != NonceSize || !bytes.Equal(ni[nonceRandom:nonceRandom+len(nonceMagic)], []byte(nonceMagic)) {
		return key.ID{}, false
	}
	copy(id[:], ni[nonceRandom+len(nonceMagic):])
	return id, !id.IsZero()
}
