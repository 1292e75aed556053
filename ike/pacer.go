package ike

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"slices"
	"sync"
	"time"
)

// docs/decisions/0005-supply-driven-rekey.md has the reasons for these.
const (
	supplyWindow = 10 * time.Minute // for which rates are measured, and over which the stock above the reserve is spread
	supplyLeast  = time.Minute      // no rate from less
	staleAfter   = 30 * time.Second // three measurings: a level is no longer known
	alarmAfter   = 10 * time.Second // of trouble without a break
	calmAfter    = 5 * time.Minute  // without trouble

	defaultReserve  = 32                                         // keys; one for each CHILD_SA where those are more
	rekeysPerSecond = 20                                         // asked of charon, over all connections
	jitter          = 0.1                                        // of an interval, to either side
	followAfter     = 1.5                                        // intervals of the end that does not lead
	latestShare     = 0.65                                       // of max_key_age, and jitter: charon's own timer begins at 0.72
	mostPolicy      = latestShare / (followAfter * (1 + jitter)) // of max_key_age: both ends' turns come before any rekeying is forced
	againMin        = 30 * time.Second
	againMax        = 2 * time.Minute // between requests for one CHILD_SA; charon repeats by itself meanwhile
	bareMin         = 10 * time.Second
	bareMax         = 5 * time.Minute // between rekeyings that shall end a fallback
	forever         = 10 * 365 * 24 * time.Hour
)

// pacer decides when each CHILD_SA is rekeyed: as often as its policy says and
// its pool of keys affords. It talks to nobody.
type pacer struct {
	reserve int
	seed    maphash.Seed

	mu       sync.Mutex
	of       map[saePair]poolID
	pools    map[poolID]*pool
	children map[uint32]*pacedState // by charon's unique id, which a rekeying changes
	bare     map[childName]int      // rekeyings of children on fallback that ended none
	credit   float64                // rekeyings that may be asked for now
	planned  time.Time              // last
}

// poolID names the keys that several pairs of SAEs share: those between two
// KMEs, as far as a KME says which the other is.
type poolID struct{ kme, target string }

func (id poolID) String() string { return fmt.Sprintf("KME %s with %s", id.kme, id.target) }

// pool is one level of keys over time.
type pool struct {
	id      poolID
	samples []sample // of supplyWindow, oldest first; never empty between calls
	level   int      // the last one, less what was asked for since
	most    int      // that the KME stores
	reserve int
	share   time.Duration // affordable interval of each CHILD_SA; zero: whatever its policy is

	trouble trouble   // as reported
	turned  time.Time // since when it is better or worse than reported; zero: it is neither
	worse   bool
	forced  time.Time // when a rekeying last took from the reserve
	wanting bool      // in this plan a rekeying was due and there was no key
}

type sample struct {
	at    time.Time
	level int
	taken int // keys that this node's IPsec took since it started
}

// trouble is what is wrong with a pool, in rising order.
type trouble uint8

const (
	enough trouble = iota
	short          // rekeyings wait for the hard limit, or took from the reserve
	dry            // rekeyings are due and there is no key
)

// paced is one CHILD_SA each of whose rekeyings takes a key.
type paced struct {
	id          uint32
	conn, child string
	pair        saePair
	policy      time.Duration // shortest interval wanted
	limit       time.Duration // max_key_age; 0: none
	since       time.Time     // of its key
	leads       bool
	bare        bool // it has no quantum key, and a rekeying can give it one
	ready       bool // charon can rekey it now

	// By schedule:
	pool        *pool // nil: its level is not known, or no longer
	due, latest time.Time
}

func (p paced) name() childName { return childName{p.conn, p.child} }

// forced reports whether p must not wait any longer.
func (p paced) forced(now time.Time) bool { return p.limit > 0 && !now.Before(p.latest) }

// pacedState is what is remembered of a CHILD_SA.
type pacedState struct {
	due   time.Time
	again time.Time // not asked for before
	tries int
}

func newPacer(reserve int) *pacer {
	return &pacer{
		reserve: cmp.Or(reserve, defaultReserve), seed: maphash.MakeSeed(),
		of: map[saePair]poolID{}, pools: map[poolID]*pool{}, children: map[uint32]*pacedState{}, bare: map[childName]int{},
	}
}

// learn notes where the keys of a pair come from.
func (p *pacer) learn(of saePair, id poolID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.of[of] = id
}

func (p *pacer) poolOf(of saePair) poolID {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.of[of]
}

// measured adds a level, of a KME that stores most keys.
func (p *pacer) measured(at time.Time, id poolID, level, most, taken int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.pools[id]
	if v == nil {
		v = &pool{id: id, reserve: p.reserve}
		p.pools[id] = v
	}
	v.level, v.most = level, most
	if n := len(v.samples); level > 0 && n > 0 && v.samples[n-1].level <= 0 {
		v.samples = nil // what fills an empty pool, a first file or the peer's agreement, is no rate
	}
	v.samples = append(v.samples, sample{at, level, taken})
	v.trim(at)
}

