package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"os"
	"strings"
)

// engine is what one kind of SQL database does its own way. All else is one
// implementation for both: portable SQL, arguments as $1, numbers as int64.
type engine interface {
	// String names the database in errors and logs; it holds no password.
	String() string
	// prepare looks at the files that Open will touch, makes what must be there
	// before the first connection, and takes the lock that keeps a second process
	// of this node away. The lock goes when the file is closed.
	prepare() (lock *os.File, err error)
	// connector opens connections. What is read through one that is readOnly
	// cannot change the database.
	connector(readOnly bool) (driver.Connector, error)
	// fresh reports whether the database is empty and ours to fill; it refuses
	// another program's.
	fresh(ctx context.Context, q querier) (bool, error)
	// claim marks the database as ours, within the transaction that makes the
	// schema.
	claim(ctx context.Context, tx *sql.Tx) error
	// bytesType is the type of byte strings in CREATE TABLE.
	bytesType() string
}

// newEngine chooses the engine by URL.
func newEngine(opt *Options) (engine, error) {
	scheme, rest, ok := strings.Cut(opt.URL, ":")
	switch {
	case ok && scheme == "sqlite" && rest != "":
		return &sqliteEngine{path: rest, rootFile: opt.RootFile}, nil
	}
	return nil, fmt.Errorf("store: URL %q: want sqlite:/path/to/file", opt.URL)
}

// querier is *sql.DB or *sql.Tx.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// explain adds our error to those of a driver that an operator can act on.
func explain(err error) error { return explainSQLite(err) }
