package twonodes

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
)

const (
	masters = 4 // clients that call enc_keys, per node
	slaves  = 4 // clients that call dec_keys, per node

	// Tickets that wait to be fetched at a node: few, where a kill makes them
	// void, so that most keys are compared.
	backlog, killBacklog = 256, 4
)

// load is SAEs at both nodes that call enc_keys as fast as they are answered,
// while those at the other node fetch the same keys.
type load struct {
	s    *site
	l    *ledger
	calm bool // no node is killed: no key may be lost
	seed uint64

	gate  sync.RWMutex   // a master has it for reading during a call
	open  sync.WaitGroup // tickets under way
	todo  [2]chan ticket // by the node where they are fetched
	idle  [2]atomic.Bool // nodes whose masters hardly call: the other one uses their keys up, too
	empty atomic.Int64   // enc_keys calls answered 503
	calls [2]atomic.Int64
	wg    [2]sync.WaitGroup // masters, slaves
	stop  context.CancelFunc
}

// ticket is the Key-IDs of one enc_keys call.
type ticket []key.ID

func startLoad(s *site, l *ledger, calm bool, seed uint64) *load {
	ctx, stop := context.WithCancel(s.t.Context())
	d := &load{s: s, l: l, calm: calm, seed: seed, stop: stop}
	room := backlog
	if !calm {
		room = killBacklog
	}
	for node := range 2 {
		d.todo[node] = make(chan ticket, room)
	}
	for node := range 2 {
		for i := range masters {
			c, rng := s.door(node, i), rand.New(rand.NewPCG(seed, uint64(node<<8|i)))
			d.wg[0].Go(func() { d.master(ctx, node, c, rng) })
		}
		for i := range slaves {
			c, rng := s.door(node, i), rand.New(rand.NewPCG(seed, uint64(1<<16|node<<8|i)))
			d.wg[1].Go(func() { d.slave(node, c, rng) })
		}
	}
	return d
}

// end stops the masters and waits until all that was issued was asked for.
func (d *load) end() {
	d.stop()
	d.wg[0].Wait()
	for _, c := range d.todo {
		close(c)
	}
	d.wg[1].Wait()
}

// pause stops the masters until the function it gives is called, and waits until
// all that was issued was asked for.
func (d *load) pause() (resume func()) {
	d.gate.Lock()
	d.open.Wait()
	return d.gate.Unlock
}

func (d *load) master(ctx context.Context, node int, c *etsi014.Client, rng *rand.Rand) {
	for ctx.Err() == nil {
		number := 1
		if rng.IntN(4) == 0 {
			number += rng.IntN(32)
		}
		d.gate.RLock()
		ks, err := c.GetKey(ctx, teOf(1-node), number, 256)
		if err == nil {
			d.l.issue(node, ks)
			d.calls[node].Add(1)
			ids := make(ticket, len(ks))
			for i, k := range ks {
				ids[i] = k.ID
			}
			key.WipeAll(ks)
			d.open.Add(1)
			d.todo[1-node] <- ids
		}
		d.gate.RUnlock()
		if d.idle[node].Load() {
			time.Sleep(50 * time.Millisecond) // the load, not a wait
		}
		var no *key.Unavailable
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.As(err, &no):
			d.empty.Add(1)
			d.hinted("enc_keys", node, no)
			time.Sleep(time.Duration(1+rng.IntN(10)) * time.Millisecond) // the load, not a wait
		default:
			d.l.wrong("enc_keys of %s: %v", names[node], err)
			return
		}
	}
}

func (d *load) slave(node int, c *etsi014.Client, rng *rand.Rand) {
	own := d.s.te(1 - node) // plays the master again
	var old []key.ID
	for ids := range d.todo[node] {
		d.fetch(node, c, rng, ids)
		switch r := rng.IntN(50); {
		case r == 0: // again
			d.refused(node, c, ids)
		case r == 1 && len(old) > 0: // much later
			d.refused(node, c, []key.ID{old[rng.IntN(len(old))]})
		case r == 2: // where it was issued
			d.refused(1-node, own, ids[:1])
		}
		if len(old) < 1000 {
			old = append(old, ids[0])
		} else {
			old[rng.IntN(len(old))] = ids[0]
		}
		d.open.Done()
	}
}

// refused asks for keys that cannot be had any more. The ledger sees it if they
// can; here, a refusal of the wrong kind is noticed.
func (d *load) refused(node int, c *etsi014.Client, ids []key.ID) {
	ks, err := c.GetKeyWithID(d.s.t.Context(), teOf(1-node), ids, 0)
	if err == nil {
		d.l.fetch(node, ks)
		key.WipeAll(ks)
		return
	}
	var no *key.BadRequest
	if d.calm && (!errors.As(err, &no) || !no.NotFound) {
		d.l.wrong("dec_keys of %s for spent keys: %v", names[node], err)
	}
}

