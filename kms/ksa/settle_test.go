package ksa

import (
	"bytes"
	"errors"
	"slices"
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
	a.sweep(a.clock())
	if n := a.count(Stranded); n != 0 {
		t.Errorf("%d keys counted before the peer has said anything", n)
	}
	a.peers.mute = nil
	a.settleWith(t)
	for range 2 {
		a.sweep(a.clock())
		b.sweep(b.clock())
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
	if a.out.waits("b") || b.in.n["a"].Load() != 0 {
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
	a.sweep(a.clock())
	b.sweep(b.clock())
	if _, err := fetch(t, b, "b1", "a1", ids(x), 0); err != nil {
		t.Fatal(err)
	}
	a.settleWith(t)
	if a.count(Stranded)+b.count(Stranded) != 0 || a.out.waits("b") {
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
	if a.out.waits("b") {
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
	first := b.Settled("a", 0)
	if again := b.Settled("a", 7); !slices.Equal(first.IDs, again.IDs) || first.UpTo != again.UpTo {
		t.Error("what was not confirmed is not told again")
	}
	if len(first.IDs) != maxSettled || !first.More || first.IDs[0] != id(0) {
		t.Errorf("first page: %d, more %v", len(first.IDs), first.More)
	}
	second := b.Settled("a", first.UpTo)
	if !slices.Equal(second.IDs, []key.ID{id(maxSettled), id(maxSettled + 1)}) || second.More {
		t.Errorf("second page: %d, more %v", len(second.IDs), second.More)
	}
	if back := b.Settled("a", first.UpTo-1); !slices.Equal(back.IDs, second.IDs) {
		t.Error("an older confirmation changed something")
	}
	if last := b.Settled("a", second.UpTo); len(last.IDs) != 0 || !l.empty() {
		t.Errorf("%d are left", len(last.IDs))
	}
	if s := b.Settled("z", 0); s.IDs != nil || s.More {
		t.Errorf("a stranger was told %+v", s)
	}
	for i := range 5 * maxSettled {
		l.add(id(i))
	}
	if len(l.ids) != l.limit {
		t.Errorf("%d kept for a peer that does not ask", len(l.ids))
	}
}
