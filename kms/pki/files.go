package pki

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// maxFile bounds a certificate, key or trust file, in bytes.
const maxFile = 1 << 20

// Files names one end's files of one channel, all PEM.
type Files struct {
	CA   string // certificates of the CA that signed the other end
	Cert string // own certificate, intermediates after it
	Key  string // own private key: 0600, of root or of our own user
}

// Write writes the credential as base.crt (0644) and base.key (0600) in dir,
// which exists. Existing files are refused unless replace; each file is
// replaced whole or not at all.
func (c Credential) Write(dir, base string, replace bool) error {
	if err := WriteFile(filepath.Join(dir, base+".key"), c.Key, 0o600, replace); err != nil {
		return err
	}
	return WriteFile(filepath.Join(dir, base+".crt"), c.Cert, 0o644, replace)
}

// ReadCredential reads what Write wrote.
func ReadCredential(dir, base string) (Credential, error) {
	keyFile := filepath.Join(dir, base+".key")
	if err := CheckSecret(keyFile); err != nil {
		return Credential{}, err
	}
	k, err := readFile(keyFile)
	if err != nil {
		return Credential{}, err
	}
	c, err := readFile(filepath.Join(dir, base+".crt"))
	if err != nil {
		return Credential{}, err
	}
	return Credential{Cert: c, Key: k}, nil
}

// WriteFile writes a file of the given mode, whatever the umask. Without
// replace an existing file is an error that wraps fs.ErrExist; with it the file
// is replaced by rename, so that a reader sees the old or the new one.
func WriteFile(name string, b []byte, mode fs.FileMode, replace bool) error {
	target := name
	if replace {
		name += ".new"
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pki: %w", err)
		}
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, mode)
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil && replace {
		err = os.Rename(name, target)
	}
	if err != nil {
		return fmt.Errorf("pki: write %s: %w", target, errors.Join(err, os.Remove(name)))
	}
	return nil
}

// CheckSecret reports what makes a file unfit to hold a secret: it must be a
// regular file, of root or of our own user, that nobody else can read or write.
func CheckSecret(name string) error {
	fi, err := os.Lstat(name)
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("pki: %s is not a regular file", name)
	}
	if m := fi.Mode().Perm(); m&0o077 != 0 {
		return fmt.Errorf("pki: %s has mode %#o: others can reach a secret; chmod 600 it", name, m)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("pki: %s belongs to uid %d: chown it to root or to the daemon's user", name, st.Uid)
	}
	return nil
}

// Pool reads a trust file: one or more CA certificates and nothing else.
func Pool(name string) (*x509.CertPool, error) {
	b, err := readFile(name)
	if err != nil {
		return nil, err
	}
	return parsePool(name, b)
}

// parsePool reads the text of the trust file name.
func parsePool(name string, b []byte) (*x509.CertPool, error) {
	pool, n := x509.NewCertPool(), 0
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("pki: trust file %s holds a %q: only certificates belong there", name, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("pki: trust file %s: %w", name, err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("pki: trust file %s: certificate %q is not a CA's", name, c.Subject)
		}
		pool.AddCert(c)
		n++
	}
	if n == 0 {
		return nil, fmt.Errorf("pki: trust file %s holds no certificate", name)
	}
	return pool, nil
}

func readFile(name string) ([]byte, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxFile {
		return nil, fmt.Errorf("pki: %s is not a regular file of at most %d bytes", name, maxFile)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	return b, nil
}
