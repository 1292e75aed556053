package ksa

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// GetKeyWithID gives the local SAE slave the session keys that master got under
// ids, in their order, once (ETSI GS QKD 014 "Get key with key IDs"). sizeBits
// other than 0 is compared with the size of each key (paper, table 11). All or
// nothing: with any error nothing is consumed. Errors: key.ErrUnauthorised if
// slave is not one of a key's SAEs; *key.BadRequest, with NotFound if a key is
// not to be had (unknown, supplied, burned or expired); *key.Unavailable if the
// peer that must know cannot be asked now. The caller owns the Materials.
func (a *Agent) GetKeyWithID(ctx context.Context, slave, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error) {
	_, m, err := a.pair(slave, master)
	if err != nil {
		return nil, err
	}
	if err := checkIDs(ids); err != nil {
		return nil, err
	}
	if err := a.pullMissing(ctx, m.Node, ids); err != nil {
		return nil, err
	}
	as, unlock, err := a.lockAll(ids)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := a.checkArrivals(as, slave, master, sizeBits); err != nil {
		return nil, err
	}
	keys, err := a.consume(as)
	if err != nil {
		return nil, err
	}
	return keys, nil
}

func notFound() error {
	return &key.BadRequest{Message: "one or more keys specified are not found on KME", NotFound: true}
}

func checkIDs(ids []key.ID) error {
	if len(ids) < 1 || len(ids) > MaxPerRequest {
		return &key.BadRequest{Message: fmt.Sprintf("number of key_IDs shall be between 1 and %d", MaxPerRequest)}
	}
	seen := make(map[key.ID]struct{}, len(ids))
	for _, id := range ids {
		if _, ok := seen[id]; ok {
			return &key.BadRequest{Message: "key_IDs shall not name a key twice"}
		}
		seen[id] = struct{}{}
	}
	return nil
}

// noticeWait is how long a notice that has not come is awaited before it is pulled:
// as a rule it is on its way, and a pull costs more than the wait.
const noticeWait = time.Millisecond

// pullMissing waits a moment for the notices of ids that have not come yet and asks
// peer, once, for those that still have not; all in PullTimeout. What peer does not
// have stays missing; only a peer that does not answer is an error.
func (a *Agent) pullMissing(ctx context.Context, peer string, ids []key.ID) error {
	if len(a.missing(ids)) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.o.PullTimeout)
	defer cancel()
	missing := a.await(ctx, peer, ids)
	if len(missing) == 0 {
		return nil
	}
	fail := func(err error) error {
		return a.unavailable(fmt.Errorf("ksa: ask node %q for %d supply notices: %w", peer, len(missing), err))
	}
	select {
	case a.pulls <- struct{}{}:
		defer func() { <-a.pulls }()
	case <-ctx.Done():
		return fail(ctx.Err())
	}
	ns, err := a.o.Peers.PullNotices(ctx, peer, missing)
	if err != nil {
		return fail(err)
	}
	for _, n := range ns {
		if !slices.Contains(missing, n.KeyID) {
			return fail(fmt.Errorf("it gave that of key %s, which was not asked for", n.KeyID))
		}
	}
	if err := a.receive(peer, ns, true); err != nil {
		return fail(err)
	}
	return nil
}

// missing are those of ids of which there is no notice.
func (a *Agent) missing(ids []key.ID) []key.ID {
	var out []key.ID
	for _, id := range ids {
		if a.in.get(id) == nil {
			out = append(out, id)
		}
	}
	return out
}

// await gives those of ids whose notices peer does not send in a moment.
func (a *Agent) await(ctx context.Context, peer string, ids []key.ID) []key.ID {
	t := time.NewTimer(a.wait)
	defer t.Stop()
	for {
		rung := a.in.bells[peer].next() // before the look, so that nothing is missed between
		missing := a.missing(ids)
		if len(missing) == 0 {
			return nil
		}
		select {
		case <-rung:
		case <-t.C:
			return missing
		case <-ctx.Done():
			return missing
		}
	}
}

// lockAll finds and locks the arrivals of ids, which are all different, in the
// order of ids; it locks in the order of the bytes, so that two batches cannot
// wait for each other.
func (a *Agent) lockAll(ids []key.ID) (as []*arrival, unlock func(), err error) {
	as = make([]*arrival, len(ids))
	for i, id := range ids {
		if as[i] = a.in.get(id); as[i] == nil {
			return nil, nil, notFound()
		}
	}
	sorted := as
	if len(as) > 1 {
		sorted = slices.SortedFunc(slices.Values(as), func(x, y *arrival) int { return bytes.Compare(x.KeyID[:], y.KeyID[:]) })
	}
	for _, n := range sorted {
		n.mu.Lock()
	}
	return as, func() {
		for _, n := range as {
			n.mu.Unlock()
		}
	}, nil
}

// checkArrivals holds every arrival against the request; who asks comes first,
// so that a stranger learns nothing about the keys.
func (a *Agent) checkArrivals(as []*arrival, slave, master string, sizeBits int) error {
	for _, n := range as {
		if !slices.Contains(n.SlaveSAEs, slave) {
			a.event(Event{Kind: Refused, Peer: n.peer, MasterSAE: master, SlaveSAE: slave, Pool: n.Pool, Position: n.Position, KeyID: n.KeyID, Why: "SAE is not among those the key was made for"})
			return key.ErrUnauthorised
		}
	}
	now := a.o.Now()
	for _, n := range as {
		if n.done || n.MasterSAE != master || !now.Before(n.expires) {
			return notFound()
		}
	}
	for _, n := range as {
		if sizeBits != 0 && sizeBits != n.SizeBits {
			return &key.BadRequest{Message: "size differs from that of the key"}
		}
	}
	return nil
}

// consume claims all master keys, derives all session keys, and only when
// nothing can fail any more ends the arrivals, whose mu are held. A key claimed
// by a batch that fails waits in its arrival for the next request.
func (a *Agent) consume(as []*arrival) (keys []key.SupplyKey, err error) {
	for _, n := range as {
		if n.master != nil {
			continue
		}
		n.master, n.class, err = a.o.Keys.Claim(n.peer, n.Pool, n.Position, n.KeyID)
		if errors.Is(err, ErrGone) {
			return nil, notFound()
		}
		if err != nil {
			return nil, a.unavailable(err)
		}
	}
	keys = make([]key.SupplyKey, 0, len(as))
	for _, n := range as {
		sk, err := Derive(n.master, n.KeyID, n.MasterSAE, n.SlaveSAEs, n.SizeBits)
		if err != nil {
			key.WipeAll(keys)
			return nil, a.unavailable(err)
		}
		keys = append(keys, key.SupplyKey{ID: n.KeyID, Class: n.class, Material: sk})
	}
	for _, n := range as {
		n.done = true
		n.master.Wipe()
		n.master = nil
		a.in.spend(n)
		a.event(Event{Kind: Fetched, Peer: n.peer, MasterSAE: n.MasterSAE, SlaveSAE: n.SlaveSAEs[0], Pool: n.Pool, Position: n.Position, KeyID: n.KeyID, Class: n.class})
	}
	return keys, nil
}
