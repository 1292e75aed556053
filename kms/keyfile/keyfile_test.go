package keyfile

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

var (
	pairID = uuid.MustParse("6d7b2a3e-6a0e-4c3b-9b1e-0f1e2d3c4b5a")
	devA   = uuid.MustParse("0189a1b2-c3d4-8e5f-8a6b-7c8d9e0f1a2b")
	devB   = uuid.MustParse("0189a1b2-c3d4-8e5f-8a6b-7c8d9e0f1a2c")
)

// sample is a file whose key data starts with 0, 1, 2, ...
func sample(t testing.TB, keys int) *File {
	t.Helper()
	m, err := key.New(keys*key.MasterSize + Trailer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	for i := range m.Bytes() {
		m.Bytes()[i] = byte(i)
	}
	return &File{Header: Header{
		Pair: pairID, QKD: devA, PeerQKD: devB, Role: key.Master, Seq: 7,
		Created: time.Date(2026, 11, 22, 9, 0, 0, 5000, time.UTC), QBER: 0.021, HashAlgorithm: SHA256,
	}, Data: m}
}

func text(t testing.TB, f *File) []byte {
	t.Helper()
	m, err := Encode(f)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Wipe()
	return bytes.Clone(m.Bytes())
}

func TestRoundTrip(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 200 {
		f := sample(t, 1+r.IntN(40))
		f.Seq = 1 + r.Uint64N(key.MaxSeq)
		f.QBER = r.Float64()
		f.Created = time.Unix(r.Int64N(1<<32), r.Int64N(1e9)).UTC()
		f.Role = key.Role(1 + r.IntN(2))
		f.HashAlgorithm = []string{SHA256, SHA3_256}[r.IntN(2)]
		for i := range f.Data.Bytes() {
			f.Data.Bytes()[i] = byte(r.Uint32())
		}
		in := text(t, f)
		got, _, err := Decode(in, DefaultMaxSize)
		if err != nil {
			t.Fatalf("decode what Encode gave: %v", err)
		}
		if got.Header != f.Header || !got.Data.Equal(f.Data) {
			t.Fatalf("got %+v, want %+v, or the data differs", got.Header, f.Header)
		}
		got.Wipe()
		if !bytes.Equal(in, make([]byte, len(in))) {
			t.Fatal("Decode left text behind")
		}
	}
}

// TestText pins the text itself: files of today must be read by every later
// version and by other vendors' writers.
func TestText(t *testing.T) {
	f := sample(t, 1)
	sum := sha256.Sum256(f.Data.Bytes())
	want := `{"version":1,"qkd_pair_id":"6d7b2a3e-6a0e-4c3b-9b1e-0f1e2d3c4b5a","qkd_id":"0189a1b2-c3d4-8e5f-8a6b-7c8d9e0f1a2b",` +
		`"peer_qkd_id":"0189a1b2-c3d4-8e5f-8a6b-7c8d9e0f1a2c","role":"master","seq":7,"created":"2026-11-22T09:00:00.000005Z",` +
		`"qber":0.021,"key_length":128,"hash_algorithm":"sha-256","hash":"` + hex.EncodeToString(sum[:]) +
		`","key_data":"` + base64.StdEncoding.EncodeToString(f.Data.Bytes()) + "\"}\n"
	if got := string(text(t, f)); got != want {
		t.Fatalf("got  %s\nwant %s", got, want)
	}
}

func TestDecodeLiberalInWhitespaceAndSlashes(t *testing.T) {
	f := sample(t, 3)
	for i := range f.Data.Bytes() {
		f.Data.Bytes()[i] = 0xff // all slashes in Base64
	}
	s := string(text(t, f))
	s = strings.ReplaceAll(s, "/", `\/`)
	s = strings.ReplaceAll(s, `":`, "\" \n\t:\r ")
	s = strings.ReplaceAll(s, `,"`, " ,\n\"")
	got, _, err := Decode([]byte(s), DefaultMaxSize)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !got.Data.Equal(f.Data) {
		t.Fatal("key data differs")
	}
}

// edit replaces old, which must be there, in the sample's text.
func edit(t *testing.T, old, repl string) []byte {
	t.Helper()
	s := string(text(t, sample(t, 1)))
	if strings.Count(s, old) != 1 {
		t.Fatalf("%q is not in the text once", old)
	}
	return []byte(strings.Replace(s, old, repl, 1))
}

// base64Text is the text with key data's last group replaced.
func base64Text(t *testing.T, from, to string) []byte {
	t.Helper()
	return edit(t, from+`"}`, to+`"}`)
}

func TestDecodeRefuses(t *testing.T) {
	whole := string(text(t, sample(t, 1)))
	tests := []struct {
		name  string
		text  []byte
		want  Reason
		field string
	}{
		{"empty", nil, Syntax, ""},
		{"truncated", []byte(whole[:len(whole)/2]), Syntax, ""},
		{"last byte missing", []byte(whole[:len(whole)-2]), Syntax, ""},
		{"two objects", []byte(whole + whole), Syntax, ""},
		{"array", []byte("[" + whole + "]"), Syntax, ""},
		{"number", []byte("1"), Syntax, ""},
		{"not UTF-8", edit(t, "sha-256", "sha-\xff"), Syntax, ""},
		{"byte order mark", []byte("\ufeff" + whole), Syntax, ""},
		{"line break in key_data", edit(t, `"key_data":"AAEC`, "\"key_data\":\"AA\nC"), Syntax, ""},
		{"too large", bytes.Repeat([]byte(" "), 4097), TooLarge, ""},
		{"version 2", edit(t, `"version":1`, `"version":2`), UnknownVersion, "version"},
		{"version as text", edit(t, `"version":1`, `"version":"1"`), UnknownVersion, "version"},
		{"unknown field", edit(t, `{`, `{"extra":1,`), UnknownField, "extra"},
		{"field in capitals", edit(t, `"seq"`, `"SEQ"`), UnknownField, "(odd name)"},
		{"escaped name of field", edit(t, `"seq"`, `"se\u0071"`), UnknownField, "(odd name)"},
		{"duplicate field", edit(t, `{`, `{"seq":7,`), DuplicateField, "seq"},
		{"duplicate key_data", edit(t, `{`, `{"key_data":"",`), DuplicateField, "key_data"},
		{"missing field", edit(t, `"qber":0.021,`, ``), MissingField, "qber"},
		{"empty object", []byte(`{}`), MissingField, "version"},
		{"null", edit(t, `"seq":7`, `"seq":null`), BadField, "seq"},
		{"object as value", edit(t, `"seq":7`, `"seq":{"a":"}"}`), BadField, "seq"},
		{"array as key_data", edit(t, `"role":"master"`, `"role":["master"]`), BadField, "role"},
		{"pair not a UUID", edit(t, pairID.String(), "x"), BadField, "qkd_pair_id"},
		{"pair nil", edit(t, pairID.String(), uuid.Nil.String()), BadField, "qkd_pair_id"},
		{"pair in braces", edit(t, pairID.String(), "{"+pairID.String()+"}"), BadField, "qkd_pair_id"},
		{"same device twice", edit(t, devB.String(), devA.String()), BadField, "peer_qkd_id"},
		{"role", edit(t, `"master"`, `"Master"`), BadField, "role"},
		{"seq 0", edit(t, `"seq":7`, `"seq":0`), BadField, "seq"},
		{"seq negative", edit(t, `"seq":7`, `"seq":-7`), BadField, "seq"},
		{"seq fraction", edit(t, `"seq":7`, `"seq":7.0`), BadField, "seq"},
		{"seq exponent", edit(t, `"seq":7`, `"seq":7e0`), BadField, "seq"},
		{"seq above limit", edit(t, `"seq":7`, fmt.Sprintf(`"seq":%d`, key.MaxSeq+1)), BadField, "seq"},
		{"seq beyond 64 bits", edit(t, `"seq":7`, `"seq":99999999999999999999999`), BadField, "seq"},
		{"seq text", edit(t, `"seq":7`, `"seq":"7"`), BadField, "seq"},
		{"created", edit(t, "2026-11-22T", "2026-11-22 "), BadField, "created"},
		{"qber above 1", edit(t, "0.021", "1.01"), BadField, "qber"},
		{"qber negative", edit(t, "0.021", "-0.1"), BadField, "qber"},
		{"qber text", edit(t, "0.021", `"0.021"`), BadField, "qber"},
		{"key_length 96", edit(t, `"key_length":128`, `"key_length":96`), BadLength, "key_length"},
		{"key_length not of 32", edit(t, `"key_length":128`, `"key_length":127`), BadLength, "key_length"},
		{"key_length other than key_data", edit(t, `"key_length":128`, `"key_length":160`), BadLength, "key_data"},
		{"key_length huge", edit(t, `"key_length":128`, `"key_length":2147483616`), BadLength, "key_length"},
		{"key_length above MaxIndex", edit(t, `"key_length":128`, fmt.Sprintf(`"key_length":%d`, (1<<20+1)*32+96)), BadLength, "key_length"},
		{"sha-1", edit(t, "sha-256", "sha-1"), SHA1, "hash_algorithm"},
		{"md5", edit(t, "sha-256", "md5"), UnknownHash, "hash_algorithm"},
		{"hash of another algorithm", edit(t, "sha-256", "sha3-256"), HashMismatch, "hash"},
		{"hash short", edit(t, `"hash":"`, `"hash":"0`), BadField, "hash"},
		{"damaged key_data", edit(t, `"key_data":"AAEC`, `"key_data":"AAED`), HashMismatch, "hash"},
		{"key_data URL alphabet", edit(t, `"key_data":"AAEC`, `"key_data":"AAE-`), BadBase64, "key_data"},
		{"key_data with space", edit(t, `"key_data":"AAEC`, `"key_data":"AA C`), BadBase64, "key_data"},
		{"key_data escape", edit(t, `"key_data":"AAEC`, `"key_data":"\u0041AEC`), BadField, "key_data"},
		{"key_data empty", []byte(whole[:strings.Index(whole, `"key_data":"`)] + `"key_data":""}`), BadLength, "key_data"},
		{"padding missing", base64Text(t, "fn8=", "fn8"), BadLength, "key_data"},
		{"padding bits set", base64Text(t, "fn8=", "fn9="), BadBase64, "key_data"},
		{"no padding but data", base64Text(t, "fn8=", "fn8A"), BadLength, "key_data"},
		{"padding inside", base64Text(t, "fn8=", "f=8="), BadBase64, "key_data"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, _, err := Decode(tt.text, 4096)
			f.Wipe()
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("got %v, want an *Error", err)
			}
			if e.Reason != tt.want || e.Field != tt.field {
				t.Fatalf("got %q in %q (%v), want %q in %q", e.Reason, e.Field, err, tt.want, tt.field)
			}
			if !bytes.Equal(tt.text, make([]byte, len(tt.text))) {
				t.Error("the refused text was not wiped")
			}
		})
	}
}

