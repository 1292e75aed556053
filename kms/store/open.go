package store

import (
	"context"
	"crypto/cipher"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Open opens the store, or makes it if the database is new, and counts its
// Generation up, durably. It takes an exclusive lock (ErrInUse), holds all files
// to their modes (ErrAccess), refuses a newer version (ErrNewer), another
// program's database (ErrForeign), and a database and root file that do not
// belong together (ErrNoRoot, ErrWrongRoot, ErrOldRoot, ErrRestored). Every row
// that states rest on is verified: a damaged node or pool row is ErrDamaged, a
// damaged block is given up with an alarm event. A ratchet that a crash cut off
// is finished, unless the root file cannot be replaced: then the next one does
// it. A new database beside an existing root file takes over its
// store UUID and epoch, so that a database that was only out of place still fits.
func Open(ctx context.Context, opt Options) (*Store, error) {
	if opt.RootFile == "" || opt.Log == nil {
		return nil, errors.New("store: RootFile and Log must be set")
	}
	opt.setDefaults()
	eng, err := newEngine(&opt)
	if err != nil {
		return nil, err
	}
	s := &Store{
		opt: opt, eng: eng, turn: make(chan struct{}, 1), ratcheting: make(chan struct{}, 1),
		data: map[uint64]cipher.AEAD{}, pools: map[uuid.UUID]*pool{}, leadership: leadership{deposed: make(chan struct{})},
		clock: clock{wall: opt.Now, boot: opt.boot},
	}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.shut())
	}
	if s.epoch != s.root.epoch {
		opt.Log.Info("store: finishing a ratchet that was cut off", "epoch", s.epoch)
		switch err := s.Ratchet(ctx); {
		case errors.Is(err, errRootFile):
			// The root reaches both epochs: all works but that used keys can still
			// be recovered. The next Ratchet tries again, and its caller reports.
			opt.Log.Error("store: ratchet not finished: used keys can still be recovered from disk and root file", "err", err)
		case err != nil:
			return nil, errors.Join(err, s.Close())
		}
	}
	s.beginBeats(ctx)
	return s, nil
}

func (o *Options) setDefaults() {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.HistoryRows <= 0 {
		o.HistoryRows = defaultHistoryRows
	}
	if o.EventRows <= 0 {
		o.EventRows = defaultEventRows
	}
	if o.files == nil {
		o.files = osFiles{}
	}
	if o.boot == nil {
		o.boot = sinceBoot
	}
}

func (s *Store) open(ctx context.Context) (err error) {
	if s.files, err = s.eng.prepare(); err != nil {
		return err
	}
	if err := s.connect(); err != nil {
		return err
	}
	if s.lock, err = s.eng.own(ctx); errors.Is(err, ErrInUse) {
		return errors.Join(err, s.standBy(ctx))
	} else if err != nil {
		return err
	}
	if s.root, err = s.readRoot(); err != nil {
		return err
	}
	// Looked at first: on a read-only mount removing what is not there fails, too.
	if _, err := os.Lstat(s.opt.RootFile + ".new"); err == nil {
		if err := os.Remove(s.opt.RootFile + ".new"); err != nil {
			return fmt.Errorf("store: remove a leftover: %w", err)
		}
	}
	isNew, err := s.eng.fresh(ctx, s.w)
	if err != nil {
		return fmt.Errorf("store: %s: %w", s.eng, explain(err))
	}
	if isNew {
		if err := s.create(ctx); err != nil {
			return err
		}
	}
	if err := s.migrate(ctx); err != nil {
		return fmt.Errorf("store: %s: %w", s.eng, err)
	}
	return s.begin(ctx)
}

// connect makes the pools of connections: one that writes, a few that read.
func (s *Store) connect() error {
	for _, c := range []struct {
		db       **sql.DB
		readOnly bool
		most     int
	}{{&s.w, false, 1}, {&s.r, true, 4}} {
		connector, err := s.eng.connector(c.readOnly)
		if err != nil {
			return fmt.Errorf("store: open %s: %w", s.eng, err)
		}
		if s.opt.wrap != nil && !c.readOnly {
			connector = s.opt.wrap(connector)
		}
		*c.db = sql.OpenDB(connector)
		(*c.db).SetMaxOpenConns(c.most)
	}
	return nil
}

// create makes root file, tables and node row.
func (s *Store) create(ctx context.Context) (err error) {
	if s.root == nil {
		if s.root, err = newRoot(s.credential); err != nil {
			return err
		}
		if _, err := replaceRoot(s.opt.files, s.opt.RootFile, s.root); err != nil {
			return err
		}
	}
	s.uuid, s.epoch = s.root.store, s.root.epoch
	// Ahead of any database that this one replaces, which counted starts from the
	// second it was made in.
	s.generation = uint64(max(s.opt.Now().Unix(), 1))
	err = s.transact(ctx, "make database "+s.eng.String(), func(tx *sql.Tx) (err error) {
		if err := s.makeTables(ctx, tx, s.uuid); err != nil {
			return err
		}
		if err := s.eng.claim(ctx, tx); err != nil {
			return err
		}
		if s.server, err = s.eng.server(ctx, tx); err != nil {
			return err
		}
		return s.putNode(ctx, tx)
	})
	if err == nil {
		s.opt.Log.Info("store: made", "database", s.eng.String(), "store", s.uuid, "epoch", s.epoch)
	}
	return err
}

// putNode writes what can change of the node row, with its proof.
func (s *Store) putNode(ctx context.Context, tx *sql.Tx) error {
	a, err := s.ring(s.epoch)
	if err != nil {
		return err
	}
	n := &nodeRow{generation: s.generation, epoch: s.epoch, server: s.server, holder: s.holder}
	return oneRow(tx.ExecContext(ctx, `UPDATE node SET generation = $1, epoch = $2, server = $3, holder = $4, proof = $5, clock = $6 WHERE one = 1`,
		int64(n.generation), int64(n.epoch), n.server, n.holder, seal(a, nil, nodeAAD(s.uuid, n)), s.clock.now()))
}

