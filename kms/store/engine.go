package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"strings"
)

// engine is what one kind of SQL database does its own way. All else is one
// implementation for both: portable SQL, arguments as $1, numbers as int64.
type engine interface {
	// String names the database in errors and logs; it holds no password.
	String() string
	// prepare looks at the files that Open will touch, makes what must be there,
	// and takes the lock that keeps a second process of this machine away from
	// them. It goes when the file is closed. ErrInUse.
	prepare() (*os.File, error)
	// own takes the lock that keeps processes of other machines away, and makes
	// what must be there before the tables. ErrInUse if another one has it.
	own(ctx context.Context) (lock, error)
	// connector opens connections. What is read through one that is readOnly
	// cannot change the database.
	connector(readOnly bool) (driver.Connector, error)
	// fresh reports whether the database is empty and ours to fill; it refuses
	// another program's.
	fresh(ctx context.Context, q querier) (bool, error)
	// claim marks the database as ours, within the transaction that made the
	// tables.
	claim(ctx context.Context, tx *sql.Tx) error
	// bytesType is the type of byte strings in CREATE TABLE.
	bytesType() string
	// shared reports whether processes on several machines take turns at the
	// database. If so, the lock can be lost while its holder lives.
	shared() bool
	// lockNode makes query, of the node row, one that keeps other processes from
	// changing that row until the transaction ends.
	lockNode(query string) string
	// server names the server and its history: it is another one if the database
	// was put back from a copy. It is empty where nothing but files is there.
	server(ctx context.Context, q querier) (string, error)
	// look gives a way to read the database without changing anything.
	look(ctx context.Context) (*look, error)
}

// lock is what own took.
type lock interface {
	// hold makes sure that the lock stands, and takes it anew where the
	// connection it was bound to broke. ErrInUse if another process took it,
	// ErrDeposed once the node row names another holder.
	hold(ctx context.Context, holder string) error
	// Close gives it back.
	Close() error
}

// newEngine chooses the engine by URL.
func newEngine(opt *Options) (engine, error) {
	scheme, rest, ok := strings.Cut(opt.URL, ":")
	switch {
	case scheme == "sqlite" && rest != "":
		return &sqliteEngine{path: rest, rootFile: opt.RootFile}, nil
	case ok && (scheme == "postgres" || scheme == "postgresql"):
		return newPostgres(opt)
	}
	if !ok || strings.ContainsFunc(scheme, func(r rune) bool { return r < 'a' || r > 'z' }) {
		scheme = "" // of a mistyped URL nothing is shown that may be a password
	}
	return nil, fmt.Errorf("store: URL of an unknown kind %q: want sqlite:/path/to/file or postgres://host/database", scheme)
}

// querier is *sql.DB, *sql.Conn or *sql.Tx.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// explain adds our error to those of a driver that an operator can act on.
func explain(err error) error {
	for _, ours := range []error{ErrUnreachable, ErrReadOnly, ErrDenied, ErrBusy, ErrFull, ErrDamaged, ErrDeposed} {
		if errors.Is(err, ours) {
			return err
		}
	}
	return explainPostgres(explainSQLite(err))
}