// TestErrorsShowNoText feeds texts that are one long secret in every place.
func TestErrorsShowNoText(t *testing.T) {
	const secret = "ThisIsKeyMaterialInTheWrongPlace"
	for _, s := range []string{
		secret, `"` + secret + `"`, `{"` + secret + `":1}`, `{"seq":"` + secret + `"}`, `{"role":"` + secret + `"}`,
		`{"hash_algorithm":"` + secret + `"}`, `{"qkd_id":"` + secret + `"}`, `{"version":"` + secret + `"}`,
	} {
		_, h, err := Decode([]byte(s), DefaultMaxSize)
		if err == nil {
			t.Fatalf("%s was taken", s)
		}
		if out := fmt.Sprintf("%v %+v", err, h); strings.Contains(strings.ToLower(out), strings.ToLower(secret[:8])) {
			t.Errorf("the error shows the text: %s", out)
		}
	}
}

func TestHeaderOfRefusedFile(t *testing.T) {
	_, h, err := Decode(edit(t, `"key_data":"AAEC`, `"key_data":"AAED`), DefaultMaxSize)
	if r, _ := ReasonOf(err); r != HashMismatch {
		t.Fatal(err)
	}
	if h.Pair != pairID || h.Seq != 7 || h.KeyLength != 128 {
		t.Fatalf("header of the refused file: %+v", h)
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*File){
		"seq 0":      func(f *File) { f.Seq = 0 },
		"no pair":    func(f *File) { f.Pair = uuid.Nil },
		"no role":    func(f *File) { f.Role = 0 },
		"sha-1":      func(f *File) { f.HashAlgorithm = "sha-1" },
		"no time":    func(f *File) { f.Created = time.Time{} },
		"no data":    func(f *File) { f.Data = nil },
		"qber 2":     func(f *File) { f.QBER = 2 },
		"one device": func(f *File) { f.PeerQKD = f.QKD },
	} {
		f := sample(t, 1)
		spoil(f)
		if m, err := Encode(f); err == nil {
			m.Wipe()
			t.Errorf("%s: encoded", name)
		} else if _, ok := ReasonOf(err); !ok {
			t.Errorf("%s: %v has no reason", name, err)
		}
	}
}

