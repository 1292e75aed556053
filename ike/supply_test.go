package ike

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// supplySim plays one second after the other: a pool of keys, its KME's word of
// it every 10 s, and a charon that rekeys at once what it is asked to, if there
// is a key.
type supplySim struct {
	pacer  *pacer
	now    time.Time
	keys   float64
	rate   float64 // keys per second
	most   int     // that the KME stores
	silent bool    // the KME tells no level
	mute   bool    // what has no quantum key gets none by a rekeying either
	taken  int
	list   []paced
	nextID uint32
	rekeys map[string]int
	events []Event
	burst  int     // most rekeyings of one second
	least  float64 // fewest keys
	oldest time.Duration
}

var simPair = saePair{"local", "a", "b"}

func newSupplySim(keys, rate float64) *supplySim {
	s := &supplySim{
		pacer: newPacer(0), now: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC),
		keys: keys, rate: rate, most: 1_000_000, rekeys: map[string]int{}, least: keys,
	}
	s.pacer.learn(simPair, poolID{"local", "b"})
	return s
}

func (s *supplySim) add(conn string, n int, policy, limit time.Duration) {
	for range n {
		s.nextID++
		s.list = append(s.list, paced{
			id: s.nextID, conn: conn, child: "net", pair: simPair, policy: policy, limit: limit, since: s.now, leads: true, ready: true,
		})
	}
}

// run lets time pass; the sum of rekeyings is given.
func (s *supplySim) run(d time.Duration) int {
	sum := 0
	for end := s.now.Add(d); s.now.Before(end); s.now = s.now.Add(time.Second) {
		s.keys = min(s.keys+s.rate, float64(s.most))
		if s.now.Second()%10 == 0 && !s.silent {
			s.pacer.measured(s.now, poolID{"local", "b"}, int(s.keys), s.most, s.taken)
		}
		due, events := s.pacer.plan(s.now, s.list)
		s.events = append(s.events, events...)
		for _, c := range due {
			s.rekey(c.id)
		}
		sum += len(due)
		s.burst, s.least = max(s.burst, len(due)), min(s.least, s.keys)
		for _, c := range s.list {
			s.oldest = max(s.oldest, s.now.Sub(c.since))
		}
	}
	return sum
}

func (s *supplySim) rekey(id uint32) {
	for i := range s.list {
		c := &s.list[i]
		if c.id != id || s.keys < 1 && !c.bare {
			continue
		}
		s.nextID++
		s.rekeys[c.conn]++
		c.id, c.since = s.nextID, s.now
		if s.keys >= 1 {
			s.keys, s.taken = s.keys-1, s.taken+1
			c.bare = c.bare && s.mute
		}
	}
}

// story is the severities of the events.
func (s *supplySim) story() string {
	var words []string
	for _, e := range s.events {
		words = append(words, e.Severity.String())
	}
	return strings.Join(words, " ")
}

// Where keys are few, each connection gets as many as the others, all that come
// are used, and the reserve stays.
func TestSupplyIsShared(t *testing.T) {
	s := newSupplySim(defaultReserve, 0.05)
	for _, c := range []string{"x", "y", "z"} {
		s.add(c, 1, 10*time.Second, 24*time.Hour)
	}
	sum := s.run(4 * time.Hour) // 720 keys
	if sum < 650 || sum > 720 {
		t.Errorf("%d rekeyings of 720 keys", sum)
	}
	for c, n := range s.rekeys {
		if n < sum/3-20 || n > sum/3+20 {
			t.Errorf("%s: %d of %d", c, n, sum)
		}
	}
	if s.least < defaultReserve {
		t.Errorf("the reserve fell to %v", s.least)
	}
	if s.story() != "" {
		t.Errorf("events: %+v", s.events)
	}
}

