package key

import (
	"bytes"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
)

// secret has no byte pattern that an address or a length could show by chance.
var secret = []byte("\xa7\x5c\xe1\x93\xb8\x4d\xf2\x66\x9e\x3b\xc5\x71\xd8\x2f\x8a\xe4" +
	"\xb3\x57\xcc\x98\x6d\xf5\x82\xab\xde\x49\xb7\x95\xea\x73\xd1\x86")

func take(t testing.TB, b []byte) *Material {
	t.Helper()
	m, err := Take(bytes.Clone(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	return m
}

// leaks says which spelling of three neighbouring bytes of secret out holds.
func leaks(out string) string {
	low := strings.ToLower(out)
	for i := 0; i+3 <= len(secret); i++ {
		b := secret[i : i+3]
		for _, form := range []string{
			string(b), hex.EncodeToString(b), fmt.Sprintf("% x", b), strings.ToLower(fmt.Sprintf("%#v", b[0])) + ", " + fmt.Sprintf("%#v", b[1]),
			fmt.Sprintf("%d %d %d", b[0], b[1], b[2]), fmt.Sprintf("%d,%d,%d", b[0], b[1], b[2]),
			strings.Trim(fmt.Sprintf("%q", b), `"`), fmt.Sprintf("%b %b", b[0], b[1]), fmt.Sprintf("%o %o", b[0], b[1]),
		} {
			if strings.Contains(out, form) || strings.Contains(low, form) {
				return form
			}
		}
	}
	return ""
}

func TestLeaksFindsWhatPrintersWrite(t *testing.T) {
	for _, f := range []string{"%v", "%s", "%x", "%X", "% x", "%q", "%d", "%#v", "%b", "%o"} {
		if leaks(fmt.Sprintf(f, secret)) == "" {
			t.Errorf("%s of the bare bytes was not recognised: the tests below would prove nothing", f)
		}
	}
}

type exported struct{ K *Material }

type unexported struct{ k *Material }

func TestNoFmtVerbShowsBytes(t *testing.T) {
	m := take(t, secret)
	// Copies of the struct, as a careless caller would make them (go vet refuses
	// it; reflection and generated code do not ask vet).
	type byValue struct{ K Material }
	var v byValue
	v.K.p, v.K.n = m.p, m.n
	values := map[string]any{
		"pointer": m, "exported field": exported{m}, "pointer to struct": &exported{m}, "unexported field": unexported{m},
		"pointer to unexported": &unexported{m}, "slice": []*Material{m}, "map": map[string]*Material{"k": m}, "copy": &v,
		"error": fmt.Errorf("with %v and %x", m, m),
	}
	for verb := 'A'; verb <= 'z'; verb++ {
		if verb > 'Z' && verb < 'a' {
			continue
		}
		for _, flags := range []string{"", "+", "#", " ", "-", "0", "+#", "40", ".3", "# "} {
			for name, val := range values {
				format := "%" + flags + string(verb)
				out := fmt.Sprintf(format, val)
				if form := leaks(out); form != "" {
					t.Fatalf("%s of %s shows %q: %s", format, name, form, out)
				}
				// fmt answers %T, %p and (outside Errorf) %w without asking the value.
				if name == "pointer" && !strings.ContainsRune("Tpw", verb) && out != redacted {
					t.Fatalf("%s = %q, want %q", format, out, redacted)
				}
			}
		}
	}
	if s := m.String() + m.GoString(); s != redacted+redacted {
		t.Errorf("String and GoString = %q", s)
	}
}

func TestNoLoggerShowsBytes(t *testing.T) {
	m := take(t, secret)
	var buf bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&buf, nil), slog.NewJSONHandler(&buf, nil)} {
		l := slog.New(h)
		l.Info("m", "key", m, slog.Group("g", "key", m), "in", exported{m}, "hidden", unexported{m}, "list", []any{m})
		l.With("key", m).Info("m")
	}
	if form := leaks(buf.String()); form != "" {
		t.Fatalf("shows %q: %s", form, buf.String())
	}
	if n := strings.Count(buf.String(), redacted); n < 6 {
		t.Errorf("redacted %d times, want at least 6: %s", n, buf.String())
	}
}

