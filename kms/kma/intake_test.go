package kma

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
)

// reasons keeps the reason of each refused file by name.
type reasons struct {
	mu sync.Mutex
	m  map[string][]string
}

func (r *reasons) Event(code, _, _ string, attrs ...slog.Attr) {
	if code != "KEYFILE_REFUSED" {
		return
	}
	var file, reason string
	for _, a := range attrs {
		switch a.Key {
		case "file":
			file = a.Value.String()
		case "reason":
			reason = a.Value.String()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m[file] = append(r.m[file], reason)
}

// of gives the reasons and forgets them.
func (r *reasons) of(file string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer delete(r.m, file)
	return r.m[file]
}

// site is one node with no peer that answers: intake alone.
type site struct {
	*node
	w *world
	r *reasons
}

func newSite(t *testing.T, tune func(*Options)) *site {
	t.Helper()
	r := &reasons{m: map[string][]string{}}
	w := newWorld(t, func(o *Options) {
		o.Events = r
		if tune != nil {
			tune(o)
		}
	})
	w.start(w.a, nil)
	t.Cleanup(func() { w.halt(w.a) })
	return &site{node: w.a, w: w, r: r}
}

// text is a good file of this site.
func (s *site) text(t *testing.T, seq uint64, change func(*keyfile.File)) []byte {
	t.Helper()
	data := make([]byte, 4*key.MasterSize+keyfile.Trailer)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	f := sampleFile(t, key.Master, seq, data)
	defer f.Wipe()
	if change != nil {
		change(f)
	}
	m, err := keyfile.Encode(f)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Wipe()
	return bytes.Clone(m.Bytes())
}

// put brings a file in as a feeder does.
func (s *site) put(t *testing.T, name string, text []byte, mode os.FileMode) {
	t.Helper()
	tmp := filepath.Join(s.intake(), ".x.tmp")
	if err := os.WriteFile(tmp, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tmp, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(s.intake(), name)); err != nil {
		t.Fatal(err)
	}
}

func (s *site) newest() uint64 { return s.w.info(s.w.a).NewestSeq }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestRefused brings in one bad file after the other, with a good one behind
// each: exactly the bad one is refused, for its reason, with one event and one
// record that has neither key data nor hash, and the file is gone.
func TestRefused(t *testing.T) {
	s := newSite(t, func(o *Options) { o.MaxFileSize = 4096 })
	other := uuid.MustParse("6d7b2a3e-6a0e-4c3b-9b1e-0f1e2d3c4b5b")
	seq := uint64(10)
	s.put(t, keyfile.Name(pairID, seq), s.text(t, seq, nil), 0o600)
	s.w.want("the first file", func() bool { return s.newest() == seq })
	plain := func(change func(*keyfile.File), spoil func([]byte) []byte) func(*testing.T, string, uint64) {
		return func(t *testing.T, name string, seq uint64) {
			b := s.text(t, seq, change)
			if spoil != nil {
				b = spoil(b)
			}
			s.put(t, name, b, 0o600)
		}
	}
	replace := func(old, repl string) func([]byte) []byte {
		return func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(repl), 1) }
	}
	tests := []struct {
		name string
		file func(seq uint64) string // nil: the right one
		put  func(t *testing.T, name string, seq uint64)
		want keyfile.Reason
	}{
		{"truncated", nil, plain(nil, func(b []byte) []byte { return b[:len(b)/2] }), keyfile.Syntax},
		{"empty", nil, plain(nil, func([]byte) []byte { return nil }), keyfile.Syntax},
		{"oversized", nil, plain(nil, func(b []byte) []byte { return append(b, bytes.Repeat([]byte(" "), 4096)...) }), keyfile.TooLarge},
		{"wrong pair", func(seq uint64) string { return keyfile.Name(other, seq) }, plain(func(f *keyfile.File) { f.Pair = other }, nil), WrongPair},
		{"wrong device", nil, plain(func(f *keyfile.File) { f.QKD = other }, nil), WrongDevice},
		{"wrong role", nil, plain(func(f *keyfile.File) { f.Role = key.Slave }, nil), WrongRole},
		{"wrong hash", nil, plain(nil, replace(`"hash":"`, `"hash":"0000`)), keyfile.BadField},
		{"damaged", nil, plain(nil, func(b []byte) []byte {
			i := bytes.Index(b, []byte(`"key_data":"`)) + 20
			b[i] = 'A' + (b[i]+1)%26
			return b
		}), keyfile.HashMismatch},
		{"older seq", func(uint64) string { return keyfile.Name(pairID, 3) }, func(t *testing.T, name string, _ uint64) { s.put(t, name, s.text(t, 3, nil), 0o600) }, OldSeq},
		{"seq with other bytes", func(seq uint64) string { return keyfile.Name(pairID, seq-1) }, func(t *testing.T, name string, seq uint64) {
			s.put(t, name, s.text(t, seq-1, nil), 0o600)
		}, OldSeq},
		{"unknown field", nil, plain(nil, replace(`{`, `{"x":1,`)), keyfile.UnknownField},
		{"unknown version", nil, plain(nil, replace(`"version":1`, `"version":2`)), keyfile.UnknownVersion},
		{"sha-1", nil, plain(nil, replace(`"sha-256"`, `"sha-1"`)), keyfile.SHA1},
		{"name and content", nil, plain(func(f *keyfile.File) { f.Seq += 5 }, nil), keyfile.NameMismatch},
		{"odd name", func(uint64) string { return "keys.json" }, plain(nil, nil), keyfile.BadName},
		{"odd name with control characters", func(uint64) string { return "a\nb" }, plain(nil, nil), keyfile.BadName},
		{"world-readable", nil, func(t *testing.T, name string, seq uint64) { s.put(t, name, s.text(t, seq, nil), 0o644) }, WrongMode},
		{"group-writable", nil, func(t *testing.T, name string, seq uint64) { s.put(t, name, s.text(t, seq, nil), 0o660) }, WrongMode},
		{"wrong owner", nil, func(t *testing.T, name string, seq uint64) {
			tmp := filepath.Join(s.intake(), ".y.tmp")
			if err := os.WriteFile(tmp, s.text(t, seq, nil), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(tmp, 12345, 12345); err != nil {
				t.Skipf("needs root to give a file away: %v", err)
			}
			if err := os.Rename(tmp, filepath.Join(s.intake(), name)); err != nil {
				t.Fatal(err)
			}
		}, WrongOwner},
		{"FIFO", nil, func(t *testing.T, name string, _ uint64) {
			if err := unix.Mkfifo(filepath.Join(s.intake(), name), 0o600); err != nil {
				t.Fatal(err)
			}
		}, NotRegular},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			seq++
			name := keyfile.Name(pairID, seq)
			if tt.file != nil {
				name = tt.file(seq)
			}
			tt.put(t, name, seq)
			seq++
			s.put(t, keyfile.Name(pairID, seq), s.text(t, seq, nil), 0o600)
			s.w.want("the good file behind", func() bool { return s.newest() == seq })
			s.w.want("the bad file away", func() bool { return !exists(filepath.Join(s.intake(), name)) })
			if got := s.r.of(shown(name)); len(got) != 1 || got[0] != string(tt.want) {
				t.Errorf("reasons %q, want %q once", got, tt.want)
			}
			s.checkRecord(t, shown(name), tt.want)
		})
	}
}

