package ksa

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Which node counts a key that was supplied and never fetched (Stranded): the
// slave's, which holds the notice and the key until they expire; or the owner,
// if the slave's node has lost or never got them. So that only one of them
// does, the owner keeps every issue until the slave's node says that the key
// was settled there: fetched, or expired and counted. It asks for that in the
// background. When an issue is due, settleGrace after it expired, the question
// names it; the owner counts it if the answer says neither that it was settled
// nor that it is still held there, whatever the clock there says.
//
// Nothing of this is on disk, which has limits:
//   - What a process settles in its last moments before a crash (askEvery,
//     and calls under way) the owner does not learn, and counts. Run waits for
//     the owner's question, so that a node that is stopped leaves no such keys.
//   - An owner that restarts has forgotten its issues: then nobody counts those
//     that the slave's node has lost or never got. While the slave's node does
//     not answer, nothing of its is counted; when the owner has no more room
//     to wait, it gives the oldest up, with an event (Uncounted).
//   - A notice on its way for longer than its time and settleGrace, as to a
//     machine that was paused just then, is counted, and may still be fetched.
const (
	askEvery    = 200 * time.Millisecond
	settleGrace = 5 * time.Second // a notice sent in its last moment comes before that, and is held for a second at least
	quietTime   = time.Minute     // without an answer, until the log says so
	maxSettled  = 4096            // Key-IDs in one answer, of each kind, and in one question
	maxPages    = 4               // answers taken in at once
)

// Settled is the answer to the question of which keys were settled.
type Settled struct {
	IDs  []key.ID
	UpTo uint64 // for the next question, which confirms that this answer came
	More bool
	Held []key.ID // of those that the question names: not settled yet
}

// settled is what one peer is still to be told.
type settled struct {
	limit int // of ids, the newest: an owner that is not told keeps its newest issues as well
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
	if l.ids = append(l.ids, id); len(l.ids) > l.limit {
		l.base, l.ids = l.base+1, l.ids[1:]
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
// here, and which of due are still held. upTo is that of the last answer it got;
// 0 or one of an earlier process of ours confirms nothing.
func (a *Agent) Settled(peer string, upTo uint64, due []key.ID) Settled {
	l := a.in.settled[peer]
	if l == nil {
		return Settled{}
	}
	var held []key.ID
	for _, id := range due {
		if n := a.in.get(id); n != nil && n.peer == peer {
			held = append(held, id)
		}
	}
	s := l.page(upTo) // after held: what is settled meanwhile is in both, not in none
	s.Held = held
	return s
}

// tellSettled waits, for flushTime at most, until the peers know all that was
// settled here.
func (a *Agent) tellSettled() {
	for _, n := range a.in.collect(func(n *arrival) bool { return n.settled }) {
		a.in.remove(n, true) // fetched; the peer's own sending is not awaited
	}
	end := time.Now().Add(flushTime)
	for _, l := range a.in.settled {
		for !l.empty() && time.Now().Before(end) {
			time.Sleep(askEvery / 20)
		}
	}
}

// waits reports whether there are keys that the peer has not settled yet.
func (q *queue) waits() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.m) > 0
}

// due are the oldest issues, as far as they are due. Order is nearly that of
// expiry: what is behind one issue waits for it no longer than a TTL.
func (q *queue) due(now time.Time) []key.ID {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.oldest() // leaves no gone ones before it
	var ids []key.ID
	for _, i := range q.order {
		if i.gone {
			continue
		}
		if len(ids) == maxSettled || !i.due(now) {
			break
		}
		ids = append(ids, i.KeyID)
	}
	return ids
}

// settle takes in an answer to a question that named due, and forgets and
// returns the issues whose keys the peer can neither settle nor hold any more.
func (q *queue) settle(s Settled, due []key.ID) (lost []issue) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, id := range s.IDs {
		if i := q.m[id]; i != nil {
			q.forget(i)
		}
	}
	if !s.More && len(due) > 0 {
		held := make(map[key.ID]bool, len(s.Held))
		for _, id := range s.Held {
			held[id] = true
		}
		for _, id := range due {
			if i := q.m[id]; i != nil && !held[id] {
				q.forget(i)
				lost = append(lost, *i)
			}
		}
	}
	if len(q.order) > 2*len(q.m)+batchSize {
		q.order, q.next = slices.DeleteFunc(q.order, func(i *issue) bool { return i.gone }), 0
	}
	q.gave = q.gave && len(q.m) > 0
	return lost
}

// ask learns from peer, until ctx ends, what became of our keys there.
func (a *Agent) ask(ctx context.Context, peer string) {
	pause, heard, warned := askEvery, a.o.Now(), false
	var last Settled
	for sleep(ctx, pause); ctx.Err() == nil; sleep(ctx, pause) {
		var err error
		if len(last.IDs) > 0 || a.out[peer].waits() {
			last, err = a.askPages(ctx, peer, last)
		}
		if err == nil {
			pause, heard, warned = askEvery, a.o.Now(), false
			continue
		}
		pause = min(2*pause, lastPause)
		if !warned && a.o.Now().Sub(heard) >= quietTime {
			warned = true
			a.o.Log.Warn("peer does not say which keys were settled; stranded ones are not counted meanwhile", "peer", peer, "err", err)
		}
	}
}

// askPages takes in what follows last, page by page, and gives the last page.
func (a *Agent) askPages(ctx context.Context, peer string, last Settled) (Settled, error) {
	for range maxPages {
		next, err := a.askOnce(ctx, peer, last)
		if err != nil {
			return last, err
		}
		if next.More && (len(next.IDs) == 0 || next.UpTo == last.UpTo) {
			return last, errors.New("ksa: it says that there is more, and does not go on")
		}
		if last = next; !last.More || ctx.Err() != nil {
			break
		}
	}
	return last, nil
}

// askOnce takes in the answer that follows last, counts what it shows to be
// stranded, and gives it.
func (a *Agent) askOnce(ctx context.Context, peer string, last Settled) (Settled, error) {
	q := a.out[peer]
	due := q.due(a.o.Now())
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	next, err := a.o.Peers.PullSettled(ctx, peer, last.UpTo, due)
	if err != nil {
		return last, err
	}
	for _, i := range q.settle(next, due) {
		why := "the peer took the supply notice, but has not said what became of the key"
		if !i.taken {
			why = "the peer has not taken the supply notice"
		}
		a.issueEvent(Stranded, peer, &i.Notice, why)
	}
	return next, nil
}

// issueEvent is about a key of ours that was issued with n.
func (a *Agent) issueEvent(kind EventKind, peer string, n *Notice, why string) {
	a.event(Event{Kind: kind, Own: true, Peer: peer, MasterSAE: n.MasterSAE, SlaveSAE: n.SlaveSAEs[0], Pool: n.Pool, Position: n.Position, KeyID: n.KeyID, Why: why})
}
