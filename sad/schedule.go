package sad

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// The labels of the key schedule. They and the numbers below are part of the
// protocol between two gateways and never change within version 1.
const (
	labelSession  = "Q-IPsec v1 session"
	labelContext  = "Q-IPsec v1 ctx"
	labelMix      = "mix"
	labelConfirmI = "confirm i"
	labelConfirmR = "confirm r"
	labelESP      = "esp"
)

// ConfirmSize is the size in bytes of C_i and C_r.
const ConfirmSize = 32

const hashSize = sha512.Size

// Errors of the key schedule. They name no secret.
var (
	ErrConfirmMissing = errors.New("sad: the peer sent no key confirmation")
	ErrConfirmWrong   = errors.New("sad: key confirmation differs: the two ends do not hold the same quantum key, or the exchange was changed on its way")
	ErrKeyUsed        = errors.New("sad: the key of this direction was taken already")
)

// Mix says what the ESP keys are made of. The numbers are part of the context.
type Mix uint8

// The mixes (docs/key-schedule.md).
const (
	MixClassical Mix = 0 // KEYMAT alone: the fallback of policy optional
	MixHybrid    Mix = 1 // KEYMAT and the QKD key: secret if either is
	MixQKD       Mix = 2 // the QKD key alone, as in the paper
)

// String is the name used in configuration and logs.
func (m Mix) String() string {
	switch m {
	case MixClassical:
		return "classical"
	case MixHybrid:
		return "hybrid"
	case MixQKD:
		return "qkd"
	}
	return fmt.Sprintf("mix(%d)", uint8(m))
}

// Direction of an SA within its CHILD_SA.
type Direction uint8

// The directions, as numbered in the key schedule. I is the initiator of the
// exchange that made the CHILD_SA, not of the IKE_SA.
const (
	ItoR Direction = 0
	RtoI Direction = 1
)

// Identity is an IKE identity as in an ID payload: type, then data (RFC 7296
// section 3.5).
type Identity struct {
	Type uint8
	Data []byte
}

func (i Identity) encode() []byte { return append([]byte{i.Type}, i.Data...) }

// Context is everything public that a Session's keys depend on. Both ends must
// fill it with the same values.
type Context struct {
	Mix                  Mix
	Class                key.Class // of the QKD key; 0 for MixClassical
	KeyID                key.ID    // zero for MixClassical
	SPIi, SPIr           [8]byte   // of the IKE_SA the exchange runs in, in its order
	Initiator, Responder Identity  // of the exchange, authenticated
	Exchange             uint8     // IKEv2 exchange type: 35 or 36
	Ni, Nr               []byte    // whole nonces
	Suite                Suite
	ESN                  bool
}

