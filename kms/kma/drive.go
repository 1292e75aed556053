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
	var bad failing
	swept, expired := time.Now(), time.Now()
	for ctx.Err() == nil {
		now := time.Now()
		if now.Sub(swept) > sweepEvery {
			swept = now
			p.sweep(ctx, now)
		}
		if now.Sub(expired) > p.a.o.ExpireEvery {
			expired = now
			if err := p.expireReceived(ctx); err != nil && ctx.Err() == nil {
				p.log.Error("keys that were never validated could not be expired; it is tried again", "err", err)
			}
		}
		p.mu.Lock()
		p.usage.turn(now)
		p.mu.Unlock()
		again, wait, err := p.step(ctx)
		if ctx.Err() != nil {
			return
		}
		bad = p.report(bad, err, time.Now())
		switch {
		case err != nil:
			p.sleep(ctx, pause, nil)
			pause = min(2*pause, p.a.o.RetryMax)
			continue
		case again:
		case wait > 0:
			p.sleep(ctx, wait, nil)
		default:
			p.sleep(ctx, p.a.o.ValidateEvery, p.work)
		}
		pause = p.a.o.RetryMin
	}
}

// failing is since when calls to the peer fail, zero if they do not, and
// whether an event has said so.
type failing struct {
	since    time.Time
	reported bool
}

// report tells of failures that last. A call or two may fail whenever a node
// restarts.
func (p *pool) report(f failing, err error, now time.Time) failing {
	attrs := []slog.Attr{slog.String("pool", p.ID.String()), slog.String("peer", p.Peer)}
	switch {
	case err == nil:
		if f.reported {
			p.log.Info("the peer answers again")
			p.a.event("PEER_BACK", "run", "the peer answers again", attrs...)
		}
		return failing{}
	case errors.Is(err, errChanged):
		return f
	case f.since.IsZero():
		f.since = now
	}
	if now.Sub(f.since) < p.a.o.SilentAfter {
		p.log.Debug("type-1 with the peer failed; it is tried again", "err", err)
		return f
	}
	p.log.Warn("type-1 with the peer does not get on; it is tried again", "since", f.since, "err", err)
	if !f.reported {
		f.reported = true
		p.a.event("PEER_SILENT", "fault", "the peer does not answer, or refuses: no new keys for now", append(attrs, slog.String("err", err.Error()))...)
	}
	return f
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
