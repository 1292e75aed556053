package kma

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

var errClosed = errors.New("kma: the agent has ended")

// pool is one pool of keys: its configuration, its session with the peer, and
// its leases in memory. The package comment has the rules of turn and mu.
type pool struct {
	Pool
	a     *Agent
	peer  Peer
	log   *slog.Logger
	turn  chan struct{} // of capacity 1
	work  chan struct{} // of capacity 1: there may be something to do
	hello chan struct{} // of capacity 1: the peer has spoken, do not wait on

	// Of drive's goroutine only.
	pending *lease    // announced, not acknowledged yet
	tell    []uint64  // seqs whose proof by the slave was wrong
	ask     time.Time // before it, do not ask again for what the slave lacks
	agesAt  time.Time // before it, do not look at the ages of our keys again

	// With the turn.
	generation  uint64       // of our store's start, as this pool's peer is told it
	named       bool         // the peer has named our process: it has that generation from us
	lastLease   key.Position // Mark of the peer's last lease in this session, 0: none
	lastAfter   key.Position
	lastPurpose string
	lastMissing []uint64
	floors      []floor // of the peer's keys
	givenFloors []floor // of ours that were given to it

	mismatch atomic.Bool // the algorithms of M102 differ, and an event has said so

	mu sync.Mutex
	session
	own      []LeasedKey // to take, the next one first: of our leases, and given to us
	raw      rawKeys
	lastDue  string                     // purpose of our last lease
	held     map[key.Position]LeasedKey // to claim: of the peer's leases, and given by us
	refilled chan struct{}              // closed and replaced when own or the session changes
	leasing  bool                       // a lease is being fetched
	active   int                        // keys on disk that are ours to lease
	starved  bool                       // own was found empty since the last lease
	size     int                        // of the next lease
	floor    key.Position               // the peer was told that all of ours up to here are used
	closed   bool

	// Transfer.
	usage      usage
	wantAfter  time.Time    // before it, do not ask for keys again
	coming     bool         // the peer gives keys, they are on their way
	giving     int          // keys that the peer shall get
	givenFloor key.Position // the peer was told that all that it has given up to here are used
}

// session is what is known of the peer's process.
type session struct {
	peerInstance   uuid.UUID    // nil: none was met
	peerGeneration uint64       // the highest met
	synced         bool         // our SYNC and, if due, BURN were answered by it
	burnDue        bool         // leases of ours were lost
	epoch          uint64       // counts the resets
	burned         key.Position // our own mark when it began, or what the peer knew of it
	givenBurned    key.Position // the peer's mark when it began
}

// floor is a position up to which the peer has used its keys.
type floor struct {
	pos key.Position
	at  time.Time
}

func newPool(a *Agent, c Pool) *pool {
	return &pool{
		Pool: c, a: a, peer: a.o.Peers[c.Peer], log: a.o.Log.With("pool", c.ID.String(), "peer", c.Peer),
		turn: make(chan struct{}, 1), work: make(chan struct{}, 1), hello: make(chan struct{}, 1),
		session: session{burnDue: true}, held: map[key.Position]LeasedKey{}, raw: rawKeys{held: map[key.Position]LeasedKey{}}, refilled: make(chan struct{}), size: a.o.LeaseSize,
	}
}

// acquire waits for the turn.
func (p *pool) acquire(ctx context.Context) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	p.mu.Lock()
	closed := p.closed
	p.mu.Unlock()
	if closed {
		p.release()
		return errClosed
	}
	return nil
}

func (p *pool) release() { <-p.turn }

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// changed wakes who waits in takeWait; with mu.
func (p *pool) changed() {
	close(p.refilled)
	p.refilled = make(chan struct{})
}

