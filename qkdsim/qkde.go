package qkdsim

import (
	"fmt"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Status is what a QKDE says of itself over the control interface.
type Status struct {
	State     State    `json:"state"`
	QBER      float64  `json:"qber"`             // of the last block, 0..1
	Rate      float64  `json:"secret_rate_bps"`  // now, bit/s
	Seq       uint64   `json:"seq"`              // of the last file
	Wanted    int      `json:"wanted_bytes"`     // asked for by Generate, not made yet
	Backlog   int      `json:"backlog_files"`    // not delivered yet to this end's node
	Dropped   uint64   `json:"dropped_files"`    // lost because the backlog was full
	Alarms    []string `json:"alarms,omitempty"` // present ones, by name
	Generated uint64   `json:"generated_files"`  // since the start
}

// Status reports on the pair as the device of the given role sees it.
func (p *Pair) Status(role key.Role) Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Status{
		State: p.sim.State(), QBER: p.sim.QBER(), Rate: p.sim.SecretHz() * p.opt.Speed, Seq: p.seq,
		Wanted: p.wanted / 8, Backlog: len(p.queue[role-1]), Dropped: p.dropped[role-1], Generated: p.made,
	}
	if s.State == Aborted || s.State == Outage {
		s.Alarms = append(s.Alarms, string(s.State))
	}
	if s.QBER > AlarmQBER {
		s.Alarms = append(s.Alarms, "qber-high")
	}
	return s
}

// maxWanted bounds what Generate may ask for at once, in bytes.
const maxWanted = 1 << 30

// Generate asks for n more bytes of key, trailers included. Without OnDemand
// the pair generates anyway, and the request is only checked.
func (p *Pair) Generate(n int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n < 1 || n > maxWanted || p.wanted/8+n > maxWanted {
		return fmt.Errorf("qkdsim: generate %d bytes: not between 1 and %d with the %d asked for before", n, maxWanted, p.wanted/8)
	}
	if p.opt.OnDemand {
		p.wanted += n * 8
	}
	return nil
}

// Init starts generation anew; seq goes on.
func (p *Pair) Init() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sim.Init()
}

// Stop ends generation until Init; what was asked for is forgotten.
func (p *Pair) Stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sim.Stop()
	p.wanted = 0
}
