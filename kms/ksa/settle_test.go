package ksa

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// settleWith asks the peer as Run does.
func (s *site) settleWith(t testing.TB) {
	t.Helper()
	for last, more := (Settled{}), true; more; more = len(last.IDs) > 0 {
		var err error
		if last, err = s.askOnce(t.Context(), s.keys.peer, last); err != nil {
			t.Fatal(err)
		}
	}
}

// deliver sends what is unsent.
func (s *site) deliver(t testing.TB) {
	t.Helper()
	for more := true; more; {
		var err error
		if more, err = s.sendBatch(t.Context(), s.keys.peer); err != nil {
			t.Fatal(err)
		}
	}
}

// crash replaces s by a new process, which knows nothing.
func (s *site) crash(t testing.TB) {
	t.Helper()
	s.in.wipe()
	for id, mk := range s.keys.remote {
		mk.Material.Wipe()
		delete(s.keys.remote, id)
	}
	s.Agent = newSite(t, s.o.Node, s, s.o.SAEs, func(o *Options) { o.TTL = s.o.TTL })
}

// When the slave's node crashes, the owner counts just the keys that nobody had
// fetched there, those whose notice comes later included.
func TestPeerCrashStrands(t *testing.T) {
	a, b := twoSites(t, 20, func(o *Options) { o.TTL = time.Minute })
	x := mustGet(t, a, "a1", "b1", 12, 256)
	a.deliver(t)
	if _, err := fetch(t, b, "b1", "a1", ids(x[:5]), 0); err != nil {
		t.Fatal(err)
	}
	pulled := mustGet(t, a, "a1", "b1", 1, 256)
	if _, err := fetch(t, b, "b1", "a1", ids(pulled), 0); err != nil {
		t.Fatal(err)
	}
	a.deliver(t)
	a.settleWith(t)
	y := mustGet(t, a, "a1", "b1", 2, 256)
	b.crash(t)
	a.deliver(t)
	a.peers.mute = errors.New("down")
	a.advance(time.Minute + settleGrace)
	b.advance(time.Minute + settleGrace)
	if _, err := a.askOnce(t.Context(), "b", Settled{}); err == nil || a.count(Stranded) != 0 {
		t.Errorf("%d keys counted before the peer has said anything", a.count(Stranded))
	}
	a.peers.mute = nil
	for range 2 {
		b.sweep(b.clock())
		a.settleWith(t)
	}
	want := ids(append(slices.Clone(x[5:]), y...))
	var got []key.ID
	for _, e := range append(a.events, b.events...) {
		if e.Kind == Stranded {
			got = append(got, e.KeyID)
			if !e.Own {
				t.Errorf("key %s is counted by the slave's node", e.KeyID)
			}
		}
	}
	for _, list := range [][]key.ID{want, got} {
		slices.SortFunc(list, func(x, y key.ID) int { return bytes.Compare(x[:], y[:]) })
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d stranded, want %d", len(got), len(want))
	}
	if a.out["b"].waits() || b.in.n["a"].Load() != 0 {
		t.Error("issues or arrivals are left")
	}
}

// A notice that was long on its way lives longer at the peer, and may be used so
// long: the owner waits.
func TestLateNotice(t *testing.T) {
	a, b := twoSites(t, 1, func(o *Options) { o.TTL = time.Minute })
	a.peers.send = func(ns []Notice) ([]Notice, error) {
		a.advance(30 * time.Second)
		b.advance(30 * time.Second)
		return ns, nil
	}
	x := mustGet(t, a, "a1", "b1", 1, 256)
	a.deliver(t)
	a.advance(59 * time.Second)
	b.advance(59 * time.Second)
	a.settleWith(t)
	b.sweep(b.clock())
	if _, err := fetch(t, b, "b1", "a1", ids(x), 0); err != nil {
		t.Fatal(err)
	}
	a.settleWith(t)
	if a.count(Stranded)+b.count(Stranded) != 0 || a.out["b"].waits() {
		t.Error("a key that was fetched is counted as stranded, or not settled")
	}
}

