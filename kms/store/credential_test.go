package store

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha512"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// credential writes a credential file, as systemd does, of bytes that begin
// with fill.
func credential(t testing.TB, fill byte, size int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "credentials")
	must(t, os.Mkdir(dir, 0o500))
	path := filepath.Join(dir, "qipsec-root")
	must(t, os.WriteFile(path, bytes.Repeat([]byte{fill}, size), 0o400))
	return path
}

func sealedOptions(dir, credential string) Options {
	opt := testOptions(dir)
	opt.RootCredential = credential
	return opt
}

// A new store of a node with a credential has a sealed root file from the start;
// it opens, ratchets and is finished after a crash with the credential alone.
func TestSealedRoot(t *testing.T) {
	dir, cred, ctx := filepath.Join(t.TempDir(), "s"), credential(t, 7, CredentialSize), testContext(t)
	opt := sealedOptions(dir, cred)
	spentIn(t, opt)
	for range 3 {
		s, err := Open(ctx, opt)
		must(t, err)
		b, err := os.ReadFile(opt.RootFile)
		must(t, err)
		if len(b) != sealedSize || bytes.Contains(b, s.root.secret.Bytes()) {
			t.Error("the root file is not sealed")
		}
		must(t, s.Ratchet(ctx))
		must(t, s.Close())
		if r := Check(ctx, opt); r.Verdict() != Sound || r.Keys != allKeys+10 {
			t.Errorf("%+v", r)
		}
	}
	opt.files = noRename{}
	s, err := Open(ctx, opt)
	must(t, err)
	if s.Ratchet(ctx) == nil {
		t.Fatal("a ratchet ended that could not")
	}
	must(t, s.Close())
	opt.files = nil
	s = mustOpen(t, opt)
	if st, err := s.Stats(ctx); err != nil || st.Epoch != 5 {
		t.Errorf("%+v, %v", st, err)
	}
	if n, err := drain(t, s); n != allKeys || err != nil {
		t.Errorf("%d keys, %v", n, err)
	}
}

// spentIn makes the store of damaged with options.
func spentIn(t *testing.T, opt Options) {
	t.Helper()
	s, ctx := filled(t, opt, 2100), testContext(t)
	must(t, s.PutBlock(ctx, testBlock(t, 2, 10)))
	must(t, s.Activate(ctx, testPool, 2))
	must(t, s.PutBlock(ctx, testBlock(t, 3, 10)))
	lease(t, s, Own, 0, key.At(1, 40))
	lease(t, s, Peer, 0, key.At(1, 21))
	must(t, s.Close())
}

// Whatever does not fit is refused, each with its own words, and nothing is
// changed by that.
func TestCredentialRefused(t *testing.T) {
	good := credential(t, 7, CredentialSize)
	sealed, plain := filepath.Join(t.TempDir(), "sealed"), damaged(t)
	spentIn(t, sealedOptions(sealed, good))
	readable := credential(t, 7, CredentialSize)
	must(t, os.Chmod(readable, 0o440))
	for _, tc := range []struct {
		name, dir, cred string
		want            error
		verdict         Verdict
	}{
		{"none", sealed, "", ErrSealed, Unknown},
		{"another", sealed, credential(t, 8, CredentialSize), ErrWrongCredential, Damaged},
		{"short", sealed, credential(t, 7, CredentialSize-1), ErrCredential, Unknown},
		{"long", sealed, credential(t, 7, CredentialSize+1), ErrCredential, Unknown},
		{"empty", sealed, credential(t, 7, 0), ErrCredential, Unknown},
		{"missing", sealed, good + "x", ErrCredential, Unknown},
		{"readable by others", sealed, readable, ErrAccess, Damaged},
		{"of a root that is not sealed", plain, good, ErrUnsealed, Damaged},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := tree(t, tc.dir)
			s, err := Open(testContext(t), sealedOptions(tc.dir, tc.cred))
			if !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			t.Log(err)
			if err == nil {
				_ = s.Close()
			}
			if r := Check(testContext(t), sealedOptions(tc.dir, tc.cred)); r.Verdict() != tc.verdict {
				t.Errorf("Check: %s, want %s: %+v", r.Verdict(), tc.verdict, r.Findings)
			}
			if after := tree(t, tc.dir); after != before {
				t.Errorf("a refusal changed\n%s\nto\n%s", before, after)
			}
		})
	}
	b, err := os.ReadFile(filepath.Join(sealed, "root"))
	must(t, err)
	c, err := readCredential(good)
	must(t, err)
	defer c.Wipe()
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if _, err := parseRoot(bad, c); !errors.Is(err, ErrDamaged) {
			t.Errorf("a sealed root file with byte %d changed: %v", i, err)
		}
		if _, err := parseRoot(b[:i], c); !errors.Is(err, ErrDamaged) {
			t.Errorf("a sealed root file of %d bytes: %v", i, err)
		}
	}
}

