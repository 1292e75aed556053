package ksa

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Notices are delivered in the background, all of them, also when sending fails
// at first.
func TestNoticesAreDelivered(t *testing.T) {
	a, b := twoSites(t, 300, nil)
	fails := 3
	a.peers.send = func(ns []Notice) ([]Notice, error) {
		if fails > 0 {
			fails--
			return nil, errors.New("link down")
		}
		return ns, nil
	}
	var all []key.SupplyKey
	for range 3 {
		all = append(all, mustGet(t, a, "a1", "b1", 100, 256)...)
	}
	a.run(t)
	eventually(t, "all notices at the peer", func() bool { return b.in.n["a"].Load() == 300 })
	eventually(t, "nothing left to send", func() bool {
		_, ok := a.Issued("b", all[299].ID)
		return !ok
	})
	b.peers.pull = func(context.Context) error { return errors.New("there is nothing to pull") }
	got, err := fetch(t, b, "b1", "a1", ids(all[:128]), 0)
	if err != nil {
		t.Fatal(err)
	}
	equalKeys(t, all[:128], got)
}

// At the end of Run what is unsent is sent.
func TestNoticesAreFlushedAtTheEnd(t *testing.T) {
	a, b := twoSites(t, 2, nil)
	up := make(chan struct{})
	a.peers.send = func(ns []Notice) ([]Notice, error) {
		select {
		case <-up:
			return ns, nil
		default:
			return nil, errors.New("link down")
		}
	}
	stop := a.run(t)
	mustGet(t, a, "a1", "b1", 2, 256)
	eventually(t, "a first attempt", func() bool { sent, _ := a.peers.count(); return sent > 0 })
	close(up)
	stop()
	if b.in.n["a"].Load() != 2 {
		t.Errorf("%d notices arrived", b.in.n["a"].Load())
	}
}

func TestLostNoticeIsPulled(t *testing.T) {
	a, b := twoSites(t, 5, nil) // nobody runs: no notice is sent
	x := mustGet(t, a, "a1", "b1", 5, 256)
	got, err := fetch(t, b, "b1", "a1", ids(x), 0)
	if err != nil {
		t.Fatal(err)
	}
	equalKeys(t, x, got)
	if _, pulls := b.peers.count(); pulls != 1 {
		t.Errorf("%d pulls", pulls)
	}
	if _, ok := a.Issued("c", x[0].ID); ok {
		t.Error("a third node may pull the notice")
	}
	a.run(t) // what was pulled comes once more, and leaves nothing behind
	eventually(t, "notices of keys that were supplied are gone", func() bool {
		return !a.out["b"].waits() && b.in.n["a"].Load() == 0
	})
	if _, err := fetch(t, b, "b1", "a1", ids(x)[:1], 0); err == nil {
		t.Error("a key was supplied twice")
	}
}

// One notice that the peer refuses keeps none of the others back, and is not sent
// for ever; its key is counted when its time is over.
func TestRefusedNotice(t *testing.T) {
	a, b := twoSites(t, 100, nil)
	x := mustGet(t, a, "a1", "b1", 100, 256)
	bad, calls := x[37].ID, 0
	a.peers.send = func(ns []Notice) ([]Notice, error) {
		calls++
		if slices.ContainsFunc(ns, func(n Notice) bool { return n.KeyID == bad }) {
			return nil, fmt.Errorf("pool is not shared: %w", ErrRefused)
		}
		return ns, nil
	}
	a.deliver(t)
	if got := b.in.n["a"].Load(); got != 99 || calls > 1+2*7 {
		t.Errorf("%d notices arrived, in %d calls", got, calls)
	}
	calls = 0
	a.deliver(t)
	if calls != 0 || a.count(Refused) != 1 {
		t.Errorf("sent again %d times, %d events", calls, a.count(Refused))
	}
	b.mustFetch(t, append(ids(x[:37]), ids(x[38:])...))
	a.advance(a.o.TTL + settleGrace)
	a.settleWith(t)
	if a.count(Stranded) != 1 || a.out["b"].waits() {
		t.Errorf("%d keys are counted as stranded", a.count(Stranded))
	}
}

