package kma

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

var (
	pairID = uuid.MustParse("6d7b2a3e-6a0e-4c3b-9b1e-0f1e2d3c4b5a")
	devA   = uuid.MustParse("0189a1b2-c3d4-8e5f-8a6b-7c8d9e0f1a2b")
	devB   = uuid.MustParse("0189a1b2-c3d4-8e5f-8a6b-7c8d9e0f1a2c")
)

// inventory is the real store as the agent needs it, with a switch: once dead,
// no call has any effect, as after a kill.
type inventory struct {
	*store.Store
	dead atomic.Bool
	aged atomic.Int64 // what every block is older than the store says
}

var errDead = errors.New("the process was killed")

func (i *inventory) alive() error {
	if i.dead.Load() {
		return errDead
	}
	return nil
}

func (i *inventory) EnsurePool(ctx context.Context, id uuid.UUID, peer string, role key.Role, class key.Class) error {
	return i.Store.EnsurePool(ctx, id, peer, role, class)
}

func (i *inventory) Pool(ctx context.Context, id uuid.UUID) (PoolInfo, error) {
	if err := i.alive(); err != nil {
		return PoolInfo{}, err
	}
	p, err := i.Store.Pool(ctx, id)
	return PoolInfo(p), err
}

func (i *inventory) PutBlock(ctx context.Context, b Block) error {
	if err := i.alive(); err != nil {
		return err
	}
	return i.Store.PutBlock(ctx, store.Block(b))
}

func (i *inventory) Blocks(ctx context.Context, pool uuid.UUID) ([]BlockInfo, error) {
	if err := i.alive(); err != nil {
		return nil, err
	}
	list, err := i.Store.Blocks(ctx, pool)
	out := make([]BlockInfo, len(list))
	for n := range list {
		out[n] = BlockInfo(list[n])
		out[n].Age += time.Duration(i.aged.Load())
	}
	return out, err
}

func (i *inventory) Activate(ctx context.Context, pool uuid.UUID, seq uint64) error {
	if err := i.alive(); err != nil {
		return err
	}
	return i.Store.Activate(ctx, pool, seq)
}

func (i *inventory) Destroy(ctx context.Context, pool uuid.UUID, seq uint64, end key.State, why string) error {
	if err := i.alive(); err != nil {
		return err
	}
	return i.Store.Destroy(ctx, pool, seq, end, why)
}

func (i *inventory) NextLease(ctx context.Context, pool uuid.UUID, most int) (key.Position, int, error) {
	if err := i.alive(); err != nil {
		return 0, 0, err
	}
	return i.Store.NextLease(ctx, pool, most)
}

func (i *inventory) Advance(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, purpose string, generation uint64) error {
	if err := i.alive(); err != nil {
		return err
	}
	return i.Store.Advance(ctx, pool, store.Side(side), mark, purpose, generation)
}

func (i *inventory) AdoptMark(ctx context.Context, pool uuid.UUID, side Side, mark key.Position) (int, error) {
	if err := i.alive(); err != nil {
		return 0, err
	}
	return i.Store.AdoptMark(ctx, pool, store.Side(side), mark)
}

func (i *inventory) Expire(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, generation uint64) (int, error) {
	if err := i.alive(); err != nil {
		return 0, err
	}
	return i.Store.Expire(ctx, pool, store.Side(side), mark, generation)
}

func (i *inventory) Load(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position) ([]LeasedKey, error) {
	if err := i.alive(); err != nil {
		return nil, err
	}
	list, err := i.Store.Load(ctx, pool, store.Side(side), from, to)
	out := make([]LeasedKey, len(list))
	for n := range list {
		out[n] = LeasedKey(list[n])
	}
	return out, err
}

func (i *inventory) LoadRaw(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position) ([]LeasedKey, error) {
	if err := i.alive(); err != nil {
		return nil, err
	}
	list, err := i.Store.LoadRaw(ctx, pool, store.Side(side), from, to)
	out := make([]LeasedKey, len(list))
	for n := range list {
		out[n] = LeasedKey(list[n])
	}
	return out, err
}

func (i *inventory) Bind(ctx context.Context, pool uuid.UUID, side Side, list ...key.Binding) error {
	if err := i.alive(); err != nil {
		return err
	}
	return i.Store.Bind(ctx, pool, store.Side(side), list...)
}

