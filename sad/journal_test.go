package sad

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func sampleJournal(t testing.TB) []byte {
	t.Helper()
	var all []byte
	for i, op := range []string{opIntend, opCommit, opIntend, opGone, opIntend} {
		b, err := entry{op, &record{ID: testSA(0x1000 + uint32(i/2)).ID, Owner: testOwner, Fingerprint: "0123456789abcdef"}}.encode()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return all
}

func spis(live records) string {
	var s []string
	for k := range live {
		s = append(s, fmt.Sprintf("%x/%v", k.SPI, live[k].committed))
	}
	return fmt.Sprint(len(s), strings.Contains(strings.Join(s, " "), "true"))
}

// TestJournalPrefixes: a crash can leave any prefix; each is read as its whole
// lines.
func TestJournalPrefixes(t *testing.T) {
	b := sampleJournal(t)
	for n := range len(b) + 1 {
		whole := bytes.LastIndexByte(b[:n], '\n') + 1
		got, lines, end, err := replay(b[:n])
		if err != nil || end != whole || lines != bytes.Count(b[:n], []byte("\n")) {
			t.Fatalf("prefix of %d bytes: %d lines up to %d, %v", n, lines, end, err)
		}
		want, _, _, err := replay(b[:whole])
		if err != nil || spis(got) != spis(want) {
			t.Fatalf("prefix of %d bytes: %v, want %v, %v", n, got, want, err)
		}
	}
}

// TestJournalDamage changes every byte: never silently another content.
func TestJournalDamage(t *testing.T) {
	b := sampleJournal(t)
	for n := range len(b) - 1 {
		bad := bytes.Clone(b)
		bad[n] ^= 0x04
		if bad[n] == '\n' {
			continue
		}
		live, _, _, err := replay(bad)
		if err == nil {
			t.Fatalf("byte %d changed, nothing noticed: %q gives %v", n, bad, live)
		}
		if err != nil && !strings.Contains(err.Error(), "line ") {
			t.Fatalf("the error does not say where: %v", err)
		}
	}
}

func TestJournalFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "journal")
	j, _, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, _, err := openJournal(path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("opened twice: %v", err)
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openJournal(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("readable by others: %v", err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openJournal(link); err == nil {
		t.Error("followed a symbolic link")
	}
	damaged := filepath.Join(dir, "damaged")
	if err := os.WriteFile(damaged, []byte("{}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openJournal(damaged); err == nil || !strings.Contains(err.Error(), "line 1 is damaged") {
		t.Errorf("damaged: %v", err)
	}
}

// TestJournalCompacts: the file stays bounded and keeps what is alive, and is
// still locked.
func TestJournalCompacts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j, live, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	keep := &record{ID: testSA(0x1000).ID, Owner: testOwner}
	for _, op := range []string{opIntend, opCommit} {
		if err := j.append(entry{op, keep}, false); err != nil {
			t.Fatal(err)
		}
	}
	keep.committed = true
	live[keep.ID.Key()] = keep
	for i := range 3 * compactAbove {
		for _, op := range []string{opIntend, opGone} {
			if err := j.append(entry{op, &record{ID: testSA(0x2000 + uint32(i)).ID}}, false); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.compact(live); err != nil {
			t.Fatal(err)
		}
		if j.lines > compactAbove+2*len(live)+2 {
			t.Fatalf("%d lines", j.lines)
		}
	}
	if _, _, err := openJournal(path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("compacted journal opened twice: %v", err)
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	j, live, err = openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	if len(live) != 1 || live[keep.ID.Key()] == nil || !live[keep.ID.Key()].committed || live[keep.ID.Key()].Owner != testOwner {
		t.Errorf("after compaction: %+v", live)
	}
}

// TestJournalAfterFailedCompaction: with one file descriptor left the file cannot
// be replaced; what is written afterwards is in the file of the journal's name.
func TestJournalAfterFailedCompaction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j, live, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range compactAbove {
		for _, op := range []string{opIntend, opGone} {
			if err := j.append(entry{op, &record{ID: testSA(0x2000 + uint32(i)).ID}}, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	release := useUpFiles(t, 1)
	err = j.compact(live)
	release()
	if err == nil {
		t.Error("compacted with one file descriptor: the case is not tested")
	}
	late := &record{ID: testSA(0x1000).ID, Owner: testOwner}
	if err := errors.Join(j.append(entry{opIntend, late}, true), j.close()); err != nil {
		t.Fatal(err)
	}
	j, live, err = openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	if live[late.ID.Key()] == nil {
		t.Error("the intent is not in the journal")
	}
}

// useUpFiles leaves the process with only left file descriptors until release.
func useUpFiles(t *testing.T, left int) (release func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	taken := []int{null}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(null) + 16, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	for {
		fd, err := unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			break
		}
		taken = append(taken, fd)
	}
	for range left {
		_ = unix.Close(taken[len(taken)-1])
		taken = taken[:len(taken)-1]
	}
	return func() {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
		for _, fd := range taken {
			_ = unix.Close(fd)
		}
	}
}

// TestJournalHoldsNoKey: an installed key's bytes are not in the file.
func TestJournalHoldsNoKey(t *testing.T) {
	r := newRig(t)
	r.install(0x1042, true)
	b, err := os.ReadFile(r.journal)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, bytes.Repeat([]byte{0x42}, 8)) || bytes.Contains(b, []byte(strings.Repeat("42", 8))) {
		t.Error("the journal holds the key")
	}
	if strings.Contains(r.log.String(), strings.Repeat("42", 8)) {
		t.Error("the log holds the key")
	}
}

func FuzzJournal(f *testing.F) {
	f.Add(sampleJournal(f))
	f.Add([]byte("{}\n"))
	f.Add([]byte(`{"crc":0,"entry":null}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		live, lines, end, err := replay(b)
		if err != nil {
			return
		}
		if end > len(b) || lines != bytes.Count(b[:end], []byte("\n")) {
			t.Errorf("%d lines up to %d of %d", lines, end, len(b))
		}
		for k, r := range live {
			if r == nil || r.ID.Key() != k {
				t.Errorf("record %v under %v", r, k)
			}
		}
	})
}
