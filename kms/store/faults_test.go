package store

import (
	"bytes"
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

var errInjected = errors.New("injected fault")

// fault makes the n-th write fail: once, or it and all that follow, as a crash
// would, with a copy of the files as they were then.
type fault struct {
	n, count int
	mode     string // before, after: the write is done, but an error is told; torn: done in part
	crash    bool
	dir      string
	opt      Options // how the store is opened; empty: as a file in dir
	t        testing.TB

	tripped bool
	what    string
	copy    string
}

// at does one write. partly does a part of it; it is nil for a statement within
// a transaction.
func (f *fault) at(what string, do, partly func() error) error {
	if f.tripped && f.crash {
		return errInjected
	}
	if statement := partly == nil; statement && f.mode != "before" {
		return do() // failing after one is failing before the next
	}
	f.count++
	if f.tripped || f.count != f.n {
		return do()
	}
	f.tripped, f.what = true, what
	wal := filepath.Join(f.dir, "store.db-wal")
	before := fileSize(wal)
	var err error
	switch f.mode {
	case "after":
		err = do()
	case "torn":
		err = partly()
	}
	// On a server what was not committed goes with the connection; nothing has to
	// be copied, as nothing is written from here on.
	if f.crash && f.sqlite() {
		f.copy = copyStore(f.t, f.dir)
		if grown := fileSize(wal) - before; f.mode == "torn" && grown > 1 {
			must(f.t, os.Truncate(filepath.Join(f.copy, "store.db-wal"), before+grown*2/3))
		}
	}
	return errors.Join(errInjected, err)
}

func (f *fault) sqlite() bool { return strings.HasPrefix(f.opt.URL, "sqlite:") }

func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.Size()
}

type faultConnector struct {
	driver.Connector
	f *fault
}

func (c *faultConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	// Crashes are seen through the files' contents, so syncing would only cost time.
	if !c.f.sqlite() {
		return &faultConn{conn, c.f}, nil
	}
	if _, err := conn.(driver.ExecerContext).ExecContext(ctx, "PRAGMA synchronous = OFF", nil); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &faultConn{conn, c.f}, nil
}

type faultConn struct {
	driver.Conn
	f *fault
}

func (c *faultConn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	var tx driver.Tx
	do := func() (err error) { tx, err = c.Conn.(driver.ConnBeginTx).BeginTx(ctx, o); return err }
	if err := c.f.at("begin", do, nil); err != nil {
		if tx != nil {
			_ = tx.Rollback()
		}
		return nil, err
	}
	return &faultTx{tx, c.f}, nil
}

func (c *faultConn) ExecContext(ctx context.Context, q string, args []driver.NamedValue) (res driver.Result, err error) {
	do := func() (err error) { res, err = c.Conn.(driver.ExecerContext).ExecContext(ctx, q, args); return err }
	return res, c.f.at(q[:min(len(q), 24)], do, nil)
}

func (c *faultConn) QueryContext(ctx context.Context, q string, args []driver.NamedValue) (driver.Rows, error) {
	return c.Conn.(driver.QueryerContext).QueryContext(ctx, q, args)
}

func (c *faultConn) PrepareContext(ctx context.Context, q string) (driver.Stmt, error) {
	s, err := c.Conn.(driver.ConnPrepareContext).PrepareContext(ctx, q)
	return &faultStmt{s, c.f}, err
}

type faultStmt struct {
	driver.Stmt
	f *fault
}

