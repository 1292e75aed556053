package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/testenv/pgtest"
)

// ownServer is one that the test may stop.
func ownServer(t *testing.T, settings ...string) *pgtest.Server {
	t.Helper()
	s, err := pgtest.Start(t.Context(), settings...)
	must(t, err)
	closeServer(t, s)
	return s
}

func closeServer(t *testing.T, s *pgtest.Server) {
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

func optionsAt(s *pgtest.Server, dir string) Options {
	return Options{URL: s.URL("postgres", ""), RootFile: filepath.Join(dir, "root"), Log: slog.New(slog.DiscardHandler)}
}

// A server that crashes under load and comes back: calls fail meanwhile and work
// afterwards, in the same process; no mark that was told durable goes back.
func TestServerCrashes(t *testing.T) {
	t.Parallel()
	pg := ownServer(t)
	opt := optionsAt(pg, filepath.Join(t.TempDir(), "s"))
	s, ctx := filled(t, opt, 60000), testContext(t)
	stop := make(chan struct{})
	var mu sync.Mutex
	var told key.Position
	done, failed := 0, 0
	var work sync.WaitGroup
	work.Go(func() {
		for i := uint32(2); ; {
			select {
			case <-stop:
				return
			default:
			}
			// After an error the mark may have been raised or not: the call is repeated.
			err := s.Advance(ctx, testPool, Own, key.At(1, i), "lease", 1)
			mu.Lock()
			if err == nil {
				told = key.At(1, i)
				done++
				i += 2
			} else if failed++; !errors.Is(err, ErrUnreachable) {
				t.Errorf("while the server was away: %v", err)
			}
			mu.Unlock()
			if err != nil {
				time.Sleep(5 * time.Millisecond)
			}
		}
	})
	count := func() (int, int) {
		mu.Lock()
		defer mu.Unlock()
		return done, failed
	}
	for range 3 {
		before, _ := count()
		waitFor(t, "marks are raised", func() bool { n, _ := count(); return n > before+20 })
		_, errs := count()
		must(t, pg.Stop(ctx, "immediate"))
		waitFor(t, "calls fail", func() bool { _, n := count(); return n > errs })
		must(t, pg.Resume(ctx))
	}
	before, _ := count()
	waitFor(t, "calls work again", func() bool { n, _ := count(); return n > before+20 })
	close(stop)
	work.Wait()
	waitFor(t, "the lock stands again", func() bool { return s.Held() == nil })
	p, err := s.Pool(ctx, testPool)
	if err != nil || p.Mark != told {
		t.Errorf("mark %s, told %s, %v", p.Mark, told, err)
	}
	must(t, s.Close())
	s = mustOpen(t, opt)
	if p, err = s.Pool(ctx, testPool); err != nil || p.Mark != told || p.Active != 30000+30000-int(told.Index())/2-1 {
		t.Errorf("after a restart: %+v, told %s, %v", p, told, err)
	}
}

// A leader that cannot reach its server says after some seconds that it does not
// know any more; if nobody took over meanwhile it goes on with what it has.
func TestServerAway(t *testing.T) {
	t.Parallel()
	pg := ownServer(t, "fsync=off")
	s, ctx := filled(t, optionsAt(pg, filepath.Join(t.TempDir(), "s")), 10), testContext(t)
	must(t, s.Held())
	must(t, pg.Stop(ctx, "immediate"))
	waitFor(t, "Held says no", func() bool { return errors.Is(s.Held(), ErrNotHeld) })
	must(t, pg.Resume(ctx))
	waitFor(t, "Held says yes", func() bool { return s.Held() == nil })
	if keys := lease(t, s, Own, 0, key.At(1, 9)); len(keys) != 5 {
		t.Errorf("%d keys", len(keys))
	}
}

// givenUp opens a store that is not where it was, and expects the pools with
// their marks, no key, and the alarm.
func givenUp(t *testing.T, opt Options, mark key.Position) {
	t.Helper()
	now := time.Now().Unix()
	s, ctx := mustOpen(t, opt), testContext(t)
	p, err := s.Pool(ctx, testPool)
	if err != nil || p.Mark != mark || p.NewestSeq != 3 || p.Active != 0 || p.Received != 0 {
		t.Errorf("pool %+v, %v; want mark %s and no key", p, err, mark)
	}
	if list, err := s.Blocks(ctx, testPool); err != nil || len(list) != 0 {
		t.Errorf("blocks %+v, %v", list, err)
	}
	if s.Generation() < uint64(now) {
		t.Errorf("generation %d is below the clock's, %d", s.Generation(), now)
	}
	if ev, err := s.Events(ctx, EventQuery{Severity: SeverityAlarm, Code: "store-server-changed"}); err != nil || len(ev) != 1 {
		t.Errorf("alarms %+v, %v", ev, err)
	}
	if h, err := s.History(ctx, HistoryQuery{Pool: testPool, At: key.At(2, 9), Limit: 1}); err != nil || len(h) != 1 || h[0].State != key.Destroyed {
		t.Errorf("history %+v, %v", h, err)
	}
	// It serves new keys.
	must(t, s.PutBlock(ctx, testBlock(t, 4, 10)))
	must(t, s.Activate(ctx, testPool, 4))
	must(t, s.Ratchet(ctx))
	must(t, s.Close())
	s, err = Open(ctx, opt)
	must(t, err)
	defer s.Close()
	if p, err := s.Pool(ctx, testPool); err != nil || p.Active != 10 {
		t.Errorf("after another start: %+v, %v", p, err)
	}
}

// A replica that was promoted without the last commits: marks of which the old
// primary told are missing there, so nothing that it has is supplied.
func TestPromotedReplica(t *testing.T) {
	t.Parallel()
	pg, ctx := ownServer(t, "fsync=off"), testContext(t)
	dir := filepath.Join(t.TempDir(), "s")
	opt := optionsAt(pg, dir)
	spent(t, opt)
	replica, err := pg.StartCopy(ctx)
	must(t, err)
	closeServer(t, replica)
	after := optionsAt(replica, dir)
	if _, err := Open(ctx, after); !errors.Is(err, ErrReadOnly) || !strings.Contains(err.Error(), "standby") {
		t.Errorf("a standby: %v", err)
	}
	must(t, replica.Stop(ctx, "fast"))
	s := mustOpen(t, opt)
	if keys := lease(t, s, Own, key.At(1, 40), key.At(1, 100)); len(keys) != 30 {
		t.Fatalf("%d keys", len(keys))
	}
	must(t, pg.Stop(ctx, "immediate"))
	must(t, replica.Resume(ctx))
	must(t, replica.Promote(ctx))
	// The leader that goes on with the new server, as behind one address.
	s.eng.(*postgresEngine).conf.Host = replica.Dir
	s.w.Close()
	must(t, s.connect())
	if err := s.Advance(ctx, testPool, Own, key.At(1, 120), "lease", 1); !errors.Is(err, ErrDeposed) || s.Held() == nil {
		t.Errorf("the leader at the new server: %v", err)
	}
	must(t, s.Close())
	givenUp(t, after, key.At(1, 40))
}

// Another cluster, or the same, into which a dump was put back.
func TestRestoredDump(t *testing.T) {
	t.Parallel()
	pg, ctx := ownServer(t, "fsync=off"), testContext(t)
	other := ownServer(t, "fsync=off")
	dir := filepath.Join(t.TempDir(), "s")
	opt := optionsAt(pg, dir)
	spent(t, opt)
	dump, err := pg.Output(ctx, "pg_dump", "-n", defaultSchema, "postgres")
	must(t, err)
	s := mustOpen(t, opt)
	if keys := lease(t, s, Own, key.At(1, 40), key.At(1, 100)); len(keys) != 30 {
		t.Fatalf("%d keys", len(keys))
	}
	must(t, s.Close())
	elsewhere := filepath.Join(t.TempDir(), "s")
	must(t, os.Mkdir(elsewhere, 0o700))
	copyFile(t, filepath.Join(dir, "root"), filepath.Join(elsewhere, "root"))
	must(t, other.Restore(ctx, "postgres", dump))
	givenUp(t, optionsAt(other, elsewhere), key.At(1, 40))
	must(t, pg.Exec(ctx, "postgres", "DROP SCHEMA "+defaultSchema+" CASCADE"))
	must(t, pg.Restore(ctx, "postgres", dump))
	givenUp(t, opt, key.At(1, 40))
	must(t, pg.Exec(ctx, "postgres", "DROP SCHEMA "+defaultSchema+" CASCADE"))
	must(t, pg.Restore(ctx, "postgres", dump))
	if _, err := Open(ctx, opt); !errors.Is(err, ErrRestored) {
		t.Errorf("a dump from before the last ratchet: %v", err)
	}
}

// Nothing of any key is in the server's files, log among them, nor in a dump.
func TestNoKeyByteAtTheServer(t *testing.T) {
	t.Parallel()
	const n = 3000
	pg, ctx := ownServer(t, "fsync=off", "log_statement=all", "log_parameter_max_length=-1"), testContext(t)
	s := filled(t, optionsAt(pg, filepath.Join(t.TempDir(), "s")), n)
	lease(t, s, Own, 0, key.At(1, 700))
	must(t, s.Record(ctx, []Event{{Pool: testPool, State: key.Supplied, ID: testID(1, 2)}}))
	must(t, s.Ratchet(ctx))
	lease(t, s, Peer, 0, key.At(1, 701))
	must(t, s.Close())
	must(t, pg.Exec(ctx, "postgres", "CHECKPOINT"))
	dump, err := pg.Output(ctx, "pg_dump", "postgres")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(pg.Dir, "dump"), dump, 0o600))
	w, ids := windows([]uint64{1}, n), map[string]bool{}
	for i := range n {
		id := testID(1, i)
		ids[string(id[:8])] = true
		ids[fmt.Sprintf("%x", id[:8])] = true
	}
	seen, hits := map[string]bool{}, 0
	must(t, filepath.Walk(pg.Dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil || !fi.Mode().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i := range b {
			if within(w, b, i) {
				hits++
				t.Logf("at %d of %s", i, path)
			}
			if within(ids, b, i) {
				seen[strings.Split(strings.TrimPrefix(path, pg.Dir+"/"), "/")[0]+fi.Name()[:1]] = true
			}
		}
		return nil
	}))
	// The dump, the log, and of the data at least the WAL and the tables.
	if len(seen) < 4 || !seen["dumpd"] || !seen["logl"] {
		t.Errorf("Key-IDs seen in %v only: the search does not see what is there", seen)
	}
	if hits != 0 {
		t.Errorf("%d pieces of keys", hits)
	}
}

