package kma

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// validateBatch is how many seqs one M102 carries.
const validateBatch = 64

var errChanged = errors.New("kma: the session changed during a call")

// validate is M102 at the master: it proves the oldest received blocks to the
// slave. It reports whether there may be more to do at once.
func (p *pool) validate(ctx context.Context) (again bool, err error) {
	if time.Now().Before(p.ask) {
		return false, nil
	}
	req, batch, epoch, err := p.openValidate(ctx)
	if err != nil || len(batch) == 0 && len(p.tell) == 0 {
		return false, err
	}
	resp, err := p.peer.Validate(ctx, req)
	if type1.CodeOf(err) == type1.AlgorithmMismatch && req.Algorithm != p.Algorithm {
		return true, p.outdated(ctx, batch, epoch)
	}
	if type1.CodeOf(err) == type1.AlgorithmMismatch {
		_ = p.otherAlgorithm("other") // leases of what was agreed before go on
		p.ask = time.Now().Add(p.a.o.RetryMax)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	p.tell = p.tell[len(req.Destroyed):]
	if err := p.acquire(ctx); err != nil {
		return false, err
	}
	defer p.release()
	defer p.refresh(ctx)
	if p.epoch != epoch {
		return false, errChanged
	}
	if len(resp.Results) > len(batch) {
		return false, fmt.Errorf("kma: the slave answered %d of %d seqs in M102", len(resp.Results), len(batch))
	}
	agreed := 0
	for i, r := range resp.Results {
		b := &batch[i]
		if r.Seq != b.Seq {
			return false, fmt.Errorf("kma: the slave answered seq %d for %d in M102", r.Seq, b.Seq)
		}
		if r.Verdict == type1.Missing {
			p.ask = time.Now().Add(p.a.o.ValidateEvery)
			break
		}
		if err := p.conclude(ctx, b, r); err != nil {
			return false, err
		}
		agreed++
	}
	return agreed == len(batch), nil
}

// outdated destroys the master's blocks of a batch that were taken in under an
// algorithm that neither end has now: they can never be agreed, and nothing
// after them could become active.
func (p *pool) outdated(ctx context.Context, batch []BlockInfo, epoch uint64) error {
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	defer p.refresh(ctx)
	if p.epoch != epoch {
		return errChanged
	}
	for i := range batch {
		if err := p.destroy(ctx, "M102_ALGORITHM", "fault", &batch[i], "it was taken in under "+batch[i].Algorithm+", now it is "+p.Algorithm); err != nil {
			return err
		}
	}
	return nil
}

func (p *pool) openValidate(ctx context.Context) (type1.ValidateRequest, []BlockInfo, uint64, error) {
	var req type1.ValidateRequest
	if err := p.acquire(ctx); err != nil {
		return req, nil, 0, err
	}
	defer p.release()
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return req, nil, 0, err
	}
	var batch []BlockInfo
	if info.Received > 0 {
		blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
		if err != nil {
			return req, nil, 0, err
		}
		for _, b := range blocks {
			if b.State == key.Received && len(batch) < validateBatch && (len(batch) == 0 || b.Algorithm == batch[0].Algorithm) {
				batch = append(batch, b)
			} else if b.State == key.Received {
				break // the batch is a prefix of what is received
			}
		}
	}
	req = type1.ValidateRequest{Pool: p.ID, Link: p.link(), Algorithm: p.Algorithm, Items: []type1.ValidateItem{}, Destroyed: p.tell[:min(len(p.tell), validateBatch)]}
	for i := range batch {
		req.Algorithm = batch[i].Algorithm
		req.Items = append(req.Items, type1.ValidateItem{Seq: batch[i].Seq, Tag: proof(&batch[i], 'M')})
	}
	return req, batch, p.epoch, nil
}

// conclude does with the master's block what the slave's verdict asks for; with
// the turn.
func (p *pool) conclude(ctx context.Context, b *BlockInfo, r type1.ValidateResult) error {
	var code, severity, why string
	switch {
	case r.Verdict == type1.Agreed && proves(b, 'S', r.Tag):
		if err := p.a.o.Store.Activate(ctx, p.ID, b.Seq); err != nil {
			return fmt.Errorf("kma: activate block %d: %w", b.Seq, err)
		}
		p.log.Info("M102 agreed", "seq", b.Seq, "keys", b.Count, "algorithm", b.Algorithm)
		return nil
	case r.Verdict == type1.Agreed:
		p.tell = append(p.tell, b.Seq)
		code, severity, why = "M102_BAD_PROOF", "alarm", "the slave's proof of its key data is wrong"
	case r.Verdict == type1.Mismatch:
		code, severity, why = "M102_MISMATCH", "alarm", "the slave has other key data"
	default:
		code, severity, why = "M102_NEVER", "fault", "the slave has no key data and will get none"
	}
	return p.destroy(ctx, code, severity, b, why)
}

