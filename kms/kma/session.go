package kma

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

var (
	errNotMet   = errors.New("kma: the peer has not met this process yet")
	errOldStart = errors.New("this is from an earlier start of the peer than one known here (if it is not: is the peer's clock right?)")
)

// link names the session's instances, from us to the peer; the caller has the
// turn or mu.
func (p *pool) link() type1.Link { return type1.Link{From: p.a.instance, To: p.peerInstance} }

// checkLink refuses what was not sent by the peer's process that we met to the
// one that we are. The caller has the turn.
func (p *pool) checkLink(l type1.Link) error {
	if l.To != p.a.instance || l.From != p.peerInstance || l.From == uuid.Nil {
		return &type1.Problem{Code: type1.NotSynced, Detail: "the message is not from or to the instances of this session"}
	}
	return nil
}

// checkStart is checkLink for messages that also name the start of the peer's
// store. The caller has the turn.
func (p *pool) checkStart(l type1.Link, generation uint64) error {
	if err := p.checkLink(l); err != nil {
		return err
	}
	if generation != p.peerGeneration {
		return &type1.Problem{Code: type1.NotSynced, Detail: "the generation is not that of your sync"}
	}
	return nil
}

// state is our side of a sync. The caller has the turn.
func (p *pool) state(ctx context.Context) (type1.SyncState, error) {
	st := type1.SyncState{Instance: p.a.instance, Generation: p.generation, PeerInstance: p.peerInstance}
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return st, err
	}
	blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return st, err
	}
	var received, active []uint64
	for _, b := range blocks {
		switch b.State {
		case key.Received:
			received = append(received, b.Seq)
		case key.Active:
			active = append(active, b.Seq)
		}
	}
	st.PeerGeneration = max(info.PeerGeneration, p.peerGeneration)
	st.Mark, st.PeerMark, st.NewestSeq = type1.Position(info.Mark), type1.Position(info.PeerMark), info.NewestSeq
	st.Received, st.Active = type1.Ranges(received), type1.Ranges(active)
	return st, nil
}

// syncTries is how often in a row a peer is asked that has not met us: once to
// learn its process, once to be met by it, and once more where a generation had
// to be raised first.
const syncTries = 3

// sync opens a session: SYNC until both have met each other, then BURN if leases
// were lost. Without error the pool is synced.
func (p *pool) sync(ctx context.Context) (err error) {
	for range syncTries {
		if err = p.syncOnce(ctx); !errors.Is(err, errNotMet) {
			break
		}
	}
	return err
}

func (p *pool) syncOnce(ctx context.Context) error {
	st, epoch, err := p.beforeSync(ctx)
	if err != nil {
		return err
	}
	resp, err := p.peer.Sync(ctx, type1.SyncRequest{Pool: p.ID, SyncState: st})
	if err != nil {
		return err
	}
	burn, upTo, epoch, err := p.afterSync(ctx, resp.SyncState, epoch)
	if err != nil {
		return err
	}
	if burn != nil {
		r, err := p.peer.Burn(ctx, *burn)
		if err != nil {
			return err
		}
		if len(r.Keep) > 0 {
			p.log.Info("burned what a former process had leased; the peer keeps keys that it has supply notices for", "up_to", upTo, "kept", len(r.Keep))
		}
	}
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.epoch != epoch {
		return errChanged
	}
	p.burnDue, p.synced = false, true
	p.agesAt = time.Time{}
	p.changed()
	p.log.Info("synchronised with the peer", "mark", upTo, "peer_mark", key.Position(resp.Mark))
	return nil
}

func (p *pool) beforeSync(ctx context.Context) (type1.SyncState, uint64, error) {
	if err := p.acquire(ctx); err != nil {
		return type1.SyncState{}, 0, err
	}
	defer p.release()
	st, err := p.state(ctx)
	return st, p.epoch, err
}

// afterSync meets the peer by its answer and prepares the BURN, nil if none is
// due: it is at every start, since keys may have been given to us even if we never
// had a lease. errNotMet if the peer has not met us.
func (p *pool) afterSync(ctx context.Context, st type1.SyncState, epoch uint64) (*type1.BurnRequest, key.Position, uint64, error) {
	if err := p.acquire(ctx); err != nil {
		return nil, 0, 0, err
	}
	defer p.release()
	if p.epoch != epoch && p.peerInstance != st.Instance {
		return nil, 0, 0, errChanged // the answer is from a process that is gone
	}
	if err := p.outgrow(ctx, st); err != nil {
		return nil, 0, 0, err
	}
	if err := p.meet(ctx, st); err != nil {
		return nil, 0, 0, err
	}
	if !p.named || st.PeerInstance != p.a.instance {
		return nil, 0, 0, errNotMet
	}
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return nil, 0, 0, err
	}
	if !p.burnDue {
		return nil, info.Mark, p.epoch, nil
	}
	return &type1.BurnRequest{Pool: p.ID, Link: p.link(), Generation: p.generation, UpTo: type1.Position(info.Mark)}, info.Mark, p.epoch, nil
}

