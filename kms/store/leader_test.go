package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// site gives the options of two nodes of one inventory that holds what spent
// makes: their root files are copies of one another.
func site(t *testing.T) (a, b Options) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "a")
	a = postgresOptions(t, dir)
	spent(t, a)
	b = a
	b.RootFile = filepath.Join(t.TempDir(), "b", "root")
	must(t, os.Mkdir(filepath.Dir(b.RootFile), 0o700))
	copyFile(t, a.RootFile, b.RootFile)
	return a, b
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	must(t, os.WriteFile(to, b, 0o600))
}

func epochOf(t *testing.T, opt Options) uint64 {
	t.Helper()
	r, err := readRoot(opt.RootFile, nil)
	must(t, err)
	defer r.secret.Wipe()
	return r.epoch
}

// waitFor waits until cond is true.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not so after a minute: %s", what)
		}
	}
}

// awaiting is an Await that runs.
type awaiting struct {
	s   *Store
	err error
	end chan struct{}
}

func await(t *testing.T, opt Options) *awaiting {
	w := &awaiting{end: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer close(w.end)
		w.s, w.err = Await(ctx, opt)
	}()
	t.Cleanup(func() {
		cancel()
		<-w.end
		if w.s != nil {
			if err := w.s.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return w
}

// A standby waits, keeps its root in step, and takes over with every key when
// the leader ends.
func TestStandby(t *testing.T) {
	t.Parallel()
	a, b := site(t)
	leader, ctx := mustOpen(t, a), testContext(t)
	_, err := Open(ctx, b)
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "q-ipsec") {
		t.Errorf("a second node: %v", err)
	}
	if same := a; true {
		if _, err := Open(ctx, same); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "pid") {
			t.Errorf("a second process of the same node: %v", err)
		}
	}
	w := await(t, b)
	for range 3 {
		must(t, leader.Ratchet(ctx))
		waitFor(t, "the standby's root is at the leader's epoch", func() bool { return epochOf(t, b) == epochOf(t, a) })
	}
	must(t, leader.Held())
	if err := leader.Close(); err != nil {
		t.Fatal(err)
	}
	<-w.end
	must(t, w.err)
	if w.s.Generation() != leader.Generation()+1 {
		t.Errorf("generation %d after %d", w.s.Generation(), leader.Generation())
	}
	if n, err := drain(t, w.s); n != allKeys || err != nil {
		t.Errorf("%d keys, %v", n, err)
	}
	if ev, err := w.s.Events(ctx, EventQuery{}); err != nil || len(ev) != 0 {
		t.Errorf("events %+v, %v", ev, err)
	}
	must(t, w.s.Held())
}

// endLock has the server end the session that has the lock.
func endLock(t *testing.T, schema string) {
	t.Helper()
	s, err := server()
	must(t, err)
	key := uint64((&postgresEngine{schema: schema}).lockKey())
	must(t, s.Exec(t.Context(), "postgres", fmt.Sprintf(`SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = %d AND objid = %d`, key>>32, uint32(key))))
}

// everyMethod calls all that a caller can.
func everyMethod(t *testing.T, s *Store) map[string]error {
	ctx, errs := testContext(t), map[string]error{}
	_, errs["Pool"] = s.Pool(ctx, testPool)
	_, errs["Pools"] = s.Pools(ctx)
	_, errs["Blocks"] = s.Blocks(ctx, testPool)
	_, _, errs["NextLease"] = s.NextLease(ctx, testPool, 5)
	_, errs["Load"] = s.Load(ctx, testPool, Own, key.At(1, 40), key.At(1, 60))
	_, errs["AdoptMark"] = s.AdoptMark(ctx, testPool, Own, key.At(2, 0))
	_, errs["History"] = s.History(ctx, HistoryQuery{})
	_, errs["Events"] = s.Events(ctx, EventQuery{})
	_, errs["Find"] = s.Find(ctx, testID(1, 1))
	_, errs["Stats"] = s.Stats(ctx)
	errs["Advance"] = s.Advance(ctx, testPool, Own, key.At(2, 0), "lease", 1)
	errs["Activate"] = s.Activate(ctx, testPool, 3)
	errs["Destroy"] = s.Destroy(ctx, testPool, 2, key.Destroyed, "")
	errs["PutBlock"] = s.PutBlock(ctx, testBlock(t, 9, 2))
	errs["EnsurePool"] = s.EnsurePool(ctx, testPool, "bob", key.Master, key.Direct)
	errs["Record"] = s.Record(ctx, []Event{{Pool: testPool, State: key.Supplied}})
	errs["AppendEvent"] = s.AppendEvent(ctx, LogEvent{Severity: SeverityRun, Code: "late"})
	errs["Ratchet"] = s.Ratchet(ctx)
	errs["Held"] = s.Held()
	return errs
}

// A leader whose lock is gone and that another node has followed changes nothing
// and says so from every method, even if it was about to read memory anew.
func TestDeposed(t *testing.T) {
	t.Parallel()
	for name, stale := range map[string]bool{"": false, "after a commit of unknown outcome": true} {
		t.Run(name, func(t *testing.T) {
			a, b := site(t)
			old, ctx := mustOpen(t, a), testContext(t)
			must(t, old.Advance(ctx, testPool, Own, key.At(1, 60), "lease", 1))
			old.stale = stale
			old.endBeats() // as if it were stopped: what it knows comes from the database
			endLock(t, old.eng.(*postgresEngine).schema)
			var next *Store
			waitFor(t, "the other node opens", func() bool {
				var err error
				next, err = Open(ctx, b)
				if err != nil && !errors.Is(err, ErrInUse) {
					t.Fatal(err)
				}
				return err == nil
			})
			defer next.Close()
			must(t, next.Advance(ctx, testPool, Own, key.At(1, 100), "lease", 1))
			before, err := next.History(ctx, HistoryQuery{Limit: 1000})
			must(t, err)
			if err := old.Advance(ctx, testPool, Own, key.At(2, 4), "lease", 1); !errors.Is(err, ErrDeposed) {
				t.Errorf("the deposed leader's Advance: %v", err)
			}
			select {
			case <-old.Deposed():
			default:
				t.Error("Deposed is open")
			}
			for name, err := range everyMethod(t, old) {
				if !errors.Is(err, ErrDeposed) {
					t.Errorf("%s: %v", name, err)
				}
			}
			after, err := next.History(ctx, HistoryQuery{Limit: 1000})
			must(t, err)
			if len(after) != len(before) || epochOf(t, a) != 1 {
				t.Errorf("%d history rows after %d; the old node's epoch is %d", len(after), len(before), epochOf(t, a))
			}
			must(t, next.Close())
			s := mustOpen(t, b)
			if p, err := s.Pool(ctx, testPool); err != nil || p.Mark != key.At(1, 100) || p.NewestSeq != 3 {
				t.Errorf("pool %+v, %v", p, err)
			}
		})
	}
}

// A leader whose lock's connection breaks takes the lock again by itself; one
// that finds another holder is deposed without being asked anything.
func TestLockConnectionBreaks(t *testing.T) {
	t.Parallel()
	a, b := site(t)
	s := mustOpen(t, a)
	schema := s.eng.(*postgresEngine).schema
	for range 2 {
		endLock(t, schema)
		since := s.proven.Load()
		waitFor(t, "the leader has made sure of its lock again", func() bool { return s.proven.Load() > since })
		must(t, s.Held())
	}
	if _, err := Open(testContext(t), b); !errors.Is(err, ErrInUse) {
		t.Errorf("another node: %v", err)
	}
	s2, err := server()
	must(t, err)
	must(t, s2.Exec(t.Context(), "postgres", "UPDATE "+schema+".node SET holder = 'somebody'"))
	select {
	case <-s.Deposed():
	case <-time.After(time.Minute):
		t.Fatal("nobody noticed")
	}
	if err := s.Held(); !errors.Is(err, ErrDeposed) {
		t.Errorf("Held: %v", err)
	}
}

// A leader that changes nothing finds out, too, that another node has its lock and
// has begun; while that has only the lock, it may still be ours again.
func TestDeposedWithoutAChange(t *testing.T) {
	t.Parallel()
	a, b := site(t)
	old, ctx := mustOpen(t, a), testContext(t)
	old.endBeats() // they are made below
	schema := old.eng.(*postgresEngine).schema
	eng, err := newPostgres(&b)
	must(t, err)
	endLock(t, schema)
	var other lock
	waitFor(t, "another node has the lock", func() bool { other, err = eng.own(ctx); return err == nil })
	for range 2 { // the first one finds its connection broken
		if err := old.hold(ctx); err == nil || errors.Is(err, ErrDeposed) {
			t.Errorf("another node has the lock and has not begun: %v", err)
		}
	}
	must(t, other.Close())
	must(t, old.hold(ctx))
	endLock(t, schema)
	var next *Store
	waitFor(t, "another node begins", func() bool { next, err = Open(ctx, b); return err == nil })
	defer next.Close()
	_ = old.hold(ctx) // its connection is broken
	if err := old.hold(ctx); !errors.Is(err, ErrDeposed) {
		t.Errorf("another node has begun: %v", err)
	}
}

// A process that is stopped with SIGSTOP loses the inventory after some seconds,
// and finds that out when it goes on.
func TestStoppedLeader(t *testing.T) {
	t.Parallel()
	a, b := site(t)
	cmd, in, out := child(t, "TestChildLeads", a.URL+" "+a.RootFile, nil)
	if !strings.Contains(out, "ready") {
		t.Fatalf("the child did not open the store: %s", out)
	}
	must(t, cmd.Process.Signal(syscall.SIGSTOP))
	w := await(t, b)
	<-w.end
	must(t, w.err)
	must(t, w.s.Advance(testContext(t), testPool, Own, key.At(1, 100), "lease", 1))
	must(t, cmd.Process.Signal(syscall.SIGCONT))
	must(t, in.Close())
	_ = cmd.Wait() // its output says all
	if b, err := os.ReadFile(filepath.Join(filepath.Dir(a.RootFile), "verdict")); err != nil || string(b) != "held: true false\ndeposed: true\n" {
		t.Errorf("the stopped leader says %q, %v", b, err)
	}
	if p, err := w.s.Pool(testContext(t), testPool); err != nil || p.Mark != key.At(1, 100) {
		t.Errorf("pool %+v, %v", p, err)
	}
}

// TestChildLeads is the process that TestStoppedLeader stops.
func TestChildLeads(t *testing.T) {
	url, root, ok := strings.Cut(os.Getenv("STORE_TEST_DIR"), " ")
	if !ok {
		return
	}
	s, err := Open(t.Context(), Options{URL: url, RootFile: root, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	defer s.Close()
	before := s.Held() == nil
	fmt.Println("ready")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // until it was stopped and goes on
	after := s.Held() == nil
	err = s.Advance(t.Context(), testPool, Own, key.At(2, 4), "lease", 1)
	must(t, os.WriteFile(filepath.Join(filepath.Dir(root), "verdict"), fmt.Appendf(nil, "held: %v %v\ndeposed: %v\n", before, after, errors.Is(err, ErrDeposed)), 0o600))
}

// Every order in which two nodes can meet a ratchet.
func TestRatchetAndStandby(t *testing.T) {
	t.Parallel()
	halfway := func(t *testing.T, s *Store) { // dies after some blocks, before the end
		ctx := testContext(t)
		must(t, s.acquire(ctx))
		s.epoch = s.root.epoch + 1
		n, err := s.ratchetPool(ctx, s.pools[testPool], 1)
		s.release()
		if n != 1 || err != nil {
			t.Fatalf("%d blocks, %v", n, err)
		}
	}
	for _, tc := range []struct {
		name   string
		lead   func(t *testing.T, s *Store)
		files  rootFiles // the leader's
		epochs [2]uint64 // of the leader's root file and the standby's, after the standby looked
		behind bool
	}{
		{"within it", halfway, nil, [2]uint64{1, 1}, false},
		{"after one, within the next", func(t *testing.T, s *Store) { must(t, s.Ratchet(testContext(t))); halfway(t, s) }, nil, [2]uint64{2, 2}, false},
		{"the leader's root file was not replaced", func(t *testing.T, s *Store) {
			if err := s.Ratchet(testContext(t)); err == nil {
				t.Error("it was replaced")
			}
		}, noRename{}, [2]uint64{1, 2}, false},
		{"many while nobody looked", func(t *testing.T, s *Store) {
			for range 5 {
				must(t, s.Ratchet(testContext(t)))
			}
		}, nil, [2]uint64{6, 6}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := site(t)
			old := filepath.Join(t.TempDir(), "root")
			copyFile(t, a.RootFile, old)
			a.files = tc.files
			s, ctx := mustOpen(t, a), testContext(t)
			tc.lead(t, s)
			if _, err := Open(ctx, b); !errors.Is(err, ErrInUse) {
				t.Fatal(err)
			}
			if got := [2]uint64{epochOf(t, a), epochOf(t, b)}; got != tc.epochs {
				t.Errorf("root files at epochs %d, want %d", got, tc.epochs)
			}
			must(t, s.Close())
			for turn, opt := range []Options{b, a, b} { // each in its turn, the ratchet finished by whoever is first
				opt.files = nil
				if tc.behind && turn == 1 {
					copyFile(t, old, opt.RootFile) // it was switched off all the time
				}
				s, err := Open(ctx, opt)
				must(t, err)
				if st, err := s.Stats(ctx); err != nil || st.Epoch != s.epoch || st.Damaged != 0 || st.Keys != allKeys+10 {
					t.Errorf("%+v, rows at %d, %v", st, s.epoch, err)
				}
				ev, err := s.Events(ctx, EventQuery{Code: "store-root-behind"})
				must(t, err)
				if (len(ev) == 1) != (tc.behind && turn >= 1) {
					t.Errorf("turn %d: events %+v", turn, ev)
				}
				must(t, s.Close())
			}
			if n, err := drain(t, mustOpen(t, b)); n != allKeys || err != nil {
				t.Errorf("%d keys, %v", n, err)
			}
		})
	}
}

// A database that lies about its epoch does not make a node give its root up.
func TestFollowOnlyTheTruth(t *testing.T) {
	t.Parallel()
	a, b := site(t)
	s, err := server()
	must(t, err)
	leader := mustOpen(t, a)
	for _, epoch := range []int{2, 3, 1000, 1 << 40} {
		must(t, s.Exec(t.Context(), "postgres", fmt.Sprintf("UPDATE %s.node SET epoch = %d", leader.eng.(*postgresEngine).schema, epoch)))
		if _, err := Open(testContext(t), b); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrOldRoot) {
			t.Errorf("epoch %d: %v", epoch, err)
		}
		if e := epochOf(t, b); e != 1 {
			t.Fatalf("the root file went to epoch %d", e)
		}
	}
	must(t, os.Remove(b.RootFile))
	if _, err := Await(testContext(t), b); !errors.Is(err, ErrNoRoot) {
		t.Errorf("without a root file: %v", err)
	}
}

// Leaders come and go while keys are leased: none comes out twice.
func TestManyLeaders(t *testing.T) {
	t.Parallel()
	a, b := site(t)
	c := b
	c.RootFile = filepath.Join(t.TempDir(), "c", "root")
	must(t, os.Mkdir(filepath.Dir(c.RootFile), 0o700))
	copyFile(t, b.RootFile, c.RootFile)
	var mu sync.Mutex
	seen, leaders := map[key.Position]int{}, 0
	var work sync.WaitGroup
	ctx, cancel := context.WithTimeout(testContext(t), 12*time.Second)
	defer cancel()
	for _, opt := range []Options{a, b, c} {
		work.Go(func() {
			for ctx.Err() == nil {
				s, err := Await(ctx, opt)
				if err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
				mu.Lock()
				leaders++
				mu.Unlock()
				for range 20 {
					if err := leaseOne(ctx, s, &mu, seen); err != nil {
						break
					}
				}
				if err := s.Ratchet(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, ErrDeposed) {
					t.Error(err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	if leaders < 3 || len(seen) < 20 {
		t.Errorf("%d leaders took %d keys: too few to show anything", leaders, len(seen))
	}
	for pos, n := range seen {
		if n != 1 {
			t.Errorf("key %s came out %d times", pos, n)
		}
	}
}

func leaseOne(ctx context.Context, s *Store, mu *sync.Mutex, seen map[key.Position]int) error {
	p, err := s.Pool(ctx, testPool)
	if err != nil {
		return err
	}
	mark, n, err := s.NextLease(ctx, testPool, 3)
	if err != nil || n == 0 {
		return errors.Join(err, errors.New("no keys left"))
	}
	if err := s.Advance(ctx, testPool, Own, mark, "lease", s.Generation()); err != nil {
		return err
	}
	keys, err := s.Load(ctx, testPool, Own, p.Mark, mark)
	mu.Lock()
	defer mu.Unlock()
	for _, k := range keys {
		seen[k.Position]++
	}
	wipeAll(keys)
	return err
}
