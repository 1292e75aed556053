package sad

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// hexBytes is bytes written in hexadecimal.
type hexBytes []byte

func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

// vector is one entry of testdata/schedule.json, made by testdata/vectors.py.
type vector struct {
	Name, Mix, Class, Mode string
	K                      hexBytes
	KeyID                  hexBytes `json:"key_id"`
	SPIi                   hexBytes `json:"spi_i"`
	SPIr                   hexBytes `json:"spi_r"`
	IDi                    vectorID `json:"id_i"`
	IDr                    vectorID `json:"id_r"`
	Exchange               uint8
	Ni, Nr                 hexBytes
	Encr, Integ            uint16
	EncrBits               uint16 `json:"encr_bits"`
	ESN                    bool
	Keymat                 []hexBytes
	Ctx                    hexBytes
	ConfirmI               hexBytes `json:"confirm_i"`
	ConfirmR               hexBytes `json:"confirm_r"`
	SA                     []struct {
		Direction   Direction
		SPI         uint32
		Enc, Integ  hexBytes
		Fingerprint string
	}
}

type vectorID struct {
	Type uint8
	Data hexBytes
}

func (v vectorID) identity() Identity { return Identity{v.Type, v.Data} }

func vectors(t *testing.T) []vector {
	t.Helper()
	b, err := os.ReadFile("testdata/schedule.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []vector
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// material gives a Material of b, wiped at the test's end; nil if b is empty.
func material(t *testing.T, b []byte) *key.Material {
	t.Helper()
	if len(b) == 0 {
		return nil
	}
	m, err := key.Take(bytes.Clone(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	return m
}

var mixes = map[string]Mix{"classical": MixClassical, "hybrid": MixHybrid, "qkd": MixQKD}

func (v vector) suite() Suite { return Suite{Encr: v.Encr, EncrBits: v.EncrBits, Integ: v.Integ} }

func (v vector) context(t *testing.T) Context {
	t.Helper()
	c := Context{
		Mix: mixes[v.Mix], KeyID: key.ID(v.KeyID), SPIi: [8]byte(v.SPIi), SPIr: [8]byte(v.SPIr),
		Initiator: v.IDi.identity(), Responder: v.IDr.identity(), Exchange: v.Exchange, Ni: v.Ni, Nr: v.Nr,
		Suite: v.suite(), ESN: v.ESN,
	}
	if v.Class != "" {
		var err error
		if c.Class, err = key.ParseClass(v.Class); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (v vector) keymat(t *testing.T) []*key.Material {
	var all []*key.Material
	for _, c := range v.Keymat {
		all = append(all, material(t, c))
	}
	return all
}

// TestVectors compares everything with the independent implementation.
func TestVectors(t *testing.T) {
	seen := map[string]bool{}
	for _, v := range vectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			seen[v.Mix+" "+v.suite().String()] = true
			v.check(t)
		})
	}
	for _, mix := range []string{"classical", "hybrid", "qkd"} {
		for _, s := range xfrm.Suites() {
			if !seen[mix+" "+s.String()] {
				t.Errorf("no vector for %s with %v", mix, s)
			}
		}
	}
}

func (v vector) check(t *testing.T) {
	c, k := v.context(t), material(t, v.K)
	ctx, err := c.digest()
	if err != nil || !bytes.Equal(ctx, v.Ctx) {
		t.Errorf("ctx %x, %v, want %x", ctx, err, v.Ctx)
	}
	s, err := NewSession(k, v.keymat(t), c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	if c.Mix == MixClassical {
		if _, err := s.ConfirmR(); err == nil {
			t.Error("a classical session gives C_r")
		}
	} else {
		ci, err := ConfirmI(k, c.KeyID, c.SPIi, c.SPIr, c.Ni, c.Initiator, c.Exchange)
		if err != nil || !bytes.Equal(ci[:], v.ConfirmI) {
			t.Errorf("C_i %x, %v, want %x", ci, err, v.ConfirmI)
		}
		cr, err := s.ConfirmR()
		if err != nil || !bytes.Equal(cr[:], v.ConfirmR) {
			t.Errorf("C_r %x, %v, want %x", cr, err, v.ConfirmR)
		}
		if err := s.VerifyConfirmR(v.ConfirmR); err != nil {
			t.Error(err)
		}
		if err := VerifyConfirmI(v.ConfirmI, k, c.KeyID, c.SPIi, c.SPIr, c.Ni, c.Initiator, c.Exchange); err != nil {
			t.Error(err)
		}
	}
	mode := Tunnel
	if v.Mode == "transport" {
		mode = Transport
	}
	for _, sa := range v.SA {
		keys, err := s.SAKey(sa.Direction, sa.SPI, mode)
		if err != nil {
			t.Fatal(err)
		}
		defer keys.Wipe()
		if !bytes.Equal(keys.Enc.Bytes(), sa.Enc) || !bytes.Equal(keys.Integ.Bytes(), sa.Integ) {
			t.Errorf("keys of direction %d differ from the vector", sa.Direction)
		}
		if f, err := keys.Fingerprint(); err != nil || f != sa.Fingerprint {
			t.Errorf("fingerprint %s, %v, want %s", f, err, sa.Fingerprint)
		}
		if _, err := s.SAKey(sa.Direction, sa.SPI, mode); !errors.Is(err, ErrKeyUsed) {
			t.Errorf("second key of direction %d: %v, want ErrKeyUsed", sa.Direction, err)
		}
	}
	if s.prk.Len() != 0 {
		t.Error("PRK lives on after both directions were taken")
	}
}

// TestVectorsAreCurrent runs the generator where there is a Python.
func TestVectorsAreCurrent(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("no python3 here; schedule.json is compared as committed")
	}
	for script, file := range map[string]string{
		"testdata/vectors.py":       "testdata/schedule.json",
		"xfrm/testdata/messages.py": "xfrm/testdata/messages.json",
	} {
		out, err := exec.Command(python, script).Output()
		if err != nil {
			t.Fatalf("%s: %v", script, err)
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out, want) {
			t.Errorf("%s is not what %s writes", file, script)
		}
	}
}

func hybrid(t *testing.T) vector {
	t.Helper()
	for _, v := range vectors(t) {
		if strings.HasPrefix(v.Name, "hybrid-12-256-14-esn0") {
			return v
		}
	}
	t.Fatal("no such vector")
	return vector{}
}

// TestEveryInputMatters changes each input of the schedule by one bit: keys and
// C_r must differ, and so must C_i where it covers the input.
func TestEveryInputMatters(t *testing.T) {
	flip := func(b []byte) []byte { c := bytes.Clone(b); c[len(c)-1] ^= 1; return c }
	for _, tc := range []struct {
		name   string
		change func(v *vector, c *Context)
		inCI   bool
	}{
		{"K", func(v *vector, _ *Context) { v.K = flip(v.K) }, true},
		{"KEYMAT", func(v *vector, _ *Context) { v.Keymat[3] = flip(v.Keymat[3]) }, false},
		{"mix", func(_ *vector, c *Context) { c.Mix = MixQKD }, false},
		{"class", func(_ *vector, c *Context) { c.Class = key.Relayed }, false},
		{"Key-ID", func(_ *vector, c *Context) { c.KeyID[15] ^= 1 }, true},
		{"SPIi", func(_ *vector, c *Context) { c.SPIi[0] ^= 1 }, true},
		{"SPIr", func(_ *vector, c *Context) { c.SPIr[7] ^= 1 }, true},
		{"initiator", func(_ *vector, c *Context) { c.Initiator.Data = flip(c.Initiator.Data) }, true},
		{"initiator's type", func(_ *vector, c *Context) { c.Initiator.Type ^= 1 }, true},
		{"responder", func(_ *vector, c *Context) { c.Responder.Data = flip(c.Responder.Data) }, false},
		{"exchange", func(_ *vector, c *Context) { c.Exchange = 36 }, true},
		{"Ni", func(_ *vector, c *Context) { c.Ni = flip(c.Ni) }, true},
		{"Nr", func(_ *vector, c *Context) { c.Nr = flip(c.Nr) }, false},
		{"border of Ni and Nr", func(_ *vector, c *Context) { c.Ni, c.Nr = c.Ni[:40], append(bytes.Clone(c.Ni[40:]), c.Nr...) }, true},
		{"ESN", func(_ *vector, c *Context) { c.ESN = true }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := hybrid(t)
			c := v.context(t)
			tc.change(&v, &c)
			k := material(t, v.K)
			s, err := NewSession(k, v.keymat(t), c)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Wipe()
			if err := s.VerifyConfirmR(v.ConfirmR); !errors.Is(err, ErrConfirmWrong) {
				t.Errorf("C_r: %v, want ErrConfirmWrong", err)
			}
			err = VerifyConfirmI(v.ConfirmI, k, c.KeyID, c.SPIi, c.SPIr, c.Ni, c.Initiator, c.Exchange)
			if tc.inCI != errors.Is(err, ErrConfirmWrong) {
				t.Errorf("C_i: %v", err)
			}
			keys, err := s.SAKey(ItoR, v.SA[0].SPI, Tunnel)
			if err != nil {
				t.Fatal(err)
			}
			defer keys.Wipe()
			if bytes.Equal(keys.Enc.Bytes(), v.SA[0].Enc) || bytes.Equal(keys.Integ.Bytes(), v.SA[0].Integ) {
				t.Error("key is the same")
			}
		})
	}
}

// TestSAKeyInputs: SPI, mode and direction matter.
func TestSAKeyInputs(t *testing.T) {
	v := hybrid(t)
	for name, take := range map[string]func(*Session) (Keys, error){
		"SPI":       func(s *Session) (Keys, error) { return s.SAKey(ItoR, v.SA[0].SPI^1, Tunnel) },
		"mode":      func(s *Session) (Keys, error) { return s.SAKey(ItoR, v.SA[0].SPI, Transport) },
		"direction": func(s *Session) (Keys, error) { return s.SAKey(RtoI, v.SA[0].SPI, Tunnel) },
	} {
		s, err := NewSession(material(t, v.K), v.keymat(t), v.context(t))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Wipe()
		keys, err := take(s)
		if err != nil {
			t.Fatal(err)
		}
		defer keys.Wipe()
		if bytes.Equal(keys.Enc.Bytes(), v.SA[0].Enc) {
			t.Errorf("%s: key is the same", name)
		}
	}
}

func TestConfirmMissing(t *testing.T) {
	v := hybrid(t)
	c, k := v.context(t), material(t, v.K)
	s, err := NewSession(k, v.keymat(t), c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Wipe()
	for _, got := range [][]byte{nil, {}} {
		if err := s.VerifyConfirmR(got); !errors.Is(err, ErrConfirmMissing) {
			t.Errorf("C_r: %v", err)
		}
		if err := VerifyConfirmI(got, k, c.KeyID, c.SPIi, c.SPIr, c.Ni, c.Initiator, c.Exchange); !errors.Is(err, ErrConfirmMissing) {
			t.Errorf("C_i: %v", err)
		}
	}
	if err := s.VerifyConfirmR(v.ConfirmR[:31]); !errors.Is(err, ErrConfirmWrong) {
		t.Errorf("short C_r: %v", err)
	}
}

// TestSessionRefuses lists what must not become a session.
func TestSessionRefuses(t *testing.T) {
	v := hybrid(t)
	for name, change := range map[string]func(c *Context, k **key.Material, m *[]*key.Material){
		"no key":               func(_ *Context, k **key.Material, _ *[]*key.Material) { *k = nil },
		"short key":            func(_ *Context, k **key.Material, _ *[]*key.Material) { *k = material(t, make([]byte, 15)) },
		"no KEYMAT":            func(_ *Context, _ **key.Material, m *[]*key.Material) { *m = nil },
		"KEYMAT of other size": func(_ *Context, _ **key.Material, m *[]*key.Material) { *m = (*m)[:3] },
		"no Key-ID":            func(c *Context, _ **key.Material, _ *[]*key.Material) { c.KeyID = key.ID{} },
		"no class":             func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Class = 0 },
		"unknown mix":          func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Mix = 3 },
		"classical with key":   func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Mix, c.KeyID, c.Class = 0, key.ID{}, 0 },
		"classical with ID":    func(c *Context, k **key.Material, _ *[]*key.Material) { c.Mix, *k = 0, nil },
		"no identity":          func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Responder = Identity{} },
		"short nonce":          func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Nr = c.Nr[:15] },
		"exchange":             func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Exchange = 34 },
		"suite":                func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Suite.Integ = 2 },
		"huge identity":        func(c *Context, _ **key.Material, _ *[]*key.Material) { c.Initiator.Data = make([]byte, 1<<16) },
	} {
		c, k, m := v.context(t), material(t, v.K), v.keymat(t)
		change(&c, &k, &m)
		if s, err := NewSession(k, m, c); err == nil {
			s.Wipe()
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestWipedSessionGivesNoKey(t *testing.T) {
	v := hybrid(t)
	s, err := NewSession(material(t, v.K), v.keymat(t), v.context(t))
	if err != nil {
		t.Fatal(err)
	}
	s.Wipe()
	s.Wipe()
	if _, err := s.SAKey(ItoR, 0x1000, Tunnel); !errors.Is(err, ErrKeyUsed) {
		t.Errorf("after Wipe: %v", err)
	}
}
