package kma

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	//lint:ignore SA1019 see the package comment
	"golang.org/x/crypto/poly1305"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// counting is key data 0, 1, 2, ... for n keys.
func counting(n int) []byte {
	b := make([]byte, n*key.MasterSize+keyfile.Trailer)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

// TestTags rebuilds M102's messages by hand from the package comment, and pins
// one value of each kind: both ends of an upgrade must agree.
func TestTags(t *testing.T) {
	data := counting(3)
	f := sampleFile(t, key.Master, 0x0102030405, data)
	defer f.Wipe()
	b, err := reformat(f, key.Direct, Poly1305)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Keys.Wipe()
	keys, km, ks, kid := data[:96], data[96:128], data[128:160], data[160:192]
	head := append(pairID[:], binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, 0x0102030405), 192)...)
	mac := func(k []byte, parts ...[]byte) (out [16]byte) {
		poly1305.Sum(&out, bytes.Join(parts, nil), (*[32]byte)(k))
		return out
	}
	if want := mac(km, []byte("M"), head, keys, ks, kid); b.TagM != want {
		t.Errorf("TagM %x, want %x", b.TagM, want)
	}
	if want := mac(ks, []byte("S"), head, keys, kid); b.TagS != want {
		t.Errorf("TagS %x, want %x", b.TagS, want)
	}
	if !bytes.Equal(b.Keys.Bytes(), keys) || len(b.IDs) != 3 || b.IDs[2] != key.DeriveID(kid, pairID, 0x0102030405, 2) {
		t.Error("keys or Key-IDs are wrong")
	}
	pins := map[string]string{
		Poly1305: "b9af64cbd20b7cfd6f945488fe5e99c2 7607e2fc270cb68e84a891a4f98cacae", SHA256: "58916d11f9de38fe0d603a2105bc4b170b3473780c5c1f7deda41bf9a89a3e0c 39cf6ffdcb22ad57ad23346c94c382031e26227fdd94991826af12aa55656ea1", SHA3: "8e34831ea41918b93f0cb44ee6086d6a752e02d38194c0000503c6731b66d497 66ab7d9495e8e019372c8ac6fbe37a7308023f01726bf49b26beb6e25458f71b",
	}
	for alg, want := range pins {
		b, err := reformat(f, key.Direct, alg)
		if err != nil {
			t.Fatal(err)
		}
		b.Keys.Wipe()
		i := BlockInfo{Algorithm: alg, TagM: b.TagM, TagS: b.TagS, Digest: b.Digest}
		if got := hex.EncodeToString(proof(&i, 'M')) + " " + hex.EncodeToString(proof(&i, 'S')); got != want {
			t.Errorf("%s: %s, want %s", alg, got, want)
		}
	}
}

// forger changes the slave's proof of one seq.
type forger struct {
	Peer
	seq uint64
}

func (f forger) Validate(ctx context.Context, r type1.ValidateRequest) (type1.ValidateResponse, error) {
	out, err := f.Peer.Validate(ctx, r)
	for i := range out.Results {
		if out.Results[i].Seq == f.seq && len(out.Results[i].Tag) > 0 {
			out.Results[i].Tag[0] ^= 1
		}
	}
	return out, err
}

// TestSlaveMustProve: without the slave's proof there is no agreement, and the
// slave, which had agreed, is told.
func TestSlaveMustProve(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.a.tune = func(o *Options) { o.Peers["b"] = forger{o.Peers["b"], 1} }
	w.both(l.keep)
	w.feed(1, 8, nil)
	w.want("an alarm", func() bool { return w.a.events.count("M102_BAD_PROOF") == 1 })
	w.want("both without it", func() bool {
		return w.info(w.a).Active+w.info(w.a).Received+w.info(w.b).Active+w.info(w.b).Received == 0
	})
	w.feed(2, 8, nil)
	w.want("agreement on seq 2", func() bool { return w.info(w.b).NewestSeq == 2 && w.agreed() })
}

// slave is node b alone; the test plays the master.
type slave struct {
	*world
	ag     *Agent
	me, it uuid.UUID
	events *eventLog
}

func newSlave(t *testing.T, keep func(uuid.UUID, key.Position) []key.ID) *slave {
	t.Helper()
	return newSlaveWith(t, keep, nil)
}

