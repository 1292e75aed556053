package qkdsim

import (
	"fmt"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/qkdsim/control"
)

// Status reports on the pair as the device of the given role sees it.
func (p *Pair) Status(role key.Role) control.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	state := p.sim.State()
	s := control.Status{
		State: string(state), QBER: p.sim.QBER(), Rate: p.sim.SecretHz() * p.opt.Speed, Seq: p.seq,
		Wanted: p.wanted / 8, Backlog: len(p.queue[role-1]), Dropped: p.dropped[role-1], Generated: p.made,
	}
	if state == Aborted || state == Outage {
		s.Alarms = append(s.Alarms, s.State)
	}
	if s.QBER > AlarmQBER {
		s.Alarms = append(s.Alarms, "qber-high")
	}
	return s
}

// Generate asks for n more bytes of key, trailers included. Without OnDemand
// the pair generates anyway, and the request is only checked.
func (p *Pair) Generate(n int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n < 1 || n > control.MaxGenerate || p.wanted/8+n > control.MaxGenerate {
		return fmt.Errorf("qkdsim: generate %d bytes: not between 1 and %d with the %d asked for before", n, control.MaxGenerate, p.wanted/8)
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
