package sad

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// Query gives an SA's counters without reading its key (XFRM_MSG_GETAE).
// ErrNotFound if the kernel has no such SA. The kernel does not tell here when
// an SA was used last, so LastUse is when Query first saw the present byte
// count. It works for SAs that are not ours, without LastUse.
func (s *SAD) Query(ctx context.Context, id ID) (Counters, error) {
	if err := s.acquire(ctx); err != nil {
		return Counters{}, err
	}
	defer s.release()
	c, err := s.kernel.Counters(ctx, id)
	if err != nil {
		return Counters{}, err
	}
	if r := s.live[id.Key()]; r != nil {
		if c.Bytes != r.bytes {
			if r.lastUse, err = sinceBoot(); err != nil {
				return Counters{}, err
			}
			r.bytes = c.Bytes
		}
		c.LastUse = r.lastUse
	}
	return c, nil
}

func sinceBoot() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("sad: read the clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// Change moves an SA to new addresses or ports (MOBIKE, NAT mapping change).
type Change struct {
	ID             ID
	NewSrc, NewDst netip.AddrPort
	NewEncap       bool
}

// Update carries out c on an SA of ours. moved tells that the SA was taken out
// and added anew, with its outbound sequence advanced by 2^20: packets may have
// been lost and the CHILD_SA should be rekeyed soon. A change of ports alone is
// done in place.
//
// Errors: ErrNotFound if the SA is not ours or not in the kernel, ErrSequence;
// after another error the SA may be gone, which Reconcile reports as missing.
func (s *SAD) Update(ctx context.Context, c Change) (moved bool, err error) {
	if err := s.acquire(ctx); err != nil {
		return false, err
	}
	defer s.release()
	r := s.live[c.ID.Key()]
	if r == nil {
		return false, fmt.Errorf("sad: update %v: not installed by qipsecd: %w", c.ID, ErrNotFound)
	}
	n := *r
	n.ID.Src, n.ID.Dst, n.Encap = c.NewSrc, c.NewDst, c.NewEncap
	same := r.ID.Src.Addr().Unmap() == c.NewSrc.Addr().Unmap() && r.ID.Dst.Addr().Unmap() == c.NewDst.Addr().Unmap() && r.Encap == c.NewEncap
	if same {
		if r.Encap {
			if err := s.kernel.SetPorts(ctx, r.ID, c.NewSrc.Port(), c.NewDst.Port()); err != nil {
				return false, err
			}
			r.ID.Src, r.ID.Dst = c.NewSrc, c.NewDst
		}
		return false, nil
	}
	err = s.move(ctx, r, &n)
	return err == nil, err
}

// move makes r's SA n's. Both are in the journal while it is not known which of
// them the kernel has.
func (s *SAD) move(ctx context.Context, r, n *record) error {
	if other := s.live[n.ID.Key()]; other != nil && other != r {
		return fmt.Errorf("sad: move %v: %w", n.ID, ErrExists)
	}
	renamed := n.ID.Key() != r.ID.Key()
	if err := s.keep(n); err != nil {
		return err
	}
	to := xfrm.Move{NewSrc: n.ID.Src, NewDst: n.ID.Dst, NewEncap: n.Encap}
	if err := s.kernel.Move(ctx, r.ID, to); err != nil {
		untouched := errors.Is(err, xfrm.ErrNotFound) || errors.Is(err, xfrm.ErrSequence)
		switch {
		case untouched && renamed:
			s.forget(n)
		case untouched:
			s.restore(r)
		}
		return err
	}
	if renamed {
		s.forget(r)
	}
	if n.committed {
		if err := s.file.append(entry{opCommit, &record{ID: n.ID}}, false); err != nil {
			s.log.Warn("journal not updated", "sa", n.ID, "err", err)
		}
	}
	return nil
}

// State is one SA of ours as it is in the kernel; it holds no key.
type State struct {
	ID
	Owner
	ReqID          uint32
	Mode           Mode
	Inbound        bool
	Encap          bool
	ESN            bool
	Algorithm      string // as the kernel has it, in the names of Suite
	Fingerprint    string // of the key as installed: Keys.Fingerprint
	Committed      bool
	Bytes, Packets uint64
	Added          time.Time
}

// State lists the SAs of ours that the kernel has, ordered by connection, then
// direction (inbound first), then time.
func (s *SAD) State(ctx context.Context) ([]State, error) {
	if err := s.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.release()
	infos, err := s.kernel.List(ctx)
	if err != nil {
		return nil, err
	}
	var all []State
	for _, i := range infos {
		r := s.live[i.Key()]
		if r == nil || i.Larval {
			continue
		}
		all = append(all, State{
			ID: i.ID, Owner: r.Owner, ReqID: i.ReqID, Mode: i.Mode, Inbound: r.Inbound, Encap: i.Encap, ESN: i.ESN,
			Algorithm: i.Algorithm, Fingerprint: r.Fingerprint, Committed: r.committed,
			Bytes: i.Bytes, Packets: i.Packets, Added: i.Added,
		})
	}
	slices.SortFunc(all, func(a, b State) int {
		return cmp.Or(cmp.Compare(a.Connection, b.Connection), inboundFirst(a.Inbound, b.Inbound),
			a.Added.Compare(b.Added), cmp.Compare(a.SPI, b.SPI))
	})
	return all, nil
}

// Steered gives the SPIs that the outbound policies of this network namespace send
// packets to, whoever made those. An SA that is not among them carries nothing out.
func (s *SAD) Steered(ctx context.Context) (map[uint32]bool, error) {
	all, err := s.kernel.Policies(ctx)
	if err != nil {
		return nil, err
	}
	spis := map[uint32]bool{}
	for _, p := range all {
		if p.Dir == xfrm.Out && p.SPI != 0 {
			spis[p.SPI] = true
		}
	}
	return spis, nil
}

func inboundFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}
