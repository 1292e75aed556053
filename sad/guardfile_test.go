package sad

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

func aSavedGuard() SavedGuard {
	return SavedGuard{Config: "/etc/q-ipsec/qipsecd.toml", Time: time.Unix(1_800_000_000, 0).UTC(), Guard: GuardConfig{
		Remotes: prefixes("10.2.0.0/16", "2001:db8:2::/48"), Routed: prefixes("10.3.0.0/16"),
		Allow: []Channel{
			{Local: netip.MustParseAddr("192.0.2.1"), Remote: netip.MustParsePrefix("10.2.0.1/32"), Protocol: 6, RemotePort: 8441},
			{Remote: netip.MustParsePrefix("10.2.0.9/32"), Protocol: 6, RemotePort: 443},
		},
	}}
}

func TestSavedGuard(t *testing.T) {
	name := filepath.Join(t.TempDir(), "guard")
	if _, err := LoadGuard(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	want := aSavedGuard()
	if err := os.WriteFile(name+".new", []byte("left by a crash"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := SaveGuard(name, want); err != nil {
		t.Fatal(err)
	}
	got, err := LoadGuard(name)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	if fi, err := os.Stat(name); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	same := want
	same.Time = want.Time.Add(time.Hour)
	if err := SaveGuard(name, same); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadGuard(name); err != nil || !got.Time.Equal(want.Time) {
		t.Errorf("the same guard was written anew: %v, %v", got.Time, err)
	}
	empty := SavedGuard{Config: want.Config, Time: same.Time}
	if err := SaveGuard(name, empty); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadGuard(name); err != nil || !reflect.DeepEqual(got, empty) {
		t.Errorf("nothing to guard: %+v, %v", got, err)
	}
	if err := SaveGuard(name, SavedGuard{Guard: GuardConfig{Remotes: []netip.Prefix{{}}}}); err == nil {
		t.Error("an impossible guard was saved")
	}
	if list, err := os.ReadDir(filepath.Dir(name)); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if err := SaveGuard(filepath.Join(name, "x"), want); err == nil {
		t.Error("saved below a file")
	}
}

// No damaged file, and none that others can change, gives a guard.
func TestSavedGuardDamaged(t *testing.T) {
	name := filepath.Join(t.TempDir(), "guard")
	good := aSavedGuard().encode()
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 1
		if s, err := decodeGuard(b); err == nil {
			t.Fatalf("byte %d changed: %+v", i, s)
		}
		if s, err := decodeGuard(good[:i]); err == nil {
			t.Fatalf("cut at %d: %+v", i, s)
		}
	}
	for what, put := range map[string]func() error{
		"readable": func() error { return os.WriteFile(name, good, 0o644) },
		"longer":   func() error { return os.WriteFile(name, append(bytes.Clone(good), '\n'), 0o600) },
		"later": func() error {
			return os.WriteFile(name, bytes.Replace(good, []byte("guard 1"), []byte("guard 2"), 1), 0o600)
		},
		"link":      func() error { return errors.Join(os.WriteFile(name+".x", good, 0o600), os.Symlink(name+".x", name)) },
		"directory": func() error { return os.Mkdir(name, 0o700) },
		"huge":      func() error { return os.WriteFile(name, make([]byte, maxGuardFile+1), 0o600) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		if what == "readable" {
			if err := os.Chmod(name, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if s, err := LoadGuard(name); err == nil {
			t.Errorf("%s: %+v", what, s)
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzSavedGuard(f *testing.F) {
	for _, s := range []SavedGuard{aSavedGuard(), {}} {
		b := s.encode()
		f.Add(b)
		f.Add(bytes.Split(b, []byte("\n"))[1])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// As it stands, and as a body whose checksum is right.
		for _, text := range [][]byte{b, fmt.Appendf(nil, "%s\n%s\n%x\n", guardHead, b, sha256.Sum256(b))} {
			s, err := decodeGuard(text)
			if err != nil {
				continue
			}
			if _, err := s.Guard.Policies(); err != nil {
				t.Fatal(err)
			}
			again, err := decodeGuard(s.encode())
			if err != nil || !reflect.DeepEqual(s.Guard, again.Guard) {
				t.Fatalf("%+v became %+v, %v", s, again, err)
			}
		}
	})
}
