package ksa

import (
	"context"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

const (
	sendTimeout = 3 * time.Second // one batch
	flushTime   = time.Second     // for what is unsent at the end
	firstPause  = 50 * time.Millisecond
	lastPause   = 5 * time.Second

	// Under load a batch may gather for a moment, which saves a call per key; but
	// not while the peer's SAEs fetch keys faster than that, as its pulls show.
	gatherTime = 2 * time.Millisecond // from the start of one batch to that of the next
	hurryTime  = time.Second          // after a pull
)

// issue is a notice of ours that the peer has not acknowledged yet. Once it
// has, we need it no more: a peer that forgets it forgets the key as well.
type issue struct {
	Notice
	peer    string
	expires time.Time
}

// outbox holds the issues, by id to answer pulls and in order per peer to send
// them.
type outbox struct {
	mu   sync.Mutex
	max  int
	m    map[key.ID]*issue
	peer map[string]*queue
}

type queue struct {
	pending []*issue
	asked   time.Time     // when the peer last pulled a notice that was still here
	wake    chan struct{} // of capacity 1: pending has grown
}

// gather is how long the next batch may wait at now, when the last one was
// begun at last. A notice that comes alone finds that long ago, and waits not.
func (q *queue) gather(last, now time.Time) time.Duration {
	if now.Sub(q.asked) < hurryTime {
		return 0
	}
	return max(0, gatherTime-now.Sub(last))
}

func (b *outbox) init(limit int, peers map[string]bool) {
	b.max = limit
	b.m = make(map[key.ID]*issue)
	b.peer = make(map[string]*queue, len(peers))
	for p := range peers {
		b.peer[p] = &queue{wake: make(chan struct{}, 1)}
	}
}

// add is all or nothing.
func (b *outbox) add(peer string, ns []Notice, expires time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.m)+len(ns) > b.max {
		return errFull
	}
	q := b.peer[peer]
	for _, n := range ns {
		i := &issue{Notice: n, peer: peer, expires: expires}
		b.m[n.KeyID] = i
		q.pending = append(q.pending, i)
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return nil
}

// head is the next batch for peer, without what has expired.
func (b *outbox) head(peer string) []*issue {
	b.mu.Lock()
	defer b.mu.Unlock()
	q := b.peer[peer]
	var batch []*issue
	for len(batch) < batchSize && len(q.pending) > 0 {
		i := q.pending[0]
		q.pending[0] = nil
		q.pending = q.pending[1:]
		if b.m[i.KeyID] == i {
			batch = append(batch, i)
		}
	}
	return batch
}

// back puts a batch that was not acknowledged first again.
func (b *outbox) back(peer string, batch []*issue) {
	b.mu.Lock()
	defer b.mu.Unlock()
	q := b.peer[peer]
	q.pending = append(batch[:len(batch):len(batch)], q.pending...)
}

// done forgets a batch that was acknowledged.
func (b *outbox) done(batch []*issue) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, i := range batch {
		delete(b.m, i.KeyID)
	}
}

// pull gives the issue of id to the peer that asks; nil if it is not for that one.
func (b *outbox) pull(peer string, id key.ID, now time.Time) *issue {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := b.m[id]
	if i == nil || i.peer != peer {
		return nil
	}
	b.peer[peer].asked = now
	return i
}

// gather is queue.gather of peer's.
func (b *outbox) gather(peer string, last, now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.peer[peer].gather(last, now)
}

// expire forgets and returns the issues whose time is up; head leaves them out
// of what it sends from then on.
func (b *outbox) expire(now time.Time) []*issue {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []*issue
	for id, i := range b.m {
		if !now.Before(i.expires) {
			delete(b.m, id)
			out = append(out, i)
		}
	}
	return out
}

// Issued is the notice of id for the node peer, if peer has not acknowledged it
// yet: the answer to its pull.
func (a *Agent) Issued(peer string, id key.ID) (Notice, bool) {
	i := a.out.pull(peer, id, time.Now())
	if i == nil {
		return Notice{}, false
	}
	return i.now(a.o.Now())
}

// now is the notice with the time that it still has.
func (i *issue) now(t time.Time) (Notice, bool) {
	n := i.Notice
	n.TTL = i.expires.Sub(t)
	return n, n.TTL > 0
}

// send delivers the notices for peer until ctx ends. While one batch is on its
// way the next one gathers, so batches grow with the load; gather adds to that.
func (a *Agent) send(ctx context.Context, peer string) {
	wake := a.out.peer[peer].wake
	pause := firstPause
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
			defer cancel()
			for more, err := true, error(nil); more && err == nil; {
				more, err = a.sendBatch(end, peer)
			}
			return
		case <-wake:
		}
		for ctx.Err() == nil {
			if d := a.out.gather(peer, last, time.Now()); d > 0 {
				sleep(ctx, d)
			}
			last = time.Now()
			more, err := a.sendBatch(ctx, peer)
			if err != nil {
				a.o.Log.Warn("supply notices are not delivered", "peer", peer, "retry_in", pause, "err", err)
				sleep(ctx, pause)
				pause = min(2*pause, lastPause)
				continue
			}
			pause = firstPause
			if !more {
				break
			}
		}
	}
}

// sendBatch sends one batch and reports whether there was one.
func (a *Agent) sendBatch(ctx context.Context, peer string) (bool, error) {
	batch := a.out.head(peer)
	ns := make([]Notice, 0, len(batch))
	now := a.o.Now()
	for _, i := range batch {
		if n, ok := i.now(now); ok {
			ns = append(ns, n)
		}
	}
	if len(ns) == 0 {
		return len(batch) > 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	if err := a.o.Peers.SendNotices(ctx, peer, ns); err != nil {
		a.out.back(peer, batch)
		return true, err
	}
	a.out.done(batch)
	return true, nil
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
