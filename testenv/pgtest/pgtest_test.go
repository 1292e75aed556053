package pgtest

import (
	"os"
	"testing"
)

// A server starts, stops, starts again, and leaves nothing behind.
func TestLife(t *testing.T) {
	ctx := t.Context()
	s, err := Start(ctx, "fsync=off")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []func() error{
		func() error { return s.Exec(ctx, "postgres", "CREATE TABLE x (y int)") },
		func() error { return s.Stop(ctx, "fast") },
		func() error { return s.Resume(ctx) },
		func() error { return s.Exec(ctx, "postgres", "INSERT INTO x VALUES (1)") },
		s.Close,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(s.Dir); !os.IsNotExist(err) {
		t.Errorf("the directory is still there: %v", err)
	}
	if err := s.Exec(ctx, "postgres", "SELECT 1"); err == nil {
		t.Error("the server still answers")
	}
}
