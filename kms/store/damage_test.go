package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// damaged gives the directory of a closed store: block 1 with 2100 keys, leased
// up to 1/40 and 1/21, block 2 with 10, block 3 received.
func damaged(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "s")
	spent(t, testOptions(dir))
	return dir
}

// spent makes that store.
func spent(t *testing.T, opt Options) {
	t.Helper()
	s, ctx := filled(t, opt, 2100), testContext(t)
	must(t, s.PutBlock(ctx, testBlock(t, 2, 10)))
	must(t, s.Activate(ctx, testPool, 2))
	must(t, s.PutBlock(ctx, testBlock(t, 3, 10)))
	lease(t, s, Own, 0, key.At(1, 40))
	lease(t, s, Peer, 0, key.At(1, 21))
	must(t, s.Close())
}

// drain takes all keys out of a store, checks them, and gives their number.
func drain(t *testing.T, s *Store) (n int, err error) {
	t.Helper()
	ctx := testContext(t)
	p, err := s.Pool(ctx, testPool)
	if err != nil {
		return 0, err
	}
	if p.Mark != key.At(1, 40) || p.PeerMark != key.At(1, 21) || p.NewestSeq != 3 {
		t.Fatalf("marks were believed that nobody wrote: %+v", p)
	}
	for side, from := range map[Side]key.Position{Own: p.Mark, Peer: p.PeerMark} {
		end := key.At(3, 99)
		if err := s.Advance(ctx, testPool, side, end, "lease", 1); err != nil {
			return n, err
		}
		keys, err := s.Load(ctx, testPool, side, from, end)
		if err != nil {
			return n, err
		}
		for _, k := range keys {
			if !bytes.Equal(k.Material.Bytes(), plainKey(k.Position.Seq(), int(k.Position.Index()))) || k.ID != testID(k.Position.Seq(), int(k.Position.Index())) || k.Position.Seq() == 3 {
				t.Fatalf("key %s is not the one stored, or not active", k.Position)
			}
			n++
		}
		wipeAll(keys)
	}
	return n, nil
}

const allKeys = 2100 - 21 - 11 + 10

// Whatever byte of the file changes, or wherever it is cut off: an error, a
// block given up, or no harm; never a wrong key, never a mark that nobody wrote.
func TestDamagedFile(t *testing.T) {
	dir := damaged(t)
	good, err := os.ReadFile(filepath.Join(dir, "store.db"))
	must(t, err)
	r := rand.New(rand.NewPCG(3, 4))
	refused, given, harmless := 0, 0, 0
	for i := range 160 {
		bad := bytes.Clone(good)
		if i%8 == 0 {
			bad = bad[:r.IntN(len(bad))]
		} else {
			bad[r.IntN(len(bad))] ^= byte(1 + r.IntN(255))
		}
		work := copyStore(t, dir)
		must(t, os.WriteFile(filepath.Join(work, "store.db"), bad, 0o600))
		s, err := Open(testContext(t), testOptions(work))
		if err != nil {
			refused++
			continue
		}
		if list, _ := s.Pools(testContext(t)); len(list) == 0 && len(bad) == 0 {
			must(t, s.Close()) // cut to nothing: a new store
			continue
		}
		n, err := drain(t, s)
		st, _ := s.Stats(testContext(t))
		switch {
		case err != nil:
			refused++
		case n == allKeys:
			harmless++
		case st.Damaged > 0:
			given++
		default:
			t.Errorf("%d of %d keys came out and nothing was said", n, allKeys)
		}
		_ = s.Close() // may fail on a damaged file
	}
	t.Logf("refused %d, blocks given up %d, harmless %d", refused, given, harmless)
	if refused == 0 || given == 0 {
		t.Error("the damage done shows nothing")
	}
}