// A node that is stopped leaves no key that the owner takes for stranded.
func TestStopTellsWhatWasSettled(t *testing.T) {
	a, b := twoSites(t, 3, nil)
	a.run(t)
	stop := b.run(t)
	x := mustGet(t, a, "a1", "b1", 3, 256)
	if _, err := fetch(t, b, "b1", "a1", ids(x), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the notices are there", func() bool { return b.in.n["a"].Load() == 0 })
	stop()
	if a.out["b"].waits() {
		t.Error("the owner does not know that its keys were fetched")
	}
}

// What is settled is told page by page, again until it is confirmed, and to the
// owner only.
func TestSettledPages(t *testing.T) {
	_, b := twoSites(t, 0, func(o *Options) { o.MaxNotices = maxSettled })
	l := b.in.settled["a"]
	id := func(i int) key.ID { return key.ID{byte(i), byte(i >> 8), 1} }
	for i := range maxSettled + 2 {
		l.add(id(i))
	}
	first := b.Settled("a", 0, nil)
	if again := b.Settled("a", 7, nil); !slices.Equal(first.IDs, again.IDs) || first.UpTo != again.UpTo {
		t.Error("what was not confirmed is not told again")
	}
	if len(first.IDs) != maxSettled || !first.More || first.IDs[0] != id(0) {
		t.Errorf("first page: %d, more %v", len(first.IDs), first.More)
	}
	second := b.Settled("a", first.UpTo, nil)
	if !slices.Equal(second.IDs, []key.ID{id(maxSettled), id(maxSettled + 1)}) || second.More {
		t.Errorf("second page: %d, more %v", len(second.IDs), second.More)
	}
	if back := b.Settled("a", first.UpTo-1, nil); !slices.Equal(back.IDs, second.IDs) {
		t.Error("an older confirmation changed something")
	}
	if last := b.Settled("a", second.UpTo, nil); len(last.IDs) != 0 || !l.empty() {
		t.Errorf("%d are left", len(last.IDs))
	}
	if s := b.Settled("z", 0, nil); s.IDs != nil || s.More {
		t.Errorf("a stranger was told %+v", s)
	}
	for i := range 5 * maxSettled {
		l.add(id(i))
	}
	if len(l.ids) != l.limit {
		t.Errorf("%d kept for a peer that does not ask", len(l.ids))
	}
}

// mustFetch is fetch, which succeeds.
func (s *site) mustFetch(t testing.TB, ids []key.ID) {
	t.Helper()
	if _, err := fetch(t, s, "b1", "a1", ids, 0); err != nil {
		t.Fatal(err)
	}
}

// A key that was pulled and fetched is told at a stop even if the owner's own
// sending has not come.
func TestStopTellsWhatWasPulled(t *testing.T) {
	a, b := twoSites(t, 1, nil)
	a.peers.send = func([]Notice) ([]Notice, error) { return nil, errors.New("slow") }
	a.run(t)
	stop := b.run(t)
	b.mustFetch(t, ids(mustGet(t, a, "a1", "b1", 1, 256)))
	stop()
	if a.out["b"].waits() {
		t.Error("the owner does not know that its key was fetched")
	}
}

// The slave's machine was paused, and its clock with it: what it still holds is
// not the owner's to count.
func TestPausedPeer(t *testing.T) {
	a, b := twoSites(t, 3, func(o *Options) { o.TTL = time.Minute })
	x := mustGet(t, a, "a1", "b1", 3, 256)
	a.deliver(t)
	delete(b.in.shard[of(x[2].ID)].m, x[2].ID) // lost there
	a.advance(time.Minute + settleGrace)
	a.settleWith(t)
	b.mustFetch(t, ids(x[:1]))
	b.advance(time.Minute)
	b.sweep(b.clock())
	a.settleWith(t)
	if n, m := a.count(Stranded), b.count(Stranded); n != 1 || m != 1 || a.out["b"].waits() {
		t.Errorf("the owner counts %d, the slave's node %d, not one each", n, m)
	}
	if s := b.Settled("z", 0, ids(x)); s.Held != nil {
		t.Error("a stranger was told what is held")
	}
}

// A peer that takes notices and never says what was settled costs the count, not
// the supply; its operator hears of it once.
func TestPeerThatNeverSettles(t *testing.T) {
	for name, lie := range map[string]*Settled{"silent": nil, "holds all": {}, "more for ever": {More: true}} {
		const room = 4 * 16
		a, b := twoSites(t, 3*room, func(o *Options) { o.MaxNotices, o.TTL = 16, time.Second })
		a.peers.mute, a.peers.lie = errors.New("no such method"), lie
		for range 3 * room {
			x := mustGet(t, a, "a1", "b1", 1, 256)
			a.deliver(t)
			b.mustFetch(t, ids(x))
			a.advance(settleGrace)
			if name == "holds all" {
				lie.Held = append(lie.Held, x[0].ID)
			}
			_, _ = a.askPages(t.Context(), "b", Settled{})
		}
		if n, m := a.count(Uncounted), a.count(Stranded); n != 1 || m != 0 || len(a.out["b"].m) != room {
			t.Errorf("%s: %d alarms, %d counted, %d issues", name, n, m, len(a.out["b"].m))
		}
		a.peers.mute, a.peers.lie = nil, nil
		a.settleWith(t)
		if a.out["b"].waits() || a.out["b"].gave {
			t.Errorf("%s: not settled afterwards", name)
		}
	}
	a, _ := twoSites(t, 70, func(o *Options) { o.MaxNotices = 16 })
	mustGet(t, a, "a1", "b1", 64, 256)
	a.advance(a.o.TTL)
	_, err := a.GetKey(t.Context(), "a1", "b1", 1, 256)
	wantKind(t, err, "unavailable") // the peer has still time to say it
	if a.count(Uncounted) != 0 {
		t.Error("an issue was given up too early")
	}
}

// A peer that does not answer is asked less and less often, and the log says so
// once.
func TestAskingBacksOff(t *testing.T) {
	var mu sync.Mutex
	var log bytes.Buffer
	a, _ := twoSites(t, 1, func(o *Options) {
		o.Log = slog.New(slog.NewTextHandler(writer(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return log.Write(p)
		}), nil))
	})
	a.peers.mute = errors.New("no such method")
	mustGet(t, a, "a1", "b1", 1, 256)
	asked := func() int {
		a.peers.mu.Lock()
		defer a.peers.mu.Unlock()
		return a.peers.asked
	}
	begin := time.Now()
	stop := a.run(t)
	eventually(t, "a first question", func() bool { return asked() > 0 })
	a.advance(quietTime)
	eventually(t, "three questions", func() bool { return asked() == 3 })
	if d := time.Since(begin); d < 7*askEvery { // 1+2+4
		t.Errorf("three questions in %v", d)
	}
	stop()
	mu.Lock()
	defer mu.Unlock()
	if n := strings.Count(log.String(), "does not say"); n != 1 {
		t.Errorf("%d warnings: %s", n, log.String())
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

// More that never ends is asked for page by page, some at once; without any
// progress it is an error.
func TestMoreForEver(t *testing.T) {
	a, _ := twoSites(t, 0, nil)
	for _, lie := range []Settled{{More: true}, {More: true, UpTo: 1}, {More: true, IDs: []key.ID{{1}}}} {
		a.peers.lie, a.peers.asked = &lie, 0
		if _, err := a.askPages(t.Context(), "b", Settled{}); err == nil || a.peers.asked != 1 {
			t.Errorf("%+v: %d questions, %v", lie, a.peers.asked, err)
		}
	}
	a.o.Peers = onward{a.peers}
	a.peers.asked = 0
	last, err := a.askPages(t.Context(), "b", Settled{})
	if err != nil || last.UpTo != maxPages {
		t.Errorf("%d questions, %v", last.UpTo, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if next, _ := a.askPages(ctx, "b", last); next.UpTo != maxPages+1 {
		t.Errorf("%d questions after the end", next.UpTo-maxPages)
	}
}

// onward always has one more.
type onward struct{ *fakePeers }

func (onward) PullSettled(_ context.Context, _ string, upTo uint64, _ []key.ID) (Settled, error) {
	return Settled{IDs: []key.ID{{1}}, UpTo: upTo + 1, More: true}, nil
}

// issues adds n issues for b that nobody sends.
func (s *site) issues(t testing.TB, n int) []key.ID {
	t.Helper()
	ns := make([]Notice, n)
	for i := range ns {
		_, _ = rand.Read(ns[i].KeyID[:])
		ns[i].MasterSAE, ns[i].SlaveSAEs = "a1", []string{"b1"}
	}
	if _, err := s.out["b"].add(ns, s.clock(), s.clock().Add(s.o.TTL)); err != nil {
		t.Fatal(err)
	}
	list := make([]key.ID, n)
	for i := range ns {
		list[i] = ns[i].KeyID
	}
	return list
}

// What is due is found without a walk through all issues, and one answer counts
// a page of it; one sweep of the inbox is bounded as well.
func TestPassesAreBounded(t *testing.T) {
	const n = 110_000
	a, b := twoSites(t, 0, nil)
	a.issues(t, n)
	begin := time.Now()
	for range 1000 {
		if a.out["b"].due(a.clock()) != nil {
			t.Fatal("due too early")
		}
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("1000 looks at %d issues took %v", n, d)
	}
	a.advance(a.o.TTL + settleGrace)
	for range 2 {
		if _, err := a.askOnce(t.Context(), "b", Settled{}); err != nil {
			t.Fatal(err)
		}
	}
	if c := a.count(Stranded); c != 2*maxSettled {
		t.Errorf("two answers count %d keys", c)
	}
	for i := range maxSweep + 2 {
		id := key.ID{byte(i), byte(i >> 8), byte(i >> 16), 15: byte(i)}
		if err := b.in.add(&arrival{Notice: Notice{KeyID: id}, peer: "a", expires: b.clock()}, false); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []int64{2, 0} {
		if b.sweep(b.clock()); b.in.n["a"].Load() != want {
			t.Errorf("%d arrivals after a sweep, not %d", b.in.n["a"].Load(), want)
		}
	}
}

// A busy queue does not stop the supply to another peer.
func TestQueuesAreApart(t *testing.T) {
	a, _ := twoSites(t, 1, nil)
	a.Agent = newSite(t, "a", a, []SAE{{ID: "a1", Node: "a", Peers: []string{"b1", "c1"}}, {ID: "b1", Node: "b"}, {ID: "c1", Node: "c"}}, nil)
	a.out["c"].mu.Lock()
	defer a.out["c"].mu.Unlock()
	mustGet(t, a, "a1", "b1", 1, 256)
}

// Issues that are settled behind one that is not take no room for long, and
// sending goes on where it was.
func TestSettledIssuesTakeNoRoom(t *testing.T) {
	a, _ := twoSites(t, 0, nil)
	q := a.out["b"]
	first := a.issues(t, batchSize)
	for range 20 {
		q.settle(Settled{IDs: a.issues(t, 10*batchSize)}, nil)
		batch := q.head(a.clock())
		if len(batch) != batchSize || batch[0].KeyID != first[0] || batch[batchSize-1].KeyID != first[batchSize-1] {
			t.Fatal("the batch that failed is not the next one")
		}
		if len(q.order) > 3*batchSize {
			t.Fatalf("%d issues, %d are kept", len(q.m), len(q.order))
		}
	}
	rest := a.issues(t, 10*batchSize)
	for range 2 { // first, and as many of rest
		q.done(q.head(a.clock()), a.clock().Add(time.Minute))
	}
	unsent := rest[9*batchSize:]
	for _, gone := range [][]key.ID{nil, rest[:9*batchSize], first} {
		q.settle(Settled{IDs: gone}, nil)
		q.due(a.clock())
		batch := q.head(a.clock())
		if gone != nil && (len(batch) != batchSize || batch[0].KeyID != unsent[0]) {
			t.Errorf("%d notices in the next batch, with %d of %d issues", len(batch), len(q.m), len(q.order))
		}
	}
	q.settle(Settled{IDs: unsent}, nil)
	if q.oldest() != nil || len(q.order) != 0 || q.waits() {
		t.Error("something is left")
	}
}
