package ksa

import (
	"context"
	"errors"
	"fmt"
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
	// hardly while the peer's SAEs fetch keys faster than that, as its pulls show.
	// Times are from the start of one batch to that of the next.
	gatherTime  = 10 * time.Millisecond
	hurryGather = 50 * time.Microsecond
	hurryTime   = time.Second // after a pull
)

// issue is a notice of ours for a key that the peer has not settled yet. The
// fields behind Notice have the queue's lock.
type issue struct {
	Notice
	expires time.Time // once taken: when the peer's arrival will have expired
	taken   bool      // the peer has acknowledged the notice
	refused bool      // the peer does not take the notice: it is not sent again
	gone    bool      // no longer in m: settled, counted or given up
}

// due reports whether the key should have been settled long ago.
func (i *issue) due(now time.Time) bool { return !now.Before(i.expires.Add(settleGrace)) }

// queue holds the issues for one peer.
type queue struct {
	max int

	mu    sync.Mutex
	m     map[key.ID]*issue // to answer pulls and to know what is settled
	order []*issue          // those of m as they were issued, with some that are gone between them
	next  int               // in order: nothing before it is to be sent
	gave  bool              // issues were given up since m was last empty
	asked time.Time         // when the peer last pulled a notice that was still here
	wake  chan struct{}     // of capacity 1: there is something to send
}

func newQueue(limit int) *queue {
	return &queue{max: limit, m: make(map[key.ID]*issue), wake: make(chan struct{}, 1)}
}

// gather is how long the next batch may wait at now, when the last one was
// begun at last. A notice that comes alone finds that long ago, and waits not; nor
// does a full batch.
func (q *queue) gather(last, now time.Time) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	d := gatherTime
	switch {
	case len(q.order)-q.next >= batchSize:
		d = 0
	case now.Sub(q.asked) < hurryTime:
		d = hurryGather
	}
	return max(0, d-now.Sub(last))
}

// add is all or nothing. For want of room it gives up what is due, uncounted,
// lest a peer that does not say what it settled stop the supply; it returns the
// first that it gives up.
func (q *queue) add(ns []Notice, now, expires time.Time) (given *Notice, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.m)+len(ns) > q.max {
		i := q.oldest()
		if i == nil || !i.due(now) {
			return given, errFull
		}
		q.forget(i)
		if !q.gave {
			q.gave, given = true, &i.Notice
		}
	}
	for _, n := range ns {
		i := &issue{Notice: n, expires: expires}
		q.m[n.KeyID] = i
		q.order = append(q.order, i)
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return given, nil
}

// oldest is the issue that was added first, if there is any.
func (q *queue) oldest() *issue {
	for len(q.order) > 0 {
		if i := q.order[0]; !i.gone {
			return i
		}
		q.order[0] = nil
		q.order, q.next = q.order[1:], max(0, q.next-1)
	}
	return nil
}

func (q *queue) forget(i *issue) {
	delete(q.m, i.KeyID)
	i.gone = true
}

// head is the next batch, without what is settled or has expired. It is the same
// again until it is done.
func (q *queue) head(now time.Time) []*issue {
	q.mu.Lock()
	defer q.mu.Unlock()
	var batch []*issue
	for k := q.next; k < len(q.order) && len(batch) < batchSize; k++ {
		if i := q.order[k]; !i.gone && !i.taken && !i.refused && now.Before(i.expires) {
			batch = append(batch, i)
		} else if len(batch) == 0 {
			q.next = k + 1
		}
	}
	return batch
}

// refuse notes that the peer does not take i's notice.
func (q *queue) refuse(i *issue) {
	q.mu.Lock()
	defer q.mu.Unlock()
	i.refused = true
}

// done notes that a batch was acknowledged; its notices expire there at expires
// at the latest.
func (q *queue) done(batch []*issue, expires time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, i := range batch {
		i.taken, i.expires = true, expires
	}
}

// Issued is the notice of id for the node peer, if peer has not acknowledged it
// yet: the answer to its pull.
func (a *Agent) Issued(peer string, id key.ID) (Notice, bool) {
	q := a.out[peer]
	if q == nil {
		return Notice{}, false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	i := q.m[id]
	if i == nil || i.taken {
		return Notice{}, false
	}
	q.asked = time.Now()
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
	q := a.out[peer]
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
		case <-q.wake:
		}
		for ctx.Err() == nil {
			if d := q.gather(last, time.Now()); d > 0 {
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
	batch := a.out[peer].head(a.o.Now())
	if len(batch) == 0 {
		return false, nil
	}
	return true, a.deliver(ctx, peer, batch)
}

// deliver sends batch in one message. A batch that the peer refuses is cut in two,
// and again, until what is refused is alone: the others do not wait for it.
func (a *Agent) deliver(ctx context.Context, peer string, batch []*issue) error {
	err := a.sendOnce(ctx, peer, batch)
	switch half := len(batch) / 2; {
	case err == nil:
		a.out[peer].done(batch, a.o.Now().Add(a.o.TTL))
		return nil
	case !errors.Is(err, ErrRefused):
		return err
	case half > 0:
		if err := a.deliver(ctx, peer, batch[:half]); err != nil {
			return err
		}
		return a.deliver(ctx, peer, batch[half:])
	}
	a.out[peer].refuse(batch[0])
	a.issueEvent(Refused, peer, &batch[0].Notice, fmt.Sprintf("the peer does not take the supply notice, so no SAE there can fetch the key: %v", err))
	return nil
}

func (a *Agent) sendOnce(ctx context.Context, peer string, batch []*issue) error {
	now := a.o.Now()
	ns := make([]Notice, len(batch))
	for i := range batch {
		ns[i], _ = batch[i].now(now)
	}
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	return a.o.Peers.SendNotices(ctx, peer, ns)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