func newSlaveWith(t *testing.T, keep func(uuid.UUID, key.Position) []key.ID, tune func(*Options)) *slave {
	t.Helper()
	w := newWorld(t, nil)
	w.b.tune = tune
	p := w.start(w.b, keep)
	t.Cleanup(func() { w.halt(w.b) })
	s := &slave{world: w, ag: p.agent, me: uuid.New(), it: p.agent.instance, events: w.b.events}
	s.sync(t, s.me, 5, type1.SyncState{NewestSeq: 100})
	return s
}

// sync says st to the slave as one who has met it, and gives what it answers.
func (s *slave) sync(t *testing.T, me uuid.UUID, generation uint64, st type1.SyncState) type1.SyncState {
	t.Helper()
	st.PeerInstance = s.it
	return s.say(t, me, generation, st)
}

func (s *slave) say(t *testing.T, me uuid.UUID, generation uint64, st type1.SyncState) type1.SyncState {
	t.Helper()
	st.Instance, st.Generation = me, generation
	r, err := s.ag.Sync(t.Context(), "a", type1.SyncRequest{Pool: pairID, SyncState: st})
	if err != nil {
		t.Fatal(err)
	}
	return r.SyncState
}

func (s *slave) link() type1.Link { return type1.Link{From: s.me, To: s.it} }

// file brings seq in and gives what the master would send of it.
func (s *slave) file(t *testing.T, seq uint64, keys int) Block {
	t.Helper()
	data := counting(keys)
	data[0] = byte(seq)
	s.write(s.b, seq, data)
	s.want("the file", func() bool { return s.info(s.b).NewestSeq == seq })
	f := sampleFile(t, key.Master, seq, data)
	defer f.Wipe()
	b, err := reformat(f, key.Direct, Poly1305)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Keys.Wipe)
	return b
}

func (s *slave) validate(t *testing.T, blocks ...Block) ([]type1.ValidateResult, error) {
	t.Helper()
	r := type1.ValidateRequest{Pool: pairID, Link: s.link(), Algorithm: Poly1305}
	for i := range blocks {
		r.Items = append(r.Items, type1.ValidateItem{Seq: blocks[i].Seq, Tag: blocks[i].TagM[:]})
	}
	out, err := s.ag.Validate(t.Context(), "a", r)
	return out.Results, err
}

func (s *slave) verdicts(t *testing.T, blocks ...Block) []type1.Verdict {
	t.Helper()
	rs, err := s.validate(t, blocks...)
	if err != nil {
		t.Fatal(err)
	}
	var out []type1.Verdict
	for i, r := range rs {
		if (r.Verdict == type1.Agreed) != bytes.Equal(r.Tag, blocks[i].TagS[:]) {
			t.Errorf("seq %d: %s with tag %x", r.Seq, r.Verdict, r.Tag)
		}
		out = append(out, r.Verdict)
	}
	return out
}

func (s *slave) lease(t *testing.T, after, mark key.Position, seqs ...uint64) (type1.LeaseResponse, error) {
	t.Helper()
	return s.leaseFor(t, type1.PurposeSupply, after, mark, seqs...)
}

func (s *slave) leaseFor(t *testing.T, purpose string, after, mark key.Position, seqs ...uint64) (type1.LeaseResponse, error) {
	t.Helper()
	return s.ag.Lease(t.Context(), "a", type1.LeaseRequest{
		Pool: pairID, Link: s.link(), Generation: 5, Purpose: purpose,
		After: type1.Position(after), Mark: type1.Position(mark), Floor: type1.Position(after), Seqs: seqs,
	})
}

func TestVerdicts(t *testing.T) {
	s := newSlave(t, nil)
	one, two, five := s.file(t, 1, 4), s.file(t, 2, 4), s.file(t, 5, 4)
	other := one
	other.TagM[3] ^= 1
	three, six := five, five
	three.Seq, six.Seq = 3, 6
	if got, want := s.verdicts(t, one), []type1.Verdict{type1.Agreed}; !reflect.DeepEqual(got, want) {
		t.Fatalf("first: %v", got)
	}
	if got, want := s.verdicts(t, one), []type1.Verdict{type1.Agreed}; !reflect.DeepEqual(got, want) {
		t.Errorf("repeat: %v", got)
	}
	// 3 never came, 5 is good, 6 may come; 2 is not in the master's list.
	if got, want := s.verdicts(t, three, five, six, six), []type1.Verdict{type1.Never, type1.Agreed, type1.Missing}; !reflect.DeepEqual(got, want) {
		t.Errorf("batch: %v, want %v", got, want)
	}
	if got, want := s.verdicts(t, two), []type1.Verdict{type1.Never}; !reflect.DeepEqual(got, want) {
		t.Errorf("a block the master had passed over: %v, want %v", got, want)
	}
	if got, want := s.verdicts(t, other), []type1.Verdict{type1.Mismatch}; !reflect.DeepEqual(got, want) {
		t.Errorf("an agreed seq over other bytes: %v", got)
	}
	if got, want := s.verdicts(t, one), []type1.Verdict{type1.Never}; !reflect.DeepEqual(got, want) {
		t.Errorf("after that: %v", got)
	}
	if i := s.info(s.b); i.Active != 4 || i.Received != 0 {
		t.Errorf("left: %+v", i)
	}
}

