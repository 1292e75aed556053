package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"golang.org/x/sys/unix"
)

// All that is PostgreSQL's own is in this file and in pglock.go: how to
// connect, what tells one server from another, and the codes it fails with.

// defaultSchema holds the tables unless the URL has a search_path.
const defaultSchema = "q_ipsec"

// nodeComment marks the node table as ours.
const nodeComment = "Q-IPsec inventory"

// What bounds every wait. The server gives up first, and says why; patience is
// for one that does not answer at all. A process that is stopped within a
// transaction loses it in time for the lock that its successor waits for.
const (
	pgConnect  = 5 * time.Second
	pgPatience = 45 * time.Second
	pgUnacked  = 10 * time.Second // data that nobody acknowledges
	pgSilence  = 8 * time.Second  // of who has the lock
)

var pgSession = map[string]string{
	"synchronous_commit": "on", "default_transaction_isolation": "read committed", "default_transaction_deferrable": "off",
	"idle_in_transaction_session_timeout": "10s", "lock_timeout": "15s", "statement_timeout": "30s",
	// How soon the server drops a connection whose other end is gone: later than
	// holdBound.
	"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3", "tcp_user_timeout": "10000",
	"bytea_output": "hex", "client_encoding": "UTF8",
}

// postgresEngine is one schema of a database on a server.
type postgresEngine struct {
	conf     *pgx.ConnConfig
	schema   string
	rootFile string
	log      *slog.Logger

	mu   sync.Mutex
	home string // server and timeline of the first connection; all others must be there, too
}

// socketHost is libpq's way to name a socket directory as host, which net/url
// does not take.
var socketHost = regexp.MustCompile(`^(postgres(?:ql)?://(?:[^/?#@]*@)?)(%2[fF][^/?#:@]*)(:\d+)?(/[^?#]*)?(?:\?([^#]*))?$`)

// newPostgres reads the URL. No error shows a part of it, as it may hold a
// password anywhere if it is mistyped.
func newPostgres(opt *Options) (engine, error) {
	text := opt.URL
	if m := socketHost.FindStringSubmatch(text); m != nil {
		text = m[1] + m[3] + m[4] + "?host=" + m[2]
		if m[5] != "" {
			text += "&" + m[5]
		}
	}
	if _, err := url.Parse(text); err != nil {
		return nil, errors.New("store: the PostgreSQL URL cannot be read: special characters of a password must be written as %XX")
	}
	conf, err := pgx.ParseConfig(text)
	if err != nil {
		var file *fs.PathError
		if errors.As(err, &file) {
			return nil, fmt.Errorf("store: the PostgreSQL URL names a file that cannot be read: %w", file)
		}
		return nil, errors.New("store: the PostgreSQL URL cannot be used: look at its host, port and parameters")
	}
	e := &postgresEngine{conf: conf, schema: defaultSchema, rootFile: opt.RootFile, log: opt.Log}
	if path := conf.RuntimeParams["search_path"]; path != "" {
		e.schema = strings.Trim(path, `"`)
	}
	if strings.ContainsAny(e.schema, `", `+"\x00") || e.schema == "" || len(e.schema) > 63 || strings.HasPrefix(e.schema, "pg_") {
		return nil, errors.New("store: search_path of the PostgreSQL URL must be the name of one schema")
	}
	if opt.PasswordFile != "" {
		if conf.Password, err = readPassword(opt.PasswordFile); err != nil {
			return nil, err
		}
	}
	host, err := os.Hostname()
	if err != nil {
		host = "?"
	}
	for k, v := range pgSession {
		conf.RuntimeParams[k] = v
	}
	conf.RuntimeParams["search_path"] = pgx.Identifier{e.schema}.Sanitize() + ", pg_temp"
	conf.RuntimeParams["application_name"] = fmt.Sprintf("q-ipsec %s %d", host, os.Getpid())
	if conf.ConnectTimeout == 0 || conf.ConnectTimeout > pgPatience {
		conf.ConnectTimeout = pgConnect
	}
	dialer := &net.Dialer{
		Timeout:         conf.ConnectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3},
		Control:         userTimeout,
	}
	conf.DialFunc = dialer.DialContext
	conf.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, c net.Conn) (net.Conn, error) {
		return &patientConn{Conn: c}, nil
	}
	return e, nil
}

