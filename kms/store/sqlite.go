package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"modernc.org/sqlite"
)

// All that is SQLite's own is in this file: how to open it, how it marks a file
// as ours, and the codes it fails with.

// applicationID is "QIPS" in the SQLite header, so that file(1) and we know a
// store when we see one.
const applicationID = 0x51495053

// SQLite's primary result codes (sqlite.org/rescode.html).
const (
	sqliteIOErr   = 10
	sqliteCorrupt = 11
	sqliteFull    = 13
	sqliteNotADB  = 26

	sqliteIOErrWrite = 10 | 3<<8
)

// opener opens a database by driver and DSN; tests put a failing driver here.
type opener func(dsn string) (*sql.DB, error)

func openSQLite(dsn string) (*sql.DB, error) { return sql.Open("sqlite", dsn) }

// databasePath takes the path out of Options.URL.
func databasePath(rawURL string) (string, error) {
	path, ok := strings.CutPrefix(rawURL, "sqlite:")
	if !ok || path == "" {
		return "", fmt.Errorf("store: URL %q: want sqlite:/path/to/file", rawURL)
	}
	return path, nil
}

// dsn spells the settings that every connection gets. synchronous=FULL syncs
// the write-ahead log at each commit: a mark that Advance reported survives a
// power cut.
func dsn(path string, readOnly bool) string {
	q := url.Values{"_txlock": {"immediate"}, "_pragma": {
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)",
		"cell_size_check(1)", "temp_store(MEMORY)", "journal_size_limit(16777216)",
	}}
	if readOnly {
		q.Set("_query_only", "1")
	}
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + q.Encode()
}

// fresh reports whether the database is empty and ours to fill; it refuses
// another program's.
func fresh(ctx context.Context, db *sql.DB) (bool, error) {
	var id, tables int64
	if err := db.QueryRowContext(ctx, "PRAGMA application_id").Scan(&id); err != nil {
		return false, explain(err)
	}
	if err := db.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master").Scan(&tables); err != nil {
		return false, explain(err)
	}
	switch {
	case id == applicationID:
		return false, nil
	case id == 0 && tables == 0:
		return true, nil
	}
	return false, fmt.Errorf("%w (application id %#x, %d tables)", ErrForeign, id, tables)
}

// claim marks the file as ours, within the transaction that makes the schema.
func claim(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id = %d", applicationID))
	return err
}

// explain adds our error to those of the driver that an operator can act on.
func explain(err error) error {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	switch code := e.Code(); {
	case code&0xff == sqliteFull, code == sqliteIOErrWrite:
		return fmt.Errorf("%w: %w; free some space, nothing was changed", ErrFull, err)
	case code&0xff == sqliteCorrupt, code&0xff == sqliteNotADB:
		return fmt.Errorf("%w: %w; move the database and its root file away to start with empty pools", ErrDamaged, err)
	case code&0xff == sqliteIOErr:
		return fmt.Errorf("%w; look at the disk and the kernel log", err)
	}
	return err
}
