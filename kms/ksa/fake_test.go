package ksa

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

var errEmpty = errors.New("lease is empty")

// fakeKeys is one side's KMA: a lease of own keys and what the peer leased.
type fakeKeys struct {
	mu      sync.Mutex
	pool    uuid.UUID
	peer    string
	lease   []MasterKey
	remote  map[key.ID]MasterKey
	handed  []*key.Material // every master key that went out by Take or Claim
	putBack int
	takeErr error
	apart   bool // not synced
}

func (f *fakeKeys) Take(_ context.Context, peer string) (MasterKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.takeErr != nil {
		return MasterKey{}, f.takeErr
	}
	if peer != f.peer || len(f.lease) == 0 {
		return MasterKey{}, errEmpty
	}
	mk := f.lease[0]
	f.lease = f.lease[1:]
	f.handed = append(f.handed, mk.Material)
	return mk, nil
}

func (f *fakeKeys) PutBack(mk MasterKey) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.putBack++
	f.lease = append([]MasterKey{mk}, f.lease...)
}

func (f *fakeKeys) Claim(peer string, pool uuid.UUID, pos key.Position, id key.ID) (*key.Material, key.Class, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	mk, ok := f.remote[id]
	if !ok || peer != f.peer || pool != f.pool || pos != mk.Position {
		return nil, 0, ErrGone
	}
	delete(f.remote, id)
	f.handed = append(f.handed, mk.Material)
	return mk.Material, mk.Class, nil
}

func (f *fakeKeys) Level(peer string) (Level, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if peer != f.peer {
		return Level{}, errors.New("no pool with that node")
	}
	return Level{Leased: len(f.lease), Synced: !f.apart}, nil
}

// burn destroys what the peer owns up to upTo but for keep, under the lock that
// Claim takes, as the KMA does.
func (f *fakeKeys) burn(upTo key.Position, keep func(uuid.UUID, key.Position) []key.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	kept := make(map[key.ID]bool)
	for _, id := range keep(f.pool, upTo) {
		kept[id] = true
	}
	for id, mk := range f.remote {
		if mk.Position <= upTo && !kept[id] {
			mk.Material.Wipe()
			delete(f.remote, id)
		}
	}
}

func (f *fakeKeys) left() (own, remote int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.lease), len(f.remote)
}

// unwiped counts master keys that went out, did not come back and still exist.
func (f *fakeKeys) unwiped() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	home := make(map[*key.Material]bool)
	for _, mk := range f.lease {
		home[mk.Material] = true
	}
	n := 0
	for _, m := range f.handed {
		if m.Len() > 0 && !home[m] {
			n++
		}
	}
	return n
}

// fakePeers is the way from one agent to the other.
type fakePeers struct {
	self  string
	other func() *Agent
	mu    sync.Mutex
	send  func(ns []Notice) ([]Notice, error) // what arrives; nil: everything
	pull  func(ctx context.Context) error
	extra []Notice // what PullNotices gives besides
	mute  error    // of PullSettled
	lie   *Settled // the same
	asked int      // PullSettled
	pulls int
	sent  int
}

func (f *fakePeers) SendNotices(ctx context.Context, _ string, ns []Notice) error {
	f.mu.Lock()
	send := f.send
	f.sent += len(ns)
	f.mu.Unlock()
	var failed error
	if send != nil {
		if ns, failed = send(ns); ns == nil && failed != nil {
			return failed
		}
	}
	return errors.Join(failed, f.other().Receive(ctx, f.self, ns))
}

func (f *fakePeers) PullNotices(ctx context.Context, _ string, ids []key.ID) ([]Notice, error) {
	f.mu.Lock()
	pull := f.pull
	f.pulls++
	f.mu.Unlock()
	if pull != nil {
		if err := pull(ctx); err != nil {
			return nil, err
		}
	}
	var ns []Notice
	for _, id := range ids {
		if n, ok := f.other().Issued(f.self, id); ok {
			ns = append(ns, n)
		}
	}
	return append(ns, f.extra...), nil
}

func (f *fakePeers) PullSettled(_ context.Context, _ string, upTo uint64, due []key.ID) (Settled, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.lie != nil {
		return *f.lie, nil
	}
	if f.mute != nil {
		return Settled{}, f.mute
	}
	return f.other().Settled(f.self, upTo, due), nil
}