// readPassword gives the first line of a file of mode 0600.
func readPassword(path string) (string, error) {
	if err := checkFile(path); err != nil {
		return "", err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("store: read the database password: %w", err)
	}
	defer clear(b)
	line, _, _ := strings.Cut(string(b), "\n")
	if line = strings.TrimSuffix(line, "\r"); line == "" {
		return "", fmt.Errorf("store: the database password in %s is empty", path)
	}
	return line, nil
}

// userTimeout has the kernel end a TCP connection on which what we sent is not
// acknowledged.
func userTimeout(network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(pgUnacked/time.Millisecond))
	}); e != nil {
		return e
	}
	return err
}

// patientConn ends a read that nobody put a deadline on after pgPatience, so
// that a server that is stopped or hangs does not hold us up for ever.
type patientConn struct {
	net.Conn
	mu    sync.Mutex
	bound bool // the driver's own deadline is in force
}

func (c *patientConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	if !c.bound {
		if err := c.Conn.SetReadDeadline(time.Now().Add(pgPatience)); err != nil {
			c.mu.Unlock()
			return 0, err
		}
	}
	c.mu.Unlock()
	return c.Conn.Read(b)
}

func (c *patientConn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bound = !t.IsZero()
	return c.Conn.SetDeadline(t)
}

func (c *patientConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bound = !t.IsZero()
	return c.Conn.SetReadDeadline(t)
}

// String has neither user nor password.
func (e *postgresEngine) String() string {
	u := url.URL{Scheme: "postgres", Host: net.JoinHostPort(e.conf.Host, fmt.Sprint(e.conf.Port)), Path: "/" + e.conf.Database}
	if strings.HasPrefix(e.conf.Host, "/") {
		u.Host = ""
		u.RawQuery = fmt.Sprintf("host=%s&port=%d", e.conf.Host, e.conf.Port)
	}
	return u.String() + " schema " + e.schema
}

func (e *postgresEngine) bytesType() string { return "BYTEA" }

func (e *postgresEngine) shared() bool { return true }

func (e *postgresEngine) lockNode(query string) string { return query + " FOR UPDATE" }