func (i *inventory) Settle(ctx context.Context, pool uuid.UUID, side Side, use key.RawUse, end key.RawEnd, why string) error {
	if err := i.alive(); err != nil {
		return err
	}
	return i.Store.Settle(ctx, pool, store.Side(side), use, end, why)
}

func (i *inventory) Record(ctx context.Context, rows []History) error {
	if err := i.alive(); err != nil {
		return err
	}
	out := make([]store.Event, len(rows))
	for n, h := range rows {
		out[n] = store.Event{Pool: h.Pool, Side: store.Side(h.Side), First: h.First, Last: h.Last, State: h.State, Count: h.Count, Detail: h.Detail}
	}
	return i.Store.Record(ctx, out)
}

func (i *inventory) Ratchet(ctx context.Context) error {
	if err := i.alive(); err != nil {
		return err
	}
	return i.Store.Ratchet(ctx)
}

// envInt reads a count or seed that make soak sets.
func envInt(t *testing.T, name string, def int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// eventLog keeps the codes of events.
type eventLog struct {
	mu    sync.Mutex
	codes map[string]int
}

func (e *eventLog) Event(code, severity, text string, attrs ...slog.Attr) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.codes[code]++
}

func (e *eventLog) count(code string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.codes[code]
}

// process is one life of a node.
type process struct {
	agent *Agent
	inv   *inventory
	stop  context.CancelFunc
	done  chan struct{}
}

// node is one site: its disk, its address, and the process that runs, if any.
type node struct {
	name   string
	role   key.Role
	dir    string
	srv    *httptest.Server
	events *eventLog
	cur    atomic.Pointer[process]
	h      atomic.Pointer[http.Handler]
	peer   *type1.Client
	tune   func(*Options)
	log    *slog.Logger
}

func (n *node) intake() string { return filepath.Join(n.dir, "intake") }

// world is two nodes with a line between them.
type world struct {
	t     *testing.T
	a, b  *node
	line  *line
	truth map[uint64][]byte // key data by seq
}

// options make everything quick.
func options() Options {
	return Options{
		IntakeInterval: 3 * time.Millisecond, LeaseSize: 16, TakeWait: 20 * time.Millisecond,
		RetryMin: time.Millisecond, RetryMax: 20 * time.Millisecond, ValidateEvery: 5 * time.Millisecond,
	}
}

func newWorld(t *testing.T, tune func(*Options)) *world {
	t.Helper()
	w := &world{t: t, line: &line{}, truth: map[uint64][]byte{}}
	dir := t.TempDir()
	ca, err := pki.NewCA("km", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cred, err := ca.Credential()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), cred.Cert, 0o644); err != nil {
		t.Fatal(err)
	}
	w.a, w.b = w.node("a", key.Master, dir, ca, tune), w.node("b", key.Slave, dir, ca, tune)
	w.connect(w.a, w.b, dir)
	w.connect(w.b, w.a, dir)
	return w
}

