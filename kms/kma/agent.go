package kma

import (
	"cmp"
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
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// Agent is the KMA of one node. Its methods may be called at once.
type Agent struct {
	o        Options
	instance uuid.UUID
	pools    map[uuid.UUID]*pool
	byPeer   map[string][]*pool // best class first
	onBurn   func(pool uuid.UUID, upTo key.Position) []key.ID

	leased  atomic.Int64  // keys since the last ratchet
	ratchet chan struct{} // of capacity 1: RatchetKeys were leased
}

// New checks the options, of which it reports every fault, and makes the pools
// in the store that are not there. It speaks to nobody yet.
func New(ctx context.Context, o Options) (*Agent, error) {
	if o.Store == nil || o.Log == nil {
		return nil, errors.New("kma: Store and Log are needed")
	}
	defaults(&o)
	instance, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("kma: draw an instance: %w", err)
	}
	a := &Agent{o: o, instance: instance, pools: map[uuid.UUID]*pool{}, byPeer: map[string][]*pool{}, ratchet: make(chan struct{}, 1)}
	var faults []error
	for _, c := range o.Pools {
		if c.Algorithm == "" {
			c.Algorithm = Poly1305
		}
		if err := a.checkPool(c); err != nil {
			faults = append(faults, fmt.Errorf("kma: pool %s: %w", c.ID, err))
			continue
		}
		p := newPool(a, c)
		a.pools[c.ID] = p
		a.byPeer[c.Peer] = append(a.byPeer[c.Peer], p)
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	for _, ps := range a.byPeer {
		slices.SortStableFunc(ps, func(x, y *pool) int { return cmp.Compare(y.Class, x.Class) })
	}
	for _, p := range a.pools {
		if err := o.Store.EnsurePool(ctx, p.ID, p.Peer, p.Role, p.Class); err != nil {
			return nil, fmt.Errorf("kma: pool %s with %s: %w", p.ID, p.Peer, err)
		}
		p.generation = o.Store.Generation()
		p.refresh(ctx)
	}
	return a, nil
}

func defaults(o *Options) {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	setInt := func(d *int, v int) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.IntakeInterval, time.Second)
	set(&o.TakeWait, 300*time.Millisecond)
	set(&o.RetryMin, 100*time.Millisecond)
	set(&o.RetryMax, 5*time.Second)
	set(&o.SilentAfter, 5*time.Second)
	set(&o.ValidateEvery, time.Second)
	set(&o.NoticeLife, 2*time.Hour)
	set(&o.ExpireEvery, time.Minute)
	set(&o.RatchetInterval, 10*time.Minute)
	setInt(&o.MaxFileSize, keyfile.DefaultMaxSize)
	setInt(&o.MaxRefused, 1000)
	setInt(&o.LeaseSize, 1024)
	setInt(&o.RatchetKeys, 100_000)
	setInt(&o.MaxHeld, 100_000)
}

func (a *Agent) checkPool(c Pool) error {
	switch {
	case c.ID == uuid.Nil:
		return errors.New("has no id")
	case a.pools[c.ID] != nil:
		return errors.New("is there twice")
	case a.o.Peers[c.Peer] == nil:
		return fmt.Errorf("node %q has no Type-1 address", c.Peer)
	case c.Role != key.Master && c.Role != key.Slave:
		return errors.New("role is neither master nor slave")
	case c.Class < key.Derived || c.Class > key.Direct:
		return errors.New("class is unknown")
	case c.Algorithm != Poly1305 && c.Algorithm != SHA256 && c.Algorithm != SHA3:
		return fmt.Errorf("M102 algorithm %q is none of %s, %s, %s", c.Algorithm, Poly1305, SHA256, SHA3)
	case c.Intake != "" && (c.QKD == uuid.Nil || c.PeerQKD == uuid.Nil):
		return errors.New("an intake directory needs the ids of both QKD devices")
	}
	return nil
}

// OnBurn sets how the KSA is asked which of the peer's keys of a pool, up to a
// position, it has supply notices for. To be called before Run and before the
// handler serves; without it, none are kept.
func (a *Agent) OnBurn(keep func(pool uuid.UUID, upTo key.Position) []key.ID) { a.onBurn = keep }

// Run does all that the agent does by itself until ctx ends. Then it joins its
// goroutines, wipes every key in memory and returns nil; what Take or a handler
// is asked later is refused.
func (a *Agent) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, p := range a.pools {
		scanned := make(chan struct{})
		wg.Go(func() { p.intake(ctx, scanned) })
		wg.Go(func() {
			// Files whose block was stored before a crash are cleaned up before
			// the block can be leased and forgotten.
			select {
			case <-scanned:
			case <-ctx.Done():
			}
			p.drive(ctx)
		})
	}
	wg.Go(func() { a.ratchets(ctx) })
	wg.Wait()
	for _, p := range a.pools {
		p.close()
	}
	return nil
}

// PeerOf names the node at the other end of a pool (type1.HandlerOptions).
func (a *Agent) PeerOf(pool uuid.UUID) (string, bool) {
	if p := a.pools[pool]; p != nil {
		return p.Peer, true
	}
	return "", false
}

