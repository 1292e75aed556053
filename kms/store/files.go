package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// checkMode refuses what another user could read or change. Root's files are
// taken too: systemd owns the credentials it hands to a service.
func checkMode(path string, fi fs.FileInfo, want fs.FileMode) error {
	if fi.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("store: %s has mode %04o: %w; run chmod %04o %s", path, fi.Mode().Perm(), ErrAccess, want, path)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("store: %s: no owner known: %w", path, ErrAccess)
	}
	if uid := os.Geteuid(); int(st.Uid) != uid && st.Uid != 0 {
		return fmt.Errorf("store: %s belongs to user %d, this process is user %d: %w; chown it", path, st.Uid, uid, ErrAccess)
	}
	return nil
}

// checkFile holds an existing regular file to mode 0600.
func checkFile(path string) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("store: %s is not a regular file (%s): %w", path, fi.Mode().Type(), ErrAccess)
	}
	return checkMode(path, fi, 0o600)
}

// checkDir makes dir if it is absent and holds it to mode 0700.
func checkDir(dir string) error {
	fi, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.Mkdir(dir, 0o700); err == nil {
			fi, err = os.Stat(dir)
		}
	}
	if err != nil {
		return fmt.Errorf("store: directory: %w", err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("store: %s is not a directory", dir)
	}
	return checkMode(dir, fi, 0o700)
}

// checkFiles looks at all that Open will touch. The database is created here,
// empty, so that it and what SQLite puts beside it have mode 0600.
func checkFiles(db, rootFile string) error {
	for _, dir := range []string{filepath.Dir(db), filepath.Dir(rootFile)} {
		if err := checkDir(dir); err != nil {
			return err
		}
	}
	for _, f := range []string{db, db + "-wal", db + "-shm", db + ".lock", rootFile, rootFile + ".new"} {
		if err := checkFile(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	f, err := os.OpenFile(db, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("store: create database: %w", err)
	}
	return f.Close()
}

// lockFile takes the exclusive lock that keeps a second process from db. The lock
// goes with the process, however it ends; the file stays.
func lockFile(path, db string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store: lock file: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		defer f.Close()
		b := make([]byte, 20)
		n, _ := f.ReadAt(b, 0)
		pid, convErr := strconv.Atoi(strings.TrimSpace(string(b[:n])))
		if convErr != nil {
			return nil, fmt.Errorf("store: %s: %w; stop it first", db, ErrInUse)
		}
		return nil, fmt.Errorf("store: %s: %w (pid %d); stop it first, or ask it through the operator API", db, ErrInUse, pid)
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		_ = f.Close() // the error that matters is the first
		return nil, fmt.Errorf("store: lock %s: %w", path, err)
	}
	return f, nil
}
