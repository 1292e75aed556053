package ksa

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// The vectors come from testdata/vectors.py, which shares no code with us.
func TestDeriveVectors(t *testing.T) {
	raw, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Name, Master string
		MasterKey    string `json:"master_key"`
		KeyID        string `json:"key_id"`
		Slaves       []string
		Size         int
		SessionKey   string `json:"session_key"`
	}
	if err := json.Unmarshal(raw, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) < 10 {
		t.Fatalf("only %d vectors", len(vectors))
	}
	seen := make(map[string]string)
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			m, err := key.Take(unhex(t, v.MasterKey))
			if err != nil {
				t.Fatal(err)
			}
			defer m.Wipe()
			given := append([]string(nil), v.Slaves...)
			got, err := Derive(m, key.ID(unhex(t, v.KeyID)), v.Master, v.Slaves, v.Size)
			if err != nil {
				t.Fatal(err)
			}
			defer got.Wipe()
			if !bytes.Equal(got.Bytes(), unhex(t, v.SessionKey)) {
				t.Errorf("session key %x, want %s", got.Bytes(), v.SessionKey)
			}
			if got.Len()*8 != v.Size {
				t.Errorf("%d bits, want %d", got.Len()*8, v.Size)
			}
			for i := range given {
				if given[i] != v.Slaves[i] {
					t.Error("the caller's list of slaves was sorted")
				}
			}
			if other := seen[v.SessionKey[:16]]; other != "" {
				t.Errorf("same key as %q", other)
			}
			seen[v.SessionKey[:16]] = v.Name
		})
	}
}

func TestDeriveRefusesOtherSizes(t *testing.T) {
	for _, n := range []int{1, 31, 33, 64} {
		m, err := key.New(n)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Derive(m, key.ID{1}, "a", []string{"b"}, 256); err == nil {
			got.Wipe()
			t.Errorf("a master key of %d bytes was taken", n)
		}
		m.Wipe()
		if got, err := Derive(m, key.ID{1}, "a", []string{"b"}, 256); err == nil {
			got.Wipe()
			t.Error("a wiped master key was taken")
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
