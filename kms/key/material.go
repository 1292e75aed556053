package key

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync/atomic"
	"unsafe"
)

// ErrPrinted is what every encoder gets that tries to marshal key bytes.
var ErrPrinted = errors.New("key: material cannot be marshalled")

// redacted is all that any printer ever sees of a Material.
const redacted = "[key redacted]"

// Material is secret bytes of fixed length in memory outside the Go heap:
// locked (mlock), left out of core dumps, never moved or copied by the garbage
// collector. Whoever gets a Material owns it and calls Wipe, unless a docstring
// says that it is borrowed. No printer, logger or encoder can show its bytes.
//
// A Material is safe for one goroutine at a time; Wipe may be called twice.
type Material struct {
	// A pointer, not a slice: where a printer gets hold of a copied struct and
	// so finds none of the methods below, it can show an address, no byte.
	p     *byte
	n     int // size in bytes
	wiped atomic.Bool
}

// New gives n zero bytes. It fails if the process may not lock more memory
// (RLIMIT_MEMLOCK) or n is not between 1 and MaxMaterial.
func New(n int) (*Material, error) {
	b, err := slots.alloc(n)
	if err != nil {
		return nil, fmt.Errorf("key: allocate %d bytes of locked memory: %w", n, err)
	}
	m := &Material{p: unsafe.SliceData(b), n: n}
	// The last resort for an owner that forgot; Wipe is still every owner's duty.
	runtime.SetFinalizer(m, (*Material).Wipe)
	return m, nil
}

// Take moves b into a new Material and wipes b, also when it fails.
func Take(b []byte) (*Material, error) {
	defer clear(b)
	m, err := New(len(b))
	if err != nil {
		return nil, err
	}
	copy(m.Bytes(), b)
	return m, nil
}

// Random gives n bytes read from r, which is crypto/rand.Reader or a QRNG.
func Random(r io.Reader, n int) (*Material, error) {
	m, err := New(n)
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(r, m.Bytes()); err != nil {
		m.Wipe()
		return nil, fmt.Errorf("key: read random bytes: %w", err)
	}
	return m, nil
}

// Bytes is the secret itself, borrowed: it is valid until Wipe, must not be
// kept, and a copy of it must be wiped by the one who made it. Appending to it
// copies (it has no spare capacity). It is nil after Wipe and for a nil
// Material.
func (m *Material) Bytes() []byte {
	if m == nil || m.wiped.Load() {
		return nil
	}
	return unsafe.Slice(m.p, m.n)
}

// Len is the size in bytes, 0 after Wipe.
func (m *Material) Len() int { return len(m.Bytes()) }

// Clone gives a second Material with the same bytes, owned by the caller.
func (m *Material) Clone() (*Material, error) {
	c, err := New(m.Len())
	if err != nil {
		return nil, err
	}
	copy(c.Bytes(), m.Bytes())
	runtime.KeepAlive(m)
	return c, nil
}

// Equal compares in constant time. Wiped Materials equal nothing.
func (m *Material) Equal(o *Material) bool {
	eq := m.Len() > 0 && subtle.ConstantTimeCompare(m.Bytes(), o.Bytes()) == 1
	runtime.KeepAlive(m)
	runtime.KeepAlive(o)
	return eq
}

// Fingerprint is 16 hexadecimal digits by which two ends may compare a key in
// a log: the first 8 bytes of HMAC-SHA-256(key, "Q-IPsec v1 fingerprint").
// Meant for keys of full entropy only; empty after Wipe.
func (m *Material) Fingerprint() string {
	if m.Len() == 0 {
		return ""
	}
	mac := hmac.New(sha256.New, m.Bytes())
	mac.Write([]byte("Q-IPsec v1 fingerprint"))
	runtime.KeepAlive(m)
	return hex.EncodeToString(mac.Sum(nil)[:8])
}

// Wipe overwrites the bytes and gives the memory back. It may be called again
// and on nil.
func (m *Material) Wipe() {
	if m == nil || m.wiped.Swap(true) {
		return
	}
	runtime.SetFinalizer(m, nil)
	slots.free(unsafe.Slice(m.p, m.n))
	m.p = nil
}

// String shows no byte of the key; nor do the methods below.
func (m *Material) String() string { return redacted }

// GoString keeps %#v from walking the struct.
func (m *Material) GoString() string { return redacted }

// Format keeps every fmt verb, %x and %p among them, from the bytes.
func (m *Material) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue redacts in slog.
func (m *Material) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON fails with ErrPrinted: the few places that must send a key do it
// by hand and wipe their buffer.
func (m *Material) MarshalJSON() ([]byte, error) { return nil, ErrPrinted }

// MarshalText fails with ErrPrinted.
func (m *Material) MarshalText() ([]byte, error) { return nil, ErrPrinted }

// MarshalBinary fails with ErrPrinted (gob uses it).
func (m *Material) MarshalBinary() ([]byte, error) { return nil, ErrPrinted }