// checkRecord finds the newest record.
func (s *site) checkRecord(t *testing.T, name string, want keyfile.Reason) {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(s.intake(), refusedDir, "*.json"))
	if err != nil || len(list) == 0 {
		t.Fatalf("no record: %v", err)
	}
	b, err := os.ReadFile(list[len(list)-1])
	if err != nil {
		t.Fatal(err)
	}
	var r map[string]any
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	if r["file"] != name || r["reason"] != string(want) {
		t.Errorf("record %s", b)
	}
	if r["key_data"] != nil || r["hash"] != nil || len(b) > 1000 {
		t.Errorf("record with key data or hash: %s", b)
	}
}

// TestLinksAreNotFollowed: what a link points to is neither read nor changed.
func TestLinksAreNotFollowed(t *testing.T) {
	for _, kind := range []string{"symbolic", "hard"} {
		t.Run(kind, func(t *testing.T) {
			s := newSite(t, nil)
			precious := filepath.Join(s.dir, "precious")
			text := s.text(t, 1, nil)
			if err := os.WriteFile(precious, text, 0o600); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(s.intake(), keyfile.Name(pairID, 1))
			link, want := os.Symlink, Symlink
			if kind == "hard" {
				link, want = os.Link, HardLinked
			}
			if err := link(precious, name); err != nil {
				t.Fatal(err)
			}
			s.w.want("the link away", func() bool { return !exists(name) })
			if got := s.r.of(filepath.Base(name)); len(got) != 1 || got[0] != string(want) {
				t.Errorf("reasons %q, want %q", got, want)
			}
			if b, err := os.ReadFile(precious); err != nil || !bytes.Equal(b, text) {
				t.Errorf("the link's other end was changed: %v", err)
			}
			if s.newest() != 0 {
				t.Error("the link was taken in")
			}
		})
	}
}

