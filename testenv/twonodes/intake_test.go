package twonodes

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
)

const (
	badFiles  = 10_000
	goodFiles = 10
	perGood   = 2000 // keys
)

// 10,000 bad files beside good ones, and some at the other end: the good ones
// become active, SAEs are served all the while, and nothing that a bad file
// points at is touched.
func TestBadFilesBesideGoodOnes(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, "intake_interval = \"50ms\"\n")
	s.up()
	if err := s.feed(20_000); err != nil {
		t.Fatal(err)
	}
	s.supplying()
	outside := s.plant(0, badFiles)
	s.plant(1, badFiles/20)
	for range goodFiles {
		if err := s.feed(perGood); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	l := newLedger()
	served := 0
	a, b := s.te(0), s.te(1)
	calls := time.NewTicker(50 * time.Millisecond)
	defer calls.Stop()
	for end := began.Add(2 * bound); s.waiting(0)+s.waiting(1) > 0; <-calls.C {
		if time.Now().After(end) {
			t.Fatalf("after %v, %d and %d files wait", time.Since(began), s.waiting(0), s.waiting(1))
		}
		s.pairEqual(l, 0, 1, a, b)
		served++
	}
	t.Logf("%d bad files at a were done with in %v, and %d pairs of calls were answered meanwhile", badFiles, time.Since(began).Round(time.Millisecond), served)
	if served < 3 {
		t.Errorf("only %d pairs of calls were answered while files were taken in", served)
	}
	p := s.agree()
	if p.NewestSeq != s.seq {
		t.Errorf("newest seq is %d, %d was delivered", p.NewestSeq, s.seq)
	}
	if least := goodFiles * perGood; p.Active < least {
		t.Errorf("%d keys are active, %d were delivered last", p.Active, least)
	}
	for _, f := range l.list() {
		t.Error(f)
	}
	s.intact(outside)
	s.setAside()
}

// plant puts the bad files in, among names below and above those of the good
// ones. It gives a file outside that they point at.
func (s *site) plant(node, n int) (outside string) {
	t, dir, p := s.t, s.pair[node].Intake, s.pair[node]
	t.Helper()
	outside = filepath.Join(s.dir, names[node]+"-outside")
	good := s.text(node, s.seq+500)
	put := func(name string, b []byte, mode os.FileMode) {
		if err := os.WriteFile(filepath.Join(dir, name), b, mode); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n - 8 {
		seq := uint64(1000 + i)
		switch i % 5 {
		case 0:
			put(keyfile.Name(p.ID, seq), []byte("{"), 0o600)
		case 1:
			put(keyfile.Name(uuid.New(), seq), good, 0o600)
		case 2: // of another seq
			put(keyfile.Name(p.ID, seq), good, 0o600)
		case 3:
			put(fmt.Sprintf("noise-%d", i), nil, 0o600)
		case 4:
			put(keyfile.Name(p.ID, seq), bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1), 0o600)
		}
	}
	put(keyfile.Name(p.ID, s.seq+500), good, 0o644) // only its mode is wrong
	put(keyfile.Name(p.ID, s.seq+501), good, 0o622)
	if err := errors.Join(
		os.WriteFile(outside, good, 0o600),
		os.Symlink(outside, filepath.Join(dir, keyfile.Name(p.ID, s.seq+502))),
		os.Link(outside, filepath.Join(dir, keyfile.Name(p.ID, s.seq+503))),
		os.Symlink("/nowhere", filepath.Join(dir, "dangling")),
		unix.Mkfifo(filepath.Join(dir, keyfile.Name(p.ID, s.seq+504)), 0o600),
		os.Mkdir(filepath.Join(dir, keyfile.Name(p.ID, s.seq+505)), 0o700),
		os.WriteFile(filepath.Join(dir, strings.Repeat("n", 255)), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	// os.WriteFile goes by the umask.
	for n, mode := range map[uint64]os.FileMode{500: 0o644, 501: 0o622} {
		if err := os.Chmod(filepath.Join(dir, keyfile.Name(p.ID, s.seq+n)), mode); err != nil {
			t.Fatal(err)
		}
	}
	return outside
}

// text is a QKD-Key file that would be taken in, were it not for its name or
// mode.
func (s *site) text(node int, seq uint64) []byte {
	s.t.Helper()
	data, err := key.Random(rand.Reader, 10*key.MasterSize+keyfile.Trailer)
	if err != nil {
		s.t.Fatal(err)
	}
	defer data.Wipe()
	p := s.pair[node]
	m, err := keyfile.Encode(&keyfile.File{Data: data, Header: keyfile.Header{
		Pair: p.ID, QKD: p.QKDID, PeerQKD: p.PeerQKDID, Role: p.Role, Seq: seq,
		Created: time.Now().UTC(), QBER: 0.02, HashAlgorithm: keyfile.SHA256,
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	defer m.Wipe()
	return bytes.Clone(m.Bytes())
}

// intact checks what links pointed at.
func (s *site) intact(outside string) {
	s.t.Helper()
	b, err := os.ReadFile(outside)
	if err != nil || !bytes.HasPrefix(b, []byte("{")) || !bytes.Contains(b, []byte("key_data")) {
		s.t.Errorf("a file outside the intake directory was changed: %v", err)
	}
}

// setAside checks the records of what was refused: bounded, without key data,
// and every kind is among the daemon's events.
func (s *site) setAside() {
	s.t.Helper()
	dir := filepath.Join(s.pair[0].Intake, "refused")
	list, err := os.ReadDir(dir)
	if err != nil || len(list) == 0 || len(list) > 1000 {
		s.t.Errorf("%d records of refused files: %v", len(list), err)
	}
	for _, e := range list {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil || bytes.Contains(b, []byte("key_data")) {
			s.t.Errorf("record %s: %v", e.Name(), err)
		}
	}
	events, err := s.nodes[0].op.Events(s.t.Context(), "", 4096)
	if err != nil {
		s.t.Fatal(err)
	}
	refused := 0
	for _, e := range events {
		if e.Code == "KEYFILE_REFUSED" {
			refused++
		}
	}
	if refused < 1000 {
		s.t.Errorf("%d events of refused files", refused)
	}
}