func code(err error) type1.Code { return type1.CodeOf(err) }

func TestLeaseRules(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 20)
	at := func(i uint32) key.Position { return key.At(1, i) }
	if _, err := s.lease(t, 0, at(6), 1); code(err) != type1.NotValidated {
		t.Errorf("a block not validated: %v", err)
	}
	s.verdicts(t, one)
	if r, err := s.lease(t, 0, at(6), 1); err != nil || r.Mark != type1.Position(at(6)) || r.Missing != nil {
		t.Fatalf("a good lease: %+v, %v", r, err)
	}
	claim := func(i uint32) error {
		m, _, err := s.ag.Claim("a", pairID, at(i), one.IDs[i])
		if err == nil {
			if !bytes.Equal(m.Bytes(), one.Keys.Bytes()[i*32:i*32+32]) {
				t.Errorf("key %d has other bytes", i)
			}
			m.Wipe()
		}
		return err
	}
	if err := claim(2); err != nil {
		t.Error(err)
	}
	if r, err := s.lease(t, 0, at(6), 1); err != nil || r.Mark != type1.Position(at(6)) {
		t.Errorf("its repeat: %+v, %v", r, err)
	}
	if err := claim(2); !errors.Is(err, ErrGone) {
		t.Errorf("claimed again after the repeat: %v", err)
	}
	for _, i := range []uint32{1, 3, 8} { // our own, our own, beyond the lease
		if err := claim(i); !errors.Is(err, ErrGone) {
			t.Errorf("claim of %d: %v", i, err)
		}
	}
	if _, err := s.lease(t, 0, at(8), 1); code(err) != type1.Conflict {
		t.Errorf("a lease that reaches back: %v", err)
	}
	if _, err := s.lease(t, at(10), key.At(7, 0), 7); code(err) != type1.NotValidated {
		t.Errorf("a lease beyond what was taken in: %v", err)
	}
	// The owner skips (6, 10]: given up. It lists a block that is not here.
	three := s.file(t, 3, 4)
	s.verdicts(t, three)
	if r, err := s.lease(t, at(10), key.At(3, 2), 1, 2, 3); err != nil || !reflect.DeepEqual(r.Missing, []uint64{2}) {
		t.Errorf("a lease over a hole: %+v, %v", r, err)
	}
	for i, want := range map[uint32]error{4: nil, 8: ErrGone, 10: ErrGone, 12: nil, 18: nil} {
		if err := claim(i); !errors.Is(err, want) {
			t.Errorf("claim of %d: %v, want %v", i, err, want)
		}
	}
	if _, err := s.lease(t, at(10), key.At(3, 3), 3); code(err) != type1.Conflict {
		t.Errorf("another lease from the same place: %v", err)
	}
}

// TestLeaseOfTooManyKeys: what one message moves to memory is bounded, and a
// refused lease changes nothing.
func TestLeaseOfTooManyKeys(t *testing.T) {
	s := newSlaveWith(t, nil, func(o *Options) { o.MaxHeld = 8 })
	one := s.file(t, 1, 40)
	s.verdicts(t, one)
	if _, err := s.lease(t, 0, key.At(1, 39), 1); code(err) != type1.Conflict {
		t.Errorf("20 keys where 8 are held: %v", err)
	}
	if i := s.info(s.b); i.PeerMark != 0 {
		t.Errorf("the refused lease has moved the mark to %s", i.PeerMark)
	}
	if _, err := s.lease(t, key.At(1, 3), key.At(1, 19), 1); err != nil {
		t.Errorf("8 keys: %v", err)
	}
}

