package store

import (
	"context"
	"database/sql"
	"fmt"
	"strings"

	"github.com/google/uuid"
)

// migration is one step of the schema. Its statements are portable SQL, BYTES
// standing for the dialect's type of byte strings, and run in one transaction.
type migration struct{ what, sql string }

// migrations lead from an empty database to the present one: entry n makes
// version n+1 of version n. A new database goes through all of them. What was
// released is never changed: to change the schema, append an entry. Columns that
// are added need a default, and rows keep their proofs, so what a proof covers
// may grow only by what the default leaves out (nodeAAD is an example). The
// columns that the node row had in version 2 stay, because programs of every
// version read them to know one another.
var migrations = []migration{
	{"the tables", tables},
	{"the node row's server and holder", `ALTER TABLE node ADD COLUMN server TEXT NOT NULL DEFAULT '';
		ALTER TABLE node ADD COLUMN holder TEXT NOT NULL DEFAULT ''`},
	{"the ages of blocks", `ALTER TABLE node ADD COLUMN clock BIGINT NOT NULL DEFAULT 0;
		ALTER TABLE block ADD COLUMN taken_in BIGINT NOT NULL DEFAULT 0`},
	{"the ledger of raw use", `CREATE TABLE ledger (
		pool BYTES NOT NULL REFERENCES pool (id),
		serial BIGINT NOT NULL,
		side BIGINT NOT NULL,
		first_pos BIGINT NOT NULL,
		last_pos BIGINT NOT NULL,
		purpose BIGINT NOT NULL,
		batch BYTES NOT NULL,
		attempt BIGINT NOT NULL,
		hop BIGINT NOT NULL,
		direction BIGINT NOT NULL,
		PRIMARY KEY (pool, serial)
	);
	ALTER TABLE pool ADD COLUMN ledger TEXT NOT NULL DEFAULT ''`},
}

// schemaVersion is that of the tables this program reads and writes. A database
// of a newer one is refused.
func schemaVersion() int64 { return int64(len(migrations)) }

// tables is version 1. Times are microseconds since 1970 UTC. A position is
// seq<<20|index. Serials are counted by us, the store having one writer.
const tables = `
CREATE TABLE node (
	one BIGINT PRIMARY KEY CHECK (one = 1),
	version BIGINT NOT NULL,
	uuid BYTES NOT NULL,
	generation BIGINT NOT NULL,
	epoch BIGINT NOT NULL,
	proof BYTES NOT NULL
);
CREATE TABLE pool (
	id BYTES PRIMARY KEY,
	peer TEXT NOT NULL,
	role BIGINT NOT NULL,
	class BIGINT NOT NULL,
	newest_seq BIGINT NOT NULL,
	own_mark BIGINT NOT NULL,
	peer_mark BIGINT NOT NULL,
	peer_generation BIGINT NOT NULL,
	epoch BIGINT NOT NULL,
	proof BYTES NOT NULL
);
CREATE TABLE block (
	pool BYTES NOT NULL REFERENCES pool (id),
	seq BIGINT NOT NULL,
	state BIGINT NOT NULL,
	class BIGINT NOT NULL,
	no_pad BIGINT NOT NULL,
	key_count BIGINT NOT NULL,
	byte_count BIGINT NOT NULL,
	algorithm TEXT NOT NULL,
	tag_m BYTES NOT NULL,
	tag_s BYTES NOT NULL,
	digest BYTES NOT NULL,
	own_cut BIGINT NOT NULL,
	peer_cut BIGINT NOT NULL,
	generation BIGINT NOT NULL,
	epoch BIGINT NOT NULL,
	wrap BYTES NOT NULL,
	PRIMARY KEY (pool, seq)
);
CREATE TABLE part (
	pool BYTES NOT NULL,
	seq BIGINT NOT NULL,
	part BIGINT NOT NULL,
	ids BYTES NOT NULL,
	box BYTES NOT NULL,
	PRIMARY KEY (pool, seq, part),
	FOREIGN KEY (pool, seq) REFERENCES block (pool, seq)
);
CREATE TABLE history (
	serial BIGINT PRIMARY KEY,
	time BIGINT NOT NULL,
	pool BYTES NOT NULL,
	side BIGINT NOT NULL,
	first_pos BIGINT NOT NULL,
	last_pos BIGINT NOT NULL,
	key_id BYTES NOT NULL,
	state BIGINT NOT NULL,
	key_count BIGINT NOT NULL,
	detail TEXT NOT NULL
);
CREATE INDEX history_key ON history (key_id);
CREATE TABLE event (
	serial BIGINT PRIMARY KEY,
	time BIGINT NOT NULL,
	severity TEXT NOT NULL,
	code TEXT NOT NULL,
	source TEXT NOT NULL,
	message TEXT NOT NULL,
	action TEXT NOT NULL
)`

// apply runs the statements of m within tx.
func (m migration) apply(ctx context.Context, tx *sql.Tx, bytesType string) error {
	for stmt := range strings.SplitSeq(strings.ReplaceAll(m.sql, "BYTES", bytesType), ";") {
		if _, err := tx.ExecContext(ctx, stmt); err != nil {
			return fmt.Errorf("make %s: %w", m.what, err)
		}
	}
	return nil
}

// makeTables makes the newest tables and the node row, whose numbers and proof
// the caller fills in.
func (s *Store) makeTables(ctx context.Context, tx *sql.Tx, id uuid.UUID) error {
	for _, m := range migrations {
		if err := m.apply(ctx, tx, s.eng.bytesType()); err != nil {
			return err
		}
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO node (one, version, uuid, generation, epoch, proof) VALUES (1, $1, $2, 0, 0, $3)`,
		schemaVersion(), id[:], []byte{})
	return err
}

// version reads that of the tables; ErrNewer if this program does not know it.
func (s *Store) version(ctx context.Context, q querier) (v int64, err error) {
	if err := q.QueryRowContext(ctx, `SELECT version FROM node WHERE one = 1`).Scan(&v); err != nil {
		return 0, fmt.Errorf("read node row: %w", explain(err))
	}
	if v > schemaVersion() {
		return 0, fmt.Errorf("%w: its tables have version %d, this program knows %d; install the newer program again", ErrNewer, v, schemaVersion())
	}
	return v, nil
}

// migrate brings the tables of an older version to the newest, one transaction
// for each step. ErrNewer if they are newer.
func (s *Store) migrate(ctx context.Context) error {
	version, err := s.version(ctx, s.w)
	if err != nil {
		return err
	}
	if version < 1 {
		return fmt.Errorf("version %d of the tables: %w", version, ErrDamaged)
	}
	for ; version < schemaVersion(); version++ {
		m := migrations[version]
		err := s.transact(ctx, fmt.Sprintf("bring the tables to version %d", version+1), func(tx *sql.Tx) error {
			if err := m.apply(ctx, tx, s.eng.bytesType()); err != nil {
				return err
			}
			return oneRow(tx.ExecContext(ctx, `UPDATE node SET version = $1 WHERE one = 1 AND version = $2`, version+1, version))
		})
		if err != nil {
			return err
		}
		s.opt.Log.Info("store: tables changed", "database", s.eng.String(), "version", version+1, "by", m.what)
	}
	return nil
}
