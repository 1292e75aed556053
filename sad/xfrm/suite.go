package xfrm

import "fmt"

// IANA IKEv2 transform numbers of the ESP algorithms in the table.
const (
	EncrAESCBC     uint16 = 12
	EncrAESGCM16   uint16 = 20
	EncrChaCha20   uint16 = 28
	IntegNone      uint16 = 0
	IntegSHA256128 uint16 = 12 // HMAC-SHA2-256-128
	IntegSHA384192 uint16 = 13
	IntegSHA512256 uint16 = 14
)

// Suite names the ESP transforms of an SA by their IANA IKEv2 numbers.
type Suite struct {
	Encr     uint16
	EncrBits uint16 // Key Length attribute in bits; 0 for ChaCha20-Poly1305
	Integ    uint16 // 0 for AEAD
}

// Suites is every Suite that can be installed. The caller may change the slice.
func Suites() []Suite {
	var all []Suite
	for _, bits := range []uint16{128, 192, 256} {
		all = append(all, Suite{Encr: EncrAESGCM16, EncrBits: bits})
	}
	all = append(all, Suite{Encr: EncrChaCha20})
	for _, bits := range []uint16{128, 192, 256} {
		for _, integ := range []uint16{IntegSHA256128, IntegSHA384192, IntegSHA512256} {
			all = append(all, Suite{EncrAESCBC, bits, integ})
		}
	}
	return all
}

// algorithm is what the kernel must be told of one transform.
type algorithm struct {
	iana  string // name in logs
	name  string // in the kernel's crypto API
	bytes int    // key with salt
	icv   uint32 // AEAD: ICV, integrity: truncation; in bits
}

func (s Suite) aead() bool { return s.Encr != EncrAESCBC }

// encr gives the encryption (or AEAD) algorithm.
func (s Suite) encr() (algorithm, error) {
	aes := s.EncrBits == 128 || s.EncrBits == 192 || s.EncrBits == 256
	switch {
	case s.Encr == EncrAESGCM16 && aes:
		return algorithm{fmt.Sprintf("AES_GCM_16-%d", s.EncrBits), "rfc4106(gcm(aes))", int(s.EncrBits)/8 + 4, 128}, nil
	case s.Encr == EncrChaCha20 && s.EncrBits == 0:
		return algorithm{"CHACHA20_POLY1305", "rfc7539esp(chacha20,poly1305)", 36, 128}, nil
	case s.Encr == EncrAESCBC && aes:
		return algorithm{fmt.Sprintf("AES_CBC-%d", s.EncrBits), "cbc(aes)", int(s.EncrBits) / 8, 0}, nil
	}
	return algorithm{}, fmt.Errorf("xfrm: encryption transform %d with %d-bit key: %w", s.Encr, s.EncrBits, ErrUnsupported)
}

// integ gives the integrity algorithm; the zero value for AEAD.
func (s Suite) integ() (algorithm, error) {
	if s.aead() {
		if s.Integ != IntegNone {
			return algorithm{}, fmt.Errorf("xfrm: integrity transform %d beside an AEAD: %w", s.Integ, ErrUnsupported)
		}
		return algorithm{}, nil
	}
	switch s.Integ {
	case IntegSHA256128:
		return algorithm{"HMAC_SHA2_256_128", "hmac(sha256)", 32, 128}, nil
	case IntegSHA384192:
		return algorithm{"HMAC_SHA2_384_192", "hmac(sha384)", 48, 192}, nil
	case IntegSHA512256:
		return algorithm{"HMAC_SHA2_512_256", "hmac(sha512)", 64, 256}, nil
	}
	return algorithm{}, fmt.Errorf("xfrm: integrity transform %d: %w", s.Integ, ErrUnsupported)
}

// KeySizes gives the sizes in bytes of the encryption key, with its salt for
// AEAD (RFC 4106, RFC 7634), and of the integrity key, 0 for AEAD. The error is
// ErrUnsupported.
func (s Suite) KeySizes() (enc, integ int, err error) {
	e, err := s.encr()
	if err != nil {
		return 0, 0, err
	}
	i, err := s.integ()
	if err != nil {
		return 0, 0, err
	}
	return e.bytes, i.bytes, nil
}

// String is like strongSwan's: "AES_GCM_16-256", "AES_CBC-128/HMAC_SHA2_256_128".
func (s Suite) String() string {
	e, err := s.encr()
	if err != nil {
		return fmt.Sprintf("ESP(%d-%d/%d)", s.Encr, s.EncrBits, s.Integ)
	}
	if s.Integ == IntegNone {
		return e.iana
	}
	i, err := s.integ()
	if err != nil {
		return fmt.Sprintf("%s/%d", e.iana, s.Integ)
	}
	return e.iana + "/" + i.iana
}

// suiteOf is the inverse of the kernel names and key sizes (bits, with salt).
func suiteOf(encName string, encBits uint32, authName string) (Suite, bool) {
	for _, s := range Suites() {
		e, err := s.encr()
		if err != nil || e.name != encName || uint32(e.bytes)*8 != encBits {
			continue
		}
		if i, err := s.integ(); err == nil && i.name == authName {
			return s, true
		}
	}
	return Suite{}, false
}