// A batch that was refused and then cut off is sent again, but for what has arrived.
func TestRefusedThenCutOff(t *testing.T) {
	a, b := twoSites(t, 8, nil)
	x := mustGet(t, a, "a1", "b1", 8, 256)
	down := errors.New("link down")
	calls := 0
	a.peers.send = func(ns []Notice) ([]Notice, error) {
		switch calls++; calls {
		case 1:
			return nil, ErrRefused
		case 3:
			return nil, down
		}
		return ns, nil
	}
	if _, err := a.sendBatch(t.Context(), "b"); !errors.Is(err, down) || b.in.n["a"].Load() != 4 {
		t.Errorf("%v, %d notices arrived", err, b.in.n["a"].Load())
	}
	a.deliver(t)
	if sent, _ := a.peers.count(); sent != 8+4+4+4 || a.count(Refused) != 0 {
		t.Errorf("%d notices sent, %d events", sent, a.count(Refused))
	}
	b.mustFetch(t, ids(x))
}

// A notice that is on its way is awaited: the peer is not asked for it, whatever
// else comes before it. One that does not come in time is asked for.
func TestNoticeIsAwaited(t *testing.T) {
	a, b := twoSites(t, 3, nil)
	b.wait = time.Minute
	b.o.PullTimeout = 2 * time.Minute
	x := mustGet(t, a, "a1", "b1", 3, 256)
	done := make(chan error, 1)
	go func() {
		_, err := b.GetKeyWithID(t.Context(), "b1", "a1", ids(x[1:]), 0)
		done <- err
	}()
	waits := func() bool {
		bell := b.in.bells["a"]
		bell.mu.Lock()
		defer bell.mu.Unlock()
		return bell.ch != nil
	}
	for _, k := range x {
		eventually(t, "the call waits", waits)
		n, ok := a.Issued("b", k.ID)
		if !ok {
			t.Fatal("no notice")
		}
		if err := b.Receive(t.Context(), "a", []Notice{n}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the notices have come, the call still waits")
	}
	if _, pulls := b.peers.count(); pulls != 0 {
		t.Errorf("%d pulls", pulls)
	}
	b.o.PullTimeout = 20 * time.Millisecond
	b.peers.pull = func(ctx context.Context) error { return ctx.Err() }
	begin := time.Now()
	_, err := fetch(t, b, "b1", "a1", []key.ID{{7}}, 0)
	wantKind(t, err, "unavailable") // the wait is part of the bound
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("the call took %v", d)
	}
}

// A peer that does not answer makes the call unavailable within the bound; the
// key is still there afterwards.
func TestSilentPeer(t *testing.T) {
	a, b := twoSites(t, 2, func(o *Options) { o.PullTimeout = 20 * time.Millisecond })
	x := mustGet(t, a, "a1", "b1", 2, 256)
	b.peers.pull = func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	_, err := fetch(t, b, "b1", "a1", ids(x), 0)
	wantKind(t, err, "unavailable")
	b.peers.pull = nil
	if _, err := fetch(t, b, "b1", "a1", ids(x), 0); err != nil {
		t.Error(err)
	}
}