// Who wants little gets it; the rest is the others'. With enough, all go by
// their policy.
func TestFairShare(t *testing.T) {
	h, m, s := time.Hour, time.Minute, time.Second
	for _, c := range []struct {
		rate     float64
		policies []time.Duration
		want     time.Duration
	}{
		{1, nil, 0},
		{1, []time.Duration{10 * s, 10 * s, 10 * s}, 0},
		{0.1, []time.Duration{10 * s, 10 * s, 10 * s}, 30 * s},
		{0.1 + 1/3600.0, []time.Duration{s, h, s}, 20 * s},
		{1 / 60.0, []time.Duration{m, s}, 2 * m},
		{0, []time.Duration{s}, forever},
		{-1, []time.Duration{h, s}, forever},
		{1e-30, []time.Duration{s}, forever},
	} {
		got := fairShare(c.rate, c.policies)
		if d := got - c.want; d < -time.Millisecond || d > time.Millisecond {
			t.Errorf("%v of %v: %v, want %v", c.policies, c.rate, got, c.want)
		}
	}
}

// A stock that nothing fills is spent bit by bit, not as fast as it can be.
func TestSupplyStockIsSpread(t *testing.T) {
	s := newSupplySim(defaultReserve+60, 0)
	s.add("x", 1, time.Second, 24*time.Hour)
	if n := s.run(time.Minute); n < 3 || n > 8 {
		t.Errorf("%d of 60 keys in the first tenth of the window", n)
	}
}

// A KME that stores few keys and gets many hides that they come; the pace finds
// out.
func TestSupplyBehindASmallStore(t *testing.T) {
	s := newSupplySim(100, 1)
	s.most = 100
	s.add("x", 3, 5*time.Second, time.Hour)
	s.run(time.Hour)
	if n := s.run(10 * time.Minute); n < 250 {
		t.Errorf("%d rekeyings of 360 wanted, 600 keys came", n)
	}
}

// A full pool does not make anyone rekey sooner than the policy says, nor later.
func TestSupplyPolicyIsTheLeast(t *testing.T) {
	s := newSupplySim(1e6, 100)
	s.add("x", 1, time.Minute, time.Hour)
	if n := s.run(10 * time.Hour); n < 570 || n > 630 {
		t.Errorf("%d rekeyings in 600 minutes", n)
	}
}

// A hundred CHILD_SAs of the same age are rekeyed one after the other, also when
// all are overdue.
func TestSupplyStorm(t *testing.T) {
	s := newSupplySim(1e6, 0)
	s.add("x", 100, 10*time.Minute, time.Hour)
	if n := s.run(540 * time.Second); n != 0 {
		t.Errorf("%d rekeyings before nine tenths of the interval", n)
	}
	if n := s.run(60 * time.Second); n < 30 || n > 70 {
		t.Errorf("%d rekeyings in the first half of the spread", n)
	}
	if n := s.run(61 * time.Second); n < 30 || n > 70 || s.rekeys["x"] != 100 || s.burst > 8 {
		t.Errorf("%d rekeyings in the second half, %d in all, %d at once", n, s.rekeys["x"], s.burst)
	}
	for i := range s.list {
		s.list[i].since = s.now.Add(-30 * time.Minute)
	}
	if n := s.run(time.Second); n != rekeysPerSecond {
		t.Errorf("%d overdue rekeyings in one second", n)
	}
	if n := s.run(4 * time.Second); n != 80 || s.burst != rekeysPerSecond {
		t.Errorf("%d more, %d at once", n, s.burst)
	}
}

// One who comes late, or whose clock jumps, may not ask for more at once.
func TestSupplyCreditIsBounded(t *testing.T) {
	s := newSupplySim(1e6, 0)
	s.add("x", 100, time.Minute, time.Hour)
	s.run(time.Second)
	s.now = s.now.Add(30 * time.Minute)
	if n := s.run(time.Second); n != rekeysPerSecond {
		t.Errorf("%d at once", n)
	}
}