func (w *world) node(name string, role key.Role, dir string, ca *pki.CA, tune func(*Options)) *node {
	w.t.Helper()
	n := &node{name: name, role: role, dir: filepath.Join(dir, name), events: &eventLog{codes: map[string]int{}}, tune: tune, log: slog.New(slog.DiscardHandler)}
	if os.Getenv("KMA_TEST_LOG") != "" {
		n.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", name)
	}
	if err := os.MkdirAll(n.intake(), 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Chmod(n.dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	cred, err := ca.Issue(pki.Request{Kind: pki.KindNode, Name: name, IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cred.Write(dir, name, false); err != nil {
		w.t.Fatal(err)
	}
	n.srv = httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		h := n.h.Load()
		if h == nil {
			panic(http.ErrAbortHandler) // nobody there
		}
		(*h).ServeHTTP(rw, r)
		if n.h.Load() != h {
			panic(http.ErrAbortHandler) // killed before the answer was out
		}
	}))
	n.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if n.srv.TLS, err = pki.Server(files(dir, name), n.log); err != nil {
		w.t.Fatal(err)
	}
	n.srv.StartTLS()
	w.t.Cleanup(n.srv.Close)
	return n
}

func files(dir, name string) pki.Files {
	return pki.Files{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
}

func (w *world) connect(from, to *node, dir string) {
	w.t.Helper()
	conf, err := pki.NodeClient(files(dir, from.name), to.name, from.log)
	if err != nil {
		w.t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: conf, MaxConnsPerHost: 16}
	w.t.Cleanup(tr.CloseIdleConnections)
	from.peer, err = type1.NewClient(type1.ClientOptions{URL: to.srv.URL, Transport: &lossy{line: w.line, next: tr}, Timeout: 2 * time.Second})
	if err != nil {
		w.t.Fatal(err)
	}
}

// noSupply stands for the KSA, which these tests do without.
type noSupply struct{}

func (noSupply) SupplyNotice(context.Context, string, type1.NoticeRequest) error { return nil }
func (noSupply) PullNotice(context.Context, string, type1.PullRequest) (type1.PullResponse, error) {
	return type1.PullResponse{}, nil
}

func (noSupply) PullSettled(context.Context, string, type1.SettledRequest) (type1.SettledResponse, error) {
	return type1.SettledResponse{}, nil
}

func (w *world) other(n *node) *node {
	if n == w.a {
		return w.b
	}
	return w.a
}

// start begins a life of n.
func (w *world) start(n *node, keep func(uuid.UUID, key.Position) []key.ID) *process {
	w.t.Helper()
	s, err := store.Open(w.t.Context(), store.Options{URL: "sqlite:" + filepath.Join(n.dir, "db", "inventory.db"), RootFile: filepath.Join(n.dir, "root"), Log: n.log})
	if err != nil {
		w.t.Fatalf("open the store of %s: %v", n.name, err)
	}
	o := options()
	own, peer := devA, devB
	if n.role == key.Slave {
		own, peer = devB, devA
	}
	p := &process{inv: &inventory{Store: s}, done: make(chan struct{})}
	o.Pools = []Pool{{ID: pairID, Peer: w.other(n).name, Role: n.role, Class: key.Direct, Intake: n.intake(), QKD: own, PeerQKD: peer}}
	o.Store, o.Peers, o.Log, o.Events = p.inv, map[string]Peer{w.other(n).name: n.peer}, n.log, n.events
	if n.tune != nil {
		n.tune(&o)
	}
	if p.agent, err = New(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
	p.agent.OnBurn(keep)
	h, err := type1.NewHandler(type1.HandlerOptions{Agent: p.agent, Supply: noSupply{}, Peer: pki.NodeFromRequest, PeerOf: p.agent.PeerOf, Log: n.log})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	p.stop = cancel
	go func() {
		defer close(p.done)
		if err := p.agent.Run(ctx); err != nil {
			w.t.Errorf("Run: %v", err)
		}
	}()
	n.cur.Store(p)
	n.h.Store(&h)
	return p
}

// kill ends n's process as SIGKILL would: from one moment on nothing it does
// has an effect, and what it had in memory is gone.
func (w *world) kill(n *node) {
	p := n.cur.Load()
	n.cur.Store(nil)
	p.inv.dead.Store(true)
	n.h.Store(nil)
	w.end(p)
}

// end joins p's goroutines and closes its store.
func (w *world) end(p *process) {
	p.stop()
	<-p.done
	if err := p.inv.Store.Close(); err != nil {
		w.t.Errorf("close the store: %v", err)
	}
}

// halt ends n's process in an orderly way.
func (w *world) halt(n *node) {
	n.h.Store(nil)
	if p := n.cur.Swap(nil); p != nil {
		w.end(p)
	}
}

func (w *world) both(keep func(uuid.UUID, key.Position) []key.ID) {
	for _, n := range []*node{w.a, w.b} {
		w.start(n, keep)
		w.t.Cleanup(func() { w.halt(n) })
	}
}

// feed writes the files of one seq; spoil, unless nil, changes one side's data.
func (w *world) feed(seq uint64, keys int, spoil func(n *node, data []byte) (deliver bool)) {
	w.t.Helper()
	data := make([]byte, keys*key.MasterSize+keyfile.Trailer)
	if _, err := rand.Read(data); err != nil {
		w.t.Fatal(err)
	}
	w.truth[seq] = data
	for _, n := range []*node{w.a, w.b} {
		mine := bytes.Clone(data)
		if spoil != nil && !spoil(n, mine) {
			continue
		}
		w.write(n, seq, mine)
	}
}

func (w *world) write(n *node, seq uint64, data []byte) {
	w.t.Helper()
	f := sampleFile(w.t, n.role, seq, data)
	defer f.Wipe()
	if _, err := keyfile.WriteAtomic(n.intake(), f); err != nil {
		w.t.Fatal(err)
	}
}

func sampleFile(t testing.TB, role key.Role, seq uint64, data []byte) *keyfile.File {
	t.Helper()
	m, err := key.Take(bytes.Clone(data))
	if err != nil {
		t.Fatal(err)
	}
	h := keyfile.Header{Pair: pairID, QKD: devA, PeerQKD: devB, Role: role, Seq: seq, Created: time.Now(), QBER: 0.02, HashAlgorithm: keyfile.SHA256}
	if role == key.Slave {
		h.QKD, h.PeerQKD = devB, devA
	}
	return &keyfile.File{Header: h, Data: m}
}

// want waits until ok holds.
func (w *world) want(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("not within 20 s: %s\na: %s\nb: %s", what, w.describe(w.a), w.describe(w.b))
		}
	}
}

func (w *world) describe(n *node) string {
	p := n.cur.Load()
	if p == nil {
		return "down"
	}
	info, _ := p.inv.Store.Pool(w.t.Context(), pairID)
	blocks, _ := p.inv.Store.Blocks(w.t.Context(), pairID)
	l, err := p.agent.Level(w.other(n).name)
	s := fmt.Sprintf("%+v level %+v %v events %v blocks", info, l, err, n.events.codes)
	for _, b := range blocks {
		s += fmt.Sprintf(" %d:%s/%d", b.Seq, b.State, b.Left)
	}
	return s
}

func (w *world) info(n *node) PoolInfo {
	info, err := n.cur.Load().inv.Store.Pool(w.t.Context(), pairID)
	if err != nil {
		w.t.Fatal(err)
	}
	return PoolInfo(info)
}

// agreed reports whether both sides are synced, hold the same active blocks and
// the same marks, have nothing left to validate and nothing in the intake.
func (w *world) agreed() bool {
	var lists [2]string
	for i, n := range []*node{w.a, w.b} {
		p := n.cur.Load()
		if l, err := p.agent.Level(w.other(n).name); err != nil || !l.Synced {
			return false
		}
		names, err := filepath.Glob(filepath.Join(n.intake(), "*.qkd"))
		if err != nil || len(names) > 0 {
			return false
		}
		blocks, err := p.inv.Store.Blocks(w.t.Context(), pairID)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, b := range blocks {
			if b.Left > 0 {
				lists[i] += fmt.Sprintf("%d:%s/%d ", b.Seq, b.State, b.Left)
			}
			if b.State != key.Active {
				return false
			}
		}
	}
	a, b := w.info(w.a), w.info(w.b)
	return lists[0] == lists[1] && a.Mark == b.PeerMark && a.PeerMark == b.Mark
}

// line is how bad the way between the nodes is.
type line struct {
	mu  sync.Mutex
	r   *mrand.Rand // nil: perfect
	bad float64     // probability of each misfortune
	wg  sync.WaitGroup
}

func (l *line) set(seed uint64, bad float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.r, l.bad = mrand.New(mrand.NewPCG(seed, 7)), bad
}

func (l *line) hit() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.r != nil && l.r.Float64() < l.bad
}

