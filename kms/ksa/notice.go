package ksa

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Notice is a supply notice: what the master SAE's node made of a key it owns,
// and for whom.
type Notice struct {
	Pool      uuid.UUID
	Position  key.Position
	KeyID     key.ID
	MasterSAE string
	SlaveSAEs []string // one, until there is multicast
	SizeBits  int      // of the session key
	TTL       time.Duration
}

const (
	maxTTL    = time.Hour
	shards    = 32
	maxPulls  = 64      // under way at once, whoever asks; each names MaxPerRequest keys at most
	batchSize = 256     // notices in one message
	maxSweep  = 1 << 14 // arrivals, which bounds the burst of events
)

func notices(taken []MasterKey, master string, slaves []string, sizeBits int) []Notice {
	n := make([]Notice, len(taken))
	for i, mk := range taken {
		n[i] = Notice{Pool: mk.Pool, Position: mk.Position, KeyID: mk.ID, MasterSAE: master, SlaveSAEs: slaves, SizeBits: sizeBits}
	}
	return n
}

// arrival is a notice received: the right to consume one key that the peer
// owns. Everything above mu is fixed; a goroutine that holds mu may lock a
// shard or the KMA, never the other way round.
type arrival struct {
	Notice
	peer    string
	expires time.Time

	mu     sync.Mutex
	master *key.Material // claimed from the KMA but not yet supplied
	class  key.Class
	done   bool // supplied, expired or gone: no claim any more

	// With the shard's lock. What we pulled the peer sends as well, since it
	// knows not that we have it; often later than the key is supplied.
	sent    bool // the peer sent it
	settled bool // supplied, or expired and wiped; a supplied one not sent yet is kept so that the notice to come is known
}

// inbox holds the arrivals, each until its key is supplied or it expires. Each
// peer has room of its own: keys of one that nobody fetches do not stop those
// of another.
type inbox struct {
	max     int64
	n       map[string]*atomic.Int64 // arrivals by peer; the map is fixed, as are the next two
	settled map[string]*settled
	bells   map[string]*bell // rung when a peer has sent notices
	shard   [shards]struct {
		mu sync.Mutex
		m  map[key.ID]*arrival
	}
}

func (b *inbox) init(limit int, peers map[string]bool) {
	b.max = int64(limit)
	b.n = make(map[string]*atomic.Int64, len(peers))
	b.settled = make(map[string]*settled, len(peers))
	b.bells = make(map[string]*bell, len(peers))
	for p := range peers {
		b.n[p] = new(atomic.Int64)
		b.settled[p] = newSettled(4 * limit)
		b.bells[p] = new(bell)
	}
	for i := range b.shard {
		b.shard[i].m = make(map[key.ID]*arrival)
	}
}

// bell wakes those who wait for something to happen.
type bell struct {
	mu sync.Mutex
	ch chan struct{} // nil: nobody waits
}

// next is closed at the next ring.
func (b *bell) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// of picks the shard of id: its last byte is hash output in every kind of
// Key-ID we make.
func of(id key.ID) int { return int(id[15]) % shards }

func (b *inbox) get(id key.ID) *arrival {
	s := &b.shard[of(id)]
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m[id]
}

// add keeps a, unless there is an arrival of that id already: then it reports
// whether both say the same. Notices that were pulled for a call have some room
// of their own, so that keys nobody fetches cannot stop those that are fetched.
func (b *inbox) add(a *arrival, pulled bool) error {
	s := &b.shard[of(a.KeyID)]
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.m[a.KeyID]; old != nil {
		if old.peer != a.peer || !old.same(a.Notice) {
			return fmt.Errorf("ksa: a second, different notice of key %s", a.KeyID)
		}
		if !pulled {
			old.sent = true
			if old.settled {
				b.drop(old)
			}
		}
		return nil
	}
	a.sent = !pulled
	n, limit := b.n[a.peer], b.max
	if pulled {
		limit += b.max / 8
	}
	if n.Load() >= limit {
		return errFull
	}
	n.Add(1)
	s.m[a.KeyID] = a
	return nil
}

// remove removes a; settled, if its key was wiped here.
func (b *inbox) remove(a *arrival, settled bool) {
	s := &b.shard[of(a.KeyID)]
	s.mu.Lock()
	defer s.mu.Unlock()
	a.settled = a.settled || settled
	b.drop(a)
}

// drop removes a, if it is there, with its shard's lock.
func (b *inbox) drop(a *arrival) {
	s := &b.shard[of(a.KeyID)]
	if s.m[a.KeyID] != a {
		return
	}
	delete(s.m, a.KeyID)
	b.n[a.peer].Add(-1)
	if a.settled {
		b.settled[a.peer].add(a.KeyID)
	}
}

// spend removes a, whose key was supplied, once the peer has sent it. A full
// inbox does not wait for that: the peer's sendings are refused meanwhile.
func (b *inbox) spend(a *arrival) {
	s := &b.shard[of(a.KeyID)]
	s.mu.Lock()
	defer s.mu.Unlock()
	a.settled = true
	if a.sent || b.n[a.peer].Load() >= b.max {
		b.drop(a)
	}
}