// TestTakenInFileIsOverwritten keeps the file open: its bytes must be gone, not
// only its name.
func TestTakenInFileIsOverwritten(t *testing.T) {
	s := newSite(t, nil)
	for _, tt := range []struct{ name, text string }{
		{keyfile.Name(pairID, 1), string(s.text(t, 1, nil))},
		{keyfile.Name(pairID, 2), `{"key_data":"` + strings.Repeat("A", 100_000) + `"}`},
	} {
		tmp := filepath.Join(s.intake(), ".z.tmp")
		if err := os.WriteFile(tmp, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(tmp)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if err := os.Rename(tmp, filepath.Join(s.intake(), tt.name)); err != nil {
			t.Fatal(err)
		}
		s.w.want("the file away", func() bool { return !exists(filepath.Join(s.intake(), tt.name)) })
		b := make([]byte, len(tt.text))
		if _, err := f.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("%s: bytes are left on disk", tt.name)
		}
	}
}

// TestSparseFileIsNotFilled: a huge file with little in it must not fill the
// disk when it is overwritten.
func TestSparseFileIsNotFilled(t *testing.T) {
	s := newSite(t, nil)
	const size, at = 1 << 28, 100 << 20
	tmp := filepath.Join(s.intake(), ".z.tmp")
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	secret := bytes.Repeat([]byte("K"), 5000)
	if _, err := f.WriteAt(secret, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(s.intake(), keyfile.Name(pairID, 1))
	if err := os.Rename(tmp, name); err != nil {
		t.Fatal(err)
	}
	s.w.want("the file away", func() bool { return !exists(name) })
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes on disk of a file with %d", st.Blocks*512, len(secret))
	}
	if _, err := f.ReadAt(secret, at); err != nil || !bytes.Equal(secret, make([]byte, len(secret))) {
		t.Errorf("bytes are left on disk (%v)", err)
	}
}