func TestOwnedIn(t *testing.T) {
	b := &BlockInfo{Seq: 5, Count: 7}
	for _, after := range []key.Position{0, key.At(4, 9), key.At(5, 0), key.At(5, 1), key.At(5, 6), key.At(5, 99), key.At(6, 0)} {
		for _, mark := range []key.Position{key.At(4, 1), key.At(5, 0), key.At(5, 3), key.At(5, 6), key.At(5, 50), key.At(9, 0)} {
			for _, role := range []key.Role{key.Master, key.Slave} {
				want := 0
				for i := range uint32(b.Count) {
					if p := key.At(b.Seq, i); p > after && p <= mark && role.Owns(p) {
						want++
					}
				}
				if got := ownedIn(role, b, after, mark); got != want {
					t.Errorf("%s in (%s, %s]: %d, want %d", role, after, mark, got, want)
				}
			}
		}
	}
}

// hangUp is a store whose caller hangs up in the middle of a lease.
type hangUp struct {
	Store
	after atomic.Pointer[context.CancelFunc]
}

func (h *hangUp) Advance(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, purpose string, generation uint64) error {
	err := h.Store.Advance(ctx, pool, side, mark, purpose, generation)
	if f := h.after.Swap(nil); f != nil {
		(*f)()
	}
	return err
}

// TestLeaseOfAnOwnerThatHangsUp: between the mark and the keys nothing comes
// from outside, or the repeat would find the mark and no keys, and all of them
// would be burned.
func TestLeaseOfAnOwnerThatHangsUp(t *testing.T) {
	h := &hangUp{}
	s := newSlaveWith(t, nil, func(o *Options) { h.Store, o.Store = o.Store, h })
	one := s.file(t, 1, 20)
	s.verdicts(t, one)
	ctx, cancel := context.WithCancel(t.Context())
	h.after.Store(&cancel)
	mark := key.At(1, 6)
	_, err := s.ag.Lease(ctx, "a", type1.LeaseRequest{Pool: pairID, Link: s.link(), Generation: 5, Purpose: type1.PurposeSupply, Mark: type1.Position(mark), Seqs: []uint64{1}})
	if ctx.Err() == nil {
		t.Fatal("the call was not cut off")
	}
	if r, err2 := s.lease(t, 0, mark, 1); err2 != nil || r.Mark != type1.Position(mark) {
		t.Fatalf("the repeat: %+v, %v (the call that was cut off: %v)", r, err2, err)
	}
	m, _, err := s.ag.Claim("a", pairID, key.At(1, 2), one.IDs[2])
	if err != nil {
		t.Fatal(err)
	}
	m.Wipe()
}

func TestSessionRules(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 20)
	s.verdicts(t, one)
	right := s.me
	for name, l := range map[string]type1.Link{"stranger": {From: uuid.New(), To: s.it}, "our former self": {From: s.me, To: uuid.New()}} {
		if _, err := s.ag.Lease(t.Context(), "a", type1.LeaseRequest{Pool: pairID, Link: l, Mark: type1.Position(key.At(1, 4)), Purpose: "supply"}); code(err) != type1.NotSynced {
			t.Errorf("lease, %s: %v", name, err)
		}
		if _, err := s.ag.Burn(t.Context(), "a", type1.BurnRequest{Pool: pairID, Link: l}); code(err) != type1.NotSynced {
			t.Errorf("burn, %s: %v", name, err)
		}
		if _, err := s.ag.Validate(t.Context(), "a", type1.ValidateRequest{Pool: pairID, Link: l, Algorithm: Poly1305}); code(err) != type1.NotSynced {
			t.Errorf("validate, %s: %v", name, err)
		}
	}
	if st := s.sync(t, uuid.New(), 4, type1.SyncState{}); st.PeerInstance != s.me || st.PeerGeneration != 5 {
		t.Errorf("sync of an earlier start: %+v", st)
	}
	if _, err := s.ag.Sync(t.Context(), "a", type1.SyncRequest{Pool: uuid.New()}); code(err) != type1.NotAuthorised {
		t.Errorf("an unknown pool: %v", err)
	}
	if _, err := s.ag.Lease(t.Context(), "a", type1.LeaseRequest{Pool: pairID, Link: s.link(), Generation: 6, Mark: type1.Position(key.At(1, 4)), Purpose: "supply"}); code(err) != type1.NotSynced {
		t.Errorf("a lease of another start: %v", err)
	}
	if _, err := s.lease(t, 0, key.At(1, 6), 1); err != nil {
		t.Fatal(err)
	}
	// A repeated sync of the same process changes nothing, whatever it says.
	s.sync(t, right, 5, type1.SyncState{NewestSeq: 100})
	if m, _, err := s.ag.Claim("a", pairID, key.At(1, 0), one.IDs[0]); err != nil {
		t.Errorf("after a repeated sync: %v", err)
	} else {
		m.Wipe()
	}
	// A new process knows of seq 1; its burn takes what the old one had leased.
	s.me = uuid.New()
	s.sync(t, s.me, 6, type1.SyncState{NewestSeq: 100, Mark: type1.Position(key.At(1, 8)), Active: []type1.Range{{First: 1, Last: 1}}})
	if i := s.info(s.b); i.PeerMark != key.At(1, 8) || i.Active == 0 {
		t.Errorf("after the meeting: %+v", i)
	}
	if _, err := s.ag.Burn(t.Context(), "a", type1.BurnRequest{Pool: pairID, Link: s.link(), Generation: 6, UpTo: type1.Position(key.At(1, 8))}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.ag.Claim("a", pairID, key.At(1, 2), one.IDs[2]); !errors.Is(err, ErrGone) {
		t.Errorf("a burned key: %v", err)
	}
	// The next one does not: a block on one side only.
	s.me = uuid.New()
	s.sync(t, s.me, 7, type1.SyncState{NewestSeq: 100, Mark: type1.Position(key.At(1, 8))})
	if i := s.info(s.b); i.Active != 0 || s.events.count("SYNC_DESTROYED") != 1 {
		t.Errorf("a block that only this side has: %+v, %v", i, s.events.codes)
	}
}