func (s *faultStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (res driver.Result, err error) {
	do := func() (err error) { res, err = s.Stmt.(driver.StmtExecContext).ExecContext(ctx, args); return err }
	return res, s.f.at("prepared", do, nil)
}

type faultTx struct {
	driver.Tx
	f *fault
}

func (t *faultTx) Commit() error {
	partly := t.Tx.Commit // the log is torn in the copy
	if !t.f.sqlite() {
		partly = t.Tx.Rollback // a server has no half commits
	}
	return t.f.at("commit", t.Tx.Commit, partly)
}

type faultFiles struct {
	osFiles
	f *fault
}

func (r *faultFiles) create(path string, b []byte) error {
	return r.f.at("create", func() error { return r.osFiles.create(path, b) }, func() error { return os.WriteFile(path, b[:len(b)/2], 0o600) })
}

func (r *faultFiles) rename(from, to string) error {
	do := func() error { return r.osFiles.rename(from, to) }
	return r.f.at("rename", do, do)
}

func (r *faultFiles) syncDir(dir string) error {
	do := func() error { return r.osFiles.syncDir(dir) }
	return r.f.at("sync directory", do, do)
}

func (r *faultFiles) scrub(file *os.File) error {
	return r.f.at("scrub", func() error { return r.osFiles.scrub(file) }, func() error { _, err := file.WriteAt(make([]byte, 9), 0); return err })
}

// options opens through f.
func (f *fault) options(t testing.TB) Options {
	if f.opt.URL == "" {
		f.opt = testOptions(f.dir)
	}
	opt := f.opt
	opt.wrap = func(c driver.Connector) driver.Connector { return &faultConnector{c, f} }
	opt.files = &faultFiles{osFiles{}, f}
	return opt
}

// facts are what the store has told its caller.
type facts struct {
	marks   [2]key.Position // told to be durable
	tried   [2]key.Position // asked for
	out     map[key.Position]bool
	put     []uint64 // told to be stored
	active  []uint64
	dropped []uint64 // asked to be destroyed

	binding, bound []key.Binding // asked for, and told to be
	settling       bool          // the first of them was asked to be settled
}

// script is a life of a store; it stops at the first error. retry says how often
// a failed step is called again.
func script(t testing.TB, ctx context.Context, s *Store, f *facts, retry int) error {
	try := func(done error, step func() error) (err error) {
		for range retry + 1 {
			if err = step(); err == nil || done != nil && errors.Is(err, done) && retry > 0 {
				return nil
			}
			if !errors.Is(err, errInjected) {
				t.Fatalf("a fault was answered with another error: %v", err)
			}
		}
		return err
	}
	put := func(seq uint64, n int) func() error {
		return func() error {
			if err := try(ErrOldSeq, func() error { return s.PutBlock(ctx, testBlock(t, seq, n)) }); err != nil {
				return err
			}
			f.put = append(f.put, seq)
			return nil
		}
	}
	activate := func(seq uint64) func() error {
		return func() error {
			if err := try(nil, func() error { return s.Activate(ctx, testPool, seq) }); err != nil {
				return err
			}
			f.active = append(f.active, seq)
			return nil
		}
	}
	advance := func(side Side, to key.Position) func() error {
		return func() error {
			f.tried[side.at()] = to
			err := try(nil, func() error { return s.Advance(ctx, testPool, side, to, "lease", 1) })
			if err != nil {
				return err
			}
			from := f.marks[side.at()]
			f.marks[side.at()] = to
			return try(nil, func() error { return f.load(t, ctx, s, side, from, to) })
		}
	}
	simple := func(done error, step func() error) func() error { return func() error { return try(done, step) } }
	adopt := func() error {
		f.tried[0] = key.At(1, 60)
		err := try(nil, func() error { _, err := s.AdoptMark(ctx, testPool, Own, key.At(1, 60)); return err })
		if err == nil {
			f.marks[0] = key.At(1, 60)
		}
		return err
	}
	ratchet := simple(nil, func() error { return s.Ratchet(ctx) })
	// Keys 1/42 to 1/50 are leased for raw use.
	rawLease := func() error {
		f.tried[0] = key.At(1, 50)
		if err := try(nil, func() error { return s.Advance(ctx, testPool, Own, key.At(1, 50), PurposeRaw, 1) }); err != nil {
			return err
		}
		f.marks[0] = key.At(1, 50)
		return try(nil, func() error { return f.use(t)(s.LoadRaw(ctx, testPool, Own, key.At(1, 40), key.At(1, 50))) })
	}
	bind := func(first, last uint32, batch byte) func() error {
		return func() error {
			b := bindingOf(1, first, last, key.RawUse{Purpose: key.Pad, Batch: uuid.UUID{batch}, Attempt: 1, Hop: 1, Direction: key.Forward})
			f.binding = append(f.binding, b)
			if err := try(nil, func() error { return s.Bind(ctx, testPool, Own, b) }); err != nil {
				return err
			}
			f.bound = append(f.bound, b)
			b.Batch = uuid.UUID{99}
			if err := s.Bind(ctx, testPool, Own, b); !errors.Is(err, ErrBound) && !errors.Is(err, errInjected) {
				t.Fatalf("bound to a second use: %v", err)
			}
			return nil
		}
	}
	settle := func() error {
		u := f.bound[0].RawUse
		f.settling = true
		return try(ErrNotBound, func() error { return s.Settle(ctx, testPool, Own, u, key.RawUsed, "") })
	}
	for i, step := range []func() error{
		simple(nil, func() error { return s.EnsurePool(ctx, testPool, "bob", key.Master, key.Direct) }),
		put(1, 2100), activate(1), put(2, 10), advance(Own, key.At(1, 40)), advance(Peer, key.At(1, 21)),
		rawLease, bind(42, 44, 1), bind(46, 46, 2), settle, ratchet, adopt, activate(2),
		simple(nil, func() error {
			return s.Record(ctx, []Event{{Pool: testPool, State: key.Supplied}, {Pool: testPool, State: key.Stranded}})
		}),
		simple(nil, func() error { return s.AppendEvent(ctx, LogEvent{Severity: SeverityRun, Code: "x"}) }),
		put(3, 4),
		func() error {
			f.dropped = append(f.dropped, 3)
			return try(ErrNoBlock, func() error { return s.Destroy(ctx, testPool, 3, key.Destroyed, "") })
		},
		advance(Own, key.At(1, 2098)), advance(Peer, key.At(2, 3)), ratchet, advance(Own, key.At(2, 4)), ratchet,
	} {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// load reads and checks a range.
func (f *facts) load(t testing.TB, ctx context.Context, s *Store, side Side, from, to key.Position) error {
	return f.use(t)(s.Load(ctx, testPool, side, from, to))
}

// use checks what was read.
func (f *facts) use(t testing.TB) func([]LeasedKey, error) error {
	return func(keys []LeasedKey, err error) error { return f.took(t, keys, err) }
}

func (f *facts) took(t testing.TB, keys []LeasedKey, err error) error {
	defer wipeAll(keys)
	for _, k := range keys {
		if f.out[k.Position] {
			t.Fatalf("key %s came out twice", k.Position)
		}
		f.out[k.Position] = true
		if !bytes.Equal(k.Material.Bytes(), plainKey(k.Position.Seq(), int(k.Position.Index()))) || k.ID != testID(k.Position.Seq(), int(k.Position.Index())) {
			t.Fatalf("key %s is not the one stored", k.Position)
		}
	}
	return err
}

// verify opens what a crash left, holds it against what was told, and takes out
// all that is left.
func (f *facts) verify(t testing.TB, ctx context.Context, opt Options) {
	s, err := Open(ctx, opt)
	if err != nil {
		t.Fatalf("does not open after the crash: %v", err)
	}
	defer s.Close()
	must(t, s.EnsurePool(ctx, testPool, "bob", key.Master, key.Direct))
	p, err := s.Pool(ctx, testPool)
	must(t, err)
	for i, m := range []key.Position{p.Mark, p.PeerMark} {
		if m != f.marks[i] && m != f.tried[i] || m < f.marks[i] {
			t.Fatalf("%s mark is %s; told durable: %s, asked for: %s", Side(i+1), m, f.marks[i], f.tried[i])
		}
	}
	list, err := s.Blocks(ctx, testPool)
	must(t, err)
	states := map[uint64]key.State{}
	for _, b := range list {
		states[b.Seq] = b.State
	}
	for _, seq := range f.put {
		if seq > p.NewestSeq {
			t.Fatalf("newest seq is %d, block %d was told stored", p.NewestSeq, seq)
		}
		usedUp := p.Mark.Seq() >= seq && p.PeerMark.Seq() > seq || p.Mark >= key.At(1, 2098) && seq == 1
		if states[seq] == 0 && !usedUp && !slices.Contains(f.dropped, seq) {
			t.Fatalf("block %d is lost", seq)
		}
	}
	for _, seq := range f.active {
		if st := states[seq]; st == key.Received {
			t.Fatalf("block %d is %s again", seq, st)
		}
	}
	st, err := s.Stats(ctx)
	must(t, err)
	if st.Damaged != 0 {
		t.Fatalf("%d blocks damaged by a crash", st.Damaged)
	}
	f.ledger(t, ctx, s)
	must(t, s.Ratchet(ctx))
	before := len(f.out)
	for _, b := range list {
		must(t, s.Activate(ctx, testPool, b.Seq))
	}
	if p.NewestSeq > 0 {
		end := key.At(p.NewestSeq, key.MaxIndex)
		for side, from := range map[Side]key.Position{Own: p.Mark, Peer: p.PeerMark} {
			must(t, s.Advance(ctx, testPool, side, end, "lease", 1))
			must(t, f.load(t, ctx, s, side, from, end))
		}
	}
	if got := len(f.out) - before; got != st.Keys {
		t.Fatalf("%d keys came out after the crash, the levels said %d", got, st.Keys)
	}
}

// ledger holds what is bound after a crash against what was told, and burns it.
func (f *facts) ledger(t testing.TB, ctx context.Context, s *Store) {
	list, err := s.Bindings(ctx, testPool)
	must(t, err)
	for i, b := range f.binding {
		there := slices.Contains(list, Bound{Own, b, true})
		settled := i == 0 && f.settling
		if !there && slices.Contains(f.bound, b) && !settled {
			t.Fatalf("binding %v is lost", b)
		}
		if err := s.Bind(ctx, testPool, Own, b); !errors.Is(err, ErrSpent) {
			t.Fatalf("bound again after a restart: %v", err)
		}
		if there {
			must(t, s.Settle(ctx, testPool, Own, b.RawUse, key.RawBurned, "crash"))
		}
	}
	if left, err := s.Bindings(ctx, testPool); err != nil || len(left) > 0 {
		t.Fatalf("bindings that nobody made: %v, %v", left, err)
	}
}

// Every write of every operation fails once, in each way. Crash: the store is
// opened from the files as they were. Otherwise the caller tries again.
func TestFaultAtEveryWrite(t *testing.T) {
	onBoth(t, func(t *testing.T, options func(string) Options) {
		pg := strings.HasPrefix(options("").URL, "postgres:")
		for _, crash := range []bool{true, false} {
			for _, mode := range []string{"before", "after", "torn"} {
				if pg && mode == "torn" && !crash {
					continue // as "before": a server has no half commits
				}
				t.Run(fmt.Sprintf("crash=%v/%s", crash, mode), func(t *testing.T) {
					t.Parallel()
					seen := map[string]int{}
					first, stride := 1, 1
					if pg && mode == "before" { // slower, and the server undoes a transaction at whatever statement
						stride = 3
						if crash {
							first = 2
						}
					}
					for n := first; ; n += stride {
						dir := filepath.Join(t.TempDir(), "s")
						f := &fault{n: n, mode: mode, crash: crash, dir: dir, opt: options(dir), t: t}
						if !runFault(t, f) {
							break
						}
						seen[f.what]++
					}
					for i, what := range []string{"commit", "create", "rename", "sync directory", "scrub", "begin", "prepared", "UPDATE block SET state =", "PRAGMA application_id = "} {
						if seen[what] == 0 && (i < 5 && stride == 1 || mode == "before" && !pg) {
							t.Errorf("no fault hit %q: %v", what, seen)
						}
					}
				})
			}
		}
	})
}

// runFault reports whether there was an n-th write.
func runFault(t *testing.T, f *fault) bool {
	ctx := testContext(t)
	known := &facts{out: map[key.Position]bool{}}
	s, err := Open(ctx, f.options(t))
	if err != nil && !errors.Is(err, errInjected) {
		t.Fatalf("fault %d (%s): Open: %v", f.n, f.what, err)
	}
	if err != nil && !f.crash {
		if s, err = Open(ctx, f.options(t)); err != nil {
			t.Fatalf("fault %d (%s): the second Open: %v", f.n, f.what, err)
		}
	}
	if err == nil {
		retry := 2
		if f.crash {
			retry = 0
		}
		err = script(t, ctx, s, known, retry)
		if err != nil && !f.crash {
			t.Fatalf("fault %d (%s): %v", f.n, f.what, err)
		}
		if p, perr := s.Pool(ctx, testPool); err == nil && (perr != nil || p.Active != 5 || p.OwnActive != 2) {
			t.Fatalf("fault %d (%s): at the end %+v, %v", f.n, f.what, p, perr)
		}
		if !f.crash {
			for side, mark := range map[Side]key.Position{Own: key.At(2, 4), Peer: key.At(2, 3)} {
				if _, err := s.Load(ctx, testPool, side, 0, mark); !errors.Is(err, ErrSpent) {
					t.Fatalf("fault %d (%s): %s keys read again: %v", f.n, f.what, side, err)
				}
			}
		}
		if err := s.Close(); err != nil {
			t.Fatalf("fault %d (%s): Close: %v", f.n, f.what, err)
		}
	}
	opt := f.opt
	if f.copy != "" {
		opt = testOptions(f.copy)
	}
	if f.tripped {
		known.verify(t, ctx, opt)
	}
	if t.Failed() {
		t.Fatalf("with fault %d (%s)", f.n, f.what)
	}
	return f.tripped
}
