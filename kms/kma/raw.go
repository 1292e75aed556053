package kma

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// Raw keys are those whose own bytes a relay uses, as pads and MAC keys. They
// come from leases of their own (type1.PurposeRaw), lie in lists of their own,
// and never meet Take and Claim. Leases for raw use begin with the first TakeRaw
// of a session: a node that relays nothing has none.

// maxRaw bounds the keys of one TakeRaw or DebitRaw.
const maxRaw = 1 << 13

// RawWant is how many keys are wanted for one use.
type RawWant struct {
	Use  key.RawUse
	Keys int
}

// RawKeys are bytes bound to one use: those of the keys of Range, in order.
type RawKeys struct {
	Pool uuid.UUID
	key.Binding
	Material *key.Material // the caller owns it
}

// rawKeys is a pool's part of it; with mu.
type rawKeys struct {
	own  []LeasedKey // rising
	held map[key.Position]LeasedKey
	want int // keys that the next lease should bring at least, 0: nobody ever asked
}

// publish adds the keys of a lease, but for those that must not be used raw.
func (r *rawKeys) publish(keys []LeasedKey) {
	for _, k := range keys {
		if k.fit() {
			r.own = append(r.own, k)
		} else {
			k.Material.Wipe()
		}
	}
}

// wipeOwn loses our raw keys, and with them the wish for more.
func (r *rawKeys) wipeOwn() {
	wipe(r.own)
	r.own, r.want = nil, 0
}

// wipeHeld loses the peer's up to upTo.
func (r *rawKeys) wipeHeld(upTo key.Position) (gone int) {
	for pos, k := range r.held {
		if pos <= upTo {
			delete(r.held, pos)
			k.Material.Wipe()
			gone++
		}
	}
	return gone
}

// fit reports whether k may be used raw.
func (k *LeasedKey) fit() bool { return !k.NoPad && k.Class == key.Direct }

// rawDue reports whether the next lease is one for raw use; if one for supply is
// due as well they take turns. With mu.
func (p *pool) rawDue() bool {
	r := &p.raw
	due := r.want > 0 && (len(r.own) < r.want || len(r.own)*2 <= p.a.o.LeaseSize)
	return due && (len(p.own)*2 > p.size || p.lastDue != type1.PurposeRaw)
}

// holdRaw keeps the keys of a peer's lease for DebitRaw.
func (p *pool) holdRaw(r type1.LeaseRequest, keys []LeasedKey) (missing []uint64, ok bool) {
	missing, keys = sortOut(r, keys)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range keys {
		if p.closed || !k.fit() {
			k.Material.Wipe()
		} else {
			p.raw.held[k.Position] = k
		}
	}
	return missing, !p.closed
}

// dropRaw wipes the peer's keys for raw use up to upTo, which it has burned; with
// the turn.
func (p *pool) dropRaw(ctx context.Context, upTo key.Position) int {
	p.mu.Lock()
	gone := p.raw.wipeHeld(upTo)
	p.mu.Unlock()
	if gone > 0 {
		p.record(ctx, History{Side: Other, First: 1, Last: upTo, State: key.Destroyed, Count: gone, Detail: "for raw use, burned by the peer"})
	}
	return gone
}

// TakeRaw gives keys of ours for the raw uses that are wanted, from a pool of
// class direct that is shared with the node peer, each key once and bound to its
// use, durably, before it is returned. It is all or nothing; what a want gets may
// come in several parts. Keys whose binding failed are never used, they are
// wiped, as the store may have it all the same: SettleRaw ends it. Errors are
// Take's.
func (a *Agent) TakeRaw(ctx context.Context, peer string, wants ...RawWant) ([]RawKeys, error) {
	n := 0
	for _, w := range wants {
		if w.Keys < 1 || w.Keys > maxRaw {
			return nil, fmt.Errorf("kma: %d keys for raw use: not between 1 and %d", w.Keys, maxRaw)
		}
		n += w.Keys
	}
	if n < 1 || n > maxRaw {
		return nil, fmt.Errorf("kma: %d keys for raw use: not between 1 and %d", n, maxRaw)
	}
	p := a.rawPool(peer)
	if p == nil {
		return nil, ErrNoPool
	}
	wait, cancel := context.WithTimeout(ctx, max(a.o.TakeWait, 0))
	defer cancel()
	for {
		keys, refilled, err := p.takeRaw(ctx, n)
		if err == nil {
			return p.bindRaw(ctx, Own, keys, wants)
		}
		if err != ErrEmpty || a.o.TakeWait <= 0 {
			return nil, err
		}
		select {
		case <-wait.Done():
			return nil, ErrEmpty
		case <-refilled:
		}
	}
}

// rawPool is the pool with peer whose keys may be used raw: hash validation makes
// them unfit.
func (a *Agent) rawPool(peer string) *pool {
	for _, p := range a.byPeer[peer] {
		if p.Class == key.Direct && p.Algorithm == Poly1305 {
			return p
		}
	}
	return nil
}

