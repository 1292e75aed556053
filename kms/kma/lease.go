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
	keys  []LeasedKey    // to take once it is acknowledged
	given []key.Position // of a transfer: held already
}

// refill fetches the next lease once half of the last one is used, gives keys that
// the peer was promised, or asks it for some. It reports whether there may be more to do at once, and how long to wait if the peer is
// only not ready yet.
func (p *pool) refill(ctx context.Context) (again bool, wait time.Duration, err error) {
	if p.pending == nil {
		if err := p.openLease(ctx); err != nil {
			return false, 0, err
		}
		if p.pending == nil {
			return false, 0, p.want(ctx)
		}
	}
	resp, err := p.peer.Lease(ctx, p.pending.req)
	switch code := type1.CodeOf(err); {
	case err == nil:
		return true, 0, p.closeLease(ctx, resp)
	case code == type1.NotValidated:
		return false, p.a.o.RetryMin, nil
	case code == type1.Conflict:
		p.log.Warn("the peer cannot take a lease: burned", "mark", key.Position(p.pending.req.Mark), "purpose", p.pending.req.Purpose, "keys", len(p.pending.keys)+len(p.pending.given), "err", err)
		p.takeBack(p.pending, func(uint64) bool { return true })
		p.dropPending()
		return true, 0, nil
	}
	return false, 0, err
}

// dropPending burns the lease that is on its way. Given keys may have arrived: they
// stay held until the peer burns them.
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

// due says what the next lease is for and how many keys it shall have; none, if it
// is not time. A lease of a session whose BURN is still to come would be burned at
// the peer only. The caller has the turn, so that the session stays what it is.
func (p *pool) due() (purpose string, keys int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.synced || p.active == 0:
	case p.rawDue():
		return type1.PurposeRaw, min(max(p.a.o.LeaseSize, p.raw.want), p.a.o.MaxHeld)
	case len(p.own)*2 <= p.size:
		return type1.PurposeSupply, p.size
	case p.giving > 0:
		return type1.PurposeTransfer, p.giving
	}
	return "", 0
}

