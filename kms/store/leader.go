package store

import (
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// One process at a time has an inventory (docs/decisions/0007). Who has it is
// settled by a lock that can go while its holder lives, because a connection
// broke; that a process that lost it changes nothing any more is settled by the
// node row, in which each names itself and which every transaction checks. This file is what follows from
// there being others: to notice, to wait, and to keep the root in step.

// The times of a change of leaders. The server drops a holder that it does not
// hear of after more than holdBound, so one that was cut off has stopped before
// the next one begins.
const (
	beatInterval  = time.Second
	beatTimeout   = 2 * time.Second
	holdBound     = 5 * time.Second
	awaitInterval = time.Second
)

// maxSteps bounds how far a root is stepped forward: 20 years of ratchets every
// 10 minutes.
const maxSteps = 1 << 20

// leadership is the part of a Store that knows whether it still is the one.
type leadership struct {
	proven    atomic.Int64 // when the lock was last known to stand, by sinceBoot
	deposed   chan struct{}
	deposedBy atomic.Pointer[error]
	stopBeats context.CancelFunc
	beats     sync.WaitGroup
	behind    uint64 // steps that our root file missed, if more than one
}

// sinceBoot is a clock that goes on while the machine sleeps and that nobody sets.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // Linux has it
	}
	return time.Duration(ts.Nano())
}

// Deposed is closed when another process has taken the inventory over: from
// then on every method gives ErrDeposed, and what Load gave is no longer ours to
// supply. It never is with SQLite.
func (s *Store) Deposed() <-chan struct{} { return s.deposed }

// Held reports, without asking the database, whether this process was shown to
// have the inventory within the last 5 seconds: nil, ErrNotHeld, or, for good,
// ErrDeposed. Keys that Load gave should only be supplied while it is nil. One
// that is supplied after all is never supplied by another node too, as that one
// began above its mark; but the peer may have burned it.
func (s *Store) Held() error {
	if err := s.usable(); err != nil {
		return err
	}
	if age := sinceBoot() - time.Duration(s.proven.Load()); s.eng.shared() && age > holdBound {
		return fmt.Errorf("store: %s: %w: last shown %s ago; supply nothing until it is", s.eng, ErrNotHeld, age.Round(time.Second/10))
	}
	return nil
}

// usable is the error of a store that was deposed.
func (s *Store) usable() error {
	if err := s.deposedBy.Load(); err != nil {
		return fmt.Errorf("store: %s: %w; close it and wait for its turn", s.eng, *err)
	}
	return nil
}

// depose ends the store's life, with err, and gives err back.
func (s *Store) depose(err error) error {
	if s.deposedBy.CompareAndSwap(nil, &err) {
		close(s.deposed)
		s.opt.Log.Error("store: deposed", "database", s.eng.String(), "err", err)
	}
	return err
}

// judge explains an error of the database and takes the consequence of one that
// says that we are not the leader.
func (s *Store) judge(err error) error {
	if err = explain(err); errors.Is(err, ErrDeposed) {
		return s.depose(err)
	}
	return err
}

// beginBeats has the lock looked after until endBeats.
func (s *Store) beginBeats(ctx context.Context) {
	if !s.eng.shared() {
		return
	}
	ctx, s.stopBeats = context.WithCancel(context.WithoutCancel(ctx))
	s.beats.Go(func() {
		tick := time.NewTicker(beatInterval)
		defer tick.Stop()
		failing := false
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			at := sinceBoot()
			err := s.hold(ctx)
			switch {
			case ctx.Err() != nil:
				return
			case errors.Is(err, ErrDeposed):
				_ = s.depose(err)
				return
			case err != nil && !failing:
				s.opt.Log.Warn("store: cannot make sure of the inventory", "database", s.eng.String(), "err", err)
			case err == nil && failing:
				s.opt.Log.Info("store: the inventory is still ours", "database", s.eng.String())
			}
			if failing = err != nil; !failing {
				s.proven.Store(int64(at))
			}
		}
	})
}

func (s *Store) hold(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	return explain(s.lock.hold(ctx, s.holder))
}

func (s *Store) endBeats() {
	if s.stopBeats != nil {
		s.stopBeats()
		s.beats.Wait()
	}
}

// Await is Open for a node that stands by: while another process has the
// inventory, or the server cannot be had, it tries again, about each second,
// until ctx ends. Meanwhile it keeps the root file in step with the leader's
// ratchets. Other errors of Open are given at once.
func Await(ctx context.Context, opt Options) (*Store, error) {
	for said := ""; ; {
		s, err := Open(ctx, opt)
		if err == nil || ctx.Err() != nil {
			return s, err
		}
		if !Passes(err) {
			return nil, err
		}
		if text := err.Error(); text != said {
			opt.Log.Info("store: standing by", "because", err)
			said = text
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("store: stand by: %w", ctx.Err())
		case <-time.After(awaitInterval):
		}
	}
}

