package kma

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// The steps of a lease with a purpose at which a node may die: one in words each.
// At the owner, and at the receiver.
var (
	ownerSteps    = []string{"before its mark", "after its mark", "after its keys were read", "before the message", "after the answer"}
	receiverSteps = []string{"before the owner's mark", "after the owner's mark", "after the keys were read"}
)

// tripwire ends a node when a lease of one purpose comes to one step.
type tripwire struct {
	purpose string
	step    string
	armed   atomic.Bool
	once    sync.Once
	hit     chan struct{}
	victims func() // stops them at once: what they do from then on has no effect
}

func newTripwire(purpose, step string) *tripwire {
	return &tripwire{purpose: purpose, step: step, hit: make(chan struct{})}
}

func (w *tripwire) at(purpose, step string) {
	if w.armed.Load() && purpose == w.purpose && step == w.step {
		w.once.Do(func() {
			w.victims()
			close(w.hit)
		})
	}
}

// wiredStore has a tripwire around the two steps on disk.
type wiredStore struct {
	Store
	wire *tripwire
	last atomic.Pointer[[2]string] // purpose and side of the last mark, which Load follows
}

func (s *wiredStore) Advance(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, purpose string, generation uint64) error {
	who := map[Side]string{Own: "its", Other: "the owner's"}[side]
	s.wire.at(purpose, "before "+who+" mark")
	err := s.Store.Advance(ctx, pool, side, mark, purpose, generation)
	s.last.Store(&[2]string{purpose, map[Side]string{Own: "its keys", Other: "the keys"}[side]})
	s.wire.at(purpose, "after "+who+" mark")
	return err
}

func (s *wiredStore) Expire(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, generation uint64) (int, error) {
	who := map[Side]string{Own: "its", Other: "the owner's"}[side]
	s.wire.at(type1.PurposeExpired, "before "+who+" mark")
	n, err := s.Store.Expire(ctx, pool, side, mark, generation)
	s.wire.at(type1.PurposeExpired, "after "+who+" mark")
	return n, err
}

func (s *wiredStore) Load(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position) ([]LeasedKey, error) {
	keys, err := s.Store.Load(ctx, pool, side, from, to)
	if l := s.last.Load(); l != nil {
		s.wire.at(l[0], "after "+l[1]+" were read")
	}
	return keys, err
}

// wiredPeer has one around the message.
type wiredPeer struct {
	Peer
	wire *tripwire
}

func (p wiredPeer) Lease(ctx context.Context, r type1.LeaseRequest) (type1.LeaseResponse, error) {
	p.wire.at(r.Purpose, "before the message")
	out, err := p.Peer.Lease(ctx, r)
	p.wire.at(r.Purpose, "after the answer")
	return out, err
}

// crashAt runs one lease of a purpose into a crash of victims
// at a step, and then holds what both have against each other.
func crashAt(t *testing.T, purpose, step string, victims []string, load func(w *world, l *ledger, hit <-chan struct{})) {
	wire := newTripwire(purpose, step)
	w := newWorld(t, func(o *Options) {
		o.Store = &wiredStore{Store: o.Store, wire: wire}
		o.MaxKeyAge, o.ExpireEvery = time.Hour, 5*time.Millisecond
		for name, p := range o.Peers {
			o.Peers[name] = wiredPeer{p, wire}
		}
	})
	l := newLedger(w)
	nodes := map[string]*node{"a": w.a, "b": w.b}
	var dead []*node
	var procs []*process
	wire.victims = func() {
		for _, v := range victims {
			n := nodes[v]
			p := n.cur.Load()
			p.inv.dead.Store(true)
			n.h.Store(nil)
			dead, procs = append(dead, n), append(procs, p)
		}
	}
	w.both(l.keep)
	for seq := uint64(1); seq <= 4; seq++ {
		w.feed(seq, 60, nil)
	}
	w.want("agreement", func() bool { return w.info(w.a).NewestSeq == 4 && w.info(w.b).NewestSeq == 4 && w.agreed() })
	wire.armed.Store(true)
	load(w, l, wire.hit)
	select {
	case <-wire.hit:
	case <-time.After(20 * time.Second):
		t.Fatalf("no lease of that kind\na: %s\nb: %s", w.describe(w.a), w.describe(w.b))
	}
	for _, n := range []*node{w.a, w.b} {
		n.age(0)
	}
	for i, n := range dead {
		n.cur.CompareAndSwap(procs[i], nil)
		w.end(procs[i])
		w.start(n, l.keep)
	}
	w.feed(5, 60, nil)
	w.want("agreement", func() bool {
		return w.info(w.a).NewestSeq == 5 && w.info(w.b).NewestSeq == 5 && w.agreed() &&
			w.a.cur.Load().agent.pools[pairID].met(w.b) && w.b.cur.Load().agent.pools[pairID].met(w.a)
	})
	// All that can be taken can be claimed, and nothing else is left but what
	// nobody has handed out.
	for _, n := range []*node{w.a, w.b} {
		l.drain(n)
	}
	for _, n := range []*node{w.a, w.b} {
		if n.events.count("SYNC_DESTROYED")+n.events.count("STORE_RESTORED") > 0 {
			t.Errorf("events of %s: %v", n.name, n.events.codes)
		}
	}
}

// TestTransferCrash: a transfer that either node, or both, die in at every step: no
// key is taken twice, each that can be taken can be claimed.
func TestTransferCrash(t *testing.T) {
	lopsided := func(w *world, l *ledger, hit <-chan struct{}) {
		for {
			select {
			case <-hit:
				return
			default:
			}
			k, err := l.take(t.Context(), w.a)
			if err != nil {
				continue
			}
			l.notice(k)
			l.claim(w.b, k)
			k.Material.Wipe()
		}
	}
	for _, tt := range []struct {
		steps   []string
		victims [][]string
	}{{ownerSteps, [][]string{{"b"}, {"a", "b"}}}, {receiverSteps, [][]string{{"a"}, {"b"}}}} {
		for _, step := range tt.steps {
			for _, victims := range tt.victims {
				t.Run(fmt.Sprint(step, " ", victims), func(t *testing.T) {
					t.Parallel()
					crashAt(t, type1.PurposeTransfer, step, victims, lopsided)
				})
			}
		}
	}
}
