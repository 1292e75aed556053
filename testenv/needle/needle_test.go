package needle

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
)

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// charonDump writes b as charon's logs do at level 4.
func charonDump(b []byte) string {
	out := fmt.Sprintf("12:34:56.789 07[IKE1] <a-b|1> secret => %d bytes @ 0x7f0000000000\n", len(b))
	for off := 0; off < len(b); off += 16 {
		line := b[off:min(off+16, len(b))]
		out += fmt.Sprintf("12:34:56.789 07[IKE1] <a-b|1> %4d: % X %*s%s\n", off, line, 3*(16-len(line))+1, "", "................")
	}
	return out
}

// A key is found however it was written, also its second half alone, and only
// then.
func TestSearch(t *testing.T) {
	key, other := random(32), random(32)
	set := NewSet()
	if !set.Add(key) || !set.Add(random(36)) || set.Len() != 2 {
		t.Fatal("keys not taken")
	}
	for _, p := range [][]byte{make([]byte, 32), []byte(`{"version":1,"qkd_id":"0123`), key[:15]} {
		if set.Add(p) {
			t.Errorf("took %x", p)
		}
	}
	for name, c := range map[string]struct {
		text string
		hit  bool
	}{
		"raw":            {"x" + string(key) + "y", true},
		"second half":    {"x" + string(key[16:]), true},
		"hex":            {"key=" + hex.EncodeToString(key), true},
		"hex upper":      {"0x" + strings.ToUpper(hex.EncodeToString(key)), true},
		"hex odd":        {"a" + hex.EncodeToString(key), true},
		"base64":         {`"key":"` + base64.StdEncoding.EncodeToString(key) + `"`, true},
		"base64 half":    {base64.RawStdEncoding.EncodeToString(key[:16]), true},
		"base64 url":     {base64.RawURLEncoding.EncodeToString(key), true},
		"base64 shifted": {base64.StdEncoding.EncodeToString(append([]byte("ab"), key...)), true},
		"dump":           {charonDump(key), true},
		"dump, shifted":  {charonDump(append(random(9), key...)), true},
		"dump, second":   {charonDump(random(64)) + charonDump(key), true},
		"dump, other":    {charonDump(other), false},
		"another key":    {hex.EncodeToString(other), false},
		"too little":     {hex.EncodeToString(key[:15]), false},
		"fingerprint":    {hex.EncodeToString(key[:8]), false},
	} {
		found := Found{}
		set.Search([]byte(c.text), found)
		set.SearchDumps([]byte(c.text), found)
		if _, hit := found[0]; hit != c.hit || len(found) > 1 {
			t.Errorf("%s: %v", name, found)
		}
	}
}

func TestDumpSize(t *testing.T) {
	if n := NewSet().SearchDumps([]byte(charonDump(random(36))+"12:00:00 plain line\n"+charonDump(random(5))), Found{}); n != 41 {
		t.Errorf("%d bytes in the dumps, want 41", n)
	}
}
