package store

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// A root file may be sealed by a credential, 32 secret bytes that never change
// and that systemd hands to the service: sealed themselves by the machine's TPM,
// say (docs/decisions/0008). The credential goes two ways into what it protects:
//
//	seal key = HKDF-SHA-512(credential, salt = store UUID, "Q-IPsec v1 root seal")
//	root_{n+1} = HKDF-SHA-512(root_n | credential, salt = store UUID, "Q-IPsec v1 root")
//
// by the first the root file alone is worth nothing; by the second a copy of the
// root from before it was sealed leads no further than to the next ratchet.

// What a root file and a credential that do not fit say.
var (
	ErrSealed          = errors.New("root file is sealed by a credential")
	ErrUnsealed        = errors.New("root file is not sealed")
	ErrCredential      = errors.New("credential cannot be used")
	ErrWrongCredential = errors.New("root file is sealed by another credential")
)

// CredentialSize is the size of a credential, in bytes.
const CredentialSize = 32

// The sealed root file: "QIPROOT2" | store UUID (16) | epoch (8, big-endian) |
// box of the root, all before it being the associated data | SHA-256 of all
// before it (32), which tells damage from a wrong credential.
const (
	sealedMagic = "QIPROOT2"
	sealedSize  = rootKeyAt + boxOverhead + 32 + 32
)

// readCredential reads a credential file of mode 0600 or less.
func readCredential(path string) (*key.Material, error) {
	if err := checkFile(path); err != nil {
		return nil, fmt.Errorf("%w: %w; qipsecd.service has a line that loads it", ErrCredential, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("store: %w: %w", ErrCredential, err)
	}
	defer f.Close() //nolint:errcheck // only read
	m, err := key.New(CredentialSize + 1)
	if err != nil {
		return nil, err
	}
	defer m.Wipe()
	n, err := io.ReadFull(f, m.Bytes())
	if n != CredentialSize || !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("store: %w: %s has not %d bytes; it is random bytes, not text", ErrCredential, path, CredentialSize)
	}
	c, err := key.New(CredentialSize)
	if err != nil {
		return nil, err
	}
	copy(c.Bytes(), m.Bytes())
	return c, nil
}

// readRoot reads the root file, and first the credential that it is sealed by,
// if there is one; nil, nil where no root file is.
func (s *Store) readRoot() (*root, error) {
	if s.opt.RootCredential == "" {
		return readRoot(s.opt.RootFile, nil)
	}
	if s.credential == nil {
		c, err := readCredential(s.opt.RootCredential)
		if err != nil {
			return nil, err
		}
		s.credential = c
	}
	return readRoot(s.opt.RootFile, s.credential)
}

// sealKey is the cipher of a sealed root file.
func sealKey(credential *key.Material, store uuid.UUID) (*key.Material, error) {
	b, err := hkdf.Key(sha512.New, credential.Bytes(), store[:], "Q-IPsec v1 root seal", 32)
	if err != nil {
		return nil, fmt.Errorf("store: derive seal key: %w", err)
	}
	return key.Take(b)
}

// encodeSealed gives the bytes of a sealed root file.
func (r *root) encodeSealed() (*key.Material, error) {
	k, err := sealKey(r.credential, r.store)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	a, err := newAEAD(k.Bytes())
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, sealedSize)
	b = append(b, sealedMagic...)
	b = append(b, r.store[:]...)
	b = binary.BigEndian.AppendUint64(b, r.epoch)
	b = append(b, seal(a, r.secret.Bytes(), b)...)
	sum := sha256.Sum256(b)
	return key.Take(append(b, sum[:]...))
}

// parseSealed reads a sealed root file's bytes, whose magic is right.
func parseSealed(b []byte, credential *key.Material) (*root, error) {
	if len(b) != sealedSize {
		return nil, fmt.Errorf("not a root file: %d bytes, wanted %d: %w", len(b), sealedSize, ErrDamaged)
	}
	if sum := sha256.Sum256(b[:sealedSize-32]); string(sum[:]) != string(b[sealedSize-32:]) {
		return nil, fmt.Errorf("checksum of the root file is wrong: it is torn or damaged: %w", ErrDamaged)
	}
	if credential == nil {
		return nil, fmt.Errorf("%w, and none is configured: set root_credential", ErrSealed)
	}
	r := &root{store: uuid.UUID(b[8:24]), epoch: binary.BigEndian.Uint64(b[24:rootKeyAt]), credential: credential}
	k, err := sealKey(credential, r.store)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	a, err := newAEAD(k.Bytes())
	if err != nil {
		return nil, err
	}
	if r.secret, err = key.New(32); err != nil {
		return nil, err
	}
	if err := unseal(a, b[rootKeyAt:sealedSize-32], r.secret.Bytes(), b[:rootKeyAt]); err != nil {
		r.secret.Wipe()
		return nil, ErrWrongCredential
	}
	if r.epoch == 0 || r.epoch > 1<<62 {
		r.secret.Wipe()
		return nil, fmt.Errorf("epoch of the root file is out of range: %w", ErrDamaged)
	}
	return r, nil
}

// SealRoot seals the root file of opt by opt.RootCredential, once and for all,
// and ratchets, so that copies of the file as it was become worthless. It takes
// the lock. After an error, or a crash, the root file is as it was or sealed;
// calling again is right. A root file that is sealed already is ratcheted.
func SealRoot(ctx context.Context, opt Options) error {
	if opt.RootCredential == "" {
		return fmt.Errorf("store: %w: none is named", ErrCredential)
	}
	c, err := readCredential(opt.RootCredential)
	if err != nil {
		return err
	}
	defer c.Wipe()
	r, err := readRoot(opt.RootFile, c)
	switch {
	case errors.Is(err, ErrUnsealed):
		if err := sealPlain(ctx, opt, c); err != nil {
			return err
		}
	case err != nil:
		return err
	case r == nil:
		return fmt.Errorf("store: %w: %s; a new store's is sealed from the start", ErrNoRoot, opt.RootFile)
	default:
		r.secret.Wipe()
	}
	s, err := Open(ctx, opt)
	if err != nil {
		return err
	}
	err = s.Ratchet(ctx)
	if err == nil {
		err = s.AppendEvent(ctx, LogEvent{Severity: SeverityRun, Code: "store-root-sealed", Source: "store", Text: "the root file is sealed by a credential", Action: "ratcheted"})
	}
	return errors.Join(err, s.Close())
}

// sealPlain replaces a root file by the same root, sealed. No row changes, so
// that every crash leaves a pair that fits; but a ratchet must not be under way,
// since the next step of the chain is another one with a credential.
func sealPlain(ctx context.Context, opt Options, c *key.Material) error {
	opt.RootCredential = ""
	s, err := Open(ctx, opt)
	if err != nil {
		return err
	}
	r := *s.root
	r.credential = c
	if s.epoch != r.epoch {
		err = fmt.Errorf("store: a ratchet to epoch %d is under way and cannot be finished; it must be first", s.epoch)
	} else {
		var late error
		if late, err = replaceRoot(s.opt.files, opt.RootFile, &r); late != nil {
			s.opt.Log.Warn("store: the old root's bytes may still be on the disk", "err", late)
		}
	}
	return errors.Join(err, s.Close())
}