// Rows changed by somebody who can write the database but not read the root.
func TestChangedRows(t *testing.T) {
	for _, tc := range []struct {
		name, stmt string
		open       error // from Open; nil: block given up
		lost       int   // keys
	}{
		{"own mark lowered", `UPDATE pool SET own_mark = own_mark - 2`, ErrDamaged, 0},
		{"peer mark lowered", `UPDATE pool SET peer_mark = 0`, ErrDamaged, 0},
		{"newest seq lowered", `UPDATE pool SET newest_seq = 1`, ErrDamaged, 0},
		{"class of pool", `UPDATE pool SET class = 1`, ErrDamaged, 0},
		{"role", `UPDATE pool SET role = 2`, ErrDamaged, 0},
		{"pool's epoch", `UPDATE pool SET epoch = epoch + 1`, ErrDamaged, 0},
		{"generation lowered", `UPDATE node SET generation = generation - 1`, ErrDamaged, 0},
		{"epoch of the node", `UPDATE node SET epoch = epoch + 1`, ErrDamaged, 0},
		{"block activated", `UPDATE block SET state = 2 WHERE seq = 3`, nil, 0},
		{"class raised", `UPDATE block SET class = 2 WHERE seq = 1`, nil, allKeys - 10},
		{"made a pad", `UPDATE block SET no_pad = 1 WHERE seq = 2`, nil, 10},
		{"tag", `UPDATE block SET tag_m = tag_s WHERE seq = 2; UPDATE block SET tag_s = x'01' WHERE seq = 2`, nil, 10},
		{"cut undone", `UPDATE block SET own_cut = 5 WHERE seq = 2`, nil, 10},
		{"count", `UPDATE block SET key_count = 2099 WHERE seq = 1`, nil, allKeys - 10},
		{"keys of another block", `UPDATE block SET wrap = (SELECT wrap FROM block WHERE seq = 1) WHERE seq = 2`, nil, 10},
		{"part of another block", `UPDATE part SET box = (SELECT box FROM part WHERE seq = 3) WHERE seq = 2`, nil, 10},
		{"ids of another block", `UPDATE part SET ids = (SELECT ids FROM part WHERE seq = 3) WHERE seq = 2`, nil, 10},
		{"part missing", `DELETE FROM part WHERE seq = 1 AND part = 1`, nil, allKeys - 10},
		{"part short", `UPDATE part SET box = x'010203' WHERE seq = 1 AND part = 1`, nil, allKeys - 10},
		{"another pool's", `INSERT INTO pool SELECT x'00', peer, role, class, newest_seq, own_mark, peer_mark, peer_generation, epoch, proof, ledger FROM pool`, ErrDamaged, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := damaged(t)
			sqlExec(t, dir, strings.Split(tc.stmt, "; ")...)
			s, err := Open(testContext(t), testOptions(dir))
			if tc.open != nil {
				if !errors.Is(err, tc.open) {
					t.Fatalf("error %v, want %v", err, tc.open)
				}
				return
			}
			must(t, err)
			defer s.Close()
			n, err := drain(t, s)
			must(t, err)
			st, err := s.Stats(testContext(t))
			must(t, err)
			ev, err := s.Events(testContext(t), EventQuery{Severity: SeverityAlarm, Code: "store-block-damaged"})
			must(t, err)
			if n != allKeys-tc.lost || st.Damaged != 1 || len(ev) != 1 {
				t.Errorf("%d keys, want %d; %d blocks given up, %d events", n, allKeys-tc.lost, st.Damaged, len(ev))
			}
			if h, err := s.History(testContext(t), HistoryQuery{Limit: 50}); err != nil || !strings.Contains(fmt.Sprint(h), "compromised") {
				t.Errorf("history %v, %v", h, err)
			}
			must(t, s.Ratchet(testContext(t)))
		})
	}
}

// A ratchet that meets a damaged block gives it up and goes on.
func TestRatchetMeetsDamage(t *testing.T) {
	dir := damaged(t)
	s, ctx := mustOpen(t, testOptions(dir)), testContext(t)
	if _, err := s.w.Exec(`UPDATE part SET box = (SELECT box FROM part WHERE seq = 3) || box WHERE seq = 1 AND part = 1`); err != nil {
		t.Fatal(err)
	}
	must(t, s.Ratchet(ctx))
	if st, err := s.Stats(ctx); err != nil || st.Damaged != 1 || st.Epoch != 2 {
		t.Errorf("%+v, %v", st, err)
	}
	if n, err := drain(t, s); n != 10 || err != nil {
		t.Errorf("%d keys, %v", n, err)
	}
}

