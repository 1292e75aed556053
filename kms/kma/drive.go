package kma

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// sweepEvery is how often keys without a supply notice are looked for.
const sweepEvery = time.Minute

// drive makes all calls to the peer, one at a time, until ctx ends.
func (p *pool) drive(ctx context.Context) {
	defer p.dropPending()
	pause := p.a.o.RetryMin
	silent := false
	swept := time.Now()
	for ctx.Err() == nil {
		if now := time.Now(); now.Sub(swept) > sweepEvery {
			swept = now
			p.sweep(ctx, now)
		}
		again, wait, err := p.step(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			if !errors.Is(err, errChanged) {
				silent = p.trouble(err, silent)
			}
			p.sleep(ctx, pause, nil)
			pause = min(2*pause, p.a.o.RetryMax)
			continue
		case silent:
			silent = false
			p.a.event("PEER_BACK", "run", "the peer answers again", slog.String("pool", p.ID.String()), slog.String("peer", p.Peer))
		}
		pause = p.a.o.RetryMin
		if again {
			continue
		}
		if wait > 0 {
			p.sleep(ctx, wait, nil)
		} else {
			p.sleep(ctx, p.a.o.ValidateEvery, p.work)
		}
	}
}

// step does what is due, as far as the peer lets us.
func (p *pool) step(ctx context.Context) (again bool, wait time.Duration, err error) {
	p.mu.Lock()
	synced, epoch := p.synced, p.epoch
	p.mu.Unlock()
	if p.pending != nil && p.pending.epoch != epoch {
		p.dropPending()
	}
	if !synced {
		if err := p.sync(ctx); err != nil {
			return false, 0, err
		}
		return true, 0, nil
	}
	more := false
	if p.Role == key.Master {
		if more, err = p.validate(ctx); err != nil {
			return false, 0, p.lost(err)
		}
	}
	again, wait, err = p.refill(ctx)
	return again || more, wait, p.lost(err)
}

// lost notes that the peer does not know our session any more.
func (p *pool) lost(err error) error {
	if type1.CodeOf(err) == type1.NotSynced {
		p.mu.Lock()
		p.synced = false
		p.changed()
		p.mu.Unlock()
	}
	return err
}

// trouble reports the first failure in a row as an event and every one in the
// log.
func (p *pool) trouble(err error, silent bool) bool {
	p.log.Warn("type-1 with the peer does not get on; it is tried again", "err", err)
	if !silent {
		p.a.event("PEER_SILENT", "fault", "the peer does not answer, or refuses: no new keys for now",
			slog.String("pool", p.ID.String()), slog.String("peer", p.Peer), slog.String("err", err.Error()))
	}
	return true
}

// sleep ends early when the peer has spoken, or on work unless it is nil.
func (p *pool) sleep(ctx context.Context, d time.Duration, work <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-p.hello:
	case <-work:
	}
}