// Keys come so slowly that the limit would pass: an alarm, and every SA is
// rekeyed before charon's own timer, from the reserve.
func TestSupplyHardLimitWins(t *testing.T) {
	s := newSupplySim(defaultReserve, 0.0001)
	s.add("x", 3, 10*time.Second, time.Hour)
	s.run(3 * time.Hour)
	if s.rekeys["x"] < 12 || s.rekeys["x"] > 21 {
		t.Errorf("%d rekeyings of 3 SAs in 3 h", s.rekeys["x"])
	}
	if s.oldest > 44*time.Minute {
		t.Errorf("an SA became %v old", s.oldest)
	}
	if s.story() != "alarm" || !strings.Contains(s.events[0].Text, "max_key_age") {
		t.Errorf("%+v", s.events)
	}
}

// Without a key nothing is asked of charon, one alarm says so, and when keys
// come again all is made up for.
func TestSupplyDryAndBack(t *testing.T) {
	s := newSupplySim(3, 0)
	s.add("x", 50, 10*time.Minute, time.Hour)
	if n := s.run(2 * time.Hour); n != 3 {
		t.Errorf("%d rekeyings with 3 keys", n)
	}
	if s.story() != "alarm alarm" || !strings.Contains(s.events[1].Text, "no key is left") {
		t.Errorf("%+v", s.events)
	}
	s.keys = 1000
	if n := s.run(15 * time.Second); n < 50 || s.burst > rekeysPerSecond {
		t.Errorf("%d rekeyings within 15 s, %d at once", n, s.burst)
	}
	s.run(20 * time.Minute)
	if s.story() != "alarm alarm run" {
		t.Errorf("%+v", s.events)
	}
}

// A KME that gives keys but tells its level no more is paced by policy alone,
// not by the last level less what was taken since.
func TestSupplyStale(t *testing.T) {
	s := newSupplySim(40, 0)
	s.add("x", 100, time.Minute, 5*time.Minute)
	s.run(30 * time.Second)
	s.silent, s.keys = true, 1e6
	s.run(time.Minute)
	if n := s.run(8 * time.Minute); n < 750 || s.oldest > 3*time.Minute {
		t.Errorf("%d rekeyings of 800, an SA became %v old", n, s.oldest)
	}
	if s.story() != "" {
		t.Errorf("%+v", s.events)
	}
	if v := s.pacer.supply(simPair); v != nil {
		t.Errorf("an old level is told: %+v", v)
	}
}

// A pool that a peer's restart shows as empty for a while does not come back with
// a rate that nothing delivers.
func TestSupplyEmptyForAWhile(t *testing.T) {
	s := newSupplySim(2000, 1)
	s.add("x", 1000, time.Minute, 24*time.Hour)
	s.run(15 * time.Minute)
	was := s.keys
	s.keys = -s.rate
	s.run(time.Second) // the one reading
	s.keys = was
	for range 15 * 60 {
		s.run(time.Second)
		if v := s.pacer.supply(simPair); v.Measured && v.SupplyRate > 1.5 {
			t.Fatalf("%s: %.2f keys per second come, in truth 1", s.now.Format(time.TimeOnly), v.SupplyRate)
		}
	}
}

// The trouble of a pool whose KME falls silent does not last for ever: it ends once,
// with the true reason, and what the KME says later is judged anew.
func TestSupplyAlarmOfASilentPoolEnds(t *testing.T) {
	s := newSupplySim(0, 0)
	s.add("x", 1, time.Minute, 10*time.Minute)
	s.run(9 * time.Minute)
	if s.story() != "alarm alarm" || !strings.Contains(s.events[1].Text, "no key is left") {
		t.Fatalf("%+v", s.events)
	}
	s.silent = true
	s.run(5 * time.Minute)
	if s.story() != "alarm alarm" {
		t.Errorf("too soon: %+v", s.events)
	}
	s.run(15 * time.Minute)
	if s.story() != "alarm alarm run" || !strings.Contains(s.events[2].Text, "not known") {
		t.Errorf("%+v", s.events)
	}
	s.silent, s.keys = false, 1000
	s.run(20 * time.Minute)
	if s.story() != "alarm alarm run" {
		t.Errorf("%+v", s.events)
	}
}

