package sad

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// kernel is what SAD needs of sad/xfrm.
type kernel interface {
	Add(ctx context.Context, sa *xfrm.SA, enc, integ []byte) error
	Delete(ctx context.Context, id xfrm.ID) error
	Counters(ctx context.Context, id xfrm.ID) (xfrm.Counters, error)
	List(ctx context.Context) ([]xfrm.Info, error)
	SetPorts(ctx context.Context, id xfrm.ID, src, dst uint16) error
	Move(ctx context.Context, id xfrm.ID, m xfrm.Move) error
	Policies(ctx context.Context) ([]xfrm.Policy, error)
}

const (
	// cleanUp bounds work that must be done although the caller's ctx has ended.
	cleanUp = 5 * time.Second
	// pendingFor is how long an SA may wait for Commit or Rollback before
	// Reconcile judges it as well; the plugin's limits are far below.
	pendingFor = 30 * time.Second
)

// SAD is the one owner of the SAs that qipsecd put in the kernel. Its methods
// may be called at the same time; each waits for its turn until ctx ends.
//
// Invariant: every SA of ours in the kernel has a record in the journal. A
// record without an SA is harmless and goes at the next Reconcile.
type SAD struct {
	turn   chan struct{} // holds one token: the right to use all below
	kernel kernel
	log    *slog.Logger
	file   *journal
	live   records
	serial uint64 // of the last change of a record
}

// records are the SAs of ours by what tells them apart.
type records map[xfrm.Key]*record

// record is what is kept of one SA; the exported fields go to the journal.
type record struct {
	ID          ID     `json:"id"`
	Owner       Owner  `json:"owner"`
	ReqID       uint32 `json:"reqid"`
	Mode        Mode   `json:"mode"`
	Inbound     bool   `json:"inbound"`
	Encap       bool   `json:"encap"`
	ESN         bool   `json:"esn"`
	Algorithm   string `json:"algorithm"`
	Fingerprint string `json:"fingerprint"`

	committed bool
	since     time.Time // of the intent; zero if read from the journal
	serial    uint64    // changes with every change of the record
	bytes     uint64    // at the last Query
	lastUse   time.Duration
}

// Open reads the journal (a file of mode 0600, created when absent, best below
// /run: the kernel's SAD does not survive a reboot either) and locks it. The
// kernel, *xfrm.Conn outside tests, is borrowed. It changes no SA: call
// Reconcile once charon can be asked.
func Open(k kernel, journal string, log *slog.Logger) (*SAD, error) {
	file, live, err := openJournal(journal)
	if err != nil {
		return nil, err
	}
	return &SAD{turn: make(chan struct{}, 1), kernel: k, log: log, file: file, live: live}, nil
}

// Close ends the use of the journal. SAs stay.
func (s *SAD) Close() error {
	s.turn <- struct{}{}
	defer s.release()
	if s.file == nil {
		return nil
	}
	err := s.file.close()
	s.file = nil
	return err
}

func (s *SAD) acquire(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("sad: wait for another request: %w", ctx.Err())
	}
	if s.file == nil {
		s.release()
		return errors.New("sad: closed")
	}
	return nil
}

func (s *SAD) release() { <-s.turn }

// lasting is a context for what must be done although ctx may have ended.
func lasting(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanUp)
}

// keep makes r the record of its SA, in memory and durably in the journal.
func (s *SAD) keep(r *record) error {
	if err := s.file.append(entry{opIntend, r}, true); err != nil {
		return err
	}
	s.serial++
	r.serial = s.serial
	s.live[r.ID.Key()] = r
	return nil
}

// forget drops the record of an SA that is not in the kernel. If the line
// cannot be written the journal says too much, which is harmless.
func (s *SAD) forget(r *record) {
	delete(s.live, r.ID.Key())
	if err := s.file.append(entry{opGone, &record{ID: r.ID}}, false); err != nil {
		s.log.Warn("journal not updated", "sa", r.ID, "err", err)
		return
	}
	if err := s.file.compact(s.live); err != nil {
		s.log.Warn("journal not compacted", "err", err)
	}
}