// fields joins byte strings so that no two lists give the same bytes: each is
// preceded by its length as u16, big-endian.
func fields(list ...[]byte) ([]byte, error) {
	var out []byte
	for _, f := range list {
		if len(f) > math.MaxUint16 {
			return nil, fmt.Errorf("sad: key schedule: a field of %d bytes exceeds 65535", len(f))
		}
		out = binary.BigEndian.AppendUint16(out, uint16(len(f)))
		out = append(out, f...)
	}
	return out, nil
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// transforms is the field "ESP transforms": IKE protocol number 3, encr, key
// length in bits, integ, ESN.
func (c Context) transforms() []byte {
	b := []byte{3}
	b = binary.BigEndian.AppendUint16(b, c.Suite.Encr)
	b = binary.BigEndian.AppendUint16(b, c.Suite.EncrBits)
	b = binary.BigEndian.AppendUint16(b, c.Suite.Integ)
	return append(b, flag(c.ESN))
}

// digest is ctx, 64 bytes.
func (c Context) digest() ([]byte, error) {
	in, err := fields([]byte(labelContext), []byte{byte(c.Mix)}, []byte{byte(c.Class)}, c.KeyID[:],
		c.SPIi[:], c.SPIr[:], c.Initiator.encode(), c.Responder.encode(),
		[]byte{c.Exchange}, c.Ni, c.Nr, c.transforms())
	if err != nil {
		return nil, err
	}
	sum := sha512.Sum512(in)
	return sum[:], nil
}

func (c Context) check() error {
	if c.Exchange != 35 && c.Exchange != 36 {
		return fmt.Errorf("sad: key schedule: exchange type %d is neither IKE_AUTH (35) nor CREATE_CHILD_SA (36)", c.Exchange)
	}
	if len(c.Ni) < 16 || len(c.Nr) < 16 {
		return errors.New("sad: key schedule: a nonce has less than 16 bytes (RFC 7296 section 3.9)")
	}
	if len(c.Initiator.Data) == 0 || len(c.Responder.Data) == 0 {
		return errors.New("sad: key schedule: an identity is empty")
	}
	if _, _, err := c.Suite.KeySizes(); err != nil {
		return err
	}
	switch c.Mix {
	case MixClassical:
		if !c.KeyID.IsZero() || c.Class != 0 {
			return errors.New("sad: key schedule: a classical session names a quantum key")
		}
	case MixHybrid, MixQKD:
		if c.KeyID.IsZero() {
			return errors.New("sad: key schedule: no Key-ID")
		}
		if c.Class < key.Derived || c.Class > key.Direct {
			return fmt.Errorf("sad: key schedule: key class %d is unknown", c.Class)
		}
	default:
		return fmt.Errorf("sad: key schedule: %v is unknown", c.Mix)
	}
	return nil
}

// extract is HKDF-Extract (RFC 5869) with SHA-512, into locked memory.
func extract(salt []byte, ikm *key.Material) (*key.Material, error) {
	prk, err := hkdf.Extract(sha512.New, ikm.Bytes(), salt)
	runtime.KeepAlive(ikm)
	if err != nil {
		return nil, fmt.Errorf("sad: HKDF-Extract: %w", err)
	}
	return key.Take(prk)
}

// expand is HKDF-Expand with SHA-512, into locked memory.
func expand(prk *key.Material, n int, info ...[]byte) (*key.Material, error) {
	in, err := fields(info...)
	if err != nil {
		return nil, err
	}
	out, err := hkdf.Expand(sha512.New, prk.Bytes(), string(in), n)
	runtime.KeepAlive(prk)
	if err != nil {
		return nil, fmt.Errorf("sad: HKDF-Expand: %w", err)
	}
	return key.Take(out)
}

// confirm is HMAC-SHA-512 under Expand(prk, label, 64), cut to ConfirmSize.
func confirm(prk *key.Material, label string, data ...[]byte) (c [ConfirmSize]byte, err error) {
	k, err := expand(prk, hashSize, []byte(label))
	if err != nil {
		return c, err
	}
	defer k.Wipe()
	in, err := fields(data...)
	if err != nil {
		return c, err
	}
	mac := hmac.New(sha512.New, k.Bytes())
	mac.Write(in)
	runtime.KeepAlive(k)
	copy(c[:], mac.Sum(nil))
	return c, nil
}

func verify(got []byte, want [ConfirmSize]byte) error {
	if len(got) == 0 {
		return ErrConfirmMissing
	}
	if subtle.ConstantTimeCompare(got, want[:]) != 1 {
		return ErrConfirmWrong
	}
	return nil
}

// ConfirmI gives C_i, by which the exchange initiator shows the responder that
// it holds k. initiator is the identity of the exchange initiator; in IKE_AUTH
// that of the IDi payload in the first IKE_AUTH message. SPIs are in the
// IKE_SA's order. k (the QKD session key, at least 16 bytes) is borrowed.
func ConfirmI(k *key.Material, id key.ID, spiI, spiR [8]byte, ni []byte, initiator Identity, exchange uint8) ([ConfirmSize]byte, error) {
	kx, err := session(k)
	if err != nil {
		return [ConfirmSize]byte{}, err
	}
	defer kx.Wipe()
	return confirm(kx, labelConfirmI, id[:], spiI[:], spiR[:], ni, initiator.encode(), []byte{exchange})
}

// VerifyConfirmI compares got with ConfirmI of the same arguments in constant
// time: ErrConfirmMissing if got is empty, ErrConfirmWrong if it differs.
func VerifyConfirmI(got []byte, k *key.Material, id key.ID, spiI, spiR [8]byte, ni []byte, initiator Identity, exchange uint8) error {
	want, err := ConfirmI(k, id, spiI, spiR, ni, initiator, exchange)
	if err != nil {
		return err
	}
	return verify(got, want)
}

// session is Kx.
func session(k *key.Material) (*key.Material, error) {
	if k.Len() < 16 {
		return nil, fmt.Errorf("sad: key schedule: a QKD key of %d bytes; at least 16 are needed", k.Len())
	}
	return extract([]byte(labelSession), k)
}

// Session holds the PRK of one CHILD_SA. It gives the key of each direction
// once and wipes the PRK after the second. It may be used from several
// goroutines; its owner calls Wipe when the CHILD_SA will not be made.
type Session struct {
	mu       sync.Mutex
	prk      *key.Material
	taken    [2]bool
	context  Context // Ni, Nr and identities are not kept
	confirmR [ConfirmSize]byte
}

// NewSession makes the Session of a CHILD_SA. k is the QKD session key and
// keymat are charon's four chunks in KEYMAT order (encr i->r, integ i->r, encr
// r->i, integ r->i; nil where the algorithm has none). All are borrowed: the
// caller wipes them. k must be nil for MixClassical; keymat is not used for
// MixQKD.
func NewSession(k *key.Material, keymat []*key.Material, c Context) (*Session, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.Mix == MixClassical && k != nil {
		return nil, errors.New("sad: key schedule: a quantum key for a classical session")
	}
	ctx, err := c.digest()
	if err != nil {
		return nil, err
	}
	ikm, err := mix(k, keymat, c)
	if err != nil {
		return nil, err
	}
	defer ikm.Wipe()
	prk, err := extract(ctx, ikm)
	if err != nil {
		return nil, err
	}
	s := &Session{prk: prk, context: Context{Mix: c.Mix, Suite: c.Suite, ESN: c.ESN}}
	if c.Mix != MixClassical {
		if s.confirmR, err = confirm(prk, labelConfirmR, ctx); err != nil {
			prk.Wipe()
			return nil, err
		}
	}
	return s, nil
}

// mix is the IKM of the PRK: KEYMAT (not for MixQKD), then 64 bytes expanded
// from Kx (not for MixClassical).
func mix(k *key.Material, keymat []*key.Material, c Context) (*key.Material, error) {
	var parts []*key.Material
	if c.Mix != MixQKD {
		enc, integ, err := c.Suite.KeySizes()
		if err != nil {
			return nil, err
		}
		got := 0
		for _, m := range keymat {
			got += m.Len()
		}
		if want := 2 * (enc + integ); got != want {
			return nil, fmt.Errorf("sad: key schedule: KEYMAT has %d bytes, %v takes %d", got, c.Suite, want)
		}
		parts = append(parts, keymat...)
	}
	if c.Mix != MixClassical {
		kx, err := session(k)
		if err != nil {
			return nil, err
		}
		defer kx.Wipe()
		part, err := expand(kx, hashSize, []byte(labelMix))
		if err != nil {
			return nil, err
		}
		defer part.Wipe()
		parts = append(parts, part)
	}
	return concat(parts...)
}

// concat joins borrowed Materials; nil ones add nothing.
func concat(parts ...*key.Material) (*key.Material, error) {
	n := 0
	for _, p := range parts {
		n += p.Len()
	}
	out, err := key.New(n)
	if err != nil {
		return nil, err
	}
	at := out.Bytes()
	for _, p := range parts {
		at = at[copy(at, p.Bytes()):]
		runtime.KeepAlive(p)
	}
	return out, nil
}

// ConfirmR gives C_r, by which the exchange responder shows that it holds the
// same keys and context. A classical session has none.
func (s *Session) ConfirmR() ([ConfirmSize]byte, error) {
	if s.context.Mix == MixClassical {
		return [ConfirmSize]byte{}, errors.New("sad: a classical session has no key confirmation")
	}
	return s.confirmR, nil
}

// VerifyConfirmR compares got with ConfirmR in constant time: ErrConfirmMissing
// if got is empty, ErrConfirmWrong if it differs.
func (s *Session) VerifyConfirmR(got []byte) error {
	want, err := s.ConfirmR()
	if err != nil {
		return err
	}
	return verify(got, want)
}

// Mix is what the Session's keys are made of.
func (s *Session) Mix() Mix { return s.context.Mix }

// Keys are the final keys of one SA. Integ is nil for AEAD.
type Keys struct {
	Enc   *key.Material // for AEAD with the salt at its end
	Integ *key.Material
}

// Wipe wipes both. It may be called again and on the zero Keys.
func (k Keys) Wipe() {
	k.Enc.Wipe()
	k.Integ.Wipe()
}

// Fingerprint is key.Material's Fingerprint of Enc | Integ, by which two ends
// may compare the keys of an SA.
func (k Keys) Fingerprint() (string, error) {
	m, err := concat(k.Enc, k.Integ)
	if err != nil {
		return "", fmt.Errorf("sad: fingerprint: %w", err)
	}
	defer m.Wipe()
	return m.Fingerprint(), nil
}

// SAKey derives the keys of the SA (dir, spi, mode), which the caller owns and
// wipes. spi is in host order. Each direction is given once (ErrKeyUsed): two
// SAs with one key would repeat the IVs of AES-GCM (RFC 4106 section 10).
func (s *Session) SAKey(dir Direction, spi uint32, mode Mode) (Keys, error) {
	if dir > RtoI {
		return Keys{}, fmt.Errorf("sad: key schedule: direction %d is unknown", dir)
	}
	enc, integ, err := s.context.Suite.KeySizes()
	if err != nil {
		return Keys{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken[dir] || s.prk.Len() == 0 {
		return Keys{}, ErrKeyUsed
	}
	s.taken[dir] = true
	c := s.context
	var b [8]byte
	binary.BigEndian.PutUint16(b[0:], c.Suite.Encr)
	binary.BigEndian.PutUint16(b[2:], c.Suite.EncrBits)
	binary.BigEndian.PutUint16(b[4:], c.Suite.Integ)
	out, err := expand(s.prk, enc+integ, []byte(labelESP), []byte{byte(dir)}, []byte{ProtoESP},
		binary.BigEndian.AppendUint32(nil, spi), b[0:2], b[2:4], b[4:6], []byte{flag(c.ESN)}, []byte{byte(mode)})
	if s.taken[0] && s.taken[1] {
		s.prk.Wipe()
	}
	if err != nil {
		return Keys{}, err
	}
	defer out.Wipe()
	return split(out, enc)
}

// split gives the first enc bytes of m and the rest as Materials of their own.
func split(m *key.Material, enc int) (Keys, error) {
	var k Keys
	var err error
	if k.Enc, err = key.New(enc); err != nil {
		return Keys{}, err
	}
	copy(k.Enc.Bytes(), m.Bytes())
	if m.Len() > enc {
		if k.Integ, err = key.New(m.Len() - enc); err != nil {
			k.Wipe()
			return Keys{}, err
		}
		copy(k.Integ.Bytes(), m.Bytes()[enc:])
	}
	runtime.KeepAlive(m)
	return k, nil
}

// Wipe ends the Session. It may be called again and on nil.
func (s *Session) Wipe() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prk.Wipe()
}