// More pulls than may be under way at once still end in the bound.
func TestPullsAreBounded(t *testing.T) {
	_, b := twoSites(t, 0, func(o *Options) { o.PullTimeout = 50 * time.Millisecond })
	var most atomic.Int32
	b.peers.pull = func(ctx context.Context) error {
		if n := int32(len(b.pulls)); n > most.Load() {
			most.Store(n)
		}
		<-ctx.Done()
		return ctx.Err()
	}
	var wg sync.WaitGroup
	for i := range 3 * maxPulls {
		wg.Go(func() {
			_, err := b.GetKeyWithID(t.Context(), "b1", "a1", []key.ID{{byte(i + 1), 1}}, 0)
			wantKind(t, err, "unavailable")
		})
	}
	wg.Wait()
	if n := most.Load(); n > maxPulls || len(b.pulls) != 0 {
		t.Errorf("%d pulls at once, %d slots are not given back", n, len(b.pulls))
	}
	if _, pulls := b.peers.count(); pulls > 3*maxPulls {
		t.Errorf("%d pulls", pulls)
	}
}

// A peer that answers with what was not asked for gets nothing in.
func TestPullGivesOtherNotice(t *testing.T) {
	a, b := twoSites(t, 2, nil)
	x := mustGet(t, a, "a1", "b1", 2, 256)
	n, _ := a.Issued("b", x[1].ID)
	b.peers.extra = []Notice{n}
	_, err := fetch(t, b, "b1", "a1", ids(x[:1]), 0)
	wantKind(t, err, "unavailable")
	if b.in.n["a"].Load() != 0 {
		t.Error("a notice was kept")
	}
}

// Keys that nobody fetches fill the room for notices; a pull still gets in.
func TestPullWhenFull(t *testing.T) {
	a, b := twoSites(t, 30, func(o *Options) { o.MaxNotices = 16 })
	x := mustGet(t, a, "a1", "b1", 20, 256)
	var ns []Notice
	for _, k := range x {
		n, _ := a.Issued("b", k.ID)
		ns = append(ns, n)
	}
	if err := b.Receive(t.Context(), "a", ns); !errors.Is(err, errFull) {
		t.Fatalf("20 notices where there is room for 16: %v", err)
	}
	for _, k := range x[16:] {
		if _, err := fetch(t, b, "b1", "a1", []key.ID{k.ID}, 0); err != nil {
			t.Error(err)
		}
	}
	_, err := fetch(t, b, "b1", "a1", ids(x[16:19]), 0)
	wantKind(t, err, "unavailable") // two more than there is room for
}

// A peer whose keys nobody fetches takes no room from another one.
func TestPeersDoNotFillEachOthersRoom(t *testing.T) {
	_, other := twoSites(t, 0, nil)
	b := newSite(t, "b", other, []SAE{
		{ID: "b1", Node: "b", Peers: []string{"a1", "c1"}}, {ID: "a1", Node: "a"}, {ID: "c1", Node: "c"},
	}, func(o *Options) { o.MaxNotices = 4 })
	send := func(peer, master string, first, count int) error {
		var ns []Notice
		for i := range count {
			ns = append(ns, Notice{
				Pool: other.keys.pool, Position: key.At(1, uint32(i)), KeyID: key.ID{byte(first + i), 15: byte(i)}, MasterSAE: master, SlaveSAEs: []string{"b1"},
				SizeBits: 256, TTL: time.Minute,
			})
		}
		return b.Receive(t.Context(), peer, ns)
	}
	if err := send("a", "a1", 1, 5); !errors.Is(err, errFull) {
		t.Errorf("five where there is room for four: %v", err)
	}
	if err := send("c", "c1", 100, 4); err != nil {
		t.Errorf("the other peer's: %v", err)
	}
	if a, c := b.in.n["a"].Load(), b.in.n["c"].Load(); a != 4 || c != 4 {
		t.Errorf("%d and %d notices", a, c)
	}
}