// TestBurnIsDurable: a BURN above the mark that this node knows, whose LEASE was lost
// and whose SYNC came late, takes the keys from the disk, too: they were leased, so
// the peer never reads them again.
func TestBurnIsDurable(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 20)
	s.verdicts(t, one)
	s.me = uuid.New()
	s.sync(t, s.me, 6, type1.SyncState{NewestSeq: 1, Active: []type1.Range{{First: 1, Last: 1}}})
	before := s.info(s.b).Active
	mark := key.At(1, 8)
	if _, err := s.ag.Burn(t.Context(), "a", type1.BurnRequest{Pool: pairID, Link: s.link(), Generation: 6, UpTo: type1.Position(mark)}); err != nil {
		t.Fatal(err)
	}
	if i := s.info(s.b); i.PeerMark != mark || i.Active >= before {
		t.Errorf("after the burn of %d active keys up to %s: %+v", before, mark, i)
	}
	if _, err := s.lease(t, 0, key.At(1, 6), 1); err == nil {
		t.Error("a lease of burned keys was acknowledged")
	}
}

// TestSyncForAnother: a SYNC that names no process, or one that is gone, is
// answered, and nothing is believed of what it says: it can be older than what the
// two have agreed on since.
func TestSyncForAnother(t *testing.T) {
	s := newSlave(t, nil)
	old := type1.SyncState{NewestSeq: 100, PeerInstance: s.it} // made before there was a block, and late
	one := s.file(t, 1, 20)
	s.verdicts(t, one)
	s.kill(s.b)
	p := s.start(s.b, nil)
	s.ag, s.it = p.agent, p.agent.instance
	now := type1.SyncState{NewestSeq: 100, Active: []type1.Range{{First: 1, Last: 1}}}
	for name, named := range map[string]uuid.UUID{"the process before": old.PeerInstance, "nobody": uuid.Nil} {
		old.PeerInstance = named
		if st := s.say(t, s.me, 5, old); st.Instance != s.it || st.PeerInstance != uuid.Nil {
			t.Errorf("a SYNC for %s: %+v", name, st)
		}
		if i := s.info(s.b); i.Active != 20 {
			t.Fatalf("a SYNC for %s has changed what is active: %+v", name, i)
		}
		if _, err := s.lease(t, 0, key.At(1, 6), 1); code(err) != type1.NotSynced {
			t.Errorf("a lease after a SYNC for %s: %v", name, err)
		}
	}
	if st := s.sync(t, s.me, 5, now); st.PeerInstance != s.me || st.PeerGeneration != 5 {
		t.Errorf("a SYNC for this process: %+v", st)
	}
	if _, err := s.lease(t, 0, key.At(1, 6), 1); err != nil {
		t.Error(err)
	}
}