// Install journals the intent and puts the SA with its keys in the kernel: a
// larval entry is replaced, else a new one is added. keys are borrowed. On nil
// the caller must call Commit or Rollback; on any error nothing is left. Of
// outbound SAs the replay window is set as charon does (0, or 1 with ESN).
// Errors: ErrUnsupported (nothing was tried), ErrNoESP, ErrExists.
func (s *SAD) Install(ctx context.Context, sa SA, keys Keys, owner Owner) error {
	if err := sa.Check(); err != nil {
		return err
	}
	fingerprint, err := keys.Fingerprint()
	if err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	r := &record{
		ID: sa.ID, Owner: owner, ReqID: sa.ReqID, Mode: sa.Mode, Inbound: sa.Inbound, Encap: sa.Encap, ESN: sa.ESN,
		Algorithm: sa.Suite.String(), Fingerprint: fingerprint, since: time.Now(),
	}
	before := s.live[sa.Key()]
	if err := s.keep(r); err != nil {
		return err
	}
	err = s.kernel.Add(ctx, &sa, keys.Enc.Bytes(), keys.Integ.Bytes())
	runtime.KeepAlive(keys)
	switch {
	case err == nil && ctx.Err() != nil:
		s.undo(ctx, r)
		return fmt.Errorf("sad: install %v: done too late, rolled back: %w", sa.ID, ctx.Err())
	case err == nil:
		return nil
	case errors.Is(err, xfrm.ErrExists) && before != nil:
		s.restore(before)
	case errors.Is(err, xfrm.ErrUnknown):
		s.undo(ctx, r)
	default:
		s.forget(r)
	}
	return err
}

// restore puts the record of an SA back that a refused Install has covered.
func (s *SAD) restore(r *record) {
	err := s.keep(r)
	if err == nil && r.committed {
		err = s.file.append(entry{opCommit, &record{ID: r.ID}}, false)
	}
	if err != nil {
		// The journal then shows it uncommitted, which Reconcile treats alike.
		s.live[r.ID.Key()] = r
		s.log.Warn("journal not restored", "sa", r.ID, "err", err)
	}
}

// undo removes the SA of r from the kernel whatever becomes of ctx. What cannot
// be removed keeps its record.
func (s *SAD) undo(ctx context.Context, r *record) {
	ctx, cancel := lasting(ctx)
	defer cancel()
	err := s.kernel.Delete(ctx, r.ID)
	if err != nil && !errors.Is(err, xfrm.ErrNotFound) {
		r.since = time.Time{} // Reconcile may judge it at once
		s.log.Error("SA not removed, left to the next comparison with charon", "sa", r.ID, "connection", r.Owner.Connection, "err", err)
		return
	}
	s.forget(r)
}

// Commit says that charon knows of the installed SA. ErrNotFound if it was not
// installed or rolled back.
func (s *SAD) Commit(ctx context.Context, id ID) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	r := s.live[id.Key()]
	if r == nil {
		return fmt.Errorf("sad: commit %v: %w", id, ErrNotFound)
	}
	if r.committed {
		return nil
	}
	// Not synced: an intent without it is judged by what charon knows.
	if err := s.file.append(entry{opCommit, &record{ID: r.ID}}, false); err != nil {
		return err
	}
	r.committed = true
	s.serial++
	r.serial = s.serial
	return nil
}

// Rollback removes an installed SA that charon did not acknowledge. It does
// its work, bounded, even if ctx has ended; what it could not remove is left
// to Reconcile, and logged. A committed SA is not touched.
func (s *SAD) Rollback(ctx context.Context, id ID) {
	ctx, cancel := lasting(ctx)
	defer cancel()
	if err := s.acquire(ctx); err != nil {
		s.log.Error("SA not rolled back, left to the next comparison with charon", "sa", id, "err", err)
		return
	}
	defer s.release()
	if r := s.live[id.Key()]; r != nil && !r.committed {
		s.undo(ctx, r)
	}
}

// Remove takes an SA of ours out of the kernel and the journal; no error if it
// is gone already (charon deletes SAs itself) or was never ours.
func (s *SAD) Remove(ctx context.Context, id ID) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	r := s.live[id.Key()]
	if r == nil {
		return nil
	}
	return s.remove(ctx, r)
}

func (s *SAD) remove(ctx context.Context, r *record) error {
	if err := s.kernel.Delete(ctx, r.ID); err != nil && !errors.Is(err, xfrm.ErrNotFound) {
		return err
	}
	s.forget(r)
	return nil
}