func TestSplit(t *testing.T) {
	f := sample(t, 2)
	p, err := Split(f.Data.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Keys) != 64 || p.Km[0] != 64 || p.Ks[0] != 96 || p.Kid[0] != 128 || len(p.Kid) != 32 {
		t.Fatalf("cut at the wrong places: %d keys bytes, %d %d %d", len(p.Keys), p.Km[0], p.Ks[0], p.Kid[0])
	}
	for _, n := range []int{0, 32, 96, 127, 129, (1<<20+1)*32 + 96} {
		if _, err := Split(make([]byte, n)); err == nil {
			t.Errorf("%d bytes were split", n)
		}
	}
}

func TestNames(t *testing.T) {
	n := Name(pairID, key.MaxSeq)
	if n != "6d7b2a3e-6a0e-4c3b-9b1e-0f1e2d3c4b5a-00000008796093022207.qkd" {
		t.Fatal(n)
	}
	if p, s, err := ParseName(n); err != nil || p != pairID || s != key.MaxSeq {
		t.Fatal(p, s, err)
	}
	for _, n := range []string{
		"", "x.qkd", strings.ToUpper(n), n + "x", strings.Replace(n, "-0000", "_0000", 1), Name(pairID, 0), Name(pairID, key.MaxSeq+1),
		strings.Replace(n, "00000008796093022207", "+0000008796093022207", 1), strings.Replace(n, ".qkd", ".qkx", 1),
	} {
		if _, _, err := ParseName(n); err == nil {
			t.Errorf("%q was taken", n)
		}
	}
	for n, want := range map[string]bool{".a": true, "a.tmp": true, n: false, "": false} {
		if Unfinished(n) != want {
			t.Errorf("Unfinished(%q) is not %v", n, want)
		}
	}
}