// take gives the next key, or why there is none.
func (p *pool) take() (Key, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.own)*2 <= p.size || p.low() {
		kick(p.work)
	}
	switch {
	case p.closed:
		return Key{}, errClosed
	case len(p.own) > 0:
	case !p.synced:
		return Key{}, ErrNotSynced
	default:
		p.starved = true
		return Key{}, ErrEmpty
	}
	k := p.own[0]
	p.own[0] = LeasedKey{}
	p.own = p.own[1:]
	p.usage.now++
	return Key{Pool: p.ID, Position: k.Position, ID: k.ID, Class: k.Class, Material: k.Material}, nil
}

// takeWait is take that waits, while ctx lasts, for a lease that is due.
func (p *pool) takeWait(ctx context.Context, wait bool) (Key, error) {
	for {
		p.mu.Lock()
		refilled, due := p.refilled, p.leasing || p.active > 0 || p.coming
		p.mu.Unlock()
		k, err := p.take()
		if err == nil || !wait || !due || !errors.Is(err, ErrEmpty) {
			return k, err
		}
		select {
		case <-ctx.Done():
			return Key{}, ErrEmpty
		case <-refilled:
		}
	}
}

func (p *pool) putBack(k Key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	gone := max(p.burned, p.floor)
	if !p.Role.Owns(k.Position) {
		gone = max(p.givenBurned, p.givenFloor)
	}
	if p.closed || k.Position <= gone {
		k.Material.Wipe()
		return
	}
	p.own = slices.Insert(p.own, 0, LeasedKey{ID: k.ID, Position: k.Position, Class: k.Class, Material: k.Material})
	p.changed()
}

func (p *pool) claim(pos key.Position, id key.ID) (*key.Material, key.Class, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, ok := p.held[pos]
	if !ok || k.ID != id {
		return nil, 0, ErrGone
	}
	delete(p.held, pos)
	return k.Material, k.Class, nil
}

func (p *pool) level() (active, leased int, synced bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.active, len(p.own), p.synced
}

// refresh notes how many keys are left to lease; after every change on disk,
// with the turn. The store answers from memory.
func (p *pool) refresh(ctx context.Context) {
	if info, err := p.a.o.Store.Pool(ctx, p.ID); err == nil {
		p.mu.Lock()
		p.active = info.OwnActive
		p.mu.Unlock()
	}
}

// drop wipes the peer's keys up to upTo, and those that were given to it up to
// given, but for what the KSA has supply notices of. It gives the ids of those and
// records what was wiped, with why.
func (p *pool) drop(ctx context.Context, upTo, given key.Position, why string) (kept []key.ID, gone int) {
	kept = []key.ID{}
	keep := p.a.keep(p.ID, max(upTo, given))
	type count struct{ gone, kept int }
	var theirs, ours count
	p.mu.Lock()
	for pos, k := range p.held {
		bound, n := upTo, &theirs
		if p.Role.Owns(pos) {
			bound, n = given, &ours
		}
		switch {
		case pos > bound:
		case keep[k.ID]:
			kept = append(kept, k.ID)
			n.kept++
		default:
			delete(p.held, pos)
			k.Material.Wipe()
			n.gone++
		}
	}
	p.mu.Unlock()
	note := func(side Side, last key.Position, n count, what string) {
		if n != (count{}) {
			p.record(ctx, History{Side: side, First: 1, Last: last, State: key.Destroyed, Count: n.gone, Detail: fmt.Sprintf("%s%s, %d kept for supply notices", what, why, n.kept)})
		}
	}
	note(Other, upTo, theirs, "")
	note(Own, given, ours, "given to the peer, ")
	return kept, theirs.gone + ours.gone
}

// close wipes everything, for ever.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.synced = false
	wipe(p.own)
	p.own = nil
	for _, k := range p.held {
		k.Material.Wipe()
	}
	clear(p.held)
	p.raw.wipeOwn()
	p.raw.wipeHeld(^key.Position(0))
	p.changed()
}

func wipe(ks []LeasedKey) {
	for _, k := range ks {
		k.Material.Wipe()
	}
}
