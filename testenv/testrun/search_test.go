package main

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A planted key is found however it was printed, and only then.
func TestSearchFindsAPlantedKey(t *testing.T) {
	key, other := make([]byte, 32), make([]byte, 32)
	_, _ = rand.Read(key)
	_, _ = rand.Read(other)
	trace := filepath.Join(t.TempDir(), "trace")
	lines := hex.EncodeToString(key[:16]) + "\n" + strings.Repeat("00", 16) + "\n" + hex.EncodeToString([]byte(`{"version":1,"qk`)) + "\n"
	if err := os.WriteFile(trace, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text string
		leak bool
	}{
		"raw":            {"x" + string(key) + "y", true},
		"hex":            {"key=" + hex.EncodeToString(key), true},
		"hex upper":      {"0x" + strings.ToUpper(hex.EncodeToString(key)), true},
		"hex odd":        {"a" + hex.EncodeToString(key), true},
		"base64":         {`"key":"` + base64.StdEncoding.EncodeToString(key) + `"`, true},
		"base64 url":     {base64.RawURLEncoding.EncodeToString(key), true},
		"base64 shifted": {base64.StdEncoding.EncodeToString(append([]byte("ab"), key...)), true},
		"another key":    {hex.EncodeToString(other), false},
		"fingerprint":    {hex.EncodeToString(key[:8]), false},
		"zeros":          {strings.Repeat("00", 64), false},
		"json":           {`{"version":1,"qkd_id":"x"}`, false},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "log"), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		leaks, err := search(trace, dir)
		if err != nil {
			t.Fatal(err)
		}
		if (len(leaks) > 0) != c.leak {
			t.Errorf("%s: leaks %v", name, leaks)
		}
	}
}