// Sealing is done once, on purpose; afterwards a copy of the plain root file
// opens nothing, whatever database it is put beside, and steps no further.
func TestSealRoot(t *testing.T) {
	dir, cred, ctx := damaged(t), credential(t, 7, CredentialSize), testContext(t)
	old, err := readRoot(filepath.Join(dir, "root"), nil)
	must(t, err)
	plain := copyStore(t, dir)
	opt := sealedOptions(dir, cred)
	must(t, SealRoot(ctx, opt))
	sealed := copyStore(t, dir)
	s, err := Open(ctx, opt)
	must(t, err)
	if s.root.epoch != 2 || s.uuid != old.store {
		t.Errorf("epoch %d of store %s", s.root.epoch, s.uuid)
	}
	next, err := old.next()
	must(t, err)
	if next.secret.Equal(s.root.secret) {
		t.Error("the plain root leads to the sealed one")
	}
	c, err := readCredential(cred)
	must(t, err)
	want, err := hkdf.Key(sha512.New, append(bytes.Clone(old.secret.Bytes()), c.Bytes()...), old.store[:], "Q-IPsec v1 root", 32)
	must(t, err)
	if !bytes.Equal(want, s.root.secret.Bytes()) {
		t.Error("the next root is not as documented")
	}
	if n, err := drain(t, s); n != allKeys || err != nil {
		t.Errorf("%d keys, %v", n, err)
	}
	must(t, s.Close())
	must(t, SealRoot(ctx, opt)) // again: a ratchet
	b, err := os.ReadFile(filepath.Join(plain, "root"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(sealed, "root"), b, 0o600))
	if s, err := Open(ctx, testOptions(sealed)); !errors.Is(err, ErrDamaged) {
		t.Errorf("the plain root beside the new database: %v", err)
		_ = s.Close()
	}
	if err := SealRoot(ctx, sealedOptions(filepath.Join(t.TempDir(), "none"), cred)); !errors.Is(err, ErrNoRoot) {
		t.Errorf("nothing to seal: %v", err)
	}
	if err := SealRoot(ctx, testOptions(plain)); !errors.Is(err, ErrCredential) {
		t.Errorf("no credential: %v", err)
	}
}

// A crash at any write of sealing leaves a root file that is plain or sealed and
// opens, and no key is lost.
func TestSealRootCrash(t *testing.T) {
	cred, ctx := credential(t, 7, CredentialSize), testContext(t)
	was := damaged(t)
	plain, sealed := 0, 0
	for _, mode := range []string{"before", "after", "torn"} {
		for n := 1; ; n++ {
			f := &fault{n: n, mode: mode, crash: true, dir: copyStore(t, was), t: t}
			opt := f.options(t)
			opt.RootCredential = cred
			err := SealRoot(ctx, opt)
			if !f.tripped {
				must(t, err)
				break
			}
			if err == nil && f.what != "scrub" {
				t.Fatalf("%s %d (%s): no error", mode, n, f.what)
			}
			opt = sealedOptions(f.copy, cred)
			s, err := Open(ctx, opt)
			if errors.Is(err, ErrUnsealed) {
				plain++
				opt.RootCredential = ""
				s, err = Open(ctx, opt)
			} else {
				sealed++
			}
			if err != nil {
				t.Fatalf("%s %d (%s): %v", mode, n, f.what, err)
			}
			must(t, s.Close())
			opt.RootCredential = cred
			must(t, SealRoot(ctx, opt))
			s, err = Open(ctx, opt)
			must(t, err)
			if n, err := drain(t, s); n != allKeys || err != nil {
				t.Fatalf("%s %d (%s): %d keys, %v", mode, n, f.what, n, err)
			}
			must(t, s.Close())
		}
	}
	t.Logf("plain %d, sealed %d", plain, sealed)
	if plain == 0 || sealed == 0 {
		t.Error("the crashes show nothing")
	}
}