// What the server refuses comes with our error and what to do.
func TestServerRefuses(t *testing.T) {
	t.Parallel()
	pg, ctx := ownServer(t, "fsync=off"), testContext(t)
	for _, sql := range []string{
		"CREATE ROLE stranger LOGIN", "CREATE ROLE crowd LOGIN CONNECTION LIMIT 1", "GRANT CREATE ON DATABASE postgres TO crowd",
		"CREATE SCHEMA foreign_one", "CREATE TABLE foreign_one.node (a int)", "CREATE SCHEMA mine AUTHORIZATION stranger",
	} {
		must(t, pg.Exec(ctx, "postgres", sql))
	}
	spent(t, optionsAt(pg, filepath.Join(t.TempDir(), "s")))
	user := func(name, rest string) string {
		return strings.Replace(pg.URL("postgres", ""), "user=owner", "user="+name, 1) + rest
	}
	for _, tc := range []struct {
		name, url, says string
		want            error
	}{
		{"no server", "postgres:///postgres?host=/nonexistent&user=owner", "look whether it runs", ErrUnreachable},
		{"no server at a port", "postgres://owner:secret@127.0.0.1:1/postgres", "look whether it runs", ErrUnreachable},
		{"no such role", user("nobody_here", ""), "pg_hba.conf", ErrDenied},
		{"no such database", pg.URL("none", ""), "create it", nil},
		{"may not make the schema", user("stranger", ""), "own the schema", ErrDenied},
		{"too many connections", user("crowd", "&search_path=crowd"), "max_connections", ErrBusy},
		{"another program's tables", pg.URL("postgres", "foreign_one"), "another schema", ErrForeign},
		{"a read-only server", pg.URL("postgres", "readonly") + "&default_transaction_read_only=on", "read_only", ErrReadOnly},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "s")
			s, err := Open(ctx, Options{URL: tc.url, RootFile: filepath.Join(dir, "root"), Log: slog.New(slog.DiscardHandler)})
			if err == nil {
				_ = s.Close()
			}
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v", err)
			}
			if strings.Contains(fmt.Sprint(err), "secret") {
				t.Errorf("the password is in the error: %v", err)
			}
		})
	}
	// A schema that was made for us needs no right to make one.
	mustOpen(t, Options{URL: user("stranger", "&search_path=mine"), RootFile: filepath.Join(t.TempDir(), "s", "root"), Log: slog.New(slog.DiscardHandler)})
	for code, want := range map[string]error{"53100": ErrFull, "57P03": ErrUnreachable, "XX001": ErrDamaged, "25006": ErrReadOnly} {
		if err := explain(fmt.Errorf("x: %w", &pgconn.PgError{Code: code})); !errors.Is(err, want) {
			t.Errorf("code %s: %v", code, err)
		}
	}
	must(t, pg.Exec(ctx, "postgres", "UPDATE q_ipsec.node SET version = 99"))
	if _, err := Open(ctx, optionsAt(pg, filepath.Join(t.TempDir(), "n"))); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer version: %v", err)
	}
}

