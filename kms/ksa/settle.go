package ksa

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Which node counts a key that was supplied and never fetched (Stranded): the
// slave's, which holds the notice and the key until they expire; or the owner,
// if the slave's node has lost or never got them. So that only one of them
// does, the owner keeps every issue until the slave's node says that the key
// was settled there: fetched, or expired and counted. It asks for that in the
// background. What expired and was not settled, as an answer shows that is
// later than the expiry by settleGrace, the owner counts.
//
// Nothing of this is on disk, which has limits:
//   - What a process settles in its last moments before a crash (askEvery,
//     and calls under way) the owner does not learn, and counts. Run waits for
//     the owner's question, so that a node that is stopped leaves no such keys.
//   - An owner that restarts has forgotten its issues: then nobody counts those
//     that the slave's node has lost or never got. While the slave's node does
//     not answer, nothing of its is counted.
const (
	askEvery    = 200 * time.Millisecond
	settleGrace = 5 * time.Second // the peer's expiry may be later than ours: by the way there, whole seconds, and a sweep
	maxSettled  = 4096            // Key-IDs in one answer
)

// Settled is the answer to the question of which keys were settled.
type Settled struct {
	IDs  []key.ID
	UpTo uint64 // for the next question, which confirms that this answer came
	More bool
}

// settled is what one peer is still to be told.
type settled struct {
	limit int // no peer that keeps to its own MaxNotices reaches it
	mu    sync.Mutex
	base  uint64 // of ids[0]; begins at random: what an earlier process has answered confirms nothing
	ids   []key.ID
}

func newSettled(limit int) *settled {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return &settled{limit: limit, base: binary.BigEndian.Uint64(b[:]) >> 12}
}

func (l *settled) add(id key.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.ids) < l.limit {
		l.ids = append(l.ids, id)
	}
}

// page forgets what comes before upTo and gives what comes next.
func (l *settled) page(upTo uint64) Settled {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := upTo - l.base; n <= uint64(len(l.ids)) {
		l.base, l.ids = upTo, l.ids[n:]
	}
	n := min(len(l.ids), maxSettled)
	return Settled{IDs: l.ids[:n:n], UpTo: l.base + uint64(n), More: n < len(l.ids)}
}

func (l *settled) empty() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ids) == 0
}

// Settled answers the node peer, which asks which of its keys were settled
// here. upTo is that of the last answer it got; 0 or one of an earlier process
// of ours confirms nothing.
func (a *Agent) Settled(peer string, upTo uint64) Settled {
	l := a.in.settled[peer]
	if l == nil {
		return Settled{}
	}
	return l.page(upTo)
}

// tellSettled waits, for flushTime at most, until the peers know all that was
// settled here.
func (a *Agent) tellSettled() {
	end := time.Now().Add(flushTime)
	for _, l := range a.in.settled {
		for !l.empty() && time.Now().Before(end) {
			time.Sleep(askEvery / 20)
		}
	}
}

// ask learns from peer, until ctx ends, which of our keys were settled there.
func (a *Agent) ask(ctx context.Context, peer string) {
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	var last Settled
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var err error
		for more := len(last.IDs) > 0 || a.out.waits(peer); more && err == nil; more = last.More {
			last, err = a.askOnce(ctx, peer, last)
		}
		if err != nil {
			a.o.Log.Debug("peer does not say which keys were settled; it is asked again", "peer", peer, "err", err)
		}
	}
}

// askOnce takes in the answer that follows last and gives it, or last again.
func (a *Agent) askOnce(ctx context.Context, peer string, last Settled) (Settled, error) {
	begun := a.o.Now()
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	next, err := a.o.Peers.PullSettled(ctx, peer, last.UpTo)
	if err != nil {
		return last, err
	}
	a.out.settle(peer, next, begun)
	return next, nil
}