// prepare keeps a second process of this machine from the root file, which two
// could not replace at once.
func (e *postgresEngine) prepare() (*os.File, error) {
	if err := checkDir(filepath.Dir(e.rootFile)); err != nil {
		return nil, err
	}
	lock := e.rootFile + ".lock"
	for _, f := range []string{e.rootFile, e.rootFile + ".new", lock} {
		if err := checkFile(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return lockFile(lock, e.rootFile)
}

func (e *postgresEngine) connector(readOnly bool) (driver.Connector, error) {
	conf := e.conf.Copy()
	if readOnly {
		conf.RuntimeParams["default_transaction_read_only"] = "on"
	}
	return stdlib.GetConnector(*conf, stdlib.OptionAfterConnect(func(ctx context.Context, c *pgx.Conn) error {
		if err := e.atHome(ctx, c); err != nil {
			return errors.Join(err, c.Close(ctx))
		}
		return nil
	})), nil
}

// atHome refuses a standby, and a server other than that of the first
// connection: one that took over may lack commits that were reported to us.
func (e *postgresEngine) atHome(ctx context.Context, c *pgx.Conn) error {
	var standby bool
	var home string
	// Of the timeline, pg_control_checkpoint() tells only at the first checkpoint
	// after a promotion; the name of a WAL file does at once.
	err := c.QueryRow(ctx, `SELECT pg_is_in_recovery(), (SELECT system_identifier FROM pg_control_system())::text || '/' ||
		CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END`).Scan(&standby, &home)
	if err != nil {
		return fmt.Errorf("ask the server what it is: %w", err)
	}
	if standby {
		return fmt.Errorf("%w: it is a standby; name the primary in the URL, or all hosts and target_session_attrs=read-write", ErrReadOnly)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.home == "" {
		e.home = home
	}
	if home != e.home {
		return fmt.Errorf("%w: the database moved from server and timeline %s to %s, where the last commits may be missing", ErrDeposed, e.home, home)
	}
	return nil
}

// server is the server, its timeline and the node table: a dump that was
// restored has another table, a standby that was promoted another timeline.
func (e *postgresEngine) server(ctx context.Context, q querier) (string, error) {
	var oid string
	if err := q.QueryRowContext(ctx, `SELECT 'node'::regclass::oid::text`).Scan(&oid); err != nil {
		return "", err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.home + "/" + oid, nil
}

func (e *postgresEngine) fresh(ctx context.Context, q querier) (bool, error) {
	var tables int
	err := q.QueryRowContext(ctx, `SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')`, e.schema).Scan(&tables)
	if err != nil || tables == 0 {
		return err == nil, err
	}
	var comment sql.NullString
	if err := q.QueryRowContext(ctx, `SELECT obj_description(to_regclass($1), 'pg_class')`,
		pgx.Identifier{e.schema, "node"}.Sanitize()).Scan(&comment); err != nil {
		return false, err
	}
	if comment.String != nodeComment {
		return false, fmt.Errorf("%w: schema %s has %d tables of another program; name another schema by search_path in the URL", ErrForeign, e.schema, tables)
	}
	return false, nil
}

func (e *postgresEngine) claim(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, `COMMENT ON TABLE node IS '`+nodeComment+`'`)
	return err
}

// lockKey is the advisory lock of the schema; such locks are each database's own.
func (e *postgresEngine) lockKey() int64 {
	sum := sha256.Sum256([]byte("Q-IPsec inventory " + e.schema))
	return int64(binary.BigEndian.Uint64(sum[:]))
}

func explainPostgres(err error) error {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return explainCode(e.Code, err)
	}
	var c *pgconn.ConnectError
	var n net.Error
	if errors.As(err, &c) || errors.As(err, &n) && !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, pgconn.ErrConnClosed) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, driver.ErrBadConn) {
		return fmt.Errorf("%w: %w; look whether it runs and what its log says", ErrUnreachable, err)
	}
	return err
}

// explainCode goes by PostgreSQL's SQLSTATEs (its manual, appendix A).
func explainCode(code string, err error) error {
	switch {
	case code == "53100":
		return fmt.Errorf("%w: %w; free some space at the server, nothing was changed", ErrFull, err)
	case code == "53300":
		return fmt.Errorf("%w: %w; an inventory needs six: raise max_connections", ErrBusy, err)
	case code == "25006":
		return fmt.Errorf("%w: %w; a standby, or default_transaction_read_only", ErrReadOnly, err)
	case code == "42501":
		return fmt.Errorf("%w: %w; the user must own the schema's tables, and may CREATE in the database or own the schema", ErrDenied, err)
	case strings.HasPrefix(code, "28"):
		return fmt.Errorf("%w: %w; look at user, password file and pg_hba.conf", ErrDenied, err)
	case code == "3D000":
		return fmt.Errorf("%w; create it, owned by this user", err)
	case strings.HasPrefix(code, "08"), strings.HasPrefix(code, "57P"):
		return fmt.Errorf("%w: %w; look whether it runs and what its log says", ErrUnreachable, err)
	case code == "55P03", code == "57014", code == "25P03":
		return fmt.Errorf("%w; the server is too slow, or somebody else has locked our tables", err)
	case strings.HasPrefix(code, "XX"):
		return fmt.Errorf("%w: %w; look at the server's log and disk", ErrDamaged, err)
	}
	return err
}
