package kma

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// overdue counts this node's own keys on disk that are to expire: those of blocks
// older than MaxKeyAge, and the oldest of what is more than half of MaxKeys. The
// ages are looked at every ExpireEvery, and in every new session before the first
// lease. The caller has the turn; of drive's goroutine only.
func (p *pool) overdue(ctx context.Context) (n int, why string, err error) {
	p.mu.Lock()
	active, synced := p.active, p.synced
	p.mu.Unlock()
	if !synced {
		return 0, "", nil
	}
	now := time.Now()
	if p.a.o.MaxKeyAge > 0 && !now.Before(p.agesAt) {
		info, err := p.a.o.Store.Pool(ctx, p.ID)
		if err != nil {
			return 0, "", err
		}
		blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
		if err != nil {
			return 0, "", err
		}
		old := 0
		for _, b := range blocks {
			if b.State == key.Active && b.Age > p.a.o.MaxKeyAge {
				old += ownedIn(p.Role, &b, info.Mark, key.At(b.Seq, uint32(b.Count-1)))
			}
		}
		if old > 0 {
			return old, fmt.Sprintf("older than %v", p.a.o.MaxKeyAge), nil
		}
		p.agesAt = now.Add(p.a.o.ExpireEvery)
	}
	if over := active - p.a.o.MaxKeys/2; p.a.o.MaxKeys > 0 && over > 0 {
		return over, fmt.Sprintf("more than %d keys", p.a.o.MaxKeys), nil
	}
	return 0, "", nil
}

// expire gives up the next n keys of ours and says so to the peer by a lease of
// which neither side reads anything. With the turn.
func (p *pool) expire(ctx context.Context, n int, why string) error {
	store := p.a.o.Store
	info, err := store.Pool(ctx, p.ID)
	if err != nil {
		return err
	}
	mark, n, err := store.NextLease(ctx, p.ID, n)
	if err != nil || n == 0 {
		return err
	}
	defer p.refresh(ctx)
	if _, err := store.Expire(ctx, p.ID, Own, mark, p.generation); err != nil {
		return fmt.Errorf("kma: expire keys up to %s: %w", mark, err)
	}
	p.log.Info("keys expired", "keys", n, "why", why, "mark", mark)
	p.a.event("KEYS_EXPIRED", "run", "keys of this node expired unused",
		slog.String("pool", p.ID.String()), slog.String("peer", p.Peer), slog.Int("keys", n), slog.String("why", why))
	p.mu.Lock()
	defer p.mu.Unlock()
	p.floor = p.usedUpTo(p.Role, info.Mark)
	p.pending = &lease{epoch: p.epoch, req: type1.LeaseRequest{
		Pool: p.ID, Link: p.link(), Generation: p.generation, Purpose: type1.PurposeExpired,
		After: type1.Position(info.Mark), Mark: type1.Position(mark), Floor: type1.Position(p.floor), Seqs: []uint64{},
	}}
	return nil
}

// onExpired gives up what the peer says has expired of its keys; with the turn.
func (p *pool) onExpired(ctx context.Context, r type1.LeaseRequest) error {
	mark := key.Position(r.Mark)
	n, err := p.a.o.Store.Expire(ctx, p.ID, Other, mark, r.Generation)
	if err != nil {
		return fmt.Errorf("kma: expire the peer's keys up to %s: %w", mark, err)
	}
	p.log.Info("keys of the peer's expired", "keys", n, "mark", mark)
	p.a.event("KEYS_EXPIRED", "run", "keys of the peer expired unused",
		slog.String("pool", p.ID.String()), slog.String("peer", p.Peer), slog.Int("keys", n))
	return nil
}

// expireReceived destroys what waits for M102 for too long, or is too much of it:
// nobody can use it, so each node may, and the peer finds it missing.
func (p *pool) expireReceived(ctx context.Context) error {
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	defer p.refresh(ctx)
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return err
	}
	blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return err
	}
	over := 0
	if p.a.o.MaxKeys > 0 {
		over = info.Received - p.a.o.MaxKeys
	}
	for _, b := range blocks {
		old := p.a.o.MaxKeyAge > 0 && b.Age > p.a.o.MaxKeyAge
		if b.State != key.Received || !old && over <= 0 {
			continue
		}
		why := "never validated, and too old or too many"
		if err := p.a.o.Store.Destroy(ctx, p.ID, b.Seq, key.Expired, why); err != nil {
			return fmt.Errorf("kma: destroy block %d, %s: %w", b.Seq, why, err)
		}
		over -= b.Left
		p.blockEvent("KEYS_EXPIRED", "fault", "keys expired that were never validated", b.Seq, slog.Int("keys", b.Left), slog.Duration("age", b.Age.Round(time.Second)))
	}
	return nil
}
