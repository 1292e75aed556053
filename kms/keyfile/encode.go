package keyfile

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Encode gives the text of f, which the caller wipes. f is borrowed; its
// KeyLength is set from Data. The errors of a bad header are *Error.
func Encode(f *File) (*key.Material, error) {
	f.KeyLength = f.Data.Len()
	if err := f.check(); err != nil {
		return nil, err
	}
	head, err := json.Marshal(struct {
		Version       int       `json:"version"`
		Pair          uuid.UUID `json:"qkd_pair_id"`
		QKD           uuid.UUID `json:"qkd_id"`
		PeerQKD       uuid.UUID `json:"peer_qkd_id"`
		Role          string    `json:"role"`
		Seq           uint64    `json:"seq"`
		Created       string    `json:"created"`
		QBER          float64   `json:"qber"`
		KeyLength     int       `json:"key_length"`
		HashAlgorithm string    `json:"hash_algorithm"`
	}{Version, f.Pair, f.QKD, f.PeerQKD, f.Role.String(), f.Seq, f.Created.Format(time.RFC3339Nano), f.QBER, f.KeyLength, f.HashAlgorithm})
	if err != nil {
		return nil, fmt.Errorf("keyfile: encode the header of %s: %w", &f.Header, err)
	}
	digest, err := sum(f.HashAlgorithm, f.Data.Bytes())
	defer clear(digest[:])
	if err != nil {
		return nil, err
	}
	const hash, data, end = `,"hash":"`, `","key_data":"`, "\"}\n"
	head = bytes.TrimSuffix(head, []byte("}"))
	n := len(head) + len(hash) + hex.EncodedLen(len(digest)) + len(data) + base64.StdEncoding.EncodedLen(f.KeyLength) + len(end)
	m, err := key.New(n)
	if err != nil {
		return nil, err
	}
	// Every append stays within m's memory: n is the sum of their lengths.
	b := append(m.Bytes()[:0], head...)
	b = append(b, hash...)
	b = hex.AppendEncode(b, digest[:])
	b = append(b, data...)
	b = base64.StdEncoding.AppendEncode(b, f.Data.Bytes())
	if b = append(b, end...); len(b) != n {
		panic("keyfile: the text's size was miscounted") // and part of it would be on the heap
	}
	return m, nil
}

const (
	suffix    = ".qkd"
	seqDigits = 20
)

// Name is the name of the file (pair, seq): PAIR-SEQ.qkd with seq in 20 decimal
// digits, so that names sort by seq.
func Name(pair uuid.UUID, seq uint64) string {
	return fmt.Sprintf("%s-%0*d%s", pair, seqDigits, seq, suffix)
}

// ParseName is the inverse of Name; anything else is an *Error with BadName.
func ParseName(name string) (pair uuid.UUID, seq uint64, err error) {
	no := bad(BadName, "", "want PAIR-SEQ%s with a lower-case UUID and %d digits", suffix, seqDigits)
	const idLen = 36
	if len(name) != idLen+1+seqDigits+len(suffix) || name[idLen] != '-' || !strings.HasSuffix(name, suffix) {
		return uuid.Nil, 0, no
	}
	id, err := key.ParseID(name[:idLen])
	if err != nil || id.String() != name[:idLen] {
		return uuid.Nil, 0, no
	}
	seq, err = strconv.ParseUint(name[idLen+1:idLen+1+seqDigits], 10, 64)
	if err != nil || seq < 1 || seq > key.MaxSeq {
		return uuid.Nil, 0, no
	}
	return uuid.UUID(id), seq, nil
}

// Unfinished reports whether name is one that a feeder uses while it writes: a
// reader leaves it alone.
func Unfinished(name string) bool {
	return strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".tmp")
}

// WriteAtomic writes f into dir under its Name so that a reader sees all of it
// or nothing, also after a crash: temporary name, fsync, rename, fsync of the
// directory. The file has mode 0600. An existing file of that name is an error
// that wraps fs.ErrExist.
func WriteAtomic(dir string, f *File) (path string, err error) {
	text, err := Encode(f)
	if err != nil {
		return "", err
	}
	defer text.Wipe()
	path = filepath.Join(dir, Name(f.Pair, f.Seq))
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("keyfile: write %s: %w", path, errors.Join(fs.ErrExist, err))
	}
	tmp := filepath.Join(dir, "."+filepath.Base(path)+".tmp")
	if err := writeSynced(tmp, text.Bytes()); err != nil {
		return "", fmt.Errorf("keyfile: write %s: %w", path, errors.Join(err, os.Remove(tmp)))
	}
	if err := os.Rename(tmp, path); err != nil {
		return "", fmt.Errorf("keyfile: write %s: %w", path, errors.Join(err, os.Remove(tmp)))
	}
	return path, syncDir(dir)
}

// writeSynced replaces what an earlier, interrupted call left under that name.
func writeSynced(path string, b []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	if err == nil {
		err = w.Sync()
	}
	return errors.Join(err, w.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("keyfile: sync directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("keyfile: sync directory %s: %w", dir, err)
	}
	return nil
}
