package store

import (
	"context"
	"crypto/cipher"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Options say where a store lives. URL, RootFile and Log must be set.
type Options struct {
	// URL is sqlite:/path or postgres://... . The file's directory must have mode
	// 0700; it is made if only its last element is missing. A PostgreSQL URL is
	// libpq's; the tables live in the schema that its search_path names, or
	// q_ipsec. It is made if the user may.
	URL string
	// PasswordFile holds the password of PostgreSQL's user in one line, mode 0600.
	// Without it, it comes from the URL, or as with libpq from passfile or
	// PGPASSFILE.
	PasswordFile string
	// RootFile holds the root, 96 bytes, mode 0600 or 0400. It must not lie in any
	// backup of the database. It is made if the database is new. It is replaced at
	// each ratchet: its directory must be writable.
	RootFile string
	// RootCredential is a file with the 32 bytes that the root file is sealed by,
	// such as one in a systemd credentials directory. Empty: it is not sealed.
	RootCredential string
	Log            *slog.Logger
	// Now is wall time for history, events and, with what was known before, the ages
	// of keys; nil is time.Now.
	Now func() time.Time
	// HistoryRows and EventRows bound the two logs: the oldest rows go. 0 means
	// 1,000,000 and 10,000.
	HistoryRows, EventRows int

	wrap  func(driver.Connector) driver.Connector // of the connection that writes
	files rootFiles
	boot  func() time.Duration // sinceBoot
}

// Store is a node's inventory. Its methods may be called from several
// goroutines. Changes happen one at a time, each in one durable transaction
// with its history rows; what the callers ask most is answered from memory.
type Store struct {
	opt   Options
	eng   engine
	files *os.File  // locked against other processes of this machine
	lock  lock      // against those of others
	w, r  *sql.DB   // one writing connection, a few reading ones
	snap  *sql.Conn // of a look: where everything is read from

	turn       chan struct{} // holds one token: whoever has it may change things
	ratcheting chan struct{} // the same, around a whole Ratchet

	// Guarded by turn.
	root         *root // in the root file
	credential   *key.Material
	epoch        uint64
	data         map[uint64]cipher.AEAD // data keys of root.epoch and the one after
	historyNext  int64
	eventNext    int64
	ledgerNext   int64
	ledgerFirst  int64 // of what this process has bound
	stale        bool  // a commit's outcome is unknown: read memory anew first
	closed       bool
	generation   uint64
	server       string // where the node row was last written, if the engine can tell
	holder       string // names this Open in the node row
	uuid         uuid.UUID
	sinceRatchet int

	clock clock

	mem   sync.RWMutex // guards pools and stats; written only with turn in hand
	pools map[uuid.UUID]*pool
	stats Stats

	leadership
}

// UUID names the store; it is drawn when the store is made.
func (s *Store) UUID() uuid.UUID { return s.uuid }

// acquire waits for the turn. Whoever got nil calls release.
func (s *Store) acquire(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("store: wait for another change: %w", ctx.Err())
	}
	if s.closed {
		s.release()
		return fmt.Errorf("store: %w", ErrClosed)
	}
	if err := s.usable(); err != nil {
		s.release()
		return err
	}
	if s.stale {
		if err := s.reload(ctx); err != nil {
			s.release()
			return err
		}
	}
	return nil
}

func (s *Store) release() { <-s.turn }

// write runs fn in one durable transaction; what names it in errors. Once
// another process has begun, it changes nothing and the store is deposed.
func (s *Store) write(ctx context.Context, what string, fn func(*sql.Tx) error) error {
	return s.transact(ctx, what, func(tx *sql.Tx) error {
		if err := s.stillOurs(ctx, tx); err != nil {
			return err
		}
		return fn(tx)
	})
}

// stillOurs checks, within tx, that no other process has begun, and keeps one
// from it until tx ends.
func (s *Store) stillOurs(ctx context.Context, tx *sql.Tx) error {
	var holder string
	if err := tx.QueryRowContext(ctx, s.eng.lockNode(holderQuery)).Scan(&holder); err != nil {
		return fmt.Errorf("read node row: %w", err)
	}
	return checkHolder(holder, s.holder)
}

