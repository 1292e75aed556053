package store

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"
)

// Checking, exporting, backing up and restoring go by the same rules on either
// engine.
func TestLookAtBothEngines(t *testing.T) {
	onBoth(t, func(t *testing.T, options func(string) Options) {
		ctx := testContext(t)
		opt := options(filepath.Join(t.TempDir(), "s"))
		spent(t, opt)
		if r := Check(ctx, opt); r.Verdict() != Sound || r.Keys != allKeys+10 || r.Running {
			t.Errorf("%+v", r)
		}
		s := mustOpen(t, opt)
		if r := Check(ctx, opt); r.Verdict() != Sound || !r.Running || r.Parts != 4 {
			t.Errorf("beside a daemon: %+v", r)
		}
		var lines, backup bytes.Buffer
		n, err := Export(ctx, opt, ExportQuery{}, &lines)
		must(t, err)
		info, err := Backup(ctx, opt, &backup)
		must(t, err)
		if n == 0 || info.Rows != n {
			t.Errorf("%d rows exported, %d backed up", n, info.Rows)
		}
		if _, err := Restore(ctx, opt, bytes.NewReader(backup.Bytes())); !errors.Is(err, ErrInUse) {
			t.Errorf("restored over a running store: %v", err)
		}
		must(t, s.Close())
		if _, err := Restore(ctx, opt, bytes.NewReader(backup.Bytes())); !errors.Is(err, ErrExists) {
			t.Errorf("restored over a store: %v", err)
		}
		to := options(filepath.Join(t.TempDir(), "new"))
		if _, err := Restore(ctx, to, bytes.NewReader(backup.Bytes())); err != nil {
			t.Fatal(err)
		}
		if r := Check(ctx, to); r.Verdict() != Sound || r.Pools != 1 || r.Blocks != 0 || r.History != n {
			t.Errorf("restored: %+v", r)
		}
	})
}