// nodeRow is the one row that says what the database is.
type nodeRow struct {
	uuid              uuid.UUID
	generation, epoch uint64
	server, holder    string
	proof             []byte
}

// readNode reads the node row; if lock, no other process can change it until q,
// a transaction, ends.
func (s *Store) readNode(ctx context.Context, q querier, lock bool) (*nodeRow, error) {
	query := `SELECT uuid, generation, epoch, server, holder, proof FROM node WHERE one = 1`
	if lock {
		query = s.eng.lockNode(query)
	}
	var id []byte
	n := &nodeRow{}
	if err := q.QueryRowContext(ctx, query).Scan(&id, &n.generation, &n.epoch, &n.server, &n.holder, &n.proof); err != nil {
		return nil, fmt.Errorf("read node row: %w", explain(err))
	}
	copy(n.uuid[:], id)
	return n, nil
}

// check is whether a, the cipher of its epoch, proves the row.
func (n *nodeRow) check(a cipher.AEAD) error {
	if err := unseal(a, n.proof, nil, nodeAAD(n.uuid, n)); err != nil {
		return fmt.Errorf("%w: %w", err, ErrDamaged)
	}
	return nil
}

// fits judges how database and root file belong together, and checks n's proof.
func (s *Store) fits(n *nodeRow) error {
	const startEmpty = "or move both away to start with empty pools"
	root := s.opt.RootFile
	switch {
	case s.root == nil:
		return fmt.Errorf("%w: %s; without it no key can be opened: put it back, %s", ErrNoRoot, root, startEmpty)
	case s.root.store != n.uuid:
		return fmt.Errorf("%w: %s is of store %s, the database of %s; put the right one back, %s", ErrWrongRoot, root, s.root.store, n.uuid, startEmpty)
	case n.epoch < s.root.epoch:
		return fmt.Errorf("%w: it is at epoch %d, %s at %d: its keys cannot be opened and its marks are not the last ones; put the newest one back, %s",
			ErrRestored, n.epoch, root, s.root.epoch, startEmpty)
	case n.epoch > s.root.epoch+1:
		return fmt.Errorf("%w: %s is at epoch %d, the database at %d: whoever has such a copy can open keys that were used since; put the newest one back, %s",
			ErrOldRoot, root, s.root.epoch, n.epoch, startEmpty)
	}
	a, err := s.ring(n.epoch)
	if err != nil {
		return err
	}
	if err := n.check(a); err != nil {
		return fmt.Errorf("node row does not open with root file %s: %w; put the newest copies of both back, %s", root, err, startEmpty)
	}
	return nil
}

// begin starts the process's life in the store, in one transaction that keeps
// every other process from changing anything: a new generation, nothing at or
// below the marks, nothing damaged, and, on another server, nothing at all.
func (s *Store) begin(ctx context.Context) error {
	at := sinceBoot()
	var found []*damage
	gone := map[*pool][]*header{}
	err := s.transact(ctx, "begin a new generation", func(tx *sql.Tx) (err error) {
		moved, err := s.takeOver(ctx, tx)
		if err != nil {
			return err
		}
		if err := s.startClock(ctx, tx); err != nil {
			return err
		}
		if found, err = s.readAll(ctx, tx); err != nil {
			return err
		}
		s.ledgerFirst = s.ledgerNext
		if err := s.putNode(ctx, tx); err != nil {
			return err
		}
		for _, e := range s.findings(moved) {
			if err := s.append(ctx, tx, e); err != nil {
				return err
			}
		}
		for _, d := range found {
			if err := s.giveUpIn(ctx, tx, d); err != nil {
				return err
			}
			gone[s.pools[d.h.pool]] = append(gone[s.pools[d.h.pool]], d.h)
		}
		for _, p := range s.pools {
			p.spent = [2]key.Position{p.info.Mark, p.info.PeerMark}
			p.floor = p.spent
			s.forget(p, gone[p]...)
			drop := s.dropDone
			if moved {
				drop = s.dropAll
			}
			if gone[p], err = drop(ctx, tx, p); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for p, used := range gone {
		s.forget(p, used...)
	}
	s.proven.Store(int64(at))
	s.stats.Damaged = len(found)
	for _, d := range found {
		s.opt.Log.Error("store: damaged block given up", "pool", d.h.pool, "seq", d.h.seq, "keys", d.h.count, "err", d.cause)
	}
	return nil
}

// takeOver judges the node row, counts the generation up, and reports whether
// the database is on another server than it was written at: then its last
// commits may be missing, the generation among them.
func (s *Store) takeOver(ctx context.Context, tx *sql.Tx) (moved bool, err error) {
	n, err := s.readNode(ctx, tx, true)
	if err != nil {
		return false, err
	}
	if s.eng.shared() {
		if err := s.follow(ctx, n); err != nil {
			return false, err
		}
	}
	if err := s.fits(n); err != nil {
		return false, err
	}
	s.uuid, s.epoch, s.generation, s.holder = n.uuid, n.epoch, n.generation+1, uuid.NewString()
	if s.server, err = s.eng.server(ctx, tx); err != nil {
		return false, err
	}
	if moved = s.server != n.server; moved {
		s.generation = max(s.generation, uint64(max(s.opt.Now().Unix(), 0)))
		s.opt.Log.Error("store: database is on another server, timeline or table than it was written at: all stored keys are given up",
			"database", s.eng.String(), "written", n.server, "now", s.server)
	}
	return moved, nil
}
