package kma

import (
	"context"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// usageSpan is how long the uses of keys are counted before they count as those
// of the span before; two spans are what a node has used lately.
const usageSpan = 30 * time.Second

// usage counts keys that were handed out lately; with mu.
type usage struct {
	now, before int
	since       time.Time
}

func (u *usage) turn(t time.Time) {
	for range 2 {
		if t.Sub(u.since) < usageSpan {
			return
		}
		u.since = u.since.Add(usageSpan)
		u.now, u.before = 0, u.now
	}
	u.since = t // nothing was used for longer than is counted
}

func (u *usage) lately() int { return u.now + u.before }

// left is how many keys this node can still hand out; with mu.
func (p *pool) left() int { return p.active + len(p.own) }

// low reports whether keys of the peer's are needed soon: our own on disk are
// used up, or no more than the reserve is left. With mu.
func (p *pool) low() bool { return p.left() <= p.a.o.Reserve+p.size/2 }

// want asks the peer for keys of its own, once there are too few of ours and they
// are in use. The peer decides; what it gives comes as a lease.
func (p *pool) want(ctx context.Context) error {
	p.mu.Lock()
	used := p.starved || p.usage.lately() > 0 || p.left() < p.a.o.Reserve
	due := p.synced && p.low() && used && !time.Now().Before(p.wantAfter)
	p.mu.Unlock()
	if !due {
		return nil
	}
	req, err := p.openWant(ctx)
	if err != nil {
		return err
	}
	resp, err := p.peer.Want(ctx, req)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.coming = resp.Giving > 0 && p.peerInstance == req.To
	if p.coming {
		p.log.Debug("the peer gives keys", "keys", resp.Giving, "wanted", req.Keys)
	}
	return nil
}

// openWant makes the request, with the turn: what is given must not come between
// the peer's mark and the look at what we have.
func (p *pool) openWant(ctx context.Context) (type1.WantRequest, error) {
	if err := p.acquire(ctx); err != nil {
		return type1.WantRequest{}, err
	}
	defer p.release()
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return type1.WantRequest{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wantAfter = time.Now().Add(p.a.o.ValidateEvery) // unless it comes before
	p.givenFloor = p.usedUpTo(p.Role.Other(), info.PeerMark)
	return type1.WantRequest{
		Pool: p.ID, Link: p.link(), Floor: type1.Position(p.givenFloor),
		Keys: max(1, p.a.o.Reserve+p.size-p.left()), Left: p.left(), Used: p.usage.lately(),
	}, nil
}

// onWant decides how many keys of ours the peer gets; with the turn. So many that
// what is left lasts both equally long, and never what this node needs itself: its
// reserve, what it has used lately, and its lease in memory, of which none is given
// away. As a key is given from disk to memory, it is given once only.
func (p *pool) onWant(r type1.WantRequest) (type1.WantResponse, error) {
	if err := p.checkLink(r.Link); err != nil {
		return type1.WantResponse{}, err
	}
	if f := key.Position(r.Floor); f > 0 {
		p.givenFloors = append(p.givenFloors, floor{f, time.Now()})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.usage.turn(time.Now())
	used, have := p.usage.lately(), p.left()
	keep := max(p.a.o.Reserve, used)
	if used > 0 {
		keep = max(keep, int(float64(have+r.Left)*float64(used)/float64(used+r.Used)))
	}
	p.giving = max(0, min(r.Keys, have-keep, p.active, p.a.o.MaxHeld-len(p.held), maxGrowth*p.a.o.LeaseSize))
	if len(p.own)*2 <= p.size {
		p.giving = 0 // our own next lease comes first
	}
	kick(p.work)
	return type1.WantResponse{Giving: p.giving}, nil
}

// receive takes given keys of the peer's as our own.
func (p *pool) receive(r type1.LeaseRequest, keys []LeasedKey) (missing []uint64, ok bool) {
	missing, keys = sortOut(r, keys)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		wipe(keys)
		return missing, false
	}
	p.own = append(p.own, keys...)
	p.coming, p.wantAfter = false, time.Time{}
	p.grow()
	p.changed()
	return missing, true
}

// takeBack wipes given keys that the peer does not take, of the blocks for which
// seqs is true. They are nobody's any more. In a session that has changed meanwhile
// the peer may have had them, and may have supplied some; its BURN takes the others.
func (p *pool) takeBack(l *lease, seqs func(uint64) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.epoch != l.epoch {
		return
	}
	for _, pos := range l.given {
		if k, ok := p.held[pos]; ok && seqs(pos.Seq()) {
			delete(p.held, pos)
			k.Material.Wipe()
		}
	}
}
