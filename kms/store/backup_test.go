package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// backedUp gives a store's directory and its backup.
func backedUp(t *testing.T) (dir string, backup []byte, generation uint64) {
	t.Helper()
	dir = damaged(t)
	s, ctx := mustOpen(t, testOptions(dir)), testContext(t)
	must(t, s.Advance(ctx, testPool, Peer, key.At(1, 21), "sync", 4711))
	must(t, s.AppendEvent(ctx, LogEvent{Severity: SeverityAlarm, Code: "c", Source: "s", Text: "t", Action: "a"}))
	generation = s.Generation()
	must(t, s.Close())
	var out bytes.Buffer
	before := tree(t, dir)
	info, err := Backup(ctx, testOptions(dir), &out)
	must(t, err)
	if tree(t, dir) != before {
		t.Error("Backup changed files")
	}
	if info.Store != s.UUID() || info.Pools != 1 || info.Rows != strings.Count(out.String(), "\n")-2 {
		t.Errorf("%+v", info)
	}
	return dir, out.Bytes(), generation
}

func TestBackupAndRestore(t *testing.T) {
	dir, backup, generation := backedUp(t)
	ctx := testContext(t)
	old := mustOpen(t, testOptions(dir))
	to := testOptions(filepath.Join(t.TempDir(), "new"))
	to.Now = func() time.Time { return time.Unix(1, 0) } // a clock that is set back
	info, err := Restore(ctx, to, bytes.NewReader(backup))
	must(t, err)
	if r := checked(t, filepath.Dir(to.RootFile)); r.Verdict() != Sound || len(r.Findings) != 0 {
		t.Errorf("a restored store: %+v", r)
	}
	s := mustOpen(t, to)
	p, err := s.Pool(ctx, testPool)
	must(t, err)
	want := PoolInfo{ID: testPool, Peer: "bob", Role: key.Master, Class: key.Direct, NewestSeq: 3, PeerGeneration: 4711}
	if p != want {
		t.Errorf("pool %+v, want %+v: empty, without marks", p, want)
	}
	if s.UUID() == old.UUID() || s.root.secret.Equal(old.root.secret) || s.Generation() <= generation {
		t.Errorf("store %s, generation %d; the old one was %s, %d", s.UUID(), s.Generation(), old.UUID(), generation)
	}
	// The history is all there, in order.
	was, err := old.History(ctx, HistoryQuery{Limit: 1000})
	must(t, err)
	is, err := s.History(ctx, HistoryQuery{Limit: 1000})
	must(t, err)
	if len(was) != len(is) || len(was) == 0 {
		t.Fatalf("%d rows, want %d", len(is), len(was))
	}
	for i := range was {
		if is[i] != was[i] {
			t.Errorf("%+v, want %+v", is[i], was[i])
		}
	}
	ev, err := s.Events(ctx, EventQuery{})
	must(t, err)
	if len(ev) != 2 || ev[0].Code != "store-restored" || ev[1].Code != "c" || ev[1].Action != "a" || info.Rows != len(was)+1 {
		t.Errorf("events %+v, %+v", ev, info)
	}
	if err := s.PutBlock(ctx, testBlock(t, 3, 4)); !errors.Is(err, ErrOldSeq) {
		t.Errorf("a file that was taken in before: %v", err)
	}
	if err := s.Advance(ctx, testPool, Peer, 0, "sync", 4710); !errors.Is(err, ErrOldGeneration) {
		t.Errorf("an older store of the peer's: %v", err)
	}
	must(t, s.PutBlock(ctx, testBlock(t, 4, 4)))
	must(t, s.Ratchet(ctx))
}

// No key, block, lease, mark or root is in a backup.
func TestBackupHoldsNoKeys(t *testing.T) {
	dir, backup, _ := backedUp(t)
	w := windows([]uint64{1, 2, 3}, 2100)
	root, err := readRoot(filepath.Join(dir, "root"), nil)
	must(t, err)
	w[string(root.secret.Bytes()[:8])] = true
	for i := range backup {
		if within(w, backup, i) {
			t.Fatal("a piece of a key or root is in the backup")
		}
	}
	var head map[string]any
	line, _, _ := bytes.Cut(backup, []byte("\n"))
	must(t, json.Unmarshal(line, &head))
	for _, p := range append([]any{head}, head["pools"].([]any)...) {
		for k := range p.(map[string]any) {
			if !strings.Contains(" format version made store generation pools id peer role class newest_seq peer_generation ", " "+k+" ") {
				t.Errorf("a backup says %q", k)
			}
		}
	}
}

