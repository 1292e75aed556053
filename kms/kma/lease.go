package kma

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// maxGrowth is how many times Options.LeaseSize a lease may become.
const maxGrowth = 8

// lease is keys of ours on their way to the peer's acknowledgement.
type lease struct {
	epoch uint64
	req   type1.LeaseRequest
	keys  []LeasedKey
}

// refill fetches the next lease once half of the last one is used. It reports
// whether there may be more to do at once, and how long to wait if the peer is
// only not ready yet.
func (p *pool) refill(ctx context.Context) (again bool, wait time.Duration, err error) {
	if p.pending == nil {
		if err := p.openLease(ctx); err != nil || p.pending == nil {
			return false, 0, err
		}
	}
	resp, err := p.peer.Lease(ctx, p.pending.req)
	switch code := type1.CodeOf(err); {
	case err == nil:
		return true, 0, p.closeLease(ctx, resp)
	case code == type1.NotValidated:
		return false, p.a.o.RetryMin, nil
	case code == type1.Conflict:
		p.log.Warn("the peer cannot take a lease: burned", "mark", key.Position(p.pending.req.Mark), "keys", len(p.pending.keys), "err", err)
		p.dropPending()
		return true, 0, nil
	}
	return false, 0, err
}

// dropPending burns the lease that is on its way.
func (p *pool) dropPending() {
	if p.pending == nil {
		return
	}
	wipe(p.pending.keys)
	p.pending = nil
	p.mu.Lock()
	p.leasing = false
	p.changed()
	p.mu.Unlock()
}

// openLease moves the next keys of ours from disk to memory, if it is time:
// first the mark, durably, then the keys, then the announcement.
func (p *pool) openLease(ctx context.Context) error {
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	p.mu.Lock()
	size, full := p.size, len(p.own)*2 > p.size
	p.mu.Unlock()
	if full {
		return nil
	}
	store := p.a.o.Store
	info, err := store.Pool(ctx, p.ID)
	if err != nil {
		return err
	}
	mark, n, err := store.NextLease(ctx, p.ID, size)
	if err != nil || n == 0 {
		return err
	}
	defer p.refresh(ctx)
	if err := store.Advance(ctx, p.ID, Own, mark, type1.PurposeSupply, p.generation); err != nil {
		return fmt.Errorf("kma: lease up to %s: %w", mark, err)
	}
	keys, err := store.Load(ctx, p.ID, Own, info.Mark, mark)
	if err != nil {
		return fmt.Errorf("kma: load the lease up to %s, which is burned: %w", mark, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leasing = true
	p.floor = p.usedUpTo(info.Mark)
	p.pending = &lease{epoch: p.epoch, keys: keys, req: type1.LeaseRequest{
		Pool: p.ID, Link: p.link(), Generation: p.generation, Purpose: type1.PurposeSupply,
		After: type1.Position(info.Mark), Mark: type1.Position(mark), Floor: type1.Position(p.floor), Seqs: seqsOf(keys),
	}}
	return nil
}

// usedUpTo is the position up to which no key of ours waits to be taken; mark
// is that of the lease before. With mu.
func (p *pool) usedUpTo(mark key.Position) key.Position {
	low := mark
	for i := range p.own {
		low = min(low, p.own[i].Position-1)
	}
	return low
}

// seqsOf gives the blocks that keys, which rise, are from.
func seqsOf(keys []LeasedKey) []uint64 {
	seqs := []uint64{}
	for i := range keys {
		if s := keys[i].Position.Seq(); len(seqs) == 0 || seqs[len(seqs)-1] != s {
			seqs = append(seqs, s)
		}
	}
	return seqs
}

// closeLease hands the pending lease to Take, without the blocks that the peer
// does not have: those are destroyed.
func (p *pool) closeLease(ctx context.Context, resp type1.LeaseResponse) error {
	l := p.pending
	if resp.Mark != l.req.Mark {
		return fmt.Errorf("kma: the peer acknowledged a lease up to %s, not %s", key.Position(resp.Mark), key.Position(l.req.Mark))
	}
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	keys := l.keys
	l.keys = nil
	keys = slices.DeleteFunc(keys, func(k LeasedKey) bool {
		missing := slices.Contains(resp.Missing, k.Position.Seq())
		if missing {
			k.Material.Wipe()
		}
		return missing
	})
	if !p.publish(l, keys) {
		wipe(keys)
		p.dropPending()
		return errChanged
	}
	p.dropPending()
	p.a.count(len(keys))
	p.log.Debug("leased", "keys", len(keys), "mark", key.Position(l.req.Mark))
	return p.destroyMissing(ctx, resp.Missing)
}

// publish appends keys to what Take gives, if the session is still l's.
func (p *pool) publish(l *lease, keys []LeasedKey) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.epoch != l.epoch {
		return false
	}
	p.own = append(p.own, keys...)
	if p.starved {
		p.size = min(2*p.size, maxGrowth*p.a.o.LeaseSize, max(p.a.o.LeaseSize, p.a.o.MaxHeld))
		p.starved = false
	} else {
		p.size = max(p.size-p.size/8, p.a.o.LeaseSize)
	}
	return true
}

func (p *pool) destroyMissing(ctx context.Context, missing []uint64) error {
	if len(missing) == 0 {
		return nil
	}
	defer p.refresh(ctx)
	blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return err
	}
	for _, b := range blocks {
		if !slices.Contains(missing, b.Seq) {
			continue
		}
		const why = "the peer does not have it"
		if err := p.a.o.Store.Destroy(ctx, p.ID, b.Seq, key.Destroyed, "lease: "+why); err != nil {
			return fmt.Errorf("kma: destroy block %d: %w", b.Seq, err)
		}
		p.blockEvent("LEASE_MISSING", "fault", "a leased block is on this side only; destroyed", b.Seq, slog.Int("keys", b.Left))
	}
	return nil
}