func (v *pool) trim(now time.Time) {
	v.samples = slices.DeleteFunc(v.samples, func(s sample) bool { return now.Sub(s.at) > supplyWindow })
}

// stale reports whether v's level is no longer known. Counting down the last one
// would end at zero, however many keys there are.
func (v *pool) stale(now time.Time) bool {
	return now.Sub(v.samples[len(v.samples)-1].at) > staleAfter
}

// rates gives how many keys come (less what others take) and how many this node
// takes, per second.
func (v *pool) rates() (come, use float64, ok bool) {
	a, b := v.samples[0], v.samples[len(v.samples)-1]
	t := b.at.Sub(a.at)
	if t < supplyLeast {
		return 0, 0, false
	}
	use = float64(b.taken-a.taken) / t.Seconds()
	return use + float64(b.level-a.level)/t.Seconds(), use, true
}

// affordable is how many keys per second rekeyings may take for now: those that
// come, and the stock above the reserve over a window. A stock below it makes
// them slower, so that it fills again: where rekeyings take all they may, the
// level comes to rest at the reserve.
func (v *pool) affordable() float64 {
	come, _, _ := v.rates()
	return max(0, come) + float64(v.level-v.reserve)/supplyWindow.Seconds()
}

// fairShare is the shortest interval that all may have alike, so that together
// they take no more than rate keys per second; who wants a longer one leaves the
// rest to the others. Zero: all may have what they want.
func fairShare(rate float64, policies []time.Duration) time.Duration {
	slices.SortFunc(policies, func(a, b time.Duration) int { return cmp.Compare(b, a) })
	for i, want := range policies {
		n := float64(len(policies) - i)
		if rate <= n/forever.Seconds() {
			return forever
		}
		if t := time.Duration(n / rate * float64(time.Second)); want <= t {
			return t
		}
		rate -= 1 / want.Seconds()
	}
	return 0
}

// plan gives the CHILD_SAs of list to be rekeyed now, the most urgent first, and
// what there is to report. What it gives counts as asked for.
func (p *pacer) plan(now time.Time, list []paced) ([]paced, []Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	byPool := map[*pool][]*paced{}
	events := p.forget(now)
	for i := range list {
		c := &list[i]
		c.pool = p.pools[p.of[c.pair]]
		if c.pool != nil && c.pool.stale(now) {
			c.pool = nil
		}
		if c.pool != nil {
			byPool[c.pool] = append(byPool[c.pool], c)
		}
	}
	for _, v := range p.pools {
		v.afford(p.reserve, byPool[v])
	}
	asked := p.choose(now, p.schedule(now, list))
	for _, v := range p.pools {
		if v.stale(now) {
			v.turned = time.Time{}
			continue
		}
		if e, ok := v.judge(now, byPool[v]); ok {
			events = append(events, e)
		}
	}
	return asked, events
}

// forget drops the pools of which their KMEs have said nothing for long, and ends
// their trouble, which nobody can tell any more.
func (p *pacer) forget(now time.Time) []Event {
	var events []Event
	for id, v := range p.pools {
		if v.trim(now); len(v.samples) > 0 {
			continue
		}
		delete(p.pools, id)
		if v.trouble != enough {
			events = append(events, Event{Severity: Run, Code: EventSupply, Text: fmt.Sprintf("how many keys are left at %s is not known any more: its SAs are rekeyed by rekey_time alone", id)})
		}
	}
	return events
}

// afford sets reserve and share for the CHILD_SAs that take from v. Each of them
// has a key in the reserve, unless the KME stores so few that they would be most
// of it.
func (v *pool) afford(least int, children []*paced) {
	v.reserve = min(max(least, len(children)), v.most/4)
	v.wanting = false
	policies := make([]time.Duration, len(children))
	for i, c := range children {
		policies[i] = c.policy
	}
	v.share = fairShare(v.affordable(), policies)
}

// schedule sets when each of list is due and gives those that are.
func (p *pacer) schedule(now time.Time, list []paced) []paced {
	there, bare := map[uint32]bool{}, map[childName]bool{}
	var out []paced
	for i := range list {
		c := &list[i]
		there[c.id] = true
		bare[c.name()] = bare[c.name()] || c.bare
		s := p.children[c.id]
		if s == nil {
			s = &pacedState{}
			p.children[c.id] = s
		}
		wait := c.policy
		if c.pool != nil {
			wait = max(wait, c.pool.share)
		}
		// SAs that came up at once shall not be rekeyed at once.
		by := 1 + jitter*(2*p.chance(c.id)-1)
		c.latest = c.since.Add(times(c.limit, latestShare*by))
		if !c.leads {
			by *= followAfter
		}
		c.due = c.since.Add(times(wait, by))
		if c.limit > 0 && c.due.After(c.latest) {
			c.due = c.latest
		}
		if c.bare {
			c.due = earlier(c.due, p.fallen(*c, by))
		}
		s.due = c.due
		if c.ready && !now.Before(c.due) && !now.Before(s.again) {
			out = append(out, *c)
		}
	}
	for id := range p.children {
		if !there[id] {
			delete(p.children, id)
		}
	}
	for name := range p.bare {
		if !bare[name] {
			delete(p.bare, name)
		}
	}
	return out
}

