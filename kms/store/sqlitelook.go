package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// look gives a way to read the file beside a running process, or, if none runs,
// keeps one from starting until it is done. A log that a crash left is read but
// not written back; of the files SQLite wants beside it, one that was not there
// is removed again.
func (e *sqliteEngine) look(context.Context) (*look, error) {
	l := &look{begin: "BEGIN", verify: verifySQLite}
	for _, dir := range []string{filepath.Dir(e.path), filepath.Dir(e.rootFile)} {
		fi, err := os.Stat(dir)
		if err != nil {
			return nil, fmt.Errorf("store: directory: %w", err)
		}
		if err := checkMode(dir, fi, 0o700); err != nil {
			return nil, err
		}
	}
	wal, shm := e.path+"-wal", e.path+"-shm"
	for _, f := range []string{e.path, wal, shm, e.path + ".lock", e.rootFile, e.rootFile + ".new"} {
		if err := checkFile(f); err != nil && (f == e.path || !errors.Is(err, fs.ErrNotExist)) {
			return nil, err
		}
	}
	lock, running, err := lookLock(e.path + ".lock")
	if err != nil {
		return nil, err
	}
	l.running = running
	logged := fileThere(wal) && !fileEmpty(wal)
	hadShm := fileThere(shm)
	q := url.Values{"mode": {"ro"}, "_query_only": {"1"}, "_pragma": {"busy_timeout(5000)", "trusted_schema(0)", "cell_size_check(1)", "temp_store(MEMORY)"}}
	switch {
	case running:
	case !logged:
		q.Set("immutable", "1") // the file is all there is, and nobody changes it
	case hadShm:
		q.Set("readonly_shm", "1")
	}
	l.connector = sqliteConnector("file:" + (&url.URL{Path: e.path}).EscapedPath() + "?" + q.Encode())
	if fileThere(e.rootFile+".new") && !running {
		l.leftovers = append(l.leftovers, e.rootFile+".new")
	}
	l.done = func() (err error) {
		if !running && logged && !hadShm && fileThere(shm) {
			err = os.Remove(shm)
		}
		if lock != nil {
			err = errors.Join(err, lock.Close())
		}
		return err
	}
	return l, nil
}

// lookLock shares the lock while nobody has it; running says that somebody has.
// Without a lock file nobody has ever opened the database in place.
func lookLock(path string) (f *os.File, running bool, err error) {
	f, err = os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("store: lock file: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, true, f.Close()
	}
	if err != nil {
		return nil, false, errors.Join(fmt.Errorf("store: lock %s: %w", path, err), f.Close())
	}
	return f, false, nil
}

func fileThere(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func fileEmpty(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.Size() == 0
}

// verifySQLite is SQLite's own search through every page and index.
func verifySQLite(ctx context.Context, q querier) (found []string, err error) {
	rows, err := q.QueryContext(ctx, "PRAGMA integrity_check(20)")
	if err != nil {
		return nil, explain(err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			return found, explain(err)
		}
		if s != "ok" {
			found = append(found, s)
		}
	}
	return found, explain(rows.Err())
}
