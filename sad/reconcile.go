package sad

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// place is how charon's listing names an SA.
type place struct {
	dst      netip.Addr
	spi      uint32
	protocol uint8
}

func placeOf(id ID) place { return place{id.Dst.Addr().Unmap(), id.SPI, id.Protocol} }

// Reconcile compares journal, kernel and charon. list asks charon for all SAs
// of CHILD_SAs that it has installed (both directions; only Dst's address, SPI
// and Protocol are looked at); it must wait for busy IKE_SAs (no "noblock").
// What is ours and unknown to charon is deleted; what charon has and the
// kernel has not is returned, for the caller to terminate. SAs that are not
// ours are never touched.
//
// charon is asked while SAs come and go. So only SAs that were committed before
// list was called are judged, and list is called a second time if the first
// call shows a difference: an SA is unknown, or missing, only if both agree.
// (An IKE_SA rekey moves CHILD_SAs, which one listing can miss.)
func (s *SAD) Reconcile(ctx context.Context, list func(context.Context) ([]ID, error)) (missing []ID, err error) {
	before, known, err := s.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	first, err := charonHas(ctx, list)
	if err != nil {
		return nil, err
	}
	if !differs(before, known, first) {
		return nil, s.forgetGone(ctx, known)
	}
	second, err := charonHas(ctx, list)
	if err != nil {
		return nil, err
	}
	return s.settle(ctx, before, known, first, second)
}

// charonHas is one listing by place.
func charonHas(ctx context.Context, list func(context.Context) ([]ID, error)) (map[place]ID, error) {
	ids, err := list(ctx)
	if err != nil {
		return nil, fmt.Errorf("sad: ask charon for its SAs: %w", err)
	}
	has := map[place]ID{}
	for _, id := range ids {
		has[placeOf(id)] = id
	}
	return has, nil
}

// snapshot gives the places of complete SAs in the kernel and, of our records
// that may be judged, their serials.
func (s *SAD) snapshot(ctx context.Context) (inKernel map[place]bool, judged map[xfrm.Key]uint64, err error) {
	if err := s.acquire(ctx); err != nil {
		return nil, nil, err
	}
	defer s.release()
	infos, err := s.kernel.List(ctx)
	if err != nil {
		return nil, nil, err
	}
	judged = map[xfrm.Key]uint64{}
	for k, r := range s.live {
		if r.committed || time.Since(r.since) > pendingFor {
			judged[k] = r.serial
		}
	}
	return complete(infos), judged, nil
}

func complete(infos []xfrm.Info) map[place]bool {
	in := map[place]bool{}
	for _, i := range infos {
		if !i.Larval {
			in[placeOf(i.ID)] = true
		}
	}
	return in
}

func keyPlace(k xfrm.Key) place { return place{k.Dst, k.SPI, k.Protocol} }

// differs tells whether there is anything to delete or to report.
func differs(inKernel map[place]bool, judged map[xfrm.Key]uint64, has map[place]ID) bool {
	for p := range has {
		if !inKernel[p] {
			return true
		}
	}
	for k := range judged {
		if _, ok := has[keyPlace(k)]; !ok && inKernel[keyPlace(k)] {
			return true
		}
	}
	return false
}

// settle deletes what both listings do not know and reports what both know and
// the kernel had neither before nor after.
func (s *SAD) settle(ctx context.Context, before map[place]bool, judged map[xfrm.Key]uint64, first, second map[place]ID) ([]ID, error) {
	if err := s.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.release()
	infos, err := s.kernel.List(ctx)
	if err != nil {
		return nil, err
	}
	after := complete(infos)
	var missing []ID
	for p, id := range second {
		if _, ok := first[p]; ok && !before[p] && !after[p] {
			missing = append(missing, id)
		}
	}
	var errs []error
	for k, serial := range judged {
		r := s.live[k]
		_, in1 := first[keyPlace(k)]
		_, in2 := second[keyPlace(k)]
		if r == nil || r.serial != serial || in1 || in2 {
			continue
		}
		if after[keyPlace(k)] {
			s.log.Warn("SA deleted: charon does not know it", "sa", r.ID, "connection", r.Owner.Connection, "key", r.Owner.KeyID)
		}
		if err := s.remove(ctx, r); err != nil {
			errs = append(errs, err)
		}
	}
	s.forgetAbsent(judged, after)
	return missing, errors.Join(errs...)
}

// forgetGone drops the judged records whose SAs the kernel does not have any
// more: charon deletes SAs itself.
func (s *SAD) forgetGone(ctx context.Context, judged map[xfrm.Key]uint64) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	infos, err := s.kernel.List(ctx)
	if err != nil {
		return err
	}
	s.forgetAbsent(judged, complete(infos))
	return nil
}

func (s *SAD) forgetAbsent(judged map[xfrm.Key]uint64, inKernel map[place]bool) {
	for k, serial := range judged {
		if r := s.live[k]; r != nil && r.serial == serial && !inKernel[keyPlace(k)] {
			s.forget(r)
		}
	}
}
