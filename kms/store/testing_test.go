package store

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

var testPool = uuid.UUID{15: 7}

// plainKey gives a test key's bytes.
func plainKey(seq uint64, i int) []byte {
	b := bytes.Repeat([]byte{0xc3}, key.MasterSize)
	for j := range 8 {
		b[3*j] = byte(seq+uint64(j)) ^ 0x5a
		b[3*j+1] = byte(i>>8) ^ byte(17*j)
		b[3*j+2] = byte(i) ^ byte(91*j+13)
	}
	return b
}

// testID gives a test key's id, known by its first 8 bytes.
func testID(seq uint64, i int) key.ID {
	return key.ID{0xd7, byte(i >> 8), 0xe1, byte(i), 0x9b, byte(seq), 0x3c, 0x71, 1}
}

func testBlock(t testing.TB, seq uint64, n int) Block {
	t.Helper()
	plain := make([]byte, 0, n*key.MasterSize)
	ids := make([]key.ID, n)
	for i := range n {
		plain = append(plain, plainKey(seq, i)...)
		ids[i] = testID(seq, i)
	}
	m, err := key.Take(plain)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	return Block{Pool: testPool, Seq: seq, Class: key.Direct, Keys: m, IDs: ids, Algorithm: "poly1305", Bytes: n*key.MasterSize + 96}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func testOptions(dir string) Options {
	return Options{URL: "sqlite:" + filepath.Join(dir, "store.db"), RootFile: filepath.Join(dir, "root"), Log: slog.New(slog.DiscardHandler)}
}

// mustOpen opens and closes at the test's end.
func mustOpen(t testing.TB, opt Options) *Store {
	t.Helper()
	s, err := Open(testContext(t), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// filled gives a store with one active block of n keys.
func filled(t testing.TB, opt Options, n int) *Store {
	t.Helper()
	s, ctx := mustOpen(t, opt), testContext(t)
	must(t, s.EnsurePool(ctx, testPool, "bob", key.Master, key.Direct))
	must(t, s.PutBlock(ctx, testBlock(t, 1, n)))
	must(t, s.Activate(ctx, testPool, 1))
	return s
}

// lease advances side's mark and reads up to it.
func lease(t testing.TB, s *Store, side Side, from, to key.Position) []LeasedKey {
	t.Helper()
	ctx := testContext(t)
	must(t, s.Advance(ctx, testPool, side, to, "lease", 1))
	keys, err := s.Load(ctx, testPool, side, from, to)
	must(t, err)
	t.Cleanup(func() { wipeAll(keys) })
	return keys
}

// copyStore copies a store's files, but for lock and shared memory, into a new
// directory.
func copyStore(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	must(t, os.Mkdir(to, 0o700))
	for _, name := range []string{"store.db", "store.db-wal", "root", "root.new"} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if os.IsNotExist(err) {
			continue
		}
		must(t, err)
		must(t, os.WriteFile(filepath.Join(to, name), b, 0o600))
	}
	return to
}