// A password is read from where it is meant to be, and shown nowhere.
func TestPasswords(t *testing.T) {
	t.Parallel()
	pg, ctx := ownServer(t, "fsync=off"), testContext(t)
	must(t, pg.Exec(ctx, "postgres", "CREATE ROLE guarded LOGIN PASSWORD 's3cret/%word'"))
	must(t, pg.Exec(ctx, "postgres", "CREATE SCHEMA guarded AUTHORIZATION guarded"))
	must(t, os.WriteFile(filepath.Join(pg.Data(), "pg_hba.conf"), []byte("local all owner trust\nlocal all guarded scram-sha-256\n"), 0o600))
	must(t, pg.Exec(ctx, "postgres", "SELECT pg_reload_conf()"))
	base := strings.Replace(pg.URL("postgres", "guarded"), "user=owner", "user=guarded", 1)
	dir := t.TempDir()
	file, passfile, wrong, open := filepath.Join(dir, "pw"), filepath.Join(dir, "pgpass"), filepath.Join(dir, "wrong"), filepath.Join(dir, "open")
	must(t, os.WriteFile(file, []byte("s3cret/%word\n"), 0o600))
	must(t, os.WriteFile(passfile, []byte("*:*:*:guarded:s3cret/%word\n"), 0o600))
	must(t, os.WriteFile(wrong, []byte("s3cret/%wrong\n"), 0o600))
	must(t, os.WriteFile(open, []byte("s3cret/%word\n"), 0o644))
	var logged strings.Builder
	log := slog.New(slog.NewTextHandler(&logged, nil))
	root := filepath.Join(t.TempDir(), "s", "root")
	for _, tc := range []struct {
		name, url, file string
		want            error
	}{
		{"in a file", base, file, nil},
		{"in the passfile", base + "&passfile=" + passfile, "", nil},
		{"in the URL", base + "&password=s3cret%2F%25word", "", nil},
		{"none", base, "", ErrDenied},
		{"wrong", base, wrong, ErrDenied},
		{"readable by others", base, open, ErrAccess},
	} {
		s, err := Open(ctx, Options{URL: tc.url, PasswordFile: tc.file, RootFile: root, Log: log})
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
		fmt.Fprintln(&logged, err)
		if err == nil {
			fmt.Fprintln(&logged, s.eng)
			must(t, s.Close())
		}
	}
	for _, url := range []string{
		"postgres://u:s3cret%zz@h/d", "postgres://u:s3cret@h:port/d", "postgres://u:s3cret@h:99999/d", "postgres://u:s3cret @h/d", "postgres://u:s3/cret@h/d",
		"postgres://h/d?sslmode=s3cret", "postgres://h/d?search_path=a,s3cret", "postgres://h/d?sslrootcert=/none&sslmode=verify-full&password=s3cret",
		"postgre://u:s3cret@h/d", "postgres:u:s3cret", "host=h password=s3cret",
	} {
		_, err := newEngine(&Options{URL: url, Log: log})
		if err == nil {
			t.Errorf("%s was taken", url)
		}
		fmt.Fprintln(&logged, err)
	}
	if strings.Contains(logged.String(), "s3") {
		t.Errorf("a part of a password is in a log or an error:\n%s", logged.String())
	}
	e, err := newEngine(&Options{URL: "postgres://u:s3cret@%2Fvar%2Frun%2Fpostgresql:5433/d?sslmode=disable", RootFile: root, Log: log})
	must(t, err)
	if e.String() != "postgres:///d?host=/var/run/postgresql&port=5433 schema q_ipsec" {
		t.Errorf("a socket directory as host: %s", e)
	}
}