// collect gives the arrivals for which want is true.
func (b *inbox) collect(want func(*arrival) bool) []*arrival {
	var out []*arrival
	for i := range b.shard {
		s := &b.shard[i]
		s.mu.Lock()
		for _, a := range s.m {
			if want(a) {
				out = append(out, a)
			}
		}
		s.mu.Unlock()
	}
	return out
}

// wipe ends every arrival.
func (b *inbox) wipe() {
	for _, a := range b.collect(func(*arrival) bool { return true }) {
		a.mu.Lock()
		a.done = true
		a.master.Wipe()
		a.master = nil
		a.mu.Unlock()
		b.remove(a, false)
	}
}

// same compares all but the TTL, which shrinks with each sending.
func (n Notice) same(o Notice) bool {
	return n.Pool == o.Pool && n.Position == o.Position && n.KeyID == o.KeyID &&
		n.MasterSAE == o.MasterSAE && slices.Equal(n.SlaveSAEs, o.SlaveSAEs) && n.SizeBits == o.SizeBits
}

// Receive takes in the notices that the node peer sends. A notice that peer may
// not give is dropped with an event and does not hinder the others. An error
// means that some could not be kept and shall be sent again; repeats are
// harmless.
func (a *Agent) Receive(_ context.Context, peer string, ns []Notice) error {
	err := a.receive(peer, ns, false)
	if b := a.in.bells[peer]; b != nil {
		b.ring()
	}
	return err
}

func (a *Agent) receive(peer string, ns []Notice, pulled bool) error {
	now := a.o.Now()
	for _, n := range ns {
		err := a.accept(peer, n, now, pulled)
		if errors.Is(err, errFull) {
			return err
		}
		if err != nil {
			a.event(Event{Kind: Refused, Peer: peer, MasterSAE: n.MasterSAE, Pool: n.Pool, Position: n.Position, KeyID: n.KeyID, Why: err.Error()})
		}
	}
	return nil
}

func (a *Agent) accept(peer string, n Notice, now time.Time, pulled bool) error {
	m := a.saes[n.MasterSAE]
	switch {
	case m == nil || m.Node != peer || !a.nodes[peer]:
		return fmt.Errorf("ksa: node %q sent a notice of master SAE %q, which is not its own", peer, n.MasterSAE)
	case len(n.SlaveSAEs) != 1:
		return fmt.Errorf("ksa: notice of key %s names %d slave SAEs, not one", n.KeyID, len(n.SlaveSAEs))
	case n.KeyID.IsZero() || n.SizeBits%8 != 0 || n.SizeBits < MinSize || n.SizeBits > MaxSize:
		return fmt.Errorf("ksa: notice of key %s with size %d is out of range", n.KeyID, n.SizeBits)
	case n.TTL <= 0 || n.TTL > maxTTL:
		return fmt.Errorf("ksa: notice of key %s has TTL %v, not up to %v", n.KeyID, n.TTL, maxTTL)
	}
	s := a.saes[n.SlaveSAEs[0]]
	if s == nil || s.Node != a.o.Node || !slices.Contains(s.Peers, n.MasterSAE) {
		return fmt.Errorf("ksa: notice for slave SAE %q, which may not share keys with %q here", n.SlaveSAEs[0], n.MasterSAE)
	}
	return a.in.add(&arrival{Notice: n, peer: peer, expires: now.Add(n.TTL)}, pulled)
}

// KeepOnBurn says which keys of pool up to upTo have a notice here. When the
// peer burns a lease after a crash, these stay claimable; the agent claims each
// of them in the end, to supply it or, when its notice expires, to wipe it. It
// takes no lock that is held while calling Keys, so that the KMA may call it
// under its own.
func (a *Agent) KeepOnBurn(pool uuid.UUID, upTo key.Position) []key.ID {
	found := a.in.collect(func(n *arrival) bool { return n.Pool == pool && n.Position <= upTo })
	ids := make([]key.ID, len(found))
	for i, n := range found {
		ids[i] = n.KeyID
	}
	return ids
}

// sweep ends arrivals that have expired, maxSweep at once: their keys, fetched by
// nobody, are claimed and wiped.
func (a *Agent) sweep(now time.Time) {
	left := maxSweep
	for _, n := range a.in.collect(func(n *arrival) bool {
		if left == 0 || now.Before(n.expires) {
			return false
		}
		left--
		return true
	}) {
		a.expire(n)
	}
}

func (a *Agent) expire(n *arrival) {
	n.mu.Lock()
	defer n.mu.Unlock()
	settled := false
	defer func() { a.in.remove(n, settled) }()
	if n.done {
		return
	}
	n.done = true
	m := n.master
	n.master = nil
	if m == nil {
		var err error
		if m, n.class, err = a.o.Keys.Claim(n.peer, n.Pool, n.Position, n.KeyID); err != nil {
			if !errors.Is(err, ErrGone) {
				a.o.Log.Error("key of an expired supply notice could not be destroyed", "key_id", n.KeyID, "peer", n.peer, "err", err)
			}
			return
		}
	}
	m.Wipe()
	settled = true
	a.event(Event{Kind: Stranded, Peer: n.peer, MasterSAE: n.MasterSAE, SlaveSAE: n.SlaveSAEs[0], Pool: n.Pool, Position: n.Position, KeyID: n.KeyID, Class: n.class, Why: "no SAE has fetched it"})
}
