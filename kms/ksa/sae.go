package ksa

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// SAE is one line of the table of SAEs: who there is, on which node, and what a
// local one may do.
type SAE struct {
	ID    string   // [A-Za-z0-9._~-]{1,64}
	Node  string   // the node whose KSA supplies it
	Peers []string // local SAEs only: ids of the SAEs it may share keys with
	IPsec bool     // local SAEs only: may draw on the reserve
	Rate  float64  // keys per second GetKey gives it in the long run; 0: no quota
	Burst int      // keys it may have at once after a pause; 0: MaxPerRequest
}

// sae is an SAE with its quota's state.
type sae struct {
	SAE
	mu     sync.Mutex
	tokens float64
	last   time.Time
}

// take spends n keys of the quota or says how long to wait for them.
func (s *sae) take(n int, now time.Time) (wait time.Duration, ok bool) {
	if s.Rate == 0 {
		return 0, true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens = min(float64(s.Burst), s.tokens+s.Rate*now.Sub(s.last).Seconds())
	s.last = now
	if lack := float64(n) - s.tokens; lack > 0 {
		return time.Duration(lack / s.Rate * float64(time.Second)), false
	}
	s.tokens -= float64(n)
	return 0, true
}

// give returns n keys of the quota that were not supplied after all.
func (s *sae) give(n int) {
	if s.Rate == 0 {
		return
	}
	s.mu.Lock()
	s.tokens = min(float64(s.Burst), s.tokens+float64(n))
	s.mu.Unlock()
}

// CheckSAE reports whether id may be the id of an SAE.
func CheckSAE(id string) error {
	if len(id) < 1 || len(id) > 64 {
		return fmt.Errorf("ksa: SAE id has %d characters, it may have 1 to 64", len(id))
	}
	if id == "." || id == ".." {
		return fmt.Errorf("ksa: SAE id %q cannot be part of a URL", id)
	}
	for i := range len(id) {
		c := id[i]
		switch {
		case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '.', c == '_', c == '~', c == '-':
		default:
			return fmt.Errorf("ksa: SAE id %q has characters other than letters, digits and . _ ~ -", id)
		}
	}
	return nil
}

// table checks all of saes and reports every fault at once.
func table(saes []SAE, node string, now time.Time) (map[string]*sae, error) {
	t := make(map[string]*sae, len(saes))
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf("ksa: "+format, args...)) }
	for _, s := range saes {
		if err := CheckSAE(s.ID); err != nil {
			faults = append(faults, err)
			continue
		}
		if t[s.ID] != nil {
			fault("SAE %q is there twice", s.ID)
		}
		if s.Node == "" {
			fault("SAE %q has no node", s.ID)
		}
		if s.Rate < 0 || s.Burst < 0 {
			fault("SAE %q has a negative quota", s.ID)
		}
		if s.Node != node && (len(s.Peers) > 0 || s.IPsec || s.Rate != 0 || s.Burst != 0) {
			fault("SAE %q belongs to node %q: its rights are that node's to say", s.ID, s.Node)
		}
		if s.Burst == 0 {
			s.Burst = MaxPerRequest
		}
		t[s.ID] = &sae{SAE: s, tokens: float64(s.Burst), last: now}
	}
	for _, s := range t {
		for _, p := range s.Peers {
			if t[p] == nil {
				fault("SAE %q has peer %q, which is not in the table", s.ID, p)
			}
		}
	}
	return t, errors.Join(faults...)
}

// pair finds the local SAE caller and the remote SAE peer and holds them
// against the table. All that is wrong with who they are is ErrUnauthorised.
func (a *Agent) pair(caller, peer string) (*sae, *sae, error) {
	c, p := a.saes[caller], a.saes[peer]
	if c == nil || p == nil || c.Node != a.o.Node || !slices.Contains(c.Peers, peer) {
		a.event(Event{Kind: Refused, MasterSAE: caller, SlaveSAE: peer, Why: "pair is not in the table of SAEs"})
		return nil, nil, key.ErrUnauthorised
	}
	if p.Node == a.o.Node {
		return nil, nil, &key.BadRequest{Message: "both SAEs belong to this KME: quantum keys are for SAEs at two sites"}
	}
	return c, p, nil
}