// A session keeps the settings that durability and the bounds of waiting rest
// on, whatever the database's or the role's defaults are.
func TestSession(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "s")
	s := mustOpen(t, postgresOptions(t, dir))
	for name, want := range map[string]string{
		"synchronous_commit": "on", "default_transaction_isolation": "read committed", "lock_timeout": "15s", "statement_timeout": "30s",
		"idle_in_transaction_session_timeout": "10s", "search_path": `"` + schemaOf(dir) + `", pg_temp`,
	} {
		var got string
		must(t, s.w.QueryRow(`SELECT current_setting($1)`, name).Scan(&got))
		if got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if _, err := s.r.Exec(`UPDATE node SET epoch = 9`); !errors.Is(explain(err), ErrReadOnly) {
		t.Errorf("a reading connection wrote: %v", err)
	}
}

// Check works on a server, beside a leader too.
func TestCheckAtAServer(t *testing.T) {
	t.Parallel()
	opt := postgresOptions(t, filepath.Join(t.TempDir(), "s"))
	spent(t, opt)
	for _, running := range []bool{false, true} {
		if running {
			mustOpen(t, opt)
		}
		if r := Check(testContext(t), opt); r.Verdict() != Sound || r.Running != running || r.Keys != allKeys+10 || len(r.Findings) != 0 {
			t.Errorf("%+v", r)
		}
	}
	var b strings.Builder
	if _, err := Backup(context.WithoutCancel(testContext(t)), opt, &b); err != nil {
		t.Error(err)
	}
	to := postgresOptions(t, filepath.Join(t.TempDir(), "n"))
	must(t, os.Mkdir(filepath.Dir(to.RootFile), 0o700))
	if _, err := Restore(testContext(t), to, strings.NewReader(b.String())); err != nil {
		t.Error(err)
	}
	if _, err := Restore(testContext(t), opt, strings.NewReader(b.String())); !errors.Is(err, ErrInUse) {
		t.Errorf("restored over a store in use: %v", err)
	}
}