// TestRaisedGeneration: a process that was met may raise its generation; what it
// sent before counts no more.
func TestRaisedGeneration(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 20)
	s.verdicts(t, one)
	s.sync(t, s.me, 6, type1.SyncState{NewestSeq: 100})
	if _, err := s.lease(t, 0, key.At(1, 6), 1); code(err) != type1.NotSynced {
		t.Errorf("a lease of the generation before: %v", err)
	}
	if _, err := s.ag.Burn(t.Context(), "a", type1.BurnRequest{Pool: pairID, Link: s.link(), Generation: 6}); err != nil {
		t.Error(err)
	}
	if i := s.info(s.b); i.Active != 20 {
		t.Errorf("it was met anew: %+v", i)
	}
}

// TestOutgrow: which generations of ours, in the answer of a peer that has not met
// us, show that our store was restored. A peer that was restarted has ours from us.
func TestOutgrow(t *testing.T) {
	s := newSlave(t, nil)
	p := s.ag.pools[pairID]
	if err := p.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer p.release()
	for _, tt := range []struct {
		known  int // above ours
		named  bool
		raised uint64
	}{{-1, false, 0}, {0, true, 0}, {0, false, 1}, {1, true, 2}, {7, false, 8}} {
		before, alarms := p.generation, s.events.count("STORE_RESTORED")
		p.named = tt.named
		if err := p.outgrow(t.Context(), type1.SyncState{PeerGeneration: uint64(int(before) + tt.known)}); err != nil {
			t.Fatal(err)
		}
		if n := s.events.count("STORE_RESTORED") - alarms; p.generation-before != tt.raised || n != min(1, int(tt.raised)) || tt.raised > 0 && p.named {
			t.Errorf("%+v: raised by %d, %d alarms", tt, p.generation-before, n)
		}
	}
	if g := s.ag.o.Store.Generation(); g != p.generation {
		t.Errorf("the store is at %d, the pool at %d", g, p.generation)
	}
}

// TestLeaseSurvivesReset: a node that finds itself restored still knows the last
// lease of a peer that is the same process: its acknowledgement may have been lost.
func TestLeaseSurvivesReset(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 20)
	s.verdicts(t, one)
	if _, err := s.lease(t, 0, key.At(1, 6), 1); err != nil {
		t.Fatal(err)
	}
	s.sync(t, s.me, 5, type1.SyncState{NewestSeq: 100, PeerMark: type1.Position(key.At(1, 9)), Active: []type1.Range{{First: 1, Last: 1}}})
	if i := s.info(s.b); i.Mark != key.At(1, 9) || s.events.count("STORE_RESTORED") != 1 {
		t.Fatalf("it does not know that it was restored: %+v, %v", i, s.events.codes)
	}
	if _, err := s.lease(t, 0, key.At(1, 6), 1); err != nil {
		t.Errorf("the lease's repeat: %v", err)
	}
	m, _, err := s.ag.Claim("a", pairID, key.At(1, 2), one.IDs[2])
	if err != nil {
		t.Fatal(err)
	}
	m.Wipe()
}

func TestHopeless(t *testing.T) {
	const none, received, active = 0, 1, 2
	for _, tt := range []struct {
		ours   key.State
		theirs int
		newest uint64 // of the peer; the block is 5
		master bool   // whether the block stays at a master
		slave  bool
	}{
		{key.Active, active, 9, true, true},
		{key.Active, received, 9, false, true},
		{key.Active, none, 9, false, false},
		{key.Active, none, 4, false, false},
		{key.Received, active, 9, true, false},
		{key.Received, received, 9, true, true},
		{key.Received, none, 4, true, true},
		{key.Received, none, 5, false, false},
	} {
		st := type1.SyncState{NewestSeq: tt.newest}
		switch tt.theirs {
		case received:
			st.Received = []type1.Range{{First: 5, Last: 5}}
		case active:
			st.Active = []type1.Range{{First: 5, Last: 5}}
		}
		for role, want := range map[key.Role]bool{key.Master: tt.master, key.Slave: tt.slave} {
			p := &pool{Pool: Pool{Role: role}}
			if why := p.hopeless(&BlockInfo{Seq: 5, State: tt.ours, Left: 1}, st); (why == "") != want {
				t.Errorf("%s, %+v: %q", role, tt, why)
			}
		}
	}
}