// A supply about the limit of what is needed does not cause an event each time.
func TestSupplyEventsDoNotFlap(t *testing.T) {
	s := newSupplySim(defaultReserve, 0)
	s.add("x", 4, 10*time.Second, time.Hour)
	for i := range 6 * 60 {
		s.rate = 2 * float64(i%2) * 4 / (0.65 * 3600)
		s.run(time.Minute)
	}
	if len(s.events) > 30 {
		t.Errorf("%d events in 6 h", len(s.events))
	}
}

// The end that does not lead waits half as long again; its limit is the same.
func TestSupplyFollower(t *testing.T) {
	s := newSupplySim(1e6, 0)
	s.add("x", 20, 10*time.Minute, 0)
	for i := range s.list {
		s.list[i].leads = false
	}
	if n := s.run(13 * time.Minute); n != 0 {
		t.Errorf("%d rekeyings by the end that follows", n)
	}
	if s.run(4 * time.Minute); s.rekeys["x"] != 20 {
		t.Errorf("it stepped in %d times of 20", s.rekeys["x"])
	}
}

// fallen makes all CHILD_SAs of s those of a fallback.
func (s *supplySim) fallen() {
	for i := range s.list {
		s.list[i].bare = true
	}
}

// A CHILD_SA without a quantum key is rekeyed as soon as there is one, not at its
// ordinary time, also from the reserve; a dry pool is not asked.
func TestSupplyEndsAFallback(t *testing.T) {
	s := newSupplySim(0, 0)
	s.add("x", 1, time.Hour, 24*time.Hour)
	s.add("full", 1, time.Hour, 24*time.Hour)
	s.fallen()
	s.list[1].bare = false
	if n := s.run(30 * time.Minute); n != 0 {
		t.Errorf("%d rekeyings without a key", n)
	}
	s.keys = 3
	if n := s.run(15 * time.Second); n != 1 || s.rekeys["x"] != 1 || s.keys != 2 {
		t.Errorf("%d rekeyings once there were keys, of %v, %v keys left", n, s.rekeys, s.keys)
	}
	if n := s.run(15 * time.Minute); n != 0 {
		t.Errorf("%d more", n)
	}
}

// A fallback that rekeyings do not end, and of which no level says that they
// cannot, is tried again at longer and longer intervals.
func TestSupplyFallbackBacksOff(t *testing.T) {
	for _, leads := range []bool{true, false} {
		s := newSupplySim(0, 0)
		s.silent = true
		for i := range 20 {
			s.add(fmt.Sprint(i), 1, time.Hour, 0)
			s.list[i].leads = leads
		}
		s.fallen()
		if n := s.run(9 * time.Second); n != 0 {
			t.Errorf("%d rekeyings at once", n)
		}
		if n := s.run(9 * time.Second); n != 20 {
			t.Errorf("%d of 20 rekeyings in the first 18 s", n)
		}
		if n := s.run(time.Hour-18*time.Second) / 20; n < 10 || n > 18 {
			t.Errorf("%d more rekeyings of each in an hour", n)
		}
		s.silent, s.keys, s.most = false, 1000, 1000
		if n := s.run(9 * time.Minute); n != 20 {
			t.Errorf("%d rekeyings with keys", n)
		}
	}
}

// The same with keys that the peer does not get: each rekeying costs one.
func TestSupplyFallbackSparesKeys(t *testing.T) {
	s := newSupplySim(1000, 0)
	s.mute = true
	s.add("x", 1, time.Hour, 0)
	s.fallen()
	if n := s.run(time.Hour); n > 18 || s.keys < 982 {
		t.Errorf("%d rekeyings in an hour, %v keys left", n, s.keys)
	}
}