// Passes reports whether err, of Open or of a Store, is about another process or
// about the server for now, so that Await is what helps.
func Passes(err error) bool {
	for _, e := range []error{ErrInUse, ErrUnreachable, ErrReadOnly, ErrBusy, ErrDeposed} {
		if errors.Is(err, e) {
			return !isRootFault(err)
		}
	}
	return false
}

// holderQuery asks who has begun last.
const holderQuery = `SELECT holder FROM node WHERE one = 1`

func checkHolder(now, ours string) error {
	if now != ours {
		return fmt.Errorf("%w: holder %s has begun, this process is %s", ErrDeposed, now, ours)
	}
	return nil
}

// isRootFault reports whether waiting would not help.
func isRootFault(err error) bool {
	for _, e := range []error{ErrNoRoot, ErrWrongRoot, ErrOldRoot, ErrSealed, ErrUnsealed, ErrCredential, ErrWrongCredential, ErrRestored, ErrDamaged, ErrNewer, ErrAccess} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// standBy keeps the root file in step while another process has the inventory.
func (s *Store) standBy(ctx context.Context) (err error) {
	if s.root, err = s.readRoot(); err != nil {
		return err
	}
	if isNew, err := s.eng.fresh(ctx, s.r); err != nil || isNew {
		return s.judge(err)
	}
	if _, err := s.version(ctx, s.r); err != nil {
		return err
	}
	n, err := s.readNode(ctx, s.r, false)
	if err != nil {
		return err
	}
	if err := s.follow(ctx, n); err != nil {
		return err
	}
	return s.fits(n)
}

// follow steps the root forward to the epoch at which n was sealed, and never
// further, so that a node that stood by or was switched off does not keep a root
// that the leader's ratchets have done away with. Only a node row that opens with
// the new root makes it replace the file.
func (s *Store) follow(ctx context.Context, n *nodeRow) error {
	if s.root == nil || s.root.store != n.uuid || n.epoch <= s.root.epoch || n.epoch-s.root.epoch > maxSteps {
		return nil // fits judges
	}
	steps := n.epoch - s.root.epoch
	r := &root{store: s.root.store, epoch: s.root.epoch, secret: s.root.secret, credential: s.root.credential}
	for r.epoch < n.epoch {
		next, err := r.next()
		if r.epoch > s.root.epoch {
			r.secret.Wipe()
		}
		if err == nil {
			r, err = next, ctx.Err()
		}
		if err != nil {
			wipeRoot(next)
			return err
		}
	}
	a, err := r.dataKey()
	if err == nil {
		err = n.check(a)
	}
	if err != nil {
		r.secret.Wipe()
		return fmt.Errorf("node row, %d steps ahead of root file %s: %w", steps, s.opt.RootFile, err)
	}
	late, err := replaceRoot(s.opt.files, s.opt.RootFile, r)
	if err != nil {
		s.opt.Log.Error("store: cannot follow a ratchet: the root file here can still open used keys", "err", err)
	}
	if late != nil {
		s.opt.Log.Warn("store: the old root's bytes may still be on the disk", "err", late)
	}
	s.root.secret.Wipe()
	s.root, s.data = r, map[uint64]cipher.AEAD{}
	if steps > 1 {
		s.behind = steps
		s.opt.Log.Warn("store: root file was behind: until now it could open keys that were used since", "steps", steps, "epoch", r.epoch)
	}
	return nil
}

func wipeRoot(r *root) {
	if r != nil {
		r.secret.Wipe()
	}
}

// findings says in the event log what Open found out about other nodes and
// servers.
func (s *Store) findings(moved bool) []LogEvent {
	var list []LogEvent
	if moved {
		list = append(list, LogEvent{
			Severity: SeverityAlarm, Code: "store-server-changed", Source: "store",
			Text:   "the database is on another server, timeline or table than it was written at: commits may be lost, so its marks cannot be believed",
			Action: "all stored keys given up",
		})
	}
	if s.behind > 0 {
		list = append(list, LogEvent{
			Severity: SeverityAlarm, Code: "store-root-behind", Source: "store",
			Text:   fmt.Sprintf("the root file of this node was %d ratchets behind: whoever had a copy of it could open keys used since", s.behind),
			Action: "stepped forward",
		})
	}
	return list
}
