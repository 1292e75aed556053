package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// pgLock is a session's advisory lock, on a connection of its own.
type pgLock struct {
	e    *postgresEngine
	conn *pgx.Conn       // nil after it broke
	end  context.Context // for Close, which comes when all others have ended
}

// own takes the lock and makes the schema if it is missing.
func (e *postgresEngine) own(ctx context.Context) (lock, error) {
	l := &pgLock{e: e, end: context.WithoutCancel(ctx)}
	if err := l.take(ctx, ""); err != nil {
		return nil, fmt.Errorf("store: %s: %w", e, explain(err))
	}
	var there bool
	err := l.conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)`, e.schema).Scan(&there)
	if err == nil && !there {
		_, err = l.conn.Exec(ctx, `CREATE SCHEMA `+pgx.Identifier{e.schema}.Sanitize())
	}
	var fsync, pages string
	if err == nil {
		err = l.conn.QueryRow(ctx, `SELECT current_setting('fsync'), current_setting('full_page_writes')`).Scan(&fsync, &pages)
	}
	if err != nil {
		return nil, fmt.Errorf("store: %s: %w", e, explain(errors.Join(err, l.Close())))
	}
	if fsync != "on" {
		e.log.Error("store: the server runs with fsync off: after a power cut it may forget marks, and nothing here can tell", "database", e.String())
	}
	return l, nil
}

// take connects and takes the lock, or fails with ErrInUse; with ErrDeposed if who has
// it has already put its name in place of holder, unless that is empty.
func (l *pgLock) take(ctx context.Context, holder string) error {
	conn, err := pgx.ConnectConfig(ctx, l.e.conf.Copy())
	if err != nil {
		return err
	}
	if err := l.e.atHome(ctx, conn); err != nil {
		return errors.Join(err, conn.Close(ctx))
	}
	// A holder that stopped without its connection breaking is ended by the
	// server, later than holdBound. PostgreSQL 13 cannot.
	if _, err := conn.Exec(ctx, `SELECT set_config('idle_session_timeout', $1, false) WHERE current_setting('server_version_num')::int >= 140000`,
		strconv.Itoa(int(pgSilence/time.Millisecond))); err != nil {
		return errors.Join(err, conn.Close(ctx))
	}
	var got bool
	if err := conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1)`, l.e.lockKey()).Scan(&got); err != nil {
		return errors.Join(err, conn.Close(ctx))
	}
	if !got && holder != "" {
		var now string
		if err := conn.QueryRow(ctx, holderQuery).Scan(&now); err == nil && now != holder {
			return errors.Join(checkHolder(now, holder), conn.Close(ctx))
		}
	}
	if !got {
		return errors.Join(l.e.inUse(ctx, conn), conn.Close(ctx))
	}
	l.conn = conn
	return nil
}

// lockRow selects the lock in pg_locks.
func (e *postgresEngine) lockRow() string {
	key := uint64(e.lockKey())
	return fmt.Sprintf(`FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
		WHERE l.locktype = 'advisory' AND l.granted AND l.classid = %d AND l.objid = %d AND l.objsubid = 1
		AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())`, key>>32, uint32(key))
}

// inUse says who has the lock, as far as the server lets us see.
func (e *postgresEngine) inUse(ctx context.Context, conn *pgx.Conn) error {
	var who string
	err := conn.QueryRow(ctx, `SELECT coalesce(a.application_name, '?') || ' at ' || coalesce(host(a.client_addr), 'the same host') `+e.lockRow()).Scan(&who)
	if err != nil {
		who = "which one cannot be seen" // it may just have ended
	}
	return fmt.Errorf("%w (%s); stop it first, or stand by", ErrInUse, who)
}

// hold asks over the lock's connection, whose life is the lock's.
func (l *pgLock) hold(ctx context.Context, holder string) error {
	if l.conn == nil {
		if err := l.take(ctx, holder); err != nil {
			return err
		}
	}
	var now string
	if err := l.conn.QueryRow(ctx, holderQuery).Scan(&now); err != nil {
		return errors.Join(err, l.Close())
	}
	return checkHolder(now, holder)
}

// Close gives the lock back and ends the session. Without an answer the server
// does it when it notices.
func (l *pgLock) Close() error {
	if l.conn == nil {
		return nil
	}
	conn := l.conn
	l.conn = nil
	ctx, cancel := context.WithTimeout(l.end, beatTimeout)
	defer cancel()
	if !conn.IsClosed() {
		_, _ = conn.Exec(ctx, `SELECT pg_advisory_unlock($1)`, l.e.lockKey()) // it may be broken
	}
	_ = conn.Close(ctx)
	return nil
}

// look reads a snapshot, which a running leader does not notice.
func (e *postgresEngine) look(ctx context.Context) (*look, error) {
	dir := filepath.Dir(e.rootFile)
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("store: directory: %w", err)
	}
	if err := checkMode(dir, fi, 0o700); err != nil {
		return nil, err
	}
	l := &look{begin: "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY", done: func() error { return nil }}
	if l.connector, err = e.connector(true); err != nil {
		return nil, err
	}
	db := sql.OpenDB(l.connector)
	defer db.Close()
	if err := db.QueryRowContext(ctx, `SELECT EXISTS (SELECT `+e.lockRow()+`)`).Scan(&l.running); err != nil {
		return nil, fmt.Errorf("store: %s: %w", e, explain(err))
	}
	if leftover := e.rootFile + ".new"; fileThere(leftover) && !l.running {
		l.leftovers = append(l.leftovers, leftover)
	}
	return l, nil
}