func TestWriteAtomic(t *testing.T) {
	dir := t.TempDir()
	f := sample(t, 5)
	stale := filepath.Join(dir, "."+Name(f.Pair, f.Seq)+".tmp")
	if err := os.WriteFile(stale, []byte("left by a crash"), 0o644); err != nil {
		t.Fatal(err)
	}
	path, err := WriteAtomic(dir, f)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Fatalf("mode %v, %v", st, err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := Decode(b, DefaultMaxSize)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !got.Data.Equal(f.Data) {
		t.Fatal("other data in the file")
	}
	if _, err := WriteAtomic(dir, f); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("second write of one seq: %v", err)
	}
	if l, _ := os.ReadDir(dir); len(l) != 1 {
		t.Fatalf("left behind: %v", l)
	}
	if _, err := WriteAtomic(filepath.Join(dir, "none"), f); err == nil {
		t.Fatal("wrote into no directory")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(text(f, sample(f, 1)))
	f.Add([]byte(`{"version":1,"key_data":"\/\/8="}`))
	f.Add([]byte(`{"seq":{"a":[1,"}"]},"x":"\\\""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.Clone(b)
		got, _, err := Decode(in, 1<<16)
		if err != nil {
			if _, ok := ReasonOf(err); !ok {
				t.Fatalf("an error with no reason: %v", err)
			}
			return
		}
		defer got.Wipe()
		again, _, err := Decode(text(t, got), 1<<20)
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded and decoded: %v", err)
		}
		defer again.Wipe()
		if !again.Data.Equal(got.Data) || again.Seq != got.Seq || !again.Created.Equal(got.Created) {
			t.Fatal("the round trip changed the file")
		}
	})
}

func FuzzParseName(f *testing.F) {
	f.Add(Name(pairID, 7))
	f.Fuzz(func(t *testing.T, s string) {
		if p, seq, err := ParseName(s); err == nil && Name(p, seq) != s {
			t.Fatalf("%q is not the one name of its file", s)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	f := sample(b, 32768)
	in := text(b, f)
	buf := make([]byte, len(in))
	b.SetBytes(int64(f.Data.Len()))
	for b.Loop() {
		copy(buf, in)
		got, _, err := Decode(buf, DefaultMaxSize)
		if err != nil {
			b.Fatal(err)
		}
		got.Wipe()
	}
}
