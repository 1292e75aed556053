package store

import (
	"context"
	"crypto/cipher"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// look is how an engine's database is read without changing anything, beside
// whatever else has it open.
type look struct {
	connector driver.Connector
	running   bool   // another process has the store open and may change it meanwhile
	begin     string // statement that begins a snapshot for reading
	// verify runs the database's own search for damage and gives what it finds;
	// nil if it has none.
	verify    func(ctx context.Context, q querier) ([]string, error)
	leftovers []string // files that a crash left and the next start removes
	done      func() error
}

// openLook opens the database of opt for reading and begins a snapshot. The
// root, which is read first, may be nil; rootErr says that there is one that
// cannot be used. A ratchet that ends meanwhile leaves the root one epoch
// behind, which it reaches. The Store has no turn to give: it serves the reading
// methods of this package that take none. shut of both ends it.
func openLook(ctx context.Context, opt Options) (s *Store, l *look, rootErr, err error) {
	opt.setDefaults()
	if opt.RootFile == "" || opt.Log == nil {
		return nil, nil, nil, errors.New("store: RootFile and Log must be set")
	}
	eng, err := newEngine(&opt)
	if err != nil {
		return nil, nil, nil, err
	}
	if l, err = eng.look(ctx); err != nil {
		return nil, nil, nil, err
	}
	s = &Store{opt: opt, eng: eng, data: map[uint64]cipher.AEAD{}, pools: map[uuid.UUID]*pool{}, leadership: leadership{deposed: make(chan struct{})}, clock: clock{wall: opt.Now, boot: opt.boot}}
	s.root, rootErr = s.readRoot()
	s.w = sql.OpenDB(l.connector)
	s.w.SetMaxOpenConns(1) // all reads are of one snapshot
	if s.snap, err = s.w.Conn(ctx); err == nil {
		_, err = s.snap.ExecContext(ctx, l.begin)
	}
	if err == nil {
		return s, l, rootErr, nil
	}
	return nil, nil, nil, errors.Join(fmt.Errorf("store: %s: %w", eng, explain(err)), s.endLook(l))
}

// endLook closes what openLook opened.
func (s *Store) endLook(l *look) error {
	var errs []error
	if s.snap != nil {
		s.discard(s.snap) // a closed connection ends its snapshot
		_ = s.snap.Close()
	}
	return errors.Join(append(errs, s.shut(), l.done())...)
}

// lookNode reads the node row of a look and judges how database and root file
// belong together. Older tables are left to the next start.
func (s *Store) lookNode(ctx context.Context) error {
	version, err := s.version(ctx, s.snap)
	if err != nil {
		return err
	}
	if version < schemaVersion() {
		return fmt.Errorf("the tables have version %d, this program's have %d; start qipsecd, which brings them up to date", version, schemaVersion())
	}
	n, err := s.readNode(ctx, s.snap, false)
	if err != nil {
		return err
	}
	s.uuid, s.epoch, s.generation = n.uuid, n.epoch, n.generation
	return s.fits(n)
}

// src is what everything is read from: the writing connection, or a look's
// snapshot.
func (s *Store) src() querier {
	if s.snap != nil {
		return s.snap
	}
	return s.w
}