// fetch gets the keys of one ticket: mostly in one call, at times one by one, at
// times by two calls at once of which one must be refused.
func (d *load) fetch(node int, c *etsi014.Client, rng *rand.Rand, ids []key.ID) {
	switch rng.IntN(20) {
	case 0:
		var wg sync.WaitGroup
		var ok atomic.Int64
		for range 2 {
			wg.Go(func() {
				if d.ask(node, c, ids, false) {
					ok.Add(1)
				}
			})
		}
		wg.Wait()
		if n := ok.Load(); n > 1 || d.calm && n == 0 {
			d.l.wrong("two calls of dec_keys of %s at once for the same keys: %d were answered", names[node], n)
		}
	case 1, 2:
		for i := range ids {
			d.ask(node, c, ids[i:i+1], d.calm)
		}
	default:
		// All or nothing: where a crash took some of the keys, the others are
		// still there for a call of their own.
		if !d.ask(node, c, ids, d.calm) && len(ids) > 1 {
			for i := range ids {
				d.ask(node, c, ids[i:i+1], d.calm)
			}
		}
	}
}

// ask calls dec_keys until the node gives the keys or refuses them. must says
// that a refusal is a fault.
func (d *load) ask(node int, c *etsi014.Client, ids []key.ID, must bool) bool {
	end := time.Now().Add(bound)
	for {
		ks, err := c.GetKeyWithID(d.s.t.Context(), teOf(1-node), ids, 0)
		if err == nil {
			d.l.fetch(node, ks)
			key.WipeAll(ks)
			return true
		}
		var no *key.Unavailable
		var gone *key.BadRequest
		switch {
		case d.s.t.Context().Err() != nil:
			return false
		case errors.As(err, &gone) && gone.NotFound:
			if must {
				d.l.wrong("dec_keys of %s refuses %s, which was issued and not fetched: %v", names[node], ids[0], err)
			}
			return false
		case !errors.As(err, &no):
			d.l.wrong("dec_keys of %s: %v", names[node], err)
			return false
		case !d.hinted("dec_keys", node, no):
			return false
		case time.Now().After(end):
			d.l.wrong("dec_keys of %s: not within %v: %v", names[node], bound, err)
			return false
		}
		time.Sleep(5 * time.Millisecond) // the load, not a wait
	}
}

// hinted makes sure that a 503 says when to ask again.
func (d *load) hinted(call string, node int, no *key.Unavailable) bool {
	ok := no.RetryAfter > 0 || !strings.Contains(no.Error(), "the KME answers")
	if !ok {
		d.l.wrong("%s of %s: 503 without Retry-After: %v", call, names[node], no)
	}
	return ok
}

// report ends a test under load.
func (d *load) report(t *testing.T) {
	t.Helper()
	issued, fetched, stranded := d.l.count()
	t.Logf("enc_keys calls answered: a %d, b %d; keys issued: a %d, b %d; fetched %d, stranded %d; calls refused with 503: %d",
		d.calls[0].Load(), d.calls[1].Load(), issued[0], issued[1], fetched, stranded, d.empty.Load())
	for _, f := range d.l.list() {
		t.Error(f)
	}
	if d.calm && stranded > 0 && !t.Failed() {
		t.Errorf("%d keys are at one side only, though no node was killed", stranded)
	}
}

// Both nodes issue keys at full speed at once: neither ever stands still, no
// Key-ID comes twice, and every key has a twin at the other node.
func TestFullSpeed(t *testing.T) {
	t.Parallel()
	span := *loadTime
	if testing.Short() {
		span = min(span, 5*time.Second)
	}
	s := newSite(t, 0, "intake_interval = \"50ms\"\n")
	s.up()
	stop := s.feeding(20_000, 20_000)
	s.supplying()
	d := startLoad(s, newLedger(), true, drawSeed(t))
	worst := d.watch(span)
	d.end()
	stop()
	d.report(t)
	issued, _, _ := d.l.count()
	t.Logf("%.0f keys/s from both nodes together; longest standstill: a %v, b %v", float64(issued[0]+issued[1])/span.Seconds(), worst[0], worst[1])
	if !t.Failed() {
		p := s.agree()
		t.Logf("%d keys active at both nodes after %d QKD-Key files", p.Active, p.NewestSeq)
	}
}

// standstill is how long a node may supply nothing under full load. A lease
// costs a few commits to disk on either side; a deadlock lasts.
const standstill = 5 * time.Second

// watch lets the load run and gives the longest time in which each node supplied
// nothing, by steps of a fifth of a second.
func (d *load) watch(span time.Duration) (worst [2]time.Duration) {
	const step = 200 * time.Millisecond
	tick := time.NewTicker(step)
	defer tick.Stop()
	var last [2]int64
	began := time.Now()
	moved := [2]time.Time{began, began}
	for time.Since(began) < span {
		select {
		case <-d.l.broken:
			return worst
		case <-tick.C:
		}
		for node := range 2 {
			if n := d.calls[node].Load(); n != last[node] {
				last[node], moved[node] = n, time.Now()
			}
			still := time.Since(moved[node])
			worst[node] = max(worst[node], still.Round(step))
			if still > standstill {
				d.l.wrong("%s has supplied nothing for %v", names[node], still)
				return worst
			}
		}
	}
	return worst
}

// drawSeed gives the seed of this run and prints it.
func drawSeed(t *testing.T) uint64 {
	s := *seed
	if s == 0 {
		s = rand.Uint64()>>1 | 1
	}
	t.Logf("seed %d (repeat with -seed %d)", s, s)
	return s
}