// TestSweep: keys the peer used long ago and never sent a notice for go; the
// noticed ones and those it may still use stay.
func TestSweep(t *testing.T) {
	var noticed key.ID
	s := newSlave(t, func(uuid.UUID, key.Position) []key.ID { return []key.ID{noticed} })
	one := s.file(t, 1, 40)
	noticed = one.IDs[2]
	s.verdicts(t, one)
	for _, r := range [][2]uint32{{0, 10}, {10, 20}} {
		after := key.At(1, r[0])
		if r[0] == 0 {
			after = 0
		}
		if _, err := s.lease(t, after, key.At(1, r[1]), 1); err != nil {
			t.Fatal(err)
		}
	}
	p := s.ag.pools[pairID]
	p.sweep(t.Context(), time.Now().Add(s.ag.o.NoticeLife/2))
	p.mu.Lock()
	before := len(p.held)
	p.mu.Unlock()
	p.sweep(t.Context(), time.Now().Add(2*s.ag.o.NoticeLife))
	p.mu.Lock()
	defer p.mu.Unlock()
	var left []key.Position
	for pos := range p.held {
		left = append(left, pos)
	}
	if before != 11 || len(left) != 6 || p.held[key.At(1, 2)].ID != noticed {
		t.Errorf("%d keys before, %v after: want the noticed one and those above 1/10", before, left)
	}
	rows, err := s.ag.o.Store.(*inventory).History(t.Context(), store.HistoryQuery{Pool: pairID, Limit: 100})
	if err != nil {
		t.Fatal(err)
	}
	if r := rows[0]; r.State != key.Destroyed || r.Side != store.Peer || r.Count != before-len(left) { // stranded is the owner's to say
		t.Errorf("history: %+v", r)
	}
}

// TestNothingLeftInMemory: Run wipes what it had, and nothing is given after.
func TestNothingLeftInMemory(t *testing.T) {
	w := newWorld(t, nil)
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 100, nil)
	w.want("leases on both sides", func() bool {
		for _, n := range []*node{w.a, w.b} {
			p := n.cur.Load().agent.pools[pairID]
			p.mu.Lock()
			ok := len(p.own) > 0 && len(p.held) > 0
			p.mu.Unlock()
			if !ok {
				return false
			}
		}
		return true
	})
	proc := w.a.cur.Load()
	p := proc.agent.pools[pairID]
	p.mu.Lock()
	var ms []*key.Material
	for _, k := range p.own {
		ms = append(ms, k.Material)
	}
	for _, k := range p.held {
		ms = append(ms, k.Material)
	}
	p.mu.Unlock()
	w.halt(w.a)
	for _, m := range ms {
		if m.Len() != 0 {
			t.Fatal("a leased key outlived Run")
		}
	}
	if _, err := proc.agent.Take(t.Context(), "b"); err == nil {
		t.Error("a key after the end")
	}
	if _, err := proc.agent.Lease(t.Context(), "b", type1.LeaseRequest{Pool: pairID}); code(err) != type1.Overloaded {
		t.Errorf("a lease after the end: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	w := newWorld(t, nil)
	good := Pool{ID: pairID, Peer: "b", Role: key.Master, Class: key.Direct, Intake: "x", QKD: devA, PeerQKD: devB}
	for name, spoil := range map[string]func(*Options){
		"no id":        func(o *Options) { o.Pools[0].ID = uuid.Nil },
		"twice":        func(o *Options) { o.Pools = append(o.Pools, good) },
		"no address":   func(o *Options) { o.Pools[0].Peer = "c" },
		"no role":      func(o *Options) { o.Pools[0].Role = 0 },
		"no class":     func(o *Options) { o.Pools[0].Class = 9 },
		"algorithm":    func(o *Options) { o.Pools[0].Algorithm = "sha-1" },
		"no device":    func(o *Options) { o.Pools[0].QKD = uuid.Nil },
		"no store":     func(o *Options) { o.Store = nil },
		"no logger":    func(o *Options) { o.Log = nil },
		"two failings": func(o *Options) { o.Pools[0].Role, o.Pools = 0, append(o.Pools, Pool{}) },
	} {
		o := Options{Pools: []Pool{good}, Store: &inventory{}, Peers: map[string]Peer{"b": w.a.peer}, Log: w.a.log}
		spoil(&o)
		if _, err := New(t.Context(), o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