// However long rekey_time is, the end that leads rekeys before the other one
// would, and the other one before it is forced to.
func TestSupplyPolicyLeavesRoom(t *testing.T) {
	const limit = time.Hour
	if p := policyOf(10*time.Minute, limit); p != 10*time.Minute {
		t.Errorf("a short rekey_time became %v", p)
	}
	if p := policyOf(9*time.Hour, 0); p != 9*time.Hour {
		t.Errorf("without max_key_age: %v", p)
	}
	for _, rekeyTime := range []time.Duration{0, 25 * time.Minute, 50 * time.Minute, 24 * time.Hour} {
		p := newPacer(0)
		var list []paced
		start := time.Unix(1e9, 0)
		for i := range uint32(200) {
			list = append(list, paced{id: i, pair: simPair, policy: policyOf(rekeyTime, limit), limit: limit, since: start, leads: i%2 == 0})
		}
		p.plan(start, list)
		var leader time.Time
		follower := start.Add(limit)
		for _, c := range list {
			if c.leads && c.due.After(leader) {
				leader = c.due
			}
			if !c.leads && c.due.Before(follower) {
				follower = c.due
			}
			if c.forced(c.due) {
				t.Fatalf("rekey_time %v: forced when due (leads: %v)", rekeyTime, c.leads)
			}
		}
		if !leader.Before(follower) {
			t.Errorf("rekey_time %v: the last leader at %v, the first follower at %v", rekeyTime, leader.Sub(start), follower.Sub(start))
		}
	}
}

// Two ends with a half of the pool each: the one that leads runs short, the other
// steps in, and in the end all keys are used.
func TestSupplyBothHalves(t *testing.T) {
	a, b := newSupplySim(defaultReserve, 0.02), newSupplySim(defaultReserve, 0.02)
	a.add("x", 3, 10*time.Second, 24*time.Hour)
	b.add("x", 3, 10*time.Second, 24*time.Hour)
	for i := range b.list {
		b.list[i].leads = false
	}
	sum := 0
	for i := range 8 * 3600 {
		if i == 2*3600 {
			sum = 0
		}
		for _, s := range []*supplySim{a, b} {
			sum += s.run(time.Second)
			for i := range a.list { // both see what either did
				if a.list[i].since.Before(b.list[i].since) {
					a.list[i].since = b.list[i].since
				}
				b.list[i].since = a.list[i].since
			}
		}
	}
	if got := float64(sum) / (6 * 3600 * 0.04); got < 0.9 || got > 1.1 {
		t.Errorf("%.2f of the keys that came were used", got)
	}
	if b.taken < a.taken/4 {
		t.Errorf("%d and %d keys were used", a.taken, b.taken)
	}
}

// What charon cannot rekey now is not asked for, and the same again not at once.
func TestSupplyAsksOnce(t *testing.T) {
	s := newSupplySim(1e6, 0)
	s.add("x", 1, time.Minute, time.Hour)
	s.add("busy", 1, time.Minute, time.Hour)
	s.list[1].ready = false
	asked := 0
	s.pacer.measured(s.now, poolID{"local", "b"}, 1000, 1000, 0)
	for i := range 600 {
		due, _ := s.pacer.plan(s.now.Add(time.Duration(i)*time.Second), s.list)
		for _, c := range due {
			if c.conn == "busy" {
				t.Error("asked for what is not ready")
			}
			asked++
		}
	}
	if asked < 3 || asked > 7 { // a lost request is made up for
		t.Errorf("asked %d times in 9 minutes", asked)
	}
}