func TestReceiveRefusesWhatIsNotThePeers(t *testing.T) {
	_, b := twoSites(t, 1, nil)
	good := Notice{
		Pool: b.keys.pool, Position: key.At(1, 0), KeyID: key.ID{9}, MasterSAE: "a1", SlaveSAEs: []string{"b1"},
		SizeBits: 256, TTL: time.Minute,
	}
	for name, change := range map[string]func(*Notice){
		"unknown master":        func(n *Notice) { n.MasterSAE = "zz" },
		"our own SAE as master": func(n *Notice) { n.MasterSAE = "b1" },
		"unknown slave":         func(n *Notice) { n.SlaveSAEs = []string{"zz"} },
		"slave not here":        func(n *Notice) { n.SlaveSAEs = []string{"a2"} },
		"pair not allowed":      func(n *Notice) { n.SlaveSAEs = []string{"b2"} },
		"no slave":              func(n *Notice) { n.SlaveSAEs = nil },
		"two slaves":            func(n *Notice) { n.SlaveSAEs = []string{"b1", "b2"} },
		"no key":                func(n *Notice) { n.KeyID = key.ID{} },
		"size 0":                func(n *Notice) { n.SizeBits = 0 },
		"size 257":              func(n *Notice) { n.SizeBits = 257 },
		"huge size":             func(n *Notice) { n.SizeBits = 1 << 30 },
		"no TTL":                func(n *Notice) { n.TTL = 0 },
		"endless TTL":           func(n *Notice) { n.TTL = 24 * time.Hour },
	} {
		n := good
		change(&n)
		before := b.count(Refused)
		if err := b.Receive(t.Context(), "a", []Notice{n}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if b.count(Refused) != before+1 || b.in.n["a"].Load() != 0 {
			t.Errorf("%s: not refused", name)
		}
	}
	if err := b.Receive(t.Context(), "c", []Notice{good}); err != nil || b.in.n["a"].Load() != 0 {
		t.Error("a notice of node a's SAE was taken from node c")
	}
	bad := good
	bad.MasterSAE = "zz"
	if err := b.Receive(t.Context(), "a", []Notice{bad, good, good}); err != nil || b.in.n["a"].Load() != 1 {
		t.Errorf("good ones beside a bad one: %d, %v", b.in.n["a"].Load(), err)
	}
	before := b.count(Refused)
	changed := good
	changed.SizeBits = 128
	_ = b.Receive(t.Context(), "a", []Notice{changed})
	if got := b.in.get(good.KeyID); b.count(Refused) != before+1 || got.SizeBits != 256 {
		t.Error("a second notice changed the first")
	}
}

// A notice of a key that is not the peer's to give gets nothing.
func TestNoticeOfAnotherPool(t *testing.T) {
	a, b := twoSites(t, 3, nil)
	victim := mustGet(t, a, "a2", "b2", 1, 256)
	for _, n := range []Notice{
		{Pool: uuid.UUID{1}, Position: key.At(1, 0), KeyID: victim[0].ID},
		{Pool: b.keys.pool, Position: key.At(1, 2), KeyID: victim[0].ID},
	} {
		n.MasterSAE, n.SlaveSAEs, n.SizeBits, n.TTL = "a1", []string{"b1"}, 256, time.Second
		if err := b.Receive(t.Context(), "a", []Notice{n}); err != nil {
			t.Fatal(err)
		}
		_, err := fetch(t, b, "b1", "a1", ids(victim), 0)
		wantKind(t, err, "not found")
		b.advance(time.Second)
		b.sweep(b.clock())
	}
	if _, remote := b.keys.left(); remote != 3 {
		t.Errorf("%d keys left", remote)
	}
}

// What no SAE fetches is gone on both sides within its TTL.
func TestExpiry(t *testing.T) {
	a, b := twoSites(t, 6, func(o *Options) { o.TTL = time.Minute })
	x := mustGet(t, a, "a1", "b1", 3, 256) // never fetched
	y := mustGet(t, a, "a1", "b1", 1, 256) // notice never delivered
	for _, k := range x {
		n, ok := a.Issued("b", k.ID)
		if !ok || n.TTL != time.Minute {
			t.Fatalf("issued: %v %v", n, ok)
		}
		if err := b.Receive(t.Context(), "a", []Notice{n}); err != nil {
			t.Fatal(err)
		}
	}
	// Claimed by a batch that is refused, so the key is in the arrival.
	b.in.get(x[2].ID).master, _, _ = b.keys.Claim("a", b.keys.pool, b.in.get(x[2].ID).Position, x[2].ID)
	b.sweep(b.clock())
	if b.in.n["a"].Load() != 3 || b.count(Stranded) != 0 {
		t.Fatal("expired too early")
	}
	a.advance(time.Minute)
	b.advance(time.Minute)
	_, err := fetch(t, b, "b1", "a1", ids(x[:1]), 0)
	wantKind(t, err, "not found")
	_, err = fetch(t, b, "b1", "a1", ids(y), 0)
	wantKind(t, err, "not found")
	b.sweep(b.clock())
	if _, remote := b.keys.left(); remote != 3 || b.keys.unwiped() != 0 || b.in.n["a"].Load() != 0 || b.count(Stranded) != 3 {
		t.Errorf("%d keys left, %d unwiped, %d notices, %d stranded", remote, b.keys.unwiped(), b.in.n["a"].Load(), b.count(Stranded))
	}
	a.settleWith(t)
	if n := a.count(Stranded); n != 0 {
		t.Errorf("the owner counts %d keys that the peer may still settle", n)
	}
	a.advance(settleGrace)
	a.settleWith(t)
	if n := a.count(Stranded); n != 1 { // the peer has counted the others
		t.Errorf("%d stranded at the owner", n)
	}
	if _, ok := a.Issued("b", y[0].ID); ok {
		t.Error("an expired notice is still given out")
	}
}

// One notice waits for nothing; many that follow one another closely share
// batches, until the peer has to pull one.
func TestNoticesGather(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		since, asked, want time.Duration
	}{
		{time.Hour, time.Hour, 0},
		{gatherTime, time.Hour, 0},
		{0, time.Hour, gatherTime},
		{gatherTime / 4, time.Hour, gatherTime * 3 / 4},
		{0, hurryTime, gatherTime},
		{0, hurryTime - 1, hurryGather},
		{hurryGather, hurryTime - 1, 0},
	} {
		q := &queue{asked: now.Add(-c.asked)}
		if got := q.gather(now.Add(-c.since), now); got != c.want {
			t.Errorf("last batch %v ago, pull %v ago: %v, want %v", c.since, c.asked, got, c.want)
		}
	}
	full := &queue{order: make([]*issue, batchSize+2), next: 2}
	if got := full.gather(now, now); got != 0 {
		t.Errorf("a full batch waits %v", got)
	}
	if full.next++; full.gather(now, now) == 0 {
		t.Error("what is sent counts as a batch that waits")
	}
	const keys = batchSize - 1 // never a full batch
	a, b := twoSites(t, keys, nil)
	calls := 0
	a.peers.send = func(ns []Notice) ([]Notice, error) { calls++; return ns, nil }
	begin := time.Now()
	stop := a.run(t)
	for range keys {
		got, err := a.GetKey(t.Context(), "a1", "b1", 1, 256)
		if err != nil {
			t.Fatal(err)
		}
		key.WipeAll(got)
	}
	eventually(t, "all notices are there", func() bool { return b.in.n["a"].Load() == keys })
	stop()
	if most := int(time.Since(begin)/gatherTime) + 2; calls > most {
		t.Errorf("%d calls for %d notices; %d at most fit into the time", calls, keys, most)
	}
	if _, ok := a.Issued("b", key.ID{1}); ok || !a.out["b"].asked.IsZero() {
		t.Error("a pull of what is not there makes haste")
	}
	if _, err := a.out["b"].add([]Notice{{KeyID: key.ID{1}}}, a.clock(), a.clock().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, ok := a.Issued("b", key.ID{1}); !ok || a.out["b"].gather(time.Now(), time.Now()) > hurryGather {
		t.Error("a pull makes no haste")
	}
}