// outgrow gets past a start of this node that the peer, which has not met us,
// knows and that is not ours: our store was restored from a copy, which had
// counted less far. With the turn.
func (p *pool) outgrow(ctx context.Context, st type1.SyncState) error {
	if st.PeerInstance == p.a.instance {
		p.named = true
		return nil
	}
	// Once the peer has named us, it may well know our generation and, if it was
	// restarted, nothing else of us.
	if known := st.PeerGeneration; known < p.generation || known == p.generation && p.named {
		return nil
	}
	g, err := p.a.o.Store.RaiseGeneration(ctx, st.PeerGeneration)
	if err != nil {
		return fmt.Errorf("kma: the peer knows generation %d of this node, which is at %d: %w", st.PeerGeneration, p.generation, err)
	}
	p.a.event("STORE_RESTORED", "alarm", "the peer knows a later start of this node than its own store does: the store was restored from a copy; it goes on above that",
		slog.String("pool", p.ID.String()), slog.Uint64("generation", p.generation), slog.Uint64("peer_knows", st.PeerGeneration), slog.Uint64("raised_to", g))
	p.log.Error("our store counts fewer starts than the peer knows: generation raised", "generation", p.generation, "peer_knows", st.PeerGeneration, "raised_to", g)
	p.generation, p.named = g, false
	return nil
}

// onSync answers the peer's SYNC and meets the peer by it if it is meant for this
// process; with the turn. One that names nobody, or a process that is gone, may
// come late and from a process that is gone itself.
func (p *pool) onSync(ctx context.Context, r type1.SyncRequest) (type1.SyncResponse, error) {
	if r.PeerInstance == p.a.instance {
		p.named = true
		if err := p.meet(ctx, r.SyncState); err != nil && !errors.Is(err, errOldStart) {
			return type1.SyncResponse{}, err
		}
	}
	st, err := p.state(ctx)
	kick(p.hello)
	return type1.SyncResponse{SyncState: st}, err
}

// onBurn destroys what the peer's lost leases left here; with the turn. Its mark may
// be higher than the one that the peer's SYNC told: that one can have been made
// before the peer read its own disk's last lease back.
func (p *pool) onBurn(ctx context.Context, r type1.BurnRequest) (type1.BurnResponse, error) {
	if err := p.checkStart(r.Link, r.Generation); err != nil {
		return type1.BurnResponse{}, err
	}
	upTo := key.Position(r.UpTo)
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return type1.BurnResponse{}, err
	}
	if upTo > info.PeerMark {
		if _, err := p.a.o.Store.AdoptMark(ctx, p.ID, Other, upTo); err != nil {
			return type1.BurnResponse{}, fmt.Errorf("kma: adopt the peer's mark %s: %w", upTo, err)
		}
	}
	// What was given to the peer goes up to where it was when this session began, not
	// up to what the peer says: more can be on its way in this session already.
	kept, gone := p.drop(ctx, upTo, p.burned, "burned by the peer")
	gone += p.dropRaw(ctx, upTo)
	if gone > 0 || len(kept) > 0 {
		p.log.Info("the peer has burned its leases", "up_to", upTo, "destroyed", gone, "kept", len(kept))
	}
	return type1.BurnResponse{Keep: kept}, nil
}

// meet takes in what the peer says of itself, in a request or an answer; with
// the turn. Of an instance that was met before, only a higher generation and a
// higher idea of our own mark count: its own marks come by leases, its blocks by
// M102.
func (p *pool) meet(ctx context.Context, st type1.SyncState) error {
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return err
	}
	if st.Generation < max(info.PeerGeneration, p.peerGeneration) {
		// A message that was under way while the peer restarted; or the peer's
		// store was replaced while its clock was set back.
		return fmt.Errorf("kma: generation %d, known is %d: %w", st.Generation, max(info.PeerGeneration, p.peerGeneration), errOldStart)
	}
	fresh := st.Instance != p.peerInstance
	other := fresh
	if restored := key.Position(st.PeerMark); restored > info.Mark {
		p.reset(ctx, restored, info.PeerMark, other)
		lost, err := p.a.o.Store.AdoptMark(ctx, p.ID, Own, restored)
		if err != nil {
			return fmt.Errorf("kma: adopt our mark %s, which the peer knows: %w", restored, err)
		}
		p.a.event("STORE_RESTORED", "alarm", "the peer knows a later lease of ours than our own store: it was restored from a copy; the keys in question are given up",
			slog.String("pool", p.ID.String()), slog.String("own_mark", info.Mark.String()), slog.String("adopted", restored.String()), slog.Int("given_up", lost))
		p.log.Error("our store is older than what the peer knows: mark adopted", "own_mark", info.Mark, "adopted", restored, "given_up", lost)
		fresh = true
	}
	if !fresh {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.peerGeneration = st.Generation // it may have been raised
		return nil
	}
	p.reset(ctx, max(info.Mark, key.Position(st.PeerMark)), info.PeerMark, other)
	if mark := key.Position(st.Mark); mark > info.PeerMark {
		if _, err := p.a.o.Store.AdoptMark(ctx, p.ID, Other, mark); err != nil {
			return fmt.Errorf("kma: adopt the peer's mark %s: %w", mark, err)
		}
	}
	if err := p.reconcile(ctx, st); err != nil {
		return err
	}
	p.refresh(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.peerGeneration = st.Generation
	p.peerInstance = st.Instance // last: after a failure above, the next SYNC starts anew
	return nil
}

