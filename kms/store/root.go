package store

import (
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// The root file: "QIPROOT1" | store UUID (16) | epoch (8, big-endian) | root
// (32) | SHA-256 of all before it (32).
const (
	rootMagic = "QIPROOT1"
	rootSize  = 8 + 16 + 8 + 32 + 32
	rootKeyAt = 8 + 16 + 8
)

// root is root_n of one store. Its owner wipes secret.
type root struct {
	store      uuid.UUID
	epoch      uint64
	secret     *key.Material
	credential *key.Material // what the file is sealed by; borrowed, nil: it is not
}

// newRoot draws the first root of a new store, sealed by a credential unless
// that is nil.
func newRoot(credential *key.Material) (*root, error) {
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("store: make store UUID: %w", err)
	}
	m, err := key.Random(rand.Reader, 32)
	if err != nil {
		return nil, err
	}
	return &root{store: id, epoch: 1, secret: m, credential: credential}, nil
}

// parseRoot reads a root file's bytes, borrowed. With a credential the file must
// be sealed by it, without one it must not be sealed.
func parseRoot(b []byte, credential *key.Material) (*root, error) {
	if len(b) >= 8 && string(b[:8]) == sealedMagic {
		return parseSealed(b, credential)
	}
	if len(b) != rootSize || string(b[:8]) != rootMagic {
		return nil, fmt.Errorf("not a root file: %d bytes, wanted %d that begin with %s: %w", len(b), rootSize, rootMagic, ErrDamaged)
	}
	sum := sha256.Sum256(b[:rootSize-32])
	if !bytes.Equal(sum[:], b[rootSize-32:]) {
		return nil, fmt.Errorf("checksum of the root file is wrong: it is torn or damaged: %w", ErrDamaged)
	}
	if credential != nil {
		return nil, fmt.Errorf("%w, but root_credential is set: run `qipsec store seal-root` once", ErrUnsealed)
	}
	epoch := binary.BigEndian.Uint64(b[24:rootKeyAt])
	if epoch == 0 || epoch > 1<<62 {
		return nil, fmt.Errorf("epoch of the root file is out of range: %w", ErrDamaged)
	}
	m, err := key.New(32)
	if err != nil {
		return nil, err
	}
	copy(m.Bytes(), b[rootKeyAt:])
	return &root{store: uuid.UUID(b[8:24]), epoch: epoch, secret: m}, nil
}

// encode gives the file's bytes, which the caller wipes.
func (r *root) encode() (*key.Material, error) {
	if r.credential != nil {
		return r.encodeSealed()
	}
	m, err := key.New(rootSize)
	if err != nil {
		return nil, err
	}
	b := m.Bytes()
	copy(b, rootMagic)
	copy(b[8:], r.store[:])
	binary.BigEndian.PutUint64(b[24:], r.epoch)
	copy(b[rootKeyAt:], r.secret.Bytes())
	sum := sha256.Sum256(b[:rootSize-32])
	copy(b[rootSize-32:], sum[:])
	return m, nil
}

// derive is the KDF of the package (RFC 5869 with SHA-512).
func (r *root) derive(from *key.Material, label string) (*key.Material, error) {
	b, err := hkdf.Key(sha512.New, from.Bytes(), r.store[:], label, 32)
	if err != nil {
		return nil, fmt.Errorf("store: derive %s: %w", label, err)
	}
	return key.Take(b)
}

// next is root_{n+1}; r stays the caller's to wipe.
func (r *root) next() (*root, error) {
	from := r.secret
	if r.credential != nil {
		both, err := key.New(r.secret.Len() + r.credential.Len())
		if err != nil {
			return nil, err
		}
		defer both.Wipe()
		copy(both.Bytes(), r.secret.Bytes())
		copy(both.Bytes()[r.secret.Len():], r.credential.Bytes())
		from = both
	}
	m, err := r.derive(from, "Q-IPsec v1 root")
	if err != nil {
		return nil, err
	}
	return &root{store: r.store, epoch: r.epoch + 1, secret: m, credential: r.credential}, nil
}

// dataKey is the cipher under data key n.
func (r *root) dataKey() (cipher.AEAD, error) {
	m, err := r.derive(r.secret, "Q-IPsec v1 data")
	if err != nil {
		return nil, err
	}
	defer m.Wipe()
	return newAEAD(m.Bytes())
}

// rootFiles is what the ratchet does to the file system, so that tests can
// make any step fail.
type rootFiles interface {
	// create writes b to a new file of mode 0600 and syncs it; a leftover of
	// that name is replaced.
	create(path string, b []byte) error
	rename(from, to string) error
	syncDir(dir string) error
	// scrub overwrites an unlinked file and syncs it.
	scrub(f *os.File) error
}

type osFiles struct{}

func (osFiles) create(path string, b []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (osFiles) rename(from, to string) error { return os.Rename(from, to) }

func (osFiles) syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (osFiles) scrub(f *os.File) error {
	if _, err := f.WriteAt(make([]byte, max(rootSize, sealedSize)), 0); err != nil {
		return err
	}
	return f.Sync()
}

// readRoot reads a root file, sealed by credential unless that is nil. It gives
// nil, nil where no file is.
func readRoot(path string, credential *key.Material) (*root, error) {
	if err := checkFile(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	m, err := key.New(max(rootSize, sealedSize) + 1)
	if err != nil {
		return nil, err
	}
	defer m.Wipe()
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("store: read root file: %w", err)
	}
	defer f.Close()
	n := 0
	for n < m.Len() {
		k, err := f.Read(m.Bytes()[n:])
		n += k
		if err != nil || k == 0 {
			break // what came in is judged below
		}
	}
	r, err := parseRoot(m.Bytes()[:n], credential)
	if err != nil {
		return nil, fmt.Errorf("store: %s: %w; put the right one back, or move it and the database away to start with empty pools", path, err)
	}
	return r, nil
}

// rootFault is the error of a step on the way to a new root file.
func rootFault(path, step string, err error) error {
	return fmt.Errorf("store: %w %s: %s: %w; its directory must be writable and have space", errRootFile, path, step, err)
}

// tryRoot fails where replaceRoot would for want of a directory that can be
// written to. What it leaves there holds no secret, and replaceRoot takes its
// place.
func tryRoot(fsys rootFiles, path string) error {
	if err := fsys.create(path+".new", make([]byte, rootSize)); err != nil {
		return rootFault(path, "write", err)
	}
	return nil
}

// replaceRoot makes path hold r, or leaves it as it was: write, sync, rename,
// sync the directory, then overwrite what the old file held. late is an error
// of that last step, after which the new root is in force all the same.
func replaceRoot(fsys rootFiles, path string, r *root) (late, err error) {
	b, err := r.encode()
	if err != nil {
		return nil, err
	}
	defer b.Wipe()
	fail := func(step string, err error) error { return rootFault(path, step, err) }
	if err := fsys.create(path+".new", b.Bytes()); err != nil {
		return nil, fail("write", err)
	}
	old, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fail("open the old one", err)
	}
	if old != nil {
		defer old.Close()
	}
	if err := fsys.rename(path+".new", path); err != nil {
		return nil, fail("rename", err)
	}
	if err := fsys.syncDir(filepath.Dir(path)); err != nil {
		return nil, fail("sync directory", err)
	}
	if old != nil {
		if err := fsys.scrub(old); err != nil {
			return fmt.Errorf("store: overwrite the old root: %w", err), nil
		}
	}
	return nil, nil
}
