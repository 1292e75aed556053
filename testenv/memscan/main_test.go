package main

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
	"github.com/q-ipsec/q-ipsec/qkdsim"
	"github.com/q-ipsec/q-ipsec/testenv/needle"
)

// The scan finds what is in memory, here of this very process.
func TestProcess(t *testing.T) {
	here := make([]byte, 32)
	if _, err := rand.Read(here); err != nil {
		t.Fatal(err)
	}
	set, found := needle.NewSet(), needle.Found{}
	set.Add(here)
	size, err := searchProcess(set, strconv.Itoa(os.Getpid()), found)
	if err != nil || len(found) != 1 || size == 0 {
		t.Errorf("%d hits, %d bytes, %v", len(found), size, err)
	}
	runtime.KeepAlive(here)
	if _, err := searchProcess(set, "0", found); err == nil {
		t.Error("scanned a process that is none")
	}
}

func TestReadNeedles(t *testing.T) {
	good := "0x9f1c27d4086be35a71cc0e92b8f4635d7a\n00112233445566778899aabbccddeeff"
	for text, want := range map[string]int{"xyz\n": 0, "abcd\n": 0, good: 1} {
		set := needle.NewSet()
		err := readNeedles(set, strings.NewReader(text))
		// the second line of good counts up: nobody's key
		if set.Len() != want || err == nil {
			t.Errorf("%q: %d, %v", text, set.Len(), err)
		}
	}
}

// The keys of a seed are those that qkdsim delivers and the KSA makes of them.
func TestSimulated(t *testing.T) {
	pair := uuid.New()
	sim := &simulated{seed: 7, pair: pair.String(), files: 3, perFile: 10, saes: [][2]string{{"a", "b"}, {"b", "a"}}}
	data, err := qkdsim.KeyData(7, pair, 2, 10*32+96)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Wipe()
	master, err := key.Take(bytes.Clone(data.Bytes()[3*32 : 4*32]))
	if err != nil {
		t.Fatal(err)
	}
	defer master.Wipe()
	session, err := ksa.Derive(master, key.DeriveID(data.Bytes()[10*32+64:], pair, 2, 3), "b", []string{"a"}, 256)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Wipe()
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("nothing", "nothing here")
	if n, err := run(sim, []string{dir}, strings.NewReader(""), io.Discard); n != 0 || err != nil {
		t.Errorf("found %d, %v in a file without keys", n, err)
	}
	write("master", hex.EncodeToString(master.Bytes()))
	write("session", string(session.Bytes()))
	var out strings.Builder
	n, err := run(sim, []string{dir}, strings.NewReader(""), &out)
	if n != 2 || err != nil || !strings.HasPrefix(out.String(), "2 of 99 keys found") { // 3 * (3 + 10 * 3)
		t.Errorf("found %d, %v: %s", n, err, out.String())
	}
}

func TestRunRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		sim     simulated
		targets []string
	}{
		"no target":  {simulated{seed: 1, pair: uuid.NewString(), files: 1, perFile: 2}, nil},
		"no keys":    {simulated{}, []string{t.TempDir()}},
		"no file":    {simulated{seed: 1, pair: uuid.NewString(), files: 1, perFile: 2}, []string{filepath.Join(t.TempDir(), "none")}},
		"empty":      {simulated{seed: 1, pair: uuid.NewString(), files: 1, perFile: 2}, []string{t.TempDir()}},
		"no pair":    {simulated{seed: 1, files: 1, perFile: 2}, []string{"/"}},
		"files zero": {simulated{seed: 1, pair: uuid.NewString(), perFile: 2}, []string{"/"}},
	} {
		if n, err := run(&c.sim, c.targets, strings.NewReader(""), io.Discard); err == nil {
			t.Errorf("%s: %d found, no error", name, n)
		}
	}
}