func (f *fakePeers) count() (sent, pulls int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sent, f.pulls
}

// site is one node of the pair a, b.
type site struct {
	*Agent
	keys  *fakeKeys
	peers *fakePeers

	mu     sync.Mutex
	events []Event
	now    time.Time
	usage  []key.UsageReport
}

func (s *site) clock() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

func (s *site) advance(d time.Duration) {
	s.mu.Lock()
	s.now = s.now.Add(d)
	s.mu.Unlock()
}

func (s *site) count(k EventKind) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, e := range s.events {
		if e.Kind == k {
			n++
		}
	}
	return n
}

// twoSites makes two agents with n keys of each owner between them. SAEs:
// a1, a2 (IPsec), aq (quota 2 per second, 4 at once) on node a; b1, b2 on b;
// a1 and b1 are peers, and so are a2 and b2, aq and b1, a1 and a2.
func twoSites(t testing.TB, n int, change func(*Options)) (a, b *site) {
	t.Helper()
	pool := uuid.UUID{15: 7}
	a = &site{keys: &fakeKeys{pool: pool, peer: "b", remote: map[key.ID]MasterKey{}}, now: time.Unix(1e9, 0)}
	b = &site{keys: &fakeKeys{pool: pool, peer: "a", remote: map[key.ID]MasterKey{}}, now: time.Unix(1e9, 0)}
	for i := range 2 * n {
		mk := MasterKey{Pool: pool, Position: key.At(1, uint32(i)), Class: key.Direct, ID: key.DeriveID(make([]byte, 32), pool, 1, uint32(i))}
		m, err := key.Random(rand.Reader, key.MasterSize)
		if err != nil {
			t.Fatal(err)
		}
		twin, err := m.Clone()
		if err != nil {
			t.Fatal(err)
		}
		owner, other := a, b
		if i%2 == 1 {
			owner, other = b, a
		}
		mk.Material = m
		owner.keys.lease = append(owner.keys.lease, mk)
		mk.Material = twin
		other.keys.remote[mk.ID] = mk
	}
	a.peers = &fakePeers{self: "a", other: func() *Agent { return b.Agent }}
	b.peers = &fakePeers{self: "b", other: func() *Agent { return a.Agent }}
	a.Agent = newSite(t, "a", a, []SAE{
		{ID: "a1", Node: "a", Peers: []string{"b1", "a2"}},
		{ID: "a2", Node: "a", Peers: []string{"b2"}, IPsec: true},
		{ID: "aq", Node: "a", Peers: []string{"b1"}, Rate: 2, Burst: 4},
		{ID: "b1", Node: "b"},
		{ID: "b2", Node: "b"},
	}, change)
	b.Agent = newSite(t, "b", b, []SAE{
		{ID: "b1", Node: "b", Peers: []string{"a1", "aq"}},
		{ID: "b2", Node: "b", Peers: []string{"a2"}, IPsec: true},
		{ID: "a1", Node: "a"},
		{ID: "a2", Node: "a"},
		{ID: "aq", Node: "a"},
	}, change)
	t.Cleanup(func() {
		for _, s := range []*site{a, b} {
			s.in.wipe()
			for _, mk := range s.keys.lease {
				mk.Material.Wipe()
			}
			for _, mk := range s.keys.remote {
				mk.Material.Wipe()
			}
		}
	})
	return a, b
}

func newSite(t testing.TB, node string, s *site, saes []SAE, change func(*Options)) *Agent {
	t.Helper()
	o := Options{
		Node: node, SAEs: saes, Keys: s.keys, Peers: s.peers, Now: s.clock,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Events: func(e Event) {
			s.mu.Lock()
			s.events = append(s.events, e)
			s.mu.Unlock()
		},
		Usage: func(_ context.Context, _, _ string, r []key.UsageReport) error {
			s.mu.Lock()
			s.usage = append(s.usage, r...)
			s.mu.Unlock()
			return nil
		},
	}
	if change != nil {
		change(&o)
	}
	agent, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return agent
}

// run starts an agent's Run and ends and joins it with the test.
func (s *site) run(t testing.TB) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("Run: %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Error("Run does not end")
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// eventually polls until f is true.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in 10 s: %s", what)
		}
	}
}