// reset ends the session: the keys that wait to be taken, ours up to mark and those
// that the peer has given up to peerMark, have no use any more. What the peer has leased stays known if it is the same process still, which may
// repeat its last lease. With the turn.
func (p *pool) reset(ctx context.Context, mark, peerMark key.Position, other bool) {
	p.mu.Lock()
	lost := map[bool]*History{ // by whether the keys are ours
		true:  {Side: Own, Last: mark, State: key.Destroyed, Detail: "burned: the session has ended"},
		false: {Side: Other, Last: peerMark, State: key.Destroyed, Detail: "given to this node, burned: the session has ended"},
	}
	for _, k := range slices.Concat(p.raw.own, p.own) {
		h := lost[p.Role.Owns(k.Position)]
		if h.Count++; h.Count == 1 || k.Position < h.First {
			h.First = k.Position
		}
	}
	wipe(p.own)
	p.own = nil
	p.raw.wipeOwn()
	p.giving, p.coming, p.wantAfter = 0, false, time.Time{}
	p.peerInstance = uuid.Nil
	p.synced = false
	p.burnDue = true
	p.epoch++
	p.burned, p.givenBurned = max(p.burned, mark), max(p.givenBurned, peerMark)
	p.changed()
	p.mu.Unlock()
	if other {
		p.lastLease, p.lastAfter, p.lastMissing = 0, 0, nil
	}
	p.mismatch.Store(false)
	for _, h := range lost {
		if h.Count > 0 {
			p.log.Info("burned what was left of our leases: the session has ended", "keys", h.Count, "up_to", h.Last)
			p.record(ctx, *h)
		}
	}
}

// reconcile destroys every block that can never be active on both sides; with
// the turn, after the marks. Both sides come to the same end from each other's
// lists, whichever of them acts first.
func (p *pool) reconcile(ctx context.Context, st type1.SyncState) error {
	blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return err
	}
	for _, b := range blocks {
		why := p.hopeless(&b, st)
		if why == "" {
			continue
		}
		if err := p.a.o.Store.Destroy(ctx, p.ID, b.Seq, key.Destroyed, why); err != nil {
			return fmt.Errorf("kma: destroy block %d, %s: %w", b.Seq, why, err)
		}
		p.blockEvent("SYNC_DESTROYED", "fault", "a block is on one side only; destroyed", b.Seq, slog.Int("keys", b.Left), slog.String("why", why))
	}
	return nil
}

// hopeless says why b can never be active on both sides, "" if it can.
func (p *pool) hopeless(b *BlockInfo, st type1.SyncState) string {
	peerActive, peerReceived := type1.Contains(st.Active, b.Seq), type1.Contains(st.Received, b.Seq)
	switch {
	case b.Left == 0:
		return "" // used up: the store drops it by itself
	case b.State == key.Active && peerActive, b.State == key.Received && peerReceived:
		return ""
	case b.State == key.Active && peerReceived:
		if p.Role == key.Slave {
			return "" // M102's answer was lost; the master asks again
		}
		return "the slave has forgotten that it agreed"
	case b.State == key.Received && peerActive:
		if p.Role == key.Master {
			return ""
		}
		return "this node has forgotten that it agreed"
	case b.State == key.Received && b.Seq > st.NewestSeq:
		return "" // the peer's file may still come
	}
	return "the peer does not have it"
}

func (p *pool) blockEvent(code, severity, text string, seq uint64, attrs ...slog.Attr) {
	attrs = append([]slog.Attr{slog.String("pool", p.ID.String()), slog.String("peer", p.Peer), slog.Uint64("seq", seq)}, attrs...)
	p.a.event(code, severity, text, attrs...)
	args := make([]any, len(attrs))
	for i, a := range attrs {
		args[i] = a
	}
	p.log.Warn(text, append([]any{"code", code}, args...)...)
}

// record writes history. What was done stands, whatever becomes of its record.
func (p *pool) record(ctx context.Context, h History) {
	h.Pool = p.ID
	if err := p.a.o.Store.Record(context.WithoutCancel(ctx), []History{h}); err != nil {
		p.log.Error("usage history not written", "err", err)
	}
}