// What is not a whole sound backup is refused, and nothing is made.
func TestBadBackups(t *testing.T) {
	_, good, _ := backedUp(t)
	lines := bytes.SplitAfter(good, []byte("\n"))
	join := func(l ...[]byte) []byte { return bytes.Join(l, nil) }
	bad := map[string][]byte{
		"empty": {}, "no backup": []byte("plain text\n"), "end missing": join(lines[:len(lines)-2]...), "row missing": join(append(lines[:1:1], lines[2:]...)...),
		"rows exchanged": join(append([][]byte{lines[0], lines[2], lines[1]}, lines[3:]...)...), "more after the end": append(bytes.Clone(good), "{}\n"...),
		"newer": bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1), "other format": bytes.Replace(good, []byte(backupFormat), []byte("other"), 1),
	}
	for i := 0; i < len(good); i += 1 + len(good)/200 {
		b := bytes.Clone(good)
		b[i] ^= 1
		bad["byte "+string(rune('0'+i%10))+" "+time.Duration(i).String()] = b
	}
	for i := 1; i < len(good); i += 1 + len(good)/50 {
		bad["cut at "+time.Duration(i).String()] = good[:i]
	}
	for name, b := range bad {
		dir := filepath.Join(t.TempDir(), "new")
		if _, err := Restore(testContext(t), testOptions(dir), bytes.NewReader(b)); !errors.Is(err, ErrBackup) {
			t.Errorf("%s: error %v", name, err)
		}
		if fileThere(dir) {
			t.Errorf("%s: something was made", name)
		}
	}
}

// A store that is there is not touched, whatever of it is there.
func TestRestoreOverwritesNothing(t *testing.T) {
	dir, backup, _ := backedUp(t)
	for name, spoil := range map[string]func(string) error{
		"a store": func(string) error { return nil }, "a root file": func(d string) error { return os.Remove(d + "/store.db") },
		"a database": func(d string) error { return os.Remove(d + "/root") },
	} {
		to := copyStore(t, dir)
		must(t, spoil(to))
		before := tree(t, to)
		if _, err := Restore(testContext(t), testOptions(to), bytes.NewReader(backup)); !errors.Is(err, ErrExists) {
			t.Errorf("%s: error %v", name, err)
		}
		if tree(t, to) != before {
			t.Errorf("%s was changed", name)
		}
	}
	// One that a restore has begun is completed.
	half := filepath.Join(t.TempDir(), "half")
	s := mustOpen(t, testOptions(half))
	must(t, s.Close())
	if _, err := Restore(testContext(t), testOptions(half), bytes.NewReader(backup)); err != nil {
		t.Errorf("half-made: %v", err)
	}
	if _, err := Restore(testContext(t), testOptions(half), bytes.NewReader(backup)); !errors.Is(err, ErrExists) {
		t.Errorf("restored twice: %v", err)
	}
}

// A crash at any write of a restore leaves nothing that passes for a restored
// store: it is completed by another one, or refused until it was moved away.
func TestRestoreCrash(t *testing.T) {
	_, backup, _ := backedUp(t)
	ctx := testContext(t)
	completed, refused := 0, 0
	for _, mode := range []string{"before", "after", "torn"} {
		for n := 1; ; n++ {
			dir := filepath.Join(t.TempDir(), "new")
			f := &fault{n: n, mode: mode, crash: true, dir: dir, opt: testOptions(dir), t: t}
			_, err := Restore(ctx, f.options(t), bytes.NewReader(backup))
			if !f.tripped {
				must(t, err)
				break
			}
			opt := testOptions(f.copy)
			_, err = Restore(ctx, opt, bytes.NewReader(backup))
			whole := false
			switch {
			case err == nil:
				completed++
				whole = true
			case errors.Is(err, ErrExists):
				refused++
			default:
				t.Fatalf("%s %d (%s): %v", mode, n, f.what, err)
			}
			if !fileThere(filepath.Join(f.copy, "store.db")) {
				continue
			}
			s, err := Open(ctx, opt)
			must(t, err)
			pools, err := s.Pools(ctx)
			must(t, err)
			h, err := s.History(ctx, HistoryQuery{Limit: 1})
			must(t, err)
			if len(pools) != len(h) || whole && len(pools) != 1 {
				t.Errorf("%s %d (%s): %d pools, %d rows: half of a backup", mode, n, f.what, len(pools), len(h))
			}
			must(t, s.Close())
		}
	}
	t.Logf("completed %d, refused %d", completed, refused)
	if completed == 0 || refused == 0 {
		t.Error("the crashes show nothing")
	}
}
