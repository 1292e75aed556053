package store

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// version1 makes old a version-1 database, with the tables as they were then,
// that holds what the closed store of now holds.
func version1(t *testing.T, now, old Options) {
	t.Helper()
	ddl, err := os.ReadFile("testdata/schema-v1.sql")
	must(t, err)
	root, err := readRoot(now.RootFile, nil)
	must(t, err)
	defer root.secret.Wipe()
	from, to := &Store{opt: now}, &Store{opt: old}
	for _, s := range []*Store{from, to} {
		if s.eng, err = newEngine(&s.opt); err != nil {
			t.Fatal(err)
		}
		files, err := s.eng.prepare()
		must(t, err)
		defer files.Close()
		l, err := s.eng.own(testContext(t))
		must(t, err)
		defer l.Close()
		must(t, s.connect())
		defer s.w.Close()
		defer s.r.Close()
	}
	tx, err := to.w.Begin()
	must(t, err)
	for stmt := range strings.SplitSeq(strings.ReplaceAll(string(ddl), "BYTES", to.eng.bytesType()), ";") {
		if _, err := tx.Exec(stmt); err != nil {
			t.Fatal(err)
		}
	}
	for _, table := range []string{"node", "pool", "block", "part", "history", "event"} {
		copyTable(t, from.w, tx, table)
	}
	a, err := root.dataKey()
	must(t, err)
	var n nodeRow
	must(t, tx.QueryRow(`SELECT generation, epoch FROM node`).Scan(&n.generation, &n.epoch))
	_, err = tx.Exec(`UPDATE node SET version = 1, proof = $1`, seal(a, nil, nodeAAD(root.store, &n)))
	must(t, err)
	must(t, to.eng.claim(testContext(t), tx))
	must(t, tx.Commit())
}

// copyTable copies the columns that the target has.
func copyTable(t *testing.T, from *sql.DB, to *sql.Tx, table string) {
	t.Helper()
	none, err := to.Query(`SELECT * FROM ` + table)
	must(t, err)
	columns, err := none.Columns()
	must(t, errors.Join(err, none.Close()))
	rows, err := from.Query(`SELECT ` + strings.Join(columns, ", ") + ` FROM ` + table)
	must(t, err)
	defer rows.Close()
	for rows.Next() {
		row, at := make([]any, len(columns)), make([]any, len(columns))
		marks := make([]string, len(columns))
		for i := range row {
			at[i], marks[i] = &row[i], fmt.Sprintf("$%d", i+1)
		}
		must(t, rows.Scan(at...))
		for i := range row {
			if b, ok := row[i].([]byte); ok && b == nil {
				row[i] = []byte{} // SQLite's driver gives an empty byte string so
			}
		}
		if _, err := to.Exec(`INSERT INTO `+table+` (`+strings.Join(columns, ", ")+`) VALUES (`+strings.Join(marks, ", ")+`)`, row...); err != nil {
			t.Fatalf("%s: %v", table, err)
		}
	}
	must(t, rows.Err())
}

// A database of version 1 is brought up to date by Open, and has all its keys and
// marks. On PostgreSQL, where there was no version 1, it is one that does not
// say at which server it was written: the marks hold, the keys are given up.
func TestMigrate(t *testing.T) {
	onBoth(t, func(t *testing.T, options func(string) Options) {
		dir := filepath.Join(t.TempDir(), "new")
		spent(t, options(dir))
		old := options(filepath.Join(t.TempDir(), "old"))
		must(t, os.Mkdir(filepath.Dir(old.RootFile), 0o700))
		b, err := os.ReadFile(filepath.Join(dir, "root"))
		must(t, err)
		must(t, os.WriteFile(old.RootFile, b, 0o600))
		version1(t, options(dir), old)

		s, ctx := mustOpen(t, old), testContext(t)
		var version int64
		must(t, s.r.QueryRow(`SELECT version FROM node`).Scan(&version))
		if version != schemaVersion() || version < 2 {
			t.Errorf("version %d, want %d", version, schemaVersion())
		}
		want := allKeys
		if s.eng.shared() {
			want = 0
			must(t, s.PutBlock(ctx, testBlock(t, 4, 10)))
			if err := s.PutBlock(ctx, testBlock(t, 3, 10)); !errors.Is(err, ErrOldSeq) {
				t.Errorf("block 3 again: %v", err)
			}
			must(t, s.Destroy(ctx, testPool, 4, key.Destroyed, ""))
			p, err := s.Pool(ctx, testPool)
			must(t, err)
			if p.Mark != key.At(1, 40) || p.PeerMark != key.At(1, 21) || p.Active != 0 || p.Received != 0 {
				t.Errorf("pool %+v", p)
			}
			return
		}
		if n, err := drain(t, s); n != want || err != nil {
			t.Errorf("%d keys, want %d, %v", n, want, err)
		}
		if h, err := s.History(ctx, HistoryQuery{Limit: 100}); err != nil || len(h) < 8 {
			t.Errorf("%d history rows, %v", len(h), err)
		}
	})
}

// A step that fails changes nothing, and is done by the next Open.
func TestMigrateFails(t *testing.T) {
	onBoth(t, func(t *testing.T, options func(string) Options) {
		opt := options(filepath.Join(t.TempDir(), "s"))
		spent(t, opt)
		was := migrations
		defer func() { migrations = was }()
		migrations = append(was[:len(was):len(was)], migration{"a table", `CREATE TABLE extra (a BYTES NOT NULL); INSERT INTO nowhere VALUES (1)`})
		if s, err := Open(testContext(t), opt); err == nil || !strings.Contains(err.Error(), "a table") {
			t.Errorf("%v, error %v", s, err)
		}
		migrations[len(was)].sql = `CREATE TABLE extra (a BYTES NOT NULL)`
		s := mustOpen(t, opt)
		if n, err := drain(t, s); n != allKeys || err != nil {
			t.Errorf("%d keys, %v", n, err)
		}
	})
}