// Time to dry is the level over what it loses; without loss there is none.
func TestSupplyTimeToDry(t *testing.T) {
	p := newPacer(0)
	id, at := poolID{"local", "b"}, time.Unix(1e9, 0)
	if p.supply(simPair) != nil {
		t.Error("a supply that nobody measured")
	}
	p.learn(simPair, id)
	p.measured(at.Add(-2*time.Minute), id, 0, 10000, 5) // no rate begins there
	p.measured(at, id, 1000, 10000, 5)
	if s := p.supply(simPair); s == nil || s.Measured || s.Dry >= 0 || s.Level != 1000 {
		t.Errorf("%+v", s)
	}
	p.measured(at.Add(100*time.Second), id, 900, 10000, 305)
	s := p.supply(simPair)
	if !s.Measured || s.SupplyRate != 2 || s.UseRate != 3 || s.Dry != 900*time.Second {
		t.Errorf("%+v", s)
	}
	for _, want := range []string{"900 left at KME local with b", "reserve 32", "2/s come", "3/s are used", "dry in 15m0s"} {
		if !strings.Contains(s.text(), want) {
			t.Errorf("%q is not in %q", want, s.text())
		}
	}
	p.measured(at.Add(200*time.Second), id, 1000, 10000, 305)
	if s := p.supply(simPair); s.Dry >= 0 || !strings.Contains(s.text(), "never dry") {
		t.Errorf("%+v, %s", s, s.text())
	}
	p.plan(at.Add(time.Hour), nil)
	if s := p.supply(simPair); s != nil {
		t.Errorf("an hour old, still told: %+v", s)
	}
}

// What is counted as taken are the keys that a KME gave, once each.
func TestSupplyCountsTakenKeys(t *testing.T) {
	p := newPair(t, nil)
	p.a.mustKey(1)
	p.a.mustKey(1)
	p.a.mustKey(2)
	if a, b := p.a.note("link").taken, p.b.note("link").taken; a != 2 || b != 0 {
		t.Errorf("%d and %d keys taken", a, b)
	}
}

// fakeLevels is a KME that tells its level.
type fakeLevels struct {
	mu    sync.Mutex
	level int
	most  int
	asked []string
	err   error
}

func (f *fakeLevels) Status(_ context.Context, local, peer string) (key.SupplyStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, local+" "+peer)
	return key.SupplyStatus{TargetKME: "node-b", StoredKeyCount: f.level, MaxKeyCount: f.most}, f.err
}

func (f *fakeLevels) set(change func(*fakeLevels)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// rekeyed counts the rekeyings that charon was asked for, by child.
func (s *site) rekeyed() map[string]int {
	out := map[string]int{}
	for _, c := range s.charon.Calls("rekey") {
		out[c.Message.Text("child-id")]++
	}
	return out
}

// The Manager has charon rekey what is due while there are keys, each once, and
// leaves alone what is off; charon's own timer is only the backstop.
func TestManagerPaces(t *testing.T) {
	f := &fakeLevels{level: 0, most: 1000}
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		c[0].MaxKeyAge = 0
		c[0].Children[0].RekeyTime = time.Second // the fake's SAs are 2 s old
		off, slow := c[0], c[0]
		off.Name, off.Policy = "off", Off
		slow.Name, slow.Children = "slow", []Child{{Name: "net", Start: StartNow}}
		return append(c, off, slow)
	})
	s.Manager.o.Levels = map[string]Levels{"local": f}
	s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.hello("5.9.8")
	s.run()
	for _, name := range []string{"link", "off", "slow"} {
		eventually(t, name+" up", s.is(name, StateUp))
	}
	eventually(t, "level seen", func() bool { return s.state("link").Supply != nil })
	if v := s.state("off").Supply; v != nil {
		t.Errorf("off takes keys: %+v", v)
	}
	looks := len(s.charon.Calls("list-sas"))
	eventually(t, "more looks", func() bool { return len(s.charon.Calls("list-sas")) > looks+3 })
	if n := s.rekeyed(); len(n) != 0 {
		t.Errorf("rekeyed without a key: %v", n)
	}
	f.set(func(f *fakeLevels) { f.level = 10_000_000 })
	eventually(t, "rekeyed", func() bool { return len(s.rekeyed()) > 0 })
	looks = len(s.charon.Calls("list-sas"))
	eventually(t, "more looks", func() bool { return len(s.charon.Calls("list-sas")) > looks+3 })
	id := ""
	for _, c := range s.state("link").Children {
		id = fmt.Sprint(c.UniqueID)
		if c.NextRekey.IsZero() {
			t.Error("no time of the next rekeying")
		}
	}
	if n := s.rekeyed(); len(n) != 1 || n[id] != 1 {
		t.Errorf("child %s of link was to be rekeyed once: %v", id, n)
	}
	for name, want := range map[string]string{"link": "86400", "off": "1"} {
		if got := s.charon.Conns[name].Text("children", "net", "rekey_time"); got != want {
			t.Errorf("%s: charon's rekey_time is %s, want %s", name, got, want)
		}
	}
	if text, _ := s.Explain("link"); !strings.Contains(text, "KME local with node-b") || !strings.Contains(text, "rekeying due at") {
		t.Error(text)
	}
}