func (p *pool) destroy(ctx context.Context, code, severity string, b *BlockInfo, why string) error {
	if err := p.a.o.Store.Destroy(ctx, p.ID, b.Seq, key.Destroyed, "M102: "+why); err != nil {
		return fmt.Errorf("kma: destroy block %d, %s: %w", b.Seq, why, err)
	}
	p.blockEvent(code, severity, "M102: "+why+"; its keys are destroyed", b.Seq, slog.Int("keys", b.Left))
	return nil
}

// onValidate is M102 at the slave; with the turn.
func (p *pool) onValidate(ctx context.Context, r type1.ValidateRequest) (type1.ValidateResponse, error) {
	out := type1.ValidateResponse{Results: []type1.ValidateResult{}}
	if p.Role != key.Slave {
		return out, &type1.Problem{Code: type1.Conflict, Detail: "M102 is the master's to start, and this node is the master"}
	}
	if err := p.checkLink(r.Link); err != nil {
		return out, err
	}
	if r.Algorithm != p.Algorithm {
		return out, p.otherAlgorithm(r.Algorithm)
	}
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return out, err
	}
	list, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return out, err
	}
	defer p.refresh(ctx)
	blocks := make(map[uint64]*BlockInfo, len(list))
	for i := range list {
		blocks[list[i].Seq] = &list[i]
	}
	if err := p.forsake(ctx, r, list, blocks); err != nil {
		return out, err
	}
	for _, item := range r.Items {
		v, err := p.judge(ctx, item, blocks[item.Seq], info.NewestSeq)
		if err != nil {
			return out, err
		}
		out.Results = append(out.Results, v)
		if v.Verdict == type1.Missing {
			break // so are all later ones
		}
	}
	kick(p.work)
	return out, nil
}

func (p *pool) otherAlgorithm(theirs string) error {
	if !p.mismatch.Swap(true) {
		p.a.event("M102_ALGORITHM", "alarm", "the two ends are configured with different algorithms of M102: no key becomes active",
			slog.String("pool", p.ID.String()), slog.String("peer", p.Peer), slog.String("ours", p.Algorithm), slog.String("theirs", theirs))
	}
	return &type1.Problem{Code: type1.AlgorithmMismatch, Detail: "this node is configured with " + p.Algorithm}
}

// forsake destroys what the master has destroyed, and what it can never have:
// received blocks below the request's last one that are not in it.
func (p *pool) forsake(ctx context.Context, r type1.ValidateRequest, list []BlockInfo, blocks map[uint64]*BlockInfo) error {
	gone := map[uint64]string{}
	for _, seq := range r.Destroyed {
		gone[seq] = "the master has refused this side's proof"
	}
	if n := len(r.Items); n > 0 {
		asked := make(map[uint64]bool, n)
		for _, i := range r.Items {
			asked[i.Seq] = true
		}
		for _, b := range list {
			if b.State == key.Received && b.Seq < r.Items[n-1].Seq && !asked[b.Seq] {
				gone[b.Seq] = "the master has no key data and will get none"
			}
		}
	}
	for _, b := range list {
		why, ok := gone[b.Seq]
		if !ok {
			continue
		}
		if err := p.destroy(ctx, "M102_NEVER", "fault", &b, why); err != nil {
			return err
		}
		delete(blocks, b.Seq)
	}
	return nil
}

// judge compares the master's proof for one seq with ours, b, which is nil if
// we have none. A seq that was agreed once is agreed again for the same bytes
// only.
func (p *pool) judge(ctx context.Context, item type1.ValidateItem, b *BlockInfo, newest uint64) (type1.ValidateResult, error) {
	v := type1.ValidateResult{Seq: item.Seq}
	switch {
	case b == nil && item.Seq > newest:
		v.Verdict = type1.Missing
		return v, nil
	case b == nil:
		v.Verdict = type1.Never
		return v, nil
	case b.Algorithm != p.Algorithm || !proves(b, 'M', item.Tag):
		v.Verdict = type1.Mismatch
		return v, p.destroy(ctx, "M102_MISMATCH", "alarm", b, "the master has other key data")
	}
	if b.State == key.Received {
		if err := p.a.o.Store.Activate(ctx, p.ID, b.Seq); err != nil {
			return v, fmt.Errorf("kma: activate block %d: %w", b.Seq, err)
		}
		p.log.Info("M102 agreed", "seq", b.Seq, "keys", b.Count, "algorithm", b.Algorithm)
	}
	v.Verdict, v.Tag = type1.Agreed, proof(b, 'S')
	return v, nil
}
