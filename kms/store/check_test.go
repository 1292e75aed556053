package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// tree is what a directory holds, by name, with modes.
func tree(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	s := ""
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		fi, err2 := e.Info()
		if err != nil || err2 != nil {
			s += fmt.Sprintln(e.Name(), err, err2)
			continue
		}
		s += fmt.Sprintf("%s %s %x\n", e.Name(), fi.Mode(), sha256.Sum256(b))
	}
	return s
}

// checked runs Check on the store of dir, which it must not change.
func checked(t testing.TB, dir string) *Report {
	t.Helper()
	before := tree(t, dir)
	r := Check(testContext(t), testOptions(dir))
	if after := tree(t, dir); after != before {
		t.Errorf("Check changed files:\n%s\nwere\n%s", after, before)
	}
	for _, f := range r.Findings {
		if f.What == "" || f.Do == "" && f.Verdict != Unknown {
			t.Errorf("a finding says too little: %+v", f)
		}
	}
	return r
}

func TestCheckSound(t *testing.T) {
	dir := damaged(t)
	r := checked(t, dir)
	if r.Verdict() != Sound || len(r.Findings) != 0 || r.Running || r.Pools != 1 || r.Blocks != 3 || r.Keys != allKeys+10 || r.Parts != 4 || r.History == 0 || r.Epoch != 1 {
		t.Errorf("%+v", r)
	}
	// As a crash leaves it: a log that was not written back; then the same where
	// SQLite's shared memory is missing, as in a copy.
	s := mustOpen(t, testOptions(dir))
	must(t, s.AppendEvent(testContext(t), LogEvent{Severity: SeverityRun, Code: "x"}))
	crashed := copyStore(t, dir)
	if r := checked(t, crashed); r.Verdict() != Sound || r.Events != 1 {
		t.Errorf("without shared memory: %+v", r)
	}
	must(t, os.WriteFile(filepath.Join(crashed, "store.db-shm"), make([]byte, 32768), 0o600))
	if r := checked(t, crashed); r.Verdict() != Sound || r.Events != 1 {
		t.Errorf("after a crash: %+v", r)
	}
	must(t, os.WriteFile(filepath.Join(crashed, "root.new"), make([]byte, 96), 0o600))
	if r := checked(t, crashed); r.Verdict() != Sound || len(r.Findings) != 1 || !strings.Contains(r.Findings[0].What, "root.new") {
		t.Errorf("a leftover: %+v", r)
	}
}