func sqlExec(t *testing.T, dir string, stmts ...string) {
	t.Helper()
	db := sql.OpenDB(sqliteConnector("file:" + filepath.Join(dir, "store.db")))
	defer db.Close()
	for _, stmt := range stmts {
		if _, err := db.Exec(stmt); err != nil {
			t.Fatalf("%s: %v", stmt, err)
		}
	}
}

// Which database goes with which root file.
func TestRootAndDatabase(t *testing.T) {
	ctx := testContext(t)
	dir := filepath.Join(t.TempDir(), "s")
	s := filled(t, testOptions(dir), 10)
	var copies []string // copies[i] is at epoch i+1
	for range 4 {
		copies = append(copies, copyStore(t, dir))
		must(t, s.Ratchet(ctx))
	}
	other := filepath.Join(t.TempDir(), "other")
	o := mustOpen(t, testOptions(other))
	for _, tc := range []struct {
		name     string
		db, root string
		want     error
	}{
		{"together", copies[2], copies[2], nil},
		{"root one behind, as after a crash", copies[2], copies[1], nil},
		{"root two behind", copies[2], copies[0], ErrOldRoot},
		{"database one behind", copies[2], copies[3], ErrRestored},
		{"database far behind", copies[0], copies[3], ErrRestored},
		{"another store's root", copies[2], other, ErrWrongRoot},
		{"no root", copies[2], "", ErrNoRoot},
		{"no database", "", copies[2], nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "x")
			must(t, os.Mkdir(dir, 0o700))
			put := func(from, name string) {
				if b, err := os.ReadFile(filepath.Join(from, name)); err == nil {
					must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
				}
			}
			if tc.db != "" {
				put(tc.db, "store.db")
				put(tc.db, "store.db-wal")
			}
			if tc.root != "" {
				put(tc.root, "root")
			}
			before, _ := os.ReadFile(filepath.Join(dir, "root"))
			s, err := Open(ctx, testOptions(dir))
			if !errors.Is(err, tc.want) || tc.want == nil && err != nil {
				t.Fatalf("error %v, want %v", err, tc.want)
			}
			if err != nil {
				t.Log(err)
				if after, _ := os.ReadFile(filepath.Join(dir, "root")); !bytes.Equal(before, after) {
					t.Error("a refused Open changed the root file")
				}
				return
			}
			defer s.Close()
			st, err := s.Stats(ctx)
			must(t, err)
			if st.Epoch != 3 {
				t.Errorf("epoch %d, want 3", st.Epoch)
			}
			if tc.db == "" && (s.UUID() == o.UUID() || s.UUID() == uuid.Nil || st.Keys != 0) {
				t.Errorf("a new database: store %s, %d keys", s.UUID(), st.Keys)
			}
			if tc.db != "" && st.Keys != 10 {
				t.Errorf("%d keys, want 10", st.Keys)
			}
		})
	}
}

func TestVersionsAndForeignFiles(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		want  error
	}{
		{"newer version", func(t *testing.T, dir string) {
			sqlExec(t, dir, fmt.Sprintf(`UPDATE node SET version = %d`, schemaVersion()+1))
		}, ErrNewer},
		{"another program's", func(t *testing.T, dir string) { sqlExec(t, dir, `PRAGMA application_id = 77`) }, ErrForeign},
		{"unmarked tables", func(t *testing.T, dir string) { sqlExec(t, dir, `PRAGMA application_id = 0`) }, ErrForeign},
		{"no database", func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, "store.db"), []byte(strings.Repeat("plain text ", 100)), 0o600))
		}, ErrDamaged},
		{"torn root", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "root"), 40)) }, ErrDamaged},
		{"empty root", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "root"), 0)) }, ErrDamaged},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := damaged(t)
			tc.spoil(t, dir)
			_, err := Open(context.Background(), testOptions(dir))
			if !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			t.Log(err)
		})
	}
}