// onLease takes a lease of the peer's: its mark, durably, then its keys into
// memory, then the acknowledgement. With the turn.
func (p *pool) onLease(ctx context.Context, r type1.LeaseRequest) (type1.LeaseResponse, error) {
	none := type1.LeaseResponse{}
	if err := p.checkStart(r.Link, r.Generation); err != nil {
		return none, err
	}
	after, mark := key.Position(r.After), key.Position(r.Mark)
	if mark == p.lastLease && after == p.lastAfter {
		return type1.LeaseResponse{Mark: r.Mark, Missing: p.lastMissing}, nil // its acknowledgement was lost
	}
	store := p.a.o.Store
	info, err := store.Pool(ctx, p.ID)
	if err != nil {
		return none, err
	}
	if after < info.PeerMark {
		return none, &type1.Problem{Code: type1.Conflict, Detail: "a lease up to " + info.PeerMark.String() + " was taken before"}
	}
	if err := p.checkBlocks(ctx, r.Seqs, after, mark); err != nil {
		return none, err
	}
	defer p.refresh(ctx)
	if mark.Seq() > info.NewestSeq {
		return none, &type1.Problem{Code: type1.NotValidated, Detail: "the lease goes beyond what this node has taken in"}
	}
	// From here on to the end, even if the owner hangs up: its repeat would find
	// the mark and no keys, and the lease would be burned.
	ctx = context.WithoutCancel(ctx)
	if err := store.Advance(ctx, p.ID, Other, mark, r.Purpose, r.Generation); err != nil {
		return none, fmt.Errorf("kma: peer's lease up to %s: %w", mark, err)
	}
	keys, err := store.Load(ctx, p.ID, Other, after, mark)
	if err != nil {
		return none, fmt.Errorf("kma: load the peer's lease up to %s, which is burned: %w", mark, err)
	}
	missing, ok := p.hold(r, keys)
	if !ok {
		return none, &type1.Problem{Code: type1.Overloaded, Detail: "this node is closing"}
	}
	p.a.count(len(keys))
	p.lastAfter, p.lastLease, p.lastMissing = after, mark, missing
	p.floors = append(p.floors, floor{key.Position(r.Floor), time.Now()})
	return type1.LeaseResponse{Mark: r.Mark, Missing: missing}, nil
}

// checkBlocks makes sure, before anything changes, that no block of a lease is
// still to be validated and that there is room for its keys.
func (p *pool) checkBlocks(ctx context.Context, seqs []uint64, after, mark key.Position) error {
	blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return err
	}
	keys := 0
	for _, b := range blocks {
		if b.State == key.Active {
			keys += ownedIn(p.Role.Other(), &b, after, mark)
		}
		if _, ok := slices.BinarySearch(seqs, b.Seq); ok && b.State == key.Received {
			return &type1.Problem{Code: type1.NotValidated, Detail: fmt.Sprintf("seq %d is not validated here yet", b.Seq)}
		}
	}
	if keys > p.a.o.MaxHeld {
		return &type1.Problem{Code: type1.Conflict, Detail: fmt.Sprintf("a lease of %d keys is more than this node holds, %d", keys, p.a.o.MaxHeld)}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.held) >= p.a.o.MaxHeld {
		return &type1.Problem{Code: type1.Overloaded, Detail: "too many leased keys were not fetched yet"}
	}
	return nil
}

// ownedIn counts the keys of b in (after, mark] that role owns.
func ownedIn(role key.Role, b *BlockInfo, after, mark key.Position) int {
	below := func(p key.Position) int { // indices up to p
		switch {
		case p.Seq() < b.Seq:
			return 0
		case p.Seq() > b.Seq:
			return b.Count
		}
		return min(int(p.Index())+1, b.Count)
	}
	lo, hi := below(after), below(mark)
	if role == key.Master {
		lo, hi = lo+1, hi+1
	}
	return max(0, hi/2-lo/2)
}

// hold keeps the keys of a peer's lease for Claim and says which of its blocks
// gave none. What the peer did not list is wiped: it holds it not.
func (p *pool) hold(r type1.LeaseRequest, keys []LeasedKey) (missing []uint64, ok bool) {
	got := seqsOf(keys)
	for _, s := range r.Seqs {
		if _, ok := slices.BinarySearch(got, s); !ok {
			missing = append(missing, s)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range keys {
		if _, listed := slices.BinarySearch(r.Seqs, k.Position.Seq()); p.closed || !listed {
			k.Material.Wipe()
			continue
		}
		p.held[k.Position] = k
	}
	return missing, !p.closed
}

// sweep destroys keys of the peer's that it handed out so long ago that their
// supply notice would have expired: it never arrived.
func (p *pool) sweep(ctx context.Context, now time.Time) {
	if err := p.acquire(ctx); err != nil {
		return
	}
	defer p.release()
	var upTo key.Position
	for len(p.floors) > 0 && now.Sub(p.floors[0].at) > p.a.o.NoticeLife {
		upTo = p.floors[0].pos
		p.floors = p.floors[1:]
	}
	if upTo == 0 {
		return
	}
	if _, gone := p.drop(upTo, p.a.keep(p.ID, upTo)); gone > 0 {
		p.record(ctx, History{Side: Other, First: 1, Last: upTo, State: key.Destroyed, Count: gone, Detail: "used by the peer, no supply notice came: what it supplied it counts itself"})
		p.log.Warn("destroyed keys that the peer used without a supply notice", "keys", gone, "up_to", upTo)
	}
}
