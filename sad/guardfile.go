package sad

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

const (
	guardHead    = "q-ipsec guard 1" // first line: what the file is, in which version
	maxGuardFile = 1 << 20
)

// SavedGuard is a guard on disk: that of the last config that was good, for a boot
// at which the config is not.
type SavedGuard struct {
	Config string    // the file it was made from
	Time   time.Time // when
	Guard  GuardConfig
}

// SaveGuard writes s over what the file held, whole or not at all. One that holds the
// same guard already is left as it is.
func SaveGuard(name string, s SavedGuard) error {
	if _, err := s.Guard.Policies(); err != nil {
		return err
	}
	if old, err := LoadGuard(name); err == nil {
		was, is := old, s
		was.Time, is.Time = time.Time{}, time.Time{}
		if a, b := was.encode(), is.encode(); bytes.Equal(a, b) {
			return nil
		}
	}
	if err := replaceFile(name, s.encode()); err != nil {
		return fmt.Errorf("sad: save the guard: %w", err)
	}
	return nil
}

func (s SavedGuard) encode() []byte {
	body, err := json.Marshal(s)
	if err != nil { // addresses and numbers
		panic(err)
	}
	sum := sha256.Sum256(body)
	return fmt.Appendf(nil, "%s\n%s\n%x\n", guardHead, body, sum)
}

// replaceFile writes b with mode 0600 and syncs it and its directory.
func replaceFile(name string, b []byte) error {
	temp := name + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(temp, name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// LoadGuard reads what SaveGuard wrote. A file that is not there gives an error that
// wraps fs.ErrNotExist; one that is damaged, of another version, or that others can
// change, is never half believed.
func LoadGuard(name string) (s SavedGuard, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return s, fmt.Errorf("sad: saved guard: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fi, err := f.Stat()
	if err != nil {
		return s, fmt.Errorf("sad: saved guard: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 || ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return s, fmt.Errorf("sad: saved guard %s is not a regular file of mode 0600 of root or of this user", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxGuardFile+1))
	if err != nil {
		return s, fmt.Errorf("sad: saved guard: %w", err)
	}
	if s, err = decodeGuard(b); err != nil {
		return SavedGuard{}, fmt.Errorf("sad: saved guard %s: %w", name, err)
	}
	return s, nil
}

func decodeGuard(b []byte) (s SavedGuard, err error) {
	line := bytes.Split(b, []byte("\n"))
	if len(b) > maxGuardFile || len(line) != 4 || string(line[0]) != guardHead || len(line[3]) != 0 {
		return s, fmt.Errorf("it is not of the form that begins with %q", guardHead)
	}
	sum := sha256.Sum256(line[1])
	if hex.EncodeToString(sum[:]) != string(line[2]) {
		return s, errors.New("it is damaged: the checksum is another")
	}
	if err := json.Unmarshal(line[1], &s); err != nil {
		return s, err
	}
	_, err = s.Guard.Policies()
	return s, err
}