// Check beside a daemon that works as hard as it can, ratchets among it, finds
// nothing wrong, again and again, and takes nothing from it.
func TestCheckBesideADaemon(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	s, ctx := filled(t, testOptions(dir), 2100), testContext(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var newest atomic.Uint64
	wg.Go(func() {
		for seq := uint64(2); ; seq++ {
			newest.Store(seq)
			select {
			case <-stop:
				return
			default:
			}
			must(t, s.PutBlock(ctx, testBlock(t, seq, 10)))
			must(t, s.Activate(ctx, testPool, seq))
			must(t, s.Ratchet(ctx))
		}
	})
	for i := 0; i < 20 || newest.Load() < 20; i++ {
		if r := Check(ctx, testOptions(dir)); r.Verdict() != Sound || !r.Running || r.Blocks == 0 {
			t.Errorf("%+v", r)
		}
	}
	close(stop)
	wg.Wait()
	var out bytes.Buffer
	if n, err := Export(ctx, testOptions(dir), ExportQuery{}, &out); err != nil || n < 20 {
		t.Errorf("export beside a daemon: %d rows, %v", n, err)
	}
	out.Reset()
	if _, err := Backup(ctx, testOptions(dir), &out); err != nil {
		t.Errorf("backup beside a daemon: %v", err)
	}
	if _, err := Restore(ctx, testOptions(dir), bytes.NewReader(out.Bytes())); !errors.Is(err, ErrInUse) {
		t.Errorf("restored over a running store: %v", err)
	}
}

// spoilRow changes a byte of a column, whatever it was.
func spoilRow(table, column, where string) string {
	const other = `CASE substr(%[2]s, 6, 1) WHEN x'a5' THEN x'5a' ELSE x'a5' END`
	return fmt.Sprintf(`UPDATE %[1]s SET %[2]s = substr(%[2]s, 1, 5) || `+other+` || substr(%[2]s, 7) %[3]s`, table, column, where)
}

// Each fault is found, said with what it is about, and of the right verdict; and
// Open thinks the same of it.
func TestCheckFindings(t *testing.T) {
	sql := func(stmt string) func(*testing.T, string) {
		return func(t *testing.T, dir string) { sqlExec(t, dir, strings.Split(stmt, "; ")...) }
	}
	for _, tc := range []struct {
		name  string
		spoil func(*testing.T, string)
		want  Verdict
		says  string
	}{
		{"byte in node", sql(spoilRow("node", "proof", "")), Damaged, "node row does not open"},
		{"byte in pool", sql(spoilRow("pool", "proof", "")), Damaged, "row of pool"},
		{"mark lowered", sql(`UPDATE pool SET own_mark = own_mark - 2`), Damaged, "row of pool"},
		{"byte in block", sql(spoilRow("block", "wrap", "WHERE seq = 2")), Damaged, "block 2 of pool"},
		{"byte in a box", sql(spoilRow("part", "box", "WHERE seq = 1 AND part = 1")), Damaged, "block 1 of pool"},
		{"byte in ids", sql(spoilRow("part", "ids", "WHERE seq = 3")), Damaged, "block 3 of pool"},
		{"part missing", sql(`DELETE FROM part WHERE seq = 1 AND part = 1`), Damaged, "1 sound parts, want 2"},
		{"history out of range", sql(`UPDATE history SET state = 77 WHERE serial = 2`), Damaged, "history row 2"},
		{"history of no type", sql(`UPDATE history SET first_pos = 'x' WHERE serial = 2`), Damaged, "history"},
		{"event of no kind", sql(`INSERT INTO event VALUES (9, 1, 'loud', 'x', '', '', '')`), Damaged, "event row 9"},
		{"table missing", sql(`DROP TABLE event`), Damaged, "event"},
		{"newer schema", sql(`UPDATE node SET version = 99`), Unknown, "newer version"},
		{"another program's", sql(`PRAGMA application_id = 77`), Unknown, "not a Q-IPsec store"},
		{"no root", func(t *testing.T, d string) { must(t, os.Remove(d+"/root")) }, Damaged, "root file is missing"},
		{"torn root", func(t *testing.T, d string) { must(t, os.Truncate(d+"/root", 40)) }, Damaged, "not a root file"},
		{"root readable", func(t *testing.T, d string) { must(t, os.Chmod(d+"/root", 0o644)) }, Damaged, "root has mode 0644"},
		{"database readable", func(t *testing.T, d string) { must(t, os.Chmod(d+"/store.db", 0o640)) }, Damaged, "store.db has mode 0640"},
		{"directory open", func(t *testing.T, d string) { must(t, os.Chmod(d, 0o755)) }, Damaged, "mode 0755"},
		{"no database", func(t *testing.T, d string) { must(t, os.Remove(d+"/store.db")) }, Unknown, "there is no store"},
		{"cut to nothing", func(t *testing.T, d string) { must(t, os.Truncate(d+"/store.db", 0)) }, Damaged, "empty"},
		{"torn page", func(t *testing.T, d string) {
			f, err := os.OpenFile(d+"/store.db", os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt(bytes.Repeat([]byte{0xee}, 2048), 4096)
			must(t, err)
			must(t, f.Close())
		}, Damaged, ""},
		{"file cut off", func(t *testing.T, d string) {
			fi, err := os.Stat(d + "/store.db")
			must(t, err)
			must(t, os.Truncate(d+"/store.db", fi.Size()-4096))
		}, Damaged, ""},
		{"not a database", func(t *testing.T, d string) {
			must(t, os.WriteFile(d+"/store.db", bytes.Repeat([]byte("plain text "), 900), 0o600))
		}, Damaged, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := damaged(t)
			tc.spoil(t, dir)
			r := checked(t, dir)
			said := false
			for _, f := range r.Findings {
				said = said || f.Verdict == tc.want && strings.Contains(f.What, tc.says)
			}
			if r.Verdict() != tc.want || !said {
				t.Errorf("verdict %s, want %s with %q: %+v", r.Verdict(), tc.want, tc.says, r.Findings)
			}
			for _, f := range r.Findings {
				t.Logf("%s: %s -> %s", f.Verdict, f.What, f.Do)
			}
		})
	}
}

// Pairs of database and root file that do not belong together.
func TestCheckRootAndDatabase(t *testing.T) {
	ctx := testContext(t)
	dir := filepath.Join(t.TempDir(), "s")
	s := filled(t, testOptions(dir), 10)
	var copies []string
	for range 4 {
		copies = append(copies, copyStore(t, dir))
		must(t, s.Ratchet(ctx))
	}
	for _, tc := range []struct {
		name     string
		db, root int
		want     Verdict
		says     string
	}{
		{"together", 2, 2, Sound, ""},
		{"as after a crash", 2, 1, Sound, "a ratchet to epoch 3 was cut off"},
		{"older root", 2, 0, Damaged, "root file is an older copy"},
		{"database restored from yesterday", 1, 3, Damaged, "database is an older copy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, err := os.ReadFile(filepath.Join(copies[tc.root], "root"))
			must(t, err)
			dir := copyStore(t, copies[tc.db])
			must(t, os.WriteFile(filepath.Join(dir, "root"), b, 0o600))
			r := checked(t, dir)
			if r.Verdict() != tc.want || !strings.Contains(fmt.Sprint(r.Findings), tc.says) {
				t.Errorf("%s: %+v", r.Verdict(), r.Findings)
			}
		})
	}
}