func (l *line) delay(most time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.r == nil {
		return 0
	}
	return time.Duration(l.r.Int64N(int64(most)))
}

// lossy loses, repeats and delays requests and answers.
type lossy struct {
	line *line
	next http.RoundTripper
}

var errLost = errors.New("lost on the way")

func (y *lossy) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	send := func(ctx context.Context) (*http.Response, error) {
		c := r.Clone(ctx)
		c.Body = io.NopCloser(bytes.NewReader(body))
		return y.next.RoundTrip(c)
	}
	if y.line.hit() {
		return nil, errLost
	}
	if y.line.hit() {
		time.Sleep(y.line.delay(10 * time.Millisecond))
	}
	if y.line.hit() { // repeated, before
		if resp, err := send(r.Context()); err == nil {
			drain(resp)
		}
	}
	if y.line.hit() { // repeated, long after
		y.line.wg.Go(func() {
			time.Sleep(y.line.delay(100 * time.Millisecond))
			ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), time.Second)
			defer cancel()
			if resp, err := send(ctx); err == nil {
				drain(resp)
			}
		})
	}
	resp, err := send(r.Context())
	if err == nil && y.line.hit() {
		drain(resp)
		return nil, errLost
	}
	return resp, err
}

func drain(r *http.Response) {
	_, _ = io.Copy(io.Discard, r.Body)
	_ = r.Body.Close()
}