// takeRaw takes n keys out of memory, or says when to try again.
func (p *pool) takeRaw(ctx context.Context, n int) ([]LeasedKey, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return nil, nil, errClosed
	case !p.synced:
		return nil, nil, ErrNotSynced
	}
	p.raw.want = max(n, 1)
	defer kick(p.work)
	if len(p.raw.own) < n {
		return nil, p.refilled, ErrEmpty
	}
	keys := slices.Clone(p.raw.own[:n])
	clear(p.raw.own[:n])
	p.raw.own = p.raw.own[n:]
	return keys, nil, ctx.Err()
}

// bindRaw binds keys of ours, which it owns, as wanted, and gives their bytes.
func (p *pool) bindRaw(ctx context.Context, side Side, keys []LeasedKey, wants []RawWant) ([]RawKeys, error) {
	defer wipe(keys)
	var list []key.Binding
	rest := keys
	for _, w := range wants {
		for i, k := range rest[:w.Keys] {
			if n := len(list); i > 0 && list[n-1].Last+2 == k.Position && list[n-1].Last.Seq() == k.Position.Seq() {
				list[n-1].Last = k.Position
			} else {
				list = append(list, key.Binding{Range: key.Range{First: k.Position, Last: k.Position}, RawUse: w.Use})
			}
		}
		rest = rest[w.Keys:]
	}
	return p.bound(ctx, side, keys, list)
}

// bound binds keys, borrowed, in the order of list, and gives their bytes.
func (p *pool) bound(ctx context.Context, side Side, keys []LeasedKey, list []key.Binding) ([]RawKeys, error) {
	if err := p.acquire(ctx); err != nil {
		return nil, err
	}
	defer p.release()
	if err := p.a.o.Store.Bind(context.WithoutCancel(ctx), p.ID, side, list...); err != nil {
		return nil, fmt.Errorf("kma: bind %d keys for raw use, which are burned: %w", len(keys), err)
	}
	var out []RawKeys
	for _, b := range list {
		m, err := key.New(b.Count() * key.MasterSize)
		if err != nil {
			for _, o := range out {
				o.Material.Wipe()
			}
			return nil, err
		}
		for i := range b.Count() {
			copy(m.Bytes()[i*key.MasterSize:], keys[i].Material.Bytes())
		}
		keys = keys[b.Count():]
		out = append(out, RawKeys{p.ID, b, m})
	}
	return out, nil
}

// DebitRaw gives the peer's keys of the ranges that the peer has used raw, each
// key once and bound to that use, durably, before it is returned: the receiver's
// half of TakeRaw. ErrGone, and nothing is changed, if any of them is not there:
// debited before, burned, never leased for raw use, not of this peer. Keys whose
// binding failed are wiped.
func (a *Agent) DebitRaw(ctx context.Context, peer string, pool uuid.UUID, list ...key.Binding) ([]RawKeys, error) {
	p := a.pools[pool]
	if p == nil || p.Peer != peer {
		return nil, ErrGone
	}
	n := 0
	for i := range list {
		if err := list[i].Check(p.Role.Other()); err != nil {
			return nil, err
		}
		if c := list[i].Count(); c > maxRaw || n+c > maxRaw {
			return nil, fmt.Errorf("kma: more than %d keys for raw use", maxRaw)
		}
		n += list[i].Count()
	}
	if n == 0 {
		return nil, ErrGone
	}
	keys, err := p.debitRaw(list)
	if err != nil {
		return nil, err
	}
	defer wipe(keys)
	return p.bound(ctx, Other, keys, list)
}

// debitRaw takes the keys of list out of memory: all or none.
func (p *pool) debitRaw(list []key.Binding) ([]LeasedKey, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[key.Position]bool{}
	for _, b := range list {
		for pos := b.First; pos <= b.Last; pos += 2 {
			if _, ok := p.raw.held[pos]; !ok || seen[pos] {
				return nil, ErrGone
			}
			seen[pos] = true
		}
	}
	var keys []LeasedKey
	for _, b := range list {
		for pos := b.First; pos <= b.Last; pos += 2 {
			keys = append(keys, p.raw.held[pos])
			delete(p.raw.held, pos)
		}
	}
	return keys, nil
}

// SettleRaw ends, durably, what is bound to use: side says whose keys.
func (a *Agent) SettleRaw(ctx context.Context, pool uuid.UUID, side Side, use key.RawUse, end key.RawEnd, why string) error {
	if a.pools[pool] == nil {
		return ErrNoPool
	}
	return a.o.Store.Settle(ctx, pool, side, use, end, why)
}

// load reads a lease by its purpose.
func (p *pool) load(ctx context.Context, purpose string, side Side, from, to key.Position) ([]LeasedKey, error) {
	if purpose != type1.PurposeRaw {
		return p.a.o.Store.Load(ctx, p.ID, side, from, to)
	}
	return p.a.o.Store.LoadRaw(ctx, p.ID, side, from, to)
}