// fallen is when a CHILD_SA without a quantum key is rekeyed for one. That is soon,
// and later after each rekeying that gave it none: the peer may have no key, or a
// KME that tells no level none to give.
func (p *pacer) fallen(c paced, by float64) time.Time {
	return c.since.Add(times(min(bareMin<<min(p.bare[c.name()], 8), bareMax), by))
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// chance is a number from 0 up to 1 that stays the same for one CHILD_SA.
func (p *pacer) chance(id uint32) float64 {
	return float64(maphash.Comparable(p.seed, id)>>11) / (1 << 53)
}

func times(d time.Duration, by float64) time.Duration { return time.Duration(float64(d) * by) }

// choose takes of due what the keys allow and as many as charon is asked for.
func (p *pacer) choose(now time.Time, due []paced) []paced {
	p.credit = min(p.credit+now.Sub(p.planned).Seconds()*rekeysPerSecond, rekeysPerSecond)
	p.planned = now
	slices.SortFunc(due, func(a, b paced) int {
		if f := a.forced(now); f != b.forced(now) {
			if f {
				return -1
			}
			return 1
		}
		return a.due.Compare(b.due)
	})
	var out []paced
	for _, c := range due {
		if p.credit < 1 {
			break
		}
		if c.pool != nil && !c.pool.take(now, c) {
			continue
		}
		if c.bare {
			p.bare[c.name()]++
		}
		p.credit--
		s := p.children[c.id]
		s.again = now.Add(min(againMin<<min(s.tries, 8), againMax))
		s.tries++
		out = append(out, c)
	}
	return out
}

// take reserves a key for a rekeying, if there is one for it. What has no quantum
// key may take from the reserve, as what is set up may.
func (v *pool) take(now time.Time, c paced) bool {
	switch {
	case v.level <= 0:
		v.wanting = true
		return false
	case v.level > v.reserve || c.bare:
	case c.forced(now):
		v.forced = now
	default:
		return false
	}
	v.level--
	return true
}

// judge compares what is wrong with v with what was reported.
func (v *pool) judge(now time.Time, children []*paced) (Event, bool) {
	found := v.find(now, children)
	if found == v.trouble {
		v.turned = time.Time{}
		return Event{}, false
	}
	if worse := found > v.trouble; v.turned.IsZero() || worse != v.worse {
		v.turned, v.worse = now, worse
	}
	wait := calmAfter
	if v.worse {
		wait = alarmAfter
	}
	if now.Sub(v.turned) < wait {
		return Event{}, false
	}
	v.trouble, v.turned = found, time.Time{}
	var conns []string
	for _, c := range children {
		conns = append(conns, c.conn)
	}
	e := Event{Severity: Alarm, Code: EventSupply}
	switch found {
	case dry:
		e.Text = fmt.Sprintf("no key is left at %s: the SAs of %s end at max_key_age", v.id, names(conns))
	case short:
		e.Text = fmt.Sprintf("keys come too slowly at %s (%d left): %s are rekeyed only just before max_key_age, from the reserve of %d", v.id, v.level, names(conns), v.reserve)
	case enough:
		e.Severity, e.Text = Run, fmt.Sprintf("rekeyings have enough keys again at %s (%d left)", v.id, v.level)
	}
	return e, true
}

// find tells what is wrong with v by the plan just made.
func (v *pool) find(now time.Time, children []*paced) trouble {
	if v.level <= 0 && (v.wanting || v.trouble == dry) {
		return dry
	}
	_, _, measured := v.rates() // a supply that is not known yet counts as none
	late := measured && slices.ContainsFunc(children, func(c *paced) bool {
		return c.limit > 0 && v.share > c.policy && v.share > times(c.limit, latestShare)
	})
	if late || !v.forced.IsZero() && now.Sub(v.forced) < calmAfter {
		return short
	}
	return enough
}

// supply tells what is known of the keys of a pair; nil: nothing.
func (p *pacer) supply(of saePair) *Supply {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.pools[p.of[of]]
	if v == nil || v.stale(p.planned) {
		return nil
	}
	s := &Supply{Pool: v.id.String(), Level: v.level, Reserve: v.reserve, Interval: v.share, Dry: -1}
	if v.share >= forever {
		s.Interval, s.Waits = 0, true
	}
	s.SupplyRate, s.UseRate, s.Measured = v.rates()
	if loss := s.UseRate - s.SupplyRate; s.Measured && loss > 0 {
		s.Dry = time.Duration(min(float64(v.level)/loss, forever.Seconds()) * float64(time.Second))
	}
	return s
}

// next is when a CHILD_SA is due; zero if that is not known.
func (p *pacer) next(id uint32) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.children[id]; s != nil {
		return s.due
	}
	return time.Time{}
}