// transact is write for what comes before this process has begun. If the outcome of the
// commit is unknown, memory is read anew before the next change.
func (s *Store) transact(ctx context.Context, what string, fn func(*sql.Tx) error) error {
	conn, err := s.w.Conn(ctx)
	if err != nil {
		return fmt.Errorf("store: %s: %w", what, s.judge(err))
	}
	defer conn.Close()
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		s.discard(conn)
		return fmt.Errorf("store: %s: begin: %w", what, s.judge(err))
	}
	if err := fn(tx); err != nil {
		if tx.Rollback() != nil {
			s.discard(conn) // a closed connection rolls back
		}
		return fmt.Errorf("store: %s: %w", what, s.judge(err))
	}
	if err := tx.Commit(); err != nil {
		s.stale = true
		s.discard(conn)
		return fmt.Errorf("store: %s: commit: %w", what, s.judge(err))
	}
	return nil
}

// discard closes a connection whose transaction may still be open.
func (s *Store) discard(conn *sql.Conn) {
	_ = conn.Raw(func(any) error { return driver.ErrBadConn })
}

// Close waits for the change that runs, closes the database, wipes the root
// and gives the lock back. A second call does nothing.
func (s *Store) Close() error {
	s.turn <- struct{}{}
	defer s.release()
	if s.closed {
		return nil
	}
	s.closed = true
	return s.shut()
}

func (s *Store) shut() error {
	s.endBeats()
	var errs []error
	if s.r != nil {
		errs = append(errs, s.r.Close())
	}
	if s.w != nil {
		errs = append(errs, s.w.Close())
	}
	if s.root != nil {
		s.root.secret.Wipe()
	}
	s.credential.Wipe() // nil where there is none
	s.data = nil
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	if s.files != nil { // last: the locks cover all before
		// Not left to Close: a child that was just forked still has the file open.
		errs = append(errs, unix.Flock(int(s.files.Fd()), unix.LOCK_UN), s.files.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("store: close: %w", err)
	}
	return nil
}

// ring is the cipher under the data key of an epoch that the root reaches: its
// own and, within a ratchet, the one after.
func (s *Store) ring(epoch uint64) (cipher.AEAD, error) {
	if a := s.data[epoch]; a != nil {
		return a, nil
	}
	switch epoch {
	case s.root.epoch:
		a, err := s.root.dataKey()
		if err == nil {
			s.data[epoch] = a
		}
		return a, err
	case s.root.epoch + 1:
		n, err := s.root.next()
		if err != nil {
			return nil, err
		}
		defer n.secret.Wipe()
		a, err := n.dataKey()
		if err == nil {
			s.data[epoch] = a
		}
		return a, err
	}
	return nil, fmt.Errorf("sealed at epoch %d, the root file is at %d: %w", epoch, s.root.epoch, ErrDamaged)
}

// wrapKey seals a block key (borrowed) under the current epoch and puts epoch
// and box into h.
func (s *Store) wrapKey(h *header, k *key.Material) error {
	a, err := s.ring(s.epoch)
	if err != nil {
		return err
	}
	h.epoch = s.epoch
	h.wrap = seal(a, k.Bytes(), h.aad(s.uuid))
	return nil
}

// unwrapKey gives h's block key, which the caller wipes. That it opens proves
// the whole header.
func (s *Store) unwrapKey(h *header) (*key.Material, error) {
	a, err := s.ring(h.epoch)
	if err != nil {
		return nil, err
	}
	k, err := key.New(32)
	if err != nil {
		return nil, err
	}
	if err := unseal(a, h.wrap, k.Bytes(), h.aad(s.uuid)); err != nil {
		k.Wipe()
		return nil, fmt.Errorf("block key: %w: %w", err, ErrDamaged)
	}
	return k, nil
}

// blockAEAD is the cipher of h's parts.
func (s *Store) blockAEAD(h *header) (cipher.AEAD, error) {
	k, err := s.unwrapKey(h)
	if err != nil {
		return nil, err
	}
	defer k.Wipe()
	return newAEAD(k.Bytes())
}

// rewrap seals h's block key anew, after its header changed from old to h.
func (s *Store) rewrap(old, h *header) error {
	k, err := s.unwrapKey(old)
	if err != nil {
		return err
	}
	defer k.Wipe()
	return s.wrapKey(h, k)
}
