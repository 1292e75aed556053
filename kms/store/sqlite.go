package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/url"
	"os"

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

// sqliteEngine is a database in one file, of one process.
type sqliteEngine struct{ path, rootFile string }

func (e *sqliteEngine) String() string { return e.path }

func (e *sqliteEngine) bytesType() string { return "BLOB" }

func (e *sqliteEngine) prepare() (*os.File, error) {
	if err := checkFiles(e.path, e.rootFile); err != nil {
		return nil, err
	}
	return lockFile(e.path+".lock", e.path)
}

// own has nothing to do: the file is locked, and no lock file outlives its process.
func (e *sqliteEngine) own(context.Context) (lock, error) { return fileLock{}, nil }

// fileLock stands as long as the process does.
type fileLock struct{}

func (fileLock) hold(context.Context, string) error { return nil }

func (fileLock) Close() error { return nil }

func (e *sqliteEngine) shared() bool { return false }

// lockNode: every transaction that writes has the database to itself.
func (e *sqliteEngine) lockNode(query string) string { return query }

func (e *sqliteEngine) server(context.Context, querier) (string, error) { return "", nil }

// connector spells the settings that every connection gets. synchronous=FULL
// syncs the write-ahead log at each commit: a mark that Advance reported survives
// a power cut.
func (e *sqliteEngine) connector(readOnly bool) (driver.Connector, error) {
	q := url.Values{"_txlock": {"immediate"}, "_pragma": {
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)",
		"cell_size_check(1)", "temp_store(MEMORY)", "journal_size_limit(16777216)",
	}}
	if readOnly {
		q.Set("_query_only", "1")
	}
	return sqliteConnector("file:" + (&url.URL{Path: e.path}).EscapedPath() + "?" + q.Encode()), nil
}

// sqliteConnector is a data source name.
type sqliteConnector string

// Driver is SQLite's.
func (c sqliteConnector) Driver() driver.Driver { return &sqlite.Driver{} }

// Connect opens a connection; a file needs no waiting for.
func (c sqliteConnector) Connect(context.Context) (driver.Conn, error) {
	return c.Driver().Open(string(c))
}

func (e *sqliteEngine) fresh(ctx context.Context, q querier) (bool, error) {
	var id, tables int64
	if err := q.QueryRowContext(ctx, "PRAGMA application_id").Scan(&id); err != nil {
		return false, explain(err)
	}
	if err := q.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master").Scan(&tables); err != nil {
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

func (e *sqliteEngine) claim(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id = %d", applicationID))
	return err
}

func explainSQLite(err error) error {
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