// What is paced: rekey_time as far as max_key_age lets it, and as without a quantum
// key what has none and can get one by a rekeying.
func TestPaced(t *testing.T) {
	const limit = time.Hour
	s := newSite(t, func(_ *site, c []Connection) []Connection {
		c[0].MaxKeyAge = limit
		c[0].Children[0].RekeyTime = 50 * time.Minute
		opt := c[0]
		opt.Name, opt.Policy, opt.MaxKeyAge = "opt", Optional, 0
		c[0].Children = slices.Clone(c[0].Children)
		c[0].Children[0].Start = StartNone // the fake would bring it up on fallback, too
		return append(c, opt)
	})
	s.connects(sad.Owner{Connection: "opt", Mix: sad.MixClassical})
	s.hello("5.9.8")
	s.run()
	eventually(t, "fallback", s.is("opt", StateFallback))
	s.charon.Lock()
	ike := ikeOf("link", "net", 77)
	s.sad.put(ike.Children[0].SPIIn, ike.Children[0].SPIOut, sad.Owner{Connection: "link", Mix: sad.MixHybrid})
	s.charon.IKEs = append(s.charon.IKEs, ike)
	s.charon.Unlock()
	eventually(t, "up", s.is("link", StateUp))
	look := func() map[string]paced {
		l := &link{loaded: map[string]bool{"link": true, "opt": true}}
		out := map[string]paced{}
		for _, p := range s.paced(l) {
			out[p.conn] = p
		}
		return out
	}
	if p := look()["link"]; p.policy != times(limit, mostPolicy) || p.limit != limit || p.bare {
		t.Errorf("%+v", p)
	}
	if p := look()["opt"]; p.policy != 50*time.Minute || p.limit != 0 || !p.bare {
		t.Errorf("%+v", p)
	}
	s.broker.mu.Lock()
	s.broker.conns["opt"].mute = true
	s.broker.mu.Unlock()
	if p := look()["opt"]; p.bare {
		t.Errorf("a peer without Q-IPsec is to be rekeyed soon: %+v", p)
	}
}

// A KME that tells no level, or fails, leaves the pace to the policy; connections
// of one pair of SAEs ask once.
func TestManagerUnmeasured(t *testing.T) {
	for name, f := range map[string]*fakeLevels{
		"counts nothing": {},
		"fails":          {level: 0, most: 100, err: errors.New("down")},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, func(_ *site, c []Connection) []Connection {
				c[0].Children[0].RekeyTime = time.Second
				other := c[0]
				other.Name = "other"
				return append(c, other)
			})
			s.Manager.o.Levels = map[string]Levels{"local": f}
			s.Manager.measureOnce(t.Context(), "local", f)
			if len(f.asked) != 1 {
				t.Errorf("asked %q", f.asked)
			}
			s.connects(sad.Owner{Connection: "link", Mix: sad.MixHybrid})
			s.hello("5.9.8")
			s.run()
			eventually(t, "rekeyed", func() bool { return len(s.rekeyed()) == 2 })
			if v := s.state("link").Supply; v != nil {
				t.Errorf("%+v", v)
			}
		})
	}
}