// Take gives the next key of our leases with the node peer, from the best class
// that has one. It works on memory; only if a lease is empty and the next one on
// its way does it wait, TakeWait at most. Errors: ErrEmpty, ErrNotSynced,
// ErrNoPool, or ctx's.
func (a *Agent) Take(ctx context.Context, peer string) (Key, error) {
	ps := a.byPeer[peer]
	if len(ps) == 0 {
		return Key{}, ErrNoPool
	}
	for _, p := range ps {
		if k, err := p.take(); err == nil {
			return k, nil
		}
	}
	if a.o.TakeWait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.o.TakeWait)
		defer cancel()
	}
	var err error
	for _, p := range ps {
		var k Key
		if k, err = p.takeWait(ctx, a.o.TakeWait > 0); err == nil {
			return k, nil
		}
	}
	return Key{}, err
}

// PutBack returns a key that Take gave and that was not supplied to the head of
// its lease, or wipes it if that lease was burned meanwhile or the peer was told
// that the key is used. It owns the Material from then on.
func (a *Agent) PutBack(k Key) {
	if p := a.pools[k.Pool]; p != nil {
		p.putBack(k)
		return
	}
	k.Material.Wipe()
}

// Claim takes the key at pos, which the node peer hands out, out of memory: once,
// and never after it was burned. The caller owns the Material. ErrGone if id is
// not there.
func (a *Agent) Claim(peer string, pool uuid.UUID, pos key.Position, id key.ID) (*key.Material, key.Class, error) {
	p := a.pools[pool]
	if p == nil || p.Peer != peer {
		return nil, 0, ErrGone
	}
	return p.claim(pos, id)
}

// Level counts what Take can still give for the node peer, over all pools.
func (a *Agent) Level(peer string) (Level, error) {
	ps := a.byPeer[peer]
	if len(ps) == 0 {
		return Level{}, ErrNoPool
	}
	var l Level
	for _, p := range ps {
		active, leased, synced := p.level()
		l.Active += active
		l.Leased += leased
		l.Synced = l.Synced || synced
	}
	return l, nil
}

// Device is the control of a pool's QKD device; false if it has none.
func (a *Agent) Device(pool uuid.UUID) (QKDE, bool) {
	p := a.pools[pool]
	if p == nil || p.Pool.Device == nil {
		return nil, false
	}
	return p.Pool.Device, true
}

// ratchets replaces the store's data key (docs/architecture.md), so that used
// keys are beyond recovery soon after.
func (a *Agent) ratchets(ctx context.Context) {
	t := time.NewTicker(a.o.RatchetInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-a.ratchet:
		}
		a.leased.Store(0)
		if err := a.o.Store.Ratchet(ctx); err != nil && ctx.Err() == nil {
			a.o.Log.Error("ratchet failed: used keys can still be recovered from disk and root file; it is tried again", "err", err)
			a.event("RATCHET_FAILED", "fault", "the store's data key could not be replaced", slog.String("err", err.Error()))
		}
	}
}

// count notes keys that were leased.
func (a *Agent) count(n int) {
	if a.leased.Add(int64(n)) >= int64(a.o.RatchetKeys) {
		select {
		case a.ratchet <- struct{}{}:
		default:
		}
	}
}

func (a *Agent) event(code, severity, text string, attrs ...slog.Attr) {
	if a.o.Events != nil {
		a.o.Events.Event(code, severity, text, attrs...)
	}
}

// keep asks the KSA.
func (a *Agent) keep(pool uuid.UUID, upTo key.Position) map[key.ID]bool {
	out := map[key.ID]bool{}
	if a.onBurn != nil {
		for _, id := range a.onBurn(pool, upTo) {
			out[id] = true
		}
	}
	return out
}

// The five methods below are the handler of Type-1 (type1.Agent); the handler
// has made sure that peer is the pool's other end.

// Validate is M102 at the slave.
func (a *Agent) Validate(ctx context.Context, _ string, r type1.ValidateRequest) (type1.ValidateResponse, error) {
	return serve(ctx, a, r.Pool, func(p *pool) (type1.ValidateResponse, error) { return p.onValidate(ctx, r) })
}

// Lease takes a lease of the peer's.
func (a *Agent) Lease(ctx context.Context, _ string, r type1.LeaseRequest) (type1.LeaseResponse, error) {
	return serve(ctx, a, r.Pool, func(p *pool) (type1.LeaseResponse, error) { return p.onLease(ctx, r) })
}

// Burn destroys what the peer has lost.
func (a *Agent) Burn(ctx context.Context, _ string, r type1.BurnRequest) (type1.BurnResponse, error) {
	return serve(ctx, a, r.Pool, func(p *pool) (type1.BurnResponse, error) { return p.onBurn(ctx, r) })
}

// Sync meets the peer.
func (a *Agent) Sync(ctx context.Context, _ string, r type1.SyncRequest) (type1.SyncResponse, error) {
	return serve(ctx, a, r.Pool, func(p *pool) (type1.SyncResponse, error) { return p.onSync(ctx, r) })
}

// Want asks for keys of ours.
func (a *Agent) Want(ctx context.Context, _ string, r type1.WantRequest) (type1.WantResponse, error) {
	return serve(ctx, a, r.Pool, func(p *pool) (type1.WantResponse, error) { return p.onWant(r) })
}

// serve runs f with the pool's turn.
func serve[R any](ctx context.Context, a *Agent, pool uuid.UUID, f func(*pool) (R, error)) (R, error) {
	var none R
	p := a.pools[pool]
	if p == nil {
		return none, &type1.Problem{Code: type1.NotAuthorised, Detail: "no such pool"}
	}
	if err := p.acquire(ctx); err != nil {
		return none, &type1.Problem{Code: type1.Overloaded, Detail: "the pool is busy or closing"}
	}
	defer p.release()
	return f(p)
}
