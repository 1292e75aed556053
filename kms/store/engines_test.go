package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/q-ipsec/q-ipsec/testenv/pgtest"
)

// server is the PostgreSQL of all tests that leave it running. fsync makes no
// difference to what they see.
var server = sync.OnceValues(func() (*pgtest.Server, error) {
	serverUsed = true
	return pgtest.Start(context.Background(), "fsync=off")
})

var serverUsed bool

func TestMain(m *testing.M) {
	code := m.Run()
	if serverUsed {
		if s, err := server(); err == nil {
			err = s.Close()
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				code = 1
			}
		}
	}
	os.Exit(code)
}

// PostgresURL is a schema of its own for the store whose files are in dir.
func PostgresURL(t testing.TB, dir string) string {
	t.Helper()
	s, err := server()
	if err != nil {
		t.Fatal(err)
	}
	return s.URL("postgres", schemaOf(dir))
}

func schemaOf(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return "s" + hex.EncodeToString(sum[:10])
}

// postgresOptions are those of a store whose root file is in dir.
func postgresOptions(t testing.TB, dir string) Options {
	t.Helper()
	return Options{URL: PostgresURL(t, dir), RootFile: filepath.Join(dir, "root"), Log: slog.New(slog.DiscardHandler)}
}

// onBoth runs a test on both engines.
func onBoth(t *testing.T, f func(t *testing.T, options func(dir string) Options)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) { f(t, testOptions) })
	t.Run("postgres", func(t *testing.T) {
		f(t, func(dir string) Options { return postgresOptions(t, dir) })
	})
}
