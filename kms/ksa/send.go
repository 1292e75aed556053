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

// issue is a notice of ours for a key that the peer has not settled yet. The
// fields behind peer have the outbox's lock.
type issue struct {
	Notice
	peer    string
	expires time.Time // once taken: when the peer's arrival will have expired
	taken   bool      // the peer has acknowledged the notice
}

// outbox holds the issues for each peer.
type outbox struct {
	mu   sync.Mutex
	max  int // issues of one peer
	peer map[string]*queue
}

// queue holds the issues for one peer by id, to answer pulls and to know what
// is settled, and those not taken yet in order, to send them.
type queue struct {
	m       map[key.ID]*issue
	pending []*issue
	known   time.Time     // the peer has told of all that it had settled then
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
	b.peer = make(map[string]*queue, len(peers))
	for p := range peers {
		b.peer[p] = &queue{m: make(map[key.ID]*issue), wake: make(chan struct{}, 1)}
	}
}

// add is all or nothing.
func (b *outbox) add(peer string, ns []Notice, expires time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	q := b.peer[peer]
	if len(q.m)+len(ns) > b.max {
		return errFull
	}
	for _, n := range ns {
		i := &issue{Notice: n, peer: peer, expires: expires}
		q.m[n.KeyID] = i
		q.pending = append(q.pending, i)
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return nil
}

// head is the next batch for peer, without what is settled or has expired.
func (b *outbox) head(peer string, now time.Time) []*issue {
	b.mu.Lock()
	defer b.mu.Unlock()
	q := b.peer[peer]
	var batch []*issue
	for len(batch) < batchSize && len(q.pending) > 0 {
		i := q.pending[0]
		q.pending[0] = nil
		q.pending = q.pending[1:]
		if q.m[i.KeyID] == i && now.Before(i.expires) {
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

// done notes that a batch was acknowledged; its notices expire there at expires
// at the latest.
func (b *outbox) done(batch []*issue, expires time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, i := range batch {
		i.taken, i.expires = true, expires
	}
}

// waits reports whether there are keys that peer has not settled yet.
func (b *outbox) waits(peer string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.peer[peer].m) > 0
}

// settle takes in an answer of peer's to a question that was asked at begun.
func (b *outbox) settle(peer string, s Settled, begun time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	q := b.peer[peer]
	for _, id := range s.IDs {
		delete(q.m, id)
	}
	if !s.More {
		q.known = begun
	}
}

// gather is queue.gather of peer's.
func (b *outbox) gather(peer string, last, now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.peer[peer].gather(last, now)
}

// lost forgets and returns the issues of keys that their peers cannot settle any
// more.
func (b *outbox) lost() []issue {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []issue
	for _, q := range b.peer {
		for id, i := range q.m {
			if !q.known.Before(i.expires.Add(settleGrace)) {
				delete(q.m, id)
				out = append(out, *i)
			}
		}
	}
	return out
}

// Issued is the notice of id for the node peer, if peer has not acknowledged it
// yet: the answer to its pull.
func (a *Agent) Issued(peer string, id key.ID) (Notice, bool) {
	a.out.mu.Lock()
	defer a.out.mu.Unlock()
	q := a.out.peer[peer]
	if q == nil || q.m[id] == nil || q.m[id].taken {
		return Notice{}, false
	}
	q.asked = time.Now()
	return q.m[id].now(a.o.Now())
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
	now := a.o.Now()
	batch := a.out.head(peer, now)
	if len(batch) == 0 {
		return false, nil
	}
	ns := make([]Notice, len(batch))
	for i := range batch {
		ns[i], _ = batch[i].now(now)
	}
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	if err := a.o.Peers.SendNotices(ctx, peer, ns); err != nil {
		a.out.back(peer, batch)
		return true, err
	}
	a.out.done(batch, a.o.Now().Add(a.o.TTL))
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