// Whatever byte changes: where Open refuses or gives a block up, Check says so;
// where Check says sound, all keys come out.
func TestCheckTellsTheTruth(t *testing.T) {
	dir := damaged(t)
	good, err := os.ReadFile(filepath.Join(dir, "store.db"))
	must(t, err)
	sound, bad := 0, 0
	for i := range 40 {
		work := copyStore(t, dir)
		spoiled := bytes.Clone(good)
		at := (i*len(good)/40 + 37*i) % len(good)
		spoiled[at] ^= 0x41
		must(t, os.WriteFile(filepath.Join(work, "store.db"), spoiled, 0o600))
		r := checked(t, work)
		n := 0
		s, err := Open(testContext(t), testOptions(work))
		if err == nil {
			n, err = drain(t, s)
			_ = s.Close() // may fail on a damaged file
		}
		if r.Verdict() == Sound && (err != nil || n != allKeys) {
			t.Errorf("byte %d: said to be sound, but %d keys came out, %v", at, n, err)
		}
		if r.Verdict() == Sound {
			sound++
		} else {
			bad++
		}
	}
	t.Logf("sound %d, not %d", sound, bad)
	if sound == 0 || bad == 0 {
		t.Error("the damage done shows nothing")
	}
}

// A disk that cannot be written to: the store does not open, which it says, and
// can be checked.
func TestReadOnlyDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	cmd, in, out := child(t, "TestChildReadOnly", damaged(t), &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS})
	_ = in.Close()
	if err := cmd.Wait(); err != nil || !strings.Contains(out, "ready") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestChildReadOnly is the process of TestReadOnlyDisk.
func TestChildReadOnly(t *testing.T) {
	dir := os.Getenv("STORE_TEST_DIR")
	if dir == "" {
		return
	}
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	must(t, unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	_, err := Open(testContext(t), testOptions(dir))
	if err == nil || !strings.Contains(err.Error(), "read-only file system") {
		t.Fatalf("error %v", err)
	}
	if r := checked(t, dir); r.Verdict() != Sound || r.Keys != allKeys+10 {
		t.Fatalf("%+v", r)
	}
	must(t, unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT, ""))
	if n, err := drain(t, mustOpen(t, testOptions(dir))); n != allKeys || err != nil {
		t.Fatalf("writable again: %d keys, %v", n, err)
	}
	fmt.Println("ready")
}

func TestExport(t *testing.T) {
	dir := damaged(t)
	s, ctx := mustOpen(t, testOptions(dir)), testContext(t)
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	other := testPool
	other[0] = 9
	many := make([]Event, 2*exportPage+7)
	for i := range many {
		many[i] = Event{Time: at.Add(time.Duration(i) * time.Second), Pool: other, Side: Own, First: key.At(1, uint32(2*i)), Last: key.At(1, uint32(2*i)), State: key.Supplied, Count: 1}
	}
	many[0].ID = testID(1, 0)
	must(t, s.Record(ctx, many))
	must(t, s.AppendEvent(ctx, LogEvent{Time: at, Severity: SeverityAlarm, Code: "c", Text: "t"}))
	for _, tc := range []struct {
		name string
		q    ExportQuery
		want int
	}{
		{"a pool", ExportQuery{Pool: other}, len(many)},
		{"a time", ExportQuery{From: at, To: at.Add(10 * time.Second)}, 11},
		{"a pool's from a time", ExportQuery{Pool: other, From: at.Add(2 * exportPage * time.Second)}, 7},
		{"nothing", ExportQuery{To: at}, 0},
	} {
		var out bytes.Buffer
		n, err := Export(ctx, testOptions(dir), tc.q, &out)
		if err != nil || n != tc.want || strings.Count(out.String(), "\n") != tc.want {
			t.Errorf("%s: %d rows, want %d, %v", tc.name, n, tc.want, err)
		}
	}
	var out bytes.Buffer
	if _, err := Export(ctx, testOptions(dir), ExportQuery{From: at, To: at.Add(time.Second)}, &out); err != nil {
		t.Fatal(err)
	}
	want := `{"kind":"history","serial":8,"time":"2026-01-02T03:04:05.000006Z","pool":"` + other.String() + `","side":"own","first":"1/0","last":"1/0","key_id":"` + testID(1, 0).String() + `","state":"supplied","count":1}
{"kind":"event","serial":1,"time":"2026-01-02T03:04:05.000006Z","severity":"alarm","code":"c","text":"t"}
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}
