package qkdsim

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

// Weather is what goes wrong on a link, and how often. The zero value is a
// link on which nothing ever does.
type Weather struct {
	Jitter         float64       // relative standard deviation of the rate from block to block, 0.01..0.05 in the field
	Drift          float64       // standard deviation of the slow change of e_d, absolute
	OutageEvery    time.Duration // mean time between fibre cuts or re-alignments; 0 = never
	OutageLasts    time.Duration // mean length of one
	IntruderEvery  time.Duration // mean time between eavesdroppers; 0 = never
	IntruderLasts  time.Duration
	IntruderShare  float64 // share of the pulses one measures and resends, 0..1
	LoseMaster     float64 // chance that a file never reaches the master's node
	LoseSlave      float64
	DamageMaster   float64 // chance that a file arrives there with one key bit changed and a hash to match
	DamageSlave    float64
	TruncateMaster float64 // chance that it arrives cut off
	TruncateSlave  float64
}

// State is what a QKDE pair is doing.
type State string

// The states of a pair.
const (
	Generating State = "generating"
	Stopped    State = "stopped" // by Stop; Init starts it again
	Outage     State = "outage"  // no light
	Aborted    State = "aborted" // QBER above the limit: an eavesdropper, or a broken device
)

// AlarmQBER is where a pair raises an alarm though it still makes keys.
const AlarmQBER = 0.055

// Burst is what one completed post-processing block adds.
type Burst struct {
	At         time.Duration // since the pair's start
	QBER       float64       // as estimated in the block
	SecretBits int           // 0 if the block was dropped
}

// Sim is a QKDE pair in its own time. It draws chances from its seed alone, so
// a seed gives the same story again. One goroutine at a time.
type Sim struct {
	link      Link
	weather   Weather
	blockBits float64 // sifted bits per post-processing block
	rng       *rand.Rand

	now      time.Duration
	state    State
	sifted   float64 // bits of the open block
	drift    float64 // of e_d
	qber     float64 // of the last block
	until    time.Duration
	intruder time.Duration // there until then
	nextCut  time.Duration
	nextEve  time.Duration
}

// NewSim starts a pair. blockBits is how many sifted bits make one
// post-processing block, so keys come in bursts; 1e5..1e7 in the field.
func NewSim(l Link, w Weather, blockBits int, seed uint64) (*Sim, error) {
	if l.ClockHz <= 0 || l.Km < 0 || blockBits <= 0 {
		return nil, fmt.Errorf("qkdsim: clock %v Hz, %v km, block of %d bits: clock and block must be above 0, the distance not below", l.ClockHz, l.Km, blockBits)
	}
	s := &Sim{
		link: l, weather: w, blockBits: float64(blockBits), state: Generating,
		rng: rand.New(rand.NewPCG(seed, 0x512d4950736563)),
	}
	s.nextCut = s.after(w.OutageEvery)
	s.nextEve = s.after(w.IntruderEvery)
	return s, nil
}

// State is what the pair is doing now.
func (s *Sim) State() State { return s.state }

// QBER is that of the last block, 0 before the first.
func (s *Sim) QBER() float64 { return s.qber }

// SecretHz is the present secret rate in bit/s, without jitter.
func (s *Sim) SecretHz() float64 {
	if s.state != Generating {
		return 0
	}
	return s.linkNow().At().SecretHz
}

// Stop ends generation; what the open block holds is lost.
func (s *Sim) Stop() { s.state, s.sifted = Stopped, 0 }

// Init starts or restarts generation with an empty block.
func (s *Sim) Init() { s.state, s.sifted, s.until = Generating, 0, 0 }

// Cut begins an outage of length d by hand.
func (s *Sim) Cut(d time.Duration) { s.state, s.sifted, s.until = Outage, 0, s.now+d }

// Intrude puts an eavesdropper on the line for d by hand.
func (s *Sim) Intrude(d time.Duration, share float64) {
	s.intruder, s.weather.IntruderShare = s.now+d, share
}

// Step lets d pass and gives the blocks that were completed in it.
func (s *Sim) Step(d time.Duration) []Burst {
	var out []Burst
	for end := s.now + d; s.now < end; {
		step := min(end-s.now, 100*time.Millisecond)
		s.now += step
		if b, ok := s.tick(step); ok {
			out = append(out, b)
		}
	}
	return out
}

// tick lets one short step pass; at most one block is completed in it, its
// size being whatever was sifted by then.
func (s *Sim) tick(step time.Duration) (Burst, bool) {
	s.change()
	if s.state == Stopped || s.state == Outage {
		return Burst{}, false
	}
	w := s.weather.Drift
	// An Ornstein-Uhlenbeck walk with a correlation time of 10 minutes.
	theta := step.Seconds() / 600
	s.drift += -theta*s.drift + w*math.Sqrt(2*theta)*s.rng.NormFloat64()
	p := s.linkNow().At()
	mean := p.ClickHz * step.Seconds() * (1 + s.weather.Jitter*s.rng.NormFloat64())
	s.sifted += poisson(s.rng, mean)
	if s.sifted < s.blockBits {
		return Burst{}, false
	}
	n := s.sifted
	s.sifted = 0
	// The estimate of QBER from the block, a binomial in its normal limit.
	s.qber = max(0, p.QBER+math.Sqrt(p.QBER*(1-p.QBER)/n)*s.rng.NormFloat64())
	if s.qber > AbortQBER {
		s.state = Aborted
		return Burst{At: s.now, QBER: s.qber}, true
	}
	s.state = Generating
	return Burst{At: s.now, QBER: s.qber, SecretBits: int(n * p.SecretHz / p.ClickHz)}, true
}

// change begins and ends what the weather brings.
func (s *Sim) change() {
	if s.weather.OutageEvery > 0 && s.now >= s.nextCut && s.state != Stopped {
		s.Cut(s.after(s.weather.OutageLasts) - s.now)
		s.nextCut = s.until + s.after(s.weather.OutageEvery) - s.now
	}
	if s.state == Outage && s.now >= s.until {
		s.state = Generating
	}
	if s.weather.IntruderEvery > 0 && s.now >= s.nextEve {
		s.intruder = s.after(s.weather.IntruderLasts)
		s.nextEve = s.intruder + s.after(s.weather.IntruderEvery) - s.now
	}
}

func (s *Sim) linkNow() Link {
	l := s.link
	l.Extra = max(-l.Misaligned, s.drift)
	if s.now < s.intruder {
		l.Extra += 0.25 * s.weather.IntruderShare
	}
	return l
}

// after is now plus an exponential time of mean d.
func (s *Sim) after(d time.Duration) time.Duration {
	return s.now + time.Duration(float64(d)*s.rng.ExpFloat64())
}

// poisson draws from a Poisson distribution, by its normal limit above 1000.
func poisson(r *rand.Rand, mean float64) float64 {
	switch {
	case mean <= 0:
		return 0
	case mean > 1000:
		return max(0, math.Round(mean+math.Sqrt(mean)*r.NormFloat64()))
	}
	n := 0.0
	for t := r.ExpFloat64(); t < mean; t += r.ExpFloat64() {
		n++
	}
	return n
}