// TestUnfinishedFilesAreLeft: a feeder's temporary files are none of ours.
func TestUnfinishedFilesAreLeft(t *testing.T) {
	s := newSite(t, nil)
	names := []string{".hidden", "x.tmp", keyfile.Name(pairID, 1) + ".tmp"}
	for _, n := range names {
		if err := os.WriteFile(filepath.Join(s.intake(), n), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.put(t, keyfile.Name(pairID, 2), s.text(t, 2, nil), 0o640)
	s.w.want("the good file", func() bool { return s.newest() == 2 })
	for _, n := range names {
		if !exists(filepath.Join(s.intake(), n)) {
			t.Errorf("%s was removed", n)
		}
	}
}

// TestDirectoryThatCannotBeRemoved gets one event, not one per scan.
func TestDirectoryThatCannotBeRemoved(t *testing.T) {
	s := newSite(t, nil)
	name := keyfile.Name(pairID, 1)
	if err := os.Mkdir(filepath.Join(s.intake(), name), 0o700); err != nil {
		t.Fatal(err)
	}
	for seq := uint64(2); seq < 6; seq++ { // four scans at least
		s.put(t, keyfile.Name(pairID, seq), s.text(t, seq, nil), 0o600)
		s.w.want("a good file", func() bool { return s.newest() == seq })
	}
	if got := s.r.of(name); len(got) != 1 || got[0] != string(NotRegular) {
		t.Errorf("reasons %q", got)
	}
}

func TestUnsafeDirectory(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o770, link: 0o700, file: 0o600, dir + "/none": 0} {
		if mode != 0 && path != link {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
		if d, err := openIntake(path, 0, 100); err == nil {
			_ = d.close()
			t.Errorf("%s with mode %o was opened", path, mode)
		}
	}
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	d, err := openIntake(dir, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Error(err)
	}
	if err := os.Chown(dir, 4711, 4711); err != nil {
		t.Logf("not root, the owner's check is left out: %v", err)
		return
	}
	if d, err := openIntake(dir, 0, 100); err == nil {
		_ = d.close()
		t.Error("a stranger's directory was opened")
	}
	d, err = openIntake(dir, 4711, 100)
	if err != nil {
		t.Fatalf("the feeder's directory: %v", err)
	}
	if err := d.close(); err != nil {
		t.Error(err)
	}
}

// TestManyBadFiles: good files are not held up, the records stay
// bounded, and in the end the directory is clean.
func TestManyBadFiles(t *testing.T) {
	count := envInt(t, "COUNT", 2000) // make soak: 10,000
	s := newSite(t, func(o *Options) { o.MaxRefused = 50 })
	for i := range count {
		// Names of no file, of another pair's and of this one's, by turns.
		name := fmt.Sprintf("0junk%d", i)
		switch i % 3 {
		case 1:
			name = keyfile.Name(uuid.MustParse("00000000-6a0e-4c3b-9b1e-0f1e2d3c4b5a"), uint64(i))
		case 2:
			name = keyfile.Name(pairID, uint64(i))
		}
		if err := os.WriteFile(filepath.Join(s.intake(), name), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	for seq := uint64(count); seq < uint64(count)+20; seq++ {
		s.put(t, keyfile.Name(pairID, seq), s.text(t, seq, nil), 0o600)
		s.w.want("a good file", func() bool { return s.newest() == seq })
	}
	t.Logf("20 good files among the bad ones within %v", time.Since(begin))
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		list, err := os.ReadDir(s.intake())
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 1 {
			break // refused/
		}
		if time.Now().After(end) {
			t.Fatalf("%d entries are left", len(list))
		}
	}
	t.Logf("all %d bad files after %v", count, time.Since(begin))
	if list, err := os.ReadDir(filepath.Join(s.intake(), refusedDir)); err != nil || len(list) != 50 {
		t.Errorf("%d records, %v, want 50", len(list), err)
	}
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	if len(s.r.m) != count {
		t.Errorf("%d files have an event, want %d", len(s.r.m), count)
	}
}

// TestCrashBetweenStoreAndUnlink: the file comes again with the same bytes and
// is cleaned up without a word.
func TestCrashBetweenStoreAndUnlink(t *testing.T) {
	s := newSite(t, nil)
	text := s.text(t, 1, nil)
	name := keyfile.Name(pairID, 1)
	s.put(t, name, text, 0o600)
	s.w.want("the file taken in", func() bool { return s.newest() == 1 && !exists(filepath.Join(s.intake(), name)) })
	s.w.kill(s.w.a)
	s.put(t, name, text, 0o600)
	s.w.start(s.w.a, nil)
	s.w.want("the file away", func() bool { return !exists(filepath.Join(s.intake(), name)) })
	if got := s.r.of(name); len(got) != 0 {
		t.Errorf("refused: %q", got)
	}
	if i := s.w.info(s.w.a); i.Received != 4 {
		t.Errorf("%d keys, want the 4 of one file", i.Received)
	}
}

// TestCrashBetweenOverwriteAndUnlink: what is left has no content any more, and
// says nothing against the feeder. A file of zeros that was not taken in does.
func TestCrashBetweenOverwriteAndUnlink(t *testing.T) {
	s := newSite(t, nil)
	text := s.text(t, 1, nil)
	name := keyfile.Name(pairID, 1)
	s.put(t, name, text, 0o600)
	s.w.want("the file taken in", func() bool { return s.newest() == 1 && !exists(filepath.Join(s.intake(), name)) })
	s.w.kill(s.w.a)
	for n, seq := range map[string]uint64{"zeroed": 1, "half zeroed": 1, "never seen": 2} {
		left := make([]byte, len(text))
		if n == "half zeroed" {
			copy(left[len(left)/2:], text[len(text)/2:])
		}
		name := keyfile.Name(pairID, seq)
		s.put(t, name, left, 0o600)
		s.w.start(s.w.a, nil)
		s.w.want("the file away", func() bool { return !exists(filepath.Join(s.intake(), name)) })
		s.w.kill(s.w.a)
		if got := s.r.of(name); (len(got) > 0) != (seq == 2) {
			t.Errorf("%s: refused: %q", n, got)
		}
	}
}

// fullDisk is a store that stores no block while it is full.
type fullDisk struct {
	Store
	full  atomic.Bool
	tries atomic.Int64
}

func (d *fullDisk) PutBlock(ctx context.Context, b Block) error {
	d.tries.Add(1)
	if d.full.Load() {
		return errors.New("disk is full")
	}
	return d.Store.PutBlock(ctx, b)
}

// TestIntakeDownIsSaidOnce: a machine that cannot take files in for hours fills
// neither the events nor the log, and keeps the files.
func TestIntakeDownIsSaidOnce(t *testing.T) {
	w := newWorld(t, nil)
	d := &fullDisk{}
	d.full.Store(true)
	w.a.tune = func(o *Options) { d.Store, o.Store = o.Store, d }
	w.start(w.a, nil)
	t.Cleanup(func() { w.halt(w.a) })
	w.feed(1, 8, nil)
	w.want("many tries", func() bool { return d.tries.Load() > 10 })
	if n, m := w.a.events.count("INTAKE_DOWN"), w.a.events.count("INTAKE_BACK"); n != 1 || m != 0 {
		t.Errorf("%d events that intake is down, %d that it is back, after %d tries", n, m, d.tries.Load())
	}
	d.full.Store(false)
	w.want("the file taken in", func() bool { return w.info(w.a).NewestSeq == 1 })
	w.want("an event that says so", func() bool { return w.a.events.count("INTAKE_BACK") == 1 })
	if n := w.a.events.count("INTAKE_DOWN"); n != 1 {
		t.Errorf("%d events that intake is down", n)
	}
}
