package key

import (
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/uuid"
)

func TestParseID(t *testing.T) {
	const good = "0190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a5b"
	for _, tc := range []struct {
		name, in string
		ok       bool
	}{
		{"lower case", good, true},
		{"upper case", strings.ToUpper(good), true},
		{"nil", "00000000-0000-0000-0000-000000000000", true},
		{"empty", "", false},
		{"short", good[:35], false},
		{"long", good + "0", false},
		{"braces", "{" + good + "}", false},
		{"urn", "urn:uuid:" + good, false},
		{"no hyphens", strings.ReplaceAll(good, "-", ""), false},
		{"no hyphens, 36 long", strings.ReplaceAll(good, "-", "") + "0000", false},
		{"hyphen moved", "0190a3b27-c1d-8e4f-9a6b-0c1d2e3f4a5b", false},
		{"not hexadecimal", "0190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a5g", false},
		{"space", " 190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a5b", false},
		{"newline", good[:35] + "\n", false},
		{"NUL", good[:35] + "\x00", false},
		{"wide digits", "０190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a", false},
	} {
		id, err := ParseID(tc.in)
		if (err == nil) != tc.ok {
			t.Errorf("%s: error %v", tc.name, err)
		}
		if err == nil && id.String() != strings.ToLower(tc.in) {
			t.Errorf("%s: %s came back as %s", tc.name, tc.in, id)
		}
		if err != nil && id != (ID{}) {
			t.Errorf("%s: an error and an ID", tc.name)
		}
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"", "0190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a5b", "{0190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a5}", "urn:uuid:0190a3b2-7c1d-8e4f-9a6b-0c1d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err == nil && id.String() != strings.ToLower(s) {
			t.Errorf("%q was read as %s", s, id)
		}
		var u ID
		if (u.UnmarshalText([]byte(s)) == nil) != (err == nil) || u != id {
			t.Errorf("%q: UnmarshalText differs from ParseID", s)
		}
	})
}

func TestIDJSON(t *testing.T) {
	id := ID(uuid.MustParse("0190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a5b"))
	b, err := json.Marshal(map[ID]ID{id: id})
	if err != nil || string(b) != `{"`+id.String()+`":"`+id.String()+`"}` {
		t.Fatalf("%s, %v", b, err)
	}
	var back map[ID]ID
	if err := json.Unmarshal(b, &back); err != nil || back[id] != id {
		t.Errorf("%v, %v", back, err)
	}
	if id.IsZero() || !(ID{}).IsZero() {
		t.Error("IsZero")
	}
}

// The expected IDs were computed outside this project with Python's hmac
// module over the layout in the comment of DeriveID.
func TestDeriveID(t *testing.T) {
	kid := make([]byte, 32)
	for i := range kid {
		kid[i] = byte(i)
	}
	pair := uuid.MustParse("0190a3b2-7c1d-8e4f-9a6b-0c1d2e3f4a5b")
	for _, v := range deriveVectors {
		id := DeriveID(kid, pair, v.seq, v.index)
		if id.String() != v.want {
			t.Errorf("DeriveID(%d, %d) = %s, want %s", v.seq, v.index, id, v.want)
		}
		if u := uuid.UUID(id); u.Version() != 8 || u.Variant() != uuid.RFC4122 {
			t.Errorf("%s is not a UUIDv8 of RFC 9562", u)
		}
	}
	if hex.EncodeToString(kid[:4]) != "00010203" {
		t.Error("DeriveID changed its key")
	}
}

func TestPositionRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		seq, index := r.Uint64()&MaxSeq>>r.IntN(44), r.Uint32()&MaxIndex
		p := At(seq, index)
		if p.Seq() != seq || p.Index() != index {
			t.Fatalf("At(%d, %d) = %d/%d", seq, index, p.Seq(), p.Index())
		}
		if int64(p) < 0 {
			t.Fatalf("%s does not fit a signed 64-bit column", p)
		}
		seq2, index2 := r.Uint64()&MaxSeq>>r.IntN(44), r.Uint32()&MaxIndex
		before := seq < seq2 || seq == seq2 && index < index2
		if (p < At(seq2, index2)) != before {
			t.Fatalf("order of (%d, %d) and (%d, %d)", seq, index, seq2, index2)
		}
	}
	if At(MaxSeq, MaxIndex).String() != "8796093022207/1048575" {
		t.Error(At(MaxSeq, MaxIndex))
	}
	for _, f := range []func(){func() { At(MaxSeq+1, 0) }, func() { At(0, MaxIndex+1) }} {
		func() {
			defer func() {
				if recover() == nil {
					t.Error("At took a number out of range")
				}
			}()
			f()
		}()
	}
}

func TestOwnerRule(t *testing.T) {
	for seq := range uint64(3) {
		for i := range uint32(7) {
			p := At(seq, i)
			if m, s := Master.Owns(p), Slave.Owns(p); m == s || m != (i%2 == 0) {
				t.Errorf("%s: master owns %v, slave owns %v", p, m, s)
			}
			if Role(0).Owns(p) || Role(3).Owns(p) {
				t.Errorf("%s belongs to no known role", p)
			}
		}
	}
	if Master.Other() != Slave || Slave.Other() != Master {
		t.Error("Other")
	}
}

func TestNames(t *testing.T) {
	for _, r := range []Role{Master, Slave} {
		if got, err := ParseRole(r.String()); err != nil || got != r {
			t.Errorf("%s: %v, %v", r, got, err)
		}
	}
	for _, c := range []Class{Derived, Relayed, Direct} {
		if got, err := ParseClass(c.String()); err != nil || got != c {
			t.Errorf("%s: %v, %v", c, got, err)
		}
	}
	if _, err := ParseRole("Master"); err == nil {
		t.Error("ParseRole takes any case")
	}
	if _, err := ParseClass("class(1)"); err == nil {
		t.Error("ParseClass takes what is no class")
	}
	seen := map[string]bool{}
	for s := Received; s <= Stranded; s++ {
		if name := s.String(); seen[name] || strings.Contains(name, "(") {
			t.Errorf("state %d has no name of its own: %s", s, name)
		} else {
			seen[name] = true
		}
	}
	if State(0).String() != "state(0)" || Role(9).String() != "role(9)" || Class(0).String() != "class(0)" {
		t.Error("unknown numbers have no name")
	}
}

func TestDeriveIDs(t *testing.T) {
	kid, pair := make([]byte, 32), uuid.New()
	kid[3] = 7
	for i, id := range DeriveIDs(kid, pair, 9, 100) {
		if id != DeriveID(kid, pair, 9, uint32(i)) {
			t.Fatalf("index %d: the two functions differ", i)
		}
	}
}