// openLease moves the next keys of ours from disk to memory, if it is time:
// first the mark, durably, then the keys, then the announcement. Keys that are
// given are held at once: this node does not hand them out any more.
func (p *pool) openLease(ctx context.Context) error {
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	if n, why, err := p.overdue(ctx); err != nil || n > 0 {
		if err != nil {
			return err
		}
		return p.expire(ctx, n, why)
	}
	purpose, size := p.due()
	if purpose == "" {
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
	if err := store.Advance(ctx, p.ID, Own, mark, purpose, p.generation); err != nil {
		return fmt.Errorf("kma: lease up to %s: %w", mark, err)
	}
	keys, err := p.load(ctx, purpose, Own, info.Mark, mark)
	if err != nil {
		return fmt.Errorf("kma: load the lease up to %s, which is burned: %w", mark, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.floor = p.usedUpTo(p.Role, info.Mark)
	p.pending = &lease{epoch: p.epoch, req: type1.LeaseRequest{
		Pool: p.ID, Link: p.link(), Generation: p.generation, Purpose: purpose,
		After: type1.Position(info.Mark), Mark: type1.Position(mark), Floor: type1.Position(p.floor), Seqs: seqsOf(keys),
	}}
	p.lastDue = purpose
	if purpose != type1.PurposeTransfer {
		p.pending.keys, p.leasing = keys, true
		return nil
	}
	p.giving = 0
	for _, k := range keys {
		p.held[k.Position] = k
		p.pending.given = append(p.pending.given, k.Position)
	}
	return nil
}

// usedUpTo is the position up to which no key of owner's waits to be taken; mark
// is that of owner's lease before. With mu.
func (p *pool) usedUpTo(owner key.Role, mark key.Position) key.Position {
	low := mark
	for i := range p.own {
		if owner.Owns(p.own[i].Position) {
			low = min(low, p.own[i].Position-1)
		}
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

// closeLease hands the pending lease to Take, or leaves it to the peer's, without
// the blocks that the peer does not have: those are destroyed.
func (p *pool) closeLease(ctx context.Context, resp type1.LeaseResponse) error {
	l := p.pending
	if resp.Mark != l.req.Mark {
		return fmt.Errorf("kma: the peer acknowledged a lease up to %s, not %s", key.Position(resp.Mark), key.Position(l.req.Mark))
	}
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	gone := func(seq uint64) bool { return slices.Contains(resp.Missing, seq) }
	keys, n := l.keys, len(l.keys)+len(l.given)
	l.keys = nil
	p.takeBack(l, gone)
	keys = slices.DeleteFunc(keys, func(k LeasedKey) bool {
		missing := gone(k.Position.Seq())
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
	p.a.count(n)
	p.log.Debug("leased", "purpose", l.req.Purpose, "keys", n, "mark", key.Position(l.req.Mark))
	return p.destroyMissing(ctx, resp.Missing)
}

// publish appends keys to what Take gives, if the session is still l's.
func (p *pool) publish(l *lease, keys []LeasedKey) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.epoch != l.epoch {
		return false
	}
	if l.req.Purpose == type1.PurposeRaw {
		p.raw.publish(keys)
		return true
	}
	p.own = append(p.own, keys...)
	if l.req.Purpose == type1.PurposeSupply {
		p.grow()
	}
	return true
}

// grow makes the next lease larger if this one came too late; with mu.
func (p *pool) grow() {
	if p.starved {
		p.size = min(2*p.size, maxGrowth*p.a.o.LeaseSize, max(p.a.o.LeaseSize, p.a.o.MaxHeld))
		p.starved = false
	} else {
		p.size = max(p.size-p.size/8, p.a.o.LeaseSize)
	}
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
	if mark == p.lastLease && after == p.lastAfter && r.Purpose == p.lastPurpose {
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
	if err := p.checkBlocks(ctx, r, after, mark); err != nil {
		return none, err
	}
	defer p.refresh(ctx)
	if mark.Seq() > info.NewestSeq {
		return none, &type1.Problem{Code: type1.NotValidated, Detail: "the lease goes beyond what this node has taken in"}
	}
	// From here on to the end, even if the owner hangs up: its repeat would find
	// the mark and no keys, and the lease would be burned.
	ctx = context.WithoutCancel(ctx)
	if r.Purpose == type1.PurposeExpired {
		if err := p.onExpired(ctx, r); err != nil {
			return none, err
		}
		p.lastAfter, p.lastLease, p.lastPurpose, p.lastMissing = after, mark, r.Purpose, nil
		return type1.LeaseResponse{Mark: r.Mark}, nil
	}
	if err := store.Advance(ctx, p.ID, Other, mark, r.Purpose, r.Generation); err != nil {
		return none, fmt.Errorf("kma: peer's lease up to %s: %w", mark, err)
	}
	keys, err := p.load(ctx, r.Purpose, Other, after, mark)
	if err != nil {
		return none, fmt.Errorf("kma: load the peer's lease up to %s, which is burned: %w", mark, err)
	}
	keep := p.hold
	switch r.Purpose {
	case type1.PurposeTransfer:
		keep = p.receive
	case type1.PurposeRaw:
		keep = p.holdRaw
	}
	missing, ok := keep(r, keys)
	if !ok {
		return none, &type1.Problem{Code: type1.Overloaded, Detail: "this node is closing"}
	}
	p.a.count(len(keys))
	p.lastAfter, p.lastLease, p.lastPurpose, p.lastMissing = after, mark, r.Purpose, missing
	p.floors = append(p.floors, floor{key.Position(r.Floor), time.Now()})
	return type1.LeaseResponse{Mark: r.Mark, Missing: missing}, nil
}

// checkBlocks makes sure, before anything changes, that no block of a lease is
// still to be validated and that there is room for its keys.
func (p *pool) checkBlocks(ctx context.Context, r type1.LeaseRequest, after, mark key.Position) error {
	blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return err
	}
	keys := 0
	for _, b := range blocks {
		if b.State == key.Active {
			keys += ownedIn(p.Role.Other(), &b, after, mark)
		}
		if _, ok := slices.BinarySearch(r.Seqs, b.Seq); ok && b.State == key.Received {
			return &type1.Problem{Code: type1.NotValidated, Detail: fmt.Sprintf("seq %d is not validated here yet", b.Seq)}
		}
	}
	if r.Purpose == type1.PurposeExpired {
		return nil
	}
	if keys > p.a.o.MaxHeld {
		return &type1.Problem{Code: type1.Conflict, Detail: fmt.Sprintf("a lease of %d keys is more than this node holds, %d", keys, p.a.o.MaxHeld)}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	waiting := len(p.held) + len(p.raw.held)
	if r.Purpose == type1.PurposeTransfer {
		waiting = len(p.own)
	}
	if waiting >= p.a.o.MaxHeld {
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

// sortOut says which blocks of a peer's lease gave no keys. What the peer did not
// list is wiped: it holds it not.
func sortOut(r type1.LeaseRequest, keys []LeasedKey) (missing []uint64, listed []LeasedKey) {
	got := seqsOf(keys)
	for _, s := range r.Seqs {
		if _, ok := slices.BinarySearch(got, s); !ok {
			missing = append(missing, s)
		}
	}
	return missing, slices.DeleteFunc(keys, func(k LeasedKey) bool {
		_, ok := slices.BinarySearch(r.Seqs, k.Position.Seq())
		if !ok {
			k.Material.Wipe()
		}
		return !ok
	})
}

// hold keeps the keys of a peer's lease for Claim and says which of its blocks
// gave none.
func (p *pool) hold(r type1.LeaseRequest, keys []LeasedKey) (missing []uint64, ok bool) {
	missing, keys = sortOut(r, keys)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		wipe(keys)
		return missing, false
	}
	for _, k := range keys {
		p.held[k.Position] = k
	}
	return missing, true
}

// sweep destroys keys that the peer handed out so long ago that their supply notice
// would have expired: it never arrived.
func (p *pool) sweep(ctx context.Context, now time.Time) {
	if err := p.acquire(ctx); err != nil {
		return
	}
	defer p.release()
	old := func(floors *[]floor) (upTo key.Position) {
		for len(*floors) > 0 && now.Sub((*floors)[0].at) > p.a.o.NoticeLife {
			upTo = max(upTo, (*floors)[0].pos)
			*floors = (*floors)[1:]
		}
		return upTo
	}
	upTo, given := old(&p.floors), old(&p.givenFloors)
	if upTo == 0 && given == 0 {
		return
	}
	if _, gone := p.drop(ctx, upTo, given, "used by the peer, no supply notice came: what it supplied it counts itself"); gone > 0 {
		p.log.Warn("destroyed keys that the peer used without a supply notice", "keys", gone, "up_to", upTo, "given_up_to", given)
	}
}