func TestEncodersFail(t *testing.T) {
	m := take(t, secret)
	encoders := map[string]func(w io.Writer, v any) error{
		"json": func(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) },
		"gob":  func(w io.Writer, v any) error { return gob.NewEncoder(w).Encode(v) },
		"xml":  func(w io.Writer, v any) error { return xml.NewEncoder(w).Encode(v) },
	}
	for name, enc := range encoders {
		for _, v := range []any{m, exported{m}} {
			var buf bytes.Buffer
			err := enc(&buf, v)
			if !errors.Is(err, ErrPrinted) {
				t.Errorf("%s of %T: error %v, want ErrPrinted", name, v, err)
			}
			if leaks(buf.String()) != "" {
				t.Errorf("%s of %T leaks", name, v)
			}
		}
	}
	for name, f := range map[string]func() ([]byte, error){"text": m.MarshalText, "binary": m.MarshalBinary, "json": m.MarshalJSON} {
		if b, err := f(); b != nil || !errors.Is(err, ErrPrinted) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

func TestTakeMovesAndWipes(t *testing.T) {
	b := bytes.Clone(secret)
	m, err := Take(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.Bytes(), secret) || m.Len() != len(secret) {
		t.Error("the Material does not hold the bytes taken")
	}
	if !bytes.Equal(b, make([]byte, len(b))) {
		t.Error("Take left the caller's buffer as it was")
	}
	held := m.Bytes()
	m.Wipe()
	m.Wipe()
	if m.Bytes() != nil || m.Len() != 0 || m.Fingerprint() != "" || m.Equal(m) {
		t.Error("a wiped Material still answers")
	}
	if !bytes.Equal(held, make([]byte, len(held))) {
		t.Error("Wipe left bytes in the slot")
	}
	if _, err := m.Clone(); err == nil {
		t.Error("a wiped Material could be cloned")
	}
	var none *Material
	none.Wipe()
	if none.Bytes() != nil || none.Len() != 0 {
		t.Error("a nil Material has bytes")
	}
	big := make([]byte, MaxMaterial+1)
	big[7] = 7
	if _, err := Take(big); err == nil || big[7] != 0 {
		t.Errorf("Take of too much: error %v, buffer wiped %v", err, big[7] == 0)
	}
	if _, err := New(0); err == nil {
		t.Error("New(0) succeeded")
	}
}

func TestRandom(t *testing.T) {
	m, err := Random(bytes.NewReader(secret), 32)
	if err != nil || !bytes.Equal(m.Bytes(), secret) {
		t.Fatalf("%v", err)
	}
	m.Wipe()
	fault := errors.New("no entropy")
	if m, err := Random(io.MultiReader(bytes.NewReader(secret[:5]), iotest.ErrReader(fault)), 32); m != nil || !errors.Is(err, fault) {
		t.Errorf("Random with a failing source = %v, %v", m, err)
	}
}

func TestCloneEqualFingerprint(t *testing.T) {
	m := take(t, secret)
	c, err := m.Clone()
	if err != nil {
		t.Fatal(err)
	}
	if !m.Equal(c) || m.Fingerprint() != c.Fingerprint() {
		t.Error("a clone differs")
	}
	c.Bytes()[31] ^= 1
	if m.Equal(c) || m.Fingerprint() == c.Fingerprint() || m.Bytes()[31] != secret[31] {
		t.Error("a clone shares memory with its origin, or one bit goes unseen")
	}
	c.Wipe()
	if m.Equal(c) || c.Equal(m) {
		t.Error("a wiped Material equals one that is not")
	}
	// HMAC-SHA-256(secret, "Q-IPsec v1 fingerprint").
	if got, want := m.Fingerprint(), fingerprintVector; got != want {
		t.Errorf("Fingerprint = %s, want %s", got, want)
	}
}

// Every slot that New gives is zero over its whole size, whatever its last
// owner wrote, and an append to Bytes cannot reach the slot's rest.
func TestSlotsComeBackZero(t *testing.T) {
	sizes := []int{1, 31, 32, 33, 64, 100, 128, 200, 512, 1000, 2048, 4096, 4097, 10000, 65536}
	for round := range 3 {
		var held []*Material
		for _, n := range sizes {
			for range 20 {
				m, err := New(n)
				if err != nil {
					t.Fatal(err)
				}
				if m.Len() != n || cap(m.Bytes()) != n {
					t.Fatalf("New(%d): len %d, cap %d", n, m.Len(), cap(m.Bytes()))
				}
				for _, b := range m.Bytes() {
					if b != 0 {
						t.Fatalf("round %d: New(%d) gave bytes of an earlier owner", round, n)
					}
				}
				for i := range m.Bytes() {
					m.Bytes()[i] = 0xee
				}
				_ = append(m.Bytes(), 0xdd, 0xdd) // must copy
				held = append(held, m)
			}
		}
		for _, m := range held {
			m.Wipe()
		}
	}
	slots.mu.Lock()
	defer slots.mu.Unlock()
	for i, idle := range slots.idle {
		for _, b := range idle {
			if cap(b) != minSlot<<i {
				t.Fatalf("an idle slot of list %d has %d bytes", i, cap(b))
			}
			if !bytes.Equal(b[:cap(b)], make([]byte, cap(b))) {
				t.Fatalf("an idle slot of %d bytes is not zero", cap(b))
			}
		}
	}
}

// Two owners never hold the same slot, and a forgotten Material is wiped by
// the garbage collector, not handed out before.
func TestSlotsUnderConcurrency(t *testing.T) {
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				m, err := New(1 + (i*37+g)%300)
				if err != nil {
					t.Error(err)
					return
				}
				for j := range m.Bytes() {
					if m.Bytes()[j] != 0 {
						t.Error("a slot was not zero")
						return
					}
					m.Bytes()[j] = byte(g + 1)
				}
				if i%100 == 0 {
					runtime.Gosched()
				}
				for _, b := range m.Bytes() {
					if b != byte(g+1) {
						t.Error("another goroutine wrote into our slot")
						return
					}
				}
				if i%7 != 0 {
					m.Wipe()
				}
			}
		})
	}
	runtime.GC()
	wg.Wait()
}

func TestFinalizerWipes(t *testing.T) {
	held := func() []byte {
		m, err := Take(bytes.Clone(secret))
		if err != nil {
			t.Fatal(err)
		}
		return m.Bytes()
	}()
	for range 200 {
		runtime.GC()
		slots.mu.Lock()
		zero := bytes.Equal(held, make([]byte, len(held)))
		slots.mu.Unlock()
		if zero {
			return
		}
		runtime.Gosched()
	}
	t.Error("a Material that nobody holds was never wiped")
}
