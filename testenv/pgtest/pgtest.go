// Package pgtest runs private PostgreSQL servers for tests, from Debian's
// package postgresql. A server listens on a unix socket in its own temporary
// directory and nowhere else. It is gone, and its directory with it, when the
// process that started it has ended, however that ended.
package pgtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Server is one cluster in a directory of its own, running or stopped.
type Server struct {
	Dir string // data, socket and log are in it

	bin     string
	cred    *syscall.Credential // PostgreSQL refuses root
	janitor *exec.Cmd
	life    io.Closer // the janitor waits for its end
}

// janitor ends what is left of a server once its standard input ends.
const janitor = `cat >/dev/null
pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null) && kill -CONT "$pid" && kill -QUIT "$pid"
for i in $(seq 100); do [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
rm -rf "$1"`

// Start makes a new cluster, with settings such as "fsync=off" for its
// configuration, and starts it.
func Start(ctx context.Context, settings ...string) (*Server, error) {
	s, err := prepare(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.run(ctx, "initdb", "-D", s.data(), "-A", "trust", "-U", "owner", "-N", "--no-instructions", "-E", "UTF8", "--locale=C"); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, s.begin(ctx, settings)
}

// StartCopy starts a standby of s, which must be running. Promote makes it a
// server of its own.
func (s *Server) StartCopy(ctx context.Context) (*Server, error) {
	c, err := prepare(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.run(ctx, "pg_basebackup", "-h", s.Dir, "-U", "owner", "-D", c.data(), "-R", "-c", "fast", "-N"); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, c.begin(ctx, nil)
}

// prepare makes the directory and what will remove it.
func prepare(ctx context.Context) (*Server, error) {
	bin, err := binaries()
	if err != nil {
		return nil, err
	}
	s := &Server{bin: bin}
	if s.cred, err = credential(); err != nil {
		return nil, err
	}
	if s.Dir, err = os.MkdirTemp("", "pgtest"); err != nil { // short: a socket's path has 107 bytes
		return nil, err
	}
	if s.cred != nil {
		if err := os.Chown(s.Dir, int(s.cred.Uid), int(s.cred.Gid)); err != nil {
			return nil, errors.Join(err, os.RemoveAll(s.Dir))
		}
	}
	s.janitor = exec.CommandContext(context.WithoutCancel(ctx), "/bin/sh", "-c", janitor, "sh", s.Dir)
	// A session of its own: what ends the test's process group leaves it.
	s.janitor.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: s.cred}
	if s.life, err = s.janitor.StdinPipe(); err == nil {
		err = s.janitor.Start()
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.Dir))
	}
	return s, nil
}

// ErrNotInstalled is what Start gives where there is no PostgreSQL to start.
var ErrNotInstalled = errors.New("pgtest: no PostgreSQL in /usr/lib/postgresql: run scripts/deps.sh test")

// binaries finds the newest PostgreSQL of Debian's packages.
func binaries() (string, error) {
	dirs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(dirs) == 0 {
		return "", ErrNotInstalled
	}
	version := func(dir string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(dir))) // 0: not a version
		return n
	}
	return slices.MaxFunc(dirs, func(a, b string) int { return version(a) - version(b) }), nil
}

// credential is that of an unprivileged user if we are root.
func credential() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(err1, err2)
	}
	return nil, errors.New("pgtest: neither user postgres nor nobody to run the server as")
}

func (s *Server) data() string { return filepath.Join(s.Dir, "data") }

// Data is the directory of the server's files.
func (s *Server) Data() string { return s.data() }

func (s *Server) begin(ctx context.Context, settings []string) error {
	settings = append([]string{
		"listen_addresses=''", fmt.Sprintf("unix_socket_directories='%s'", s.Dir), "max_connections=300", "shared_buffers=32MB",
		"wal_level=replica", "max_wal_size=256MB", "logging_collector=off",
	}, settings...)
	f, err := os.OpenFile(filepath.Join(s.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(strings.Join(settings, "\n") + "\n")
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		err = s.Resume(ctx)
	}
	if err != nil {
		return errors.Join(err, s.Close())
	}
	return nil
}

// Resume starts a server that was stopped.
func (s *Server) Resume(ctx context.Context) error {
	return s.run(ctx, "pg_ctl", "-D", s.data(), "-l", filepath.Join(s.Dir, "log"), "-s", "-w", "-t", "60", "start")
}

// Stop stops it: "fast" ends its sessions first, "immediate" is like a crash.
func (s *Server) Stop(ctx context.Context, mode string) error {
	return s.run(ctx, "pg_ctl", "-D", s.data(), "-m", mode, "-s", "-w", "-t", "60", "stop")
}

// Promote makes a standby a primary, on a new timeline.
func (s *Server) Promote(ctx context.Context) error {
	return s.run(ctx, "pg_ctl", "-D", s.data(), "-s", "-w", "-t", "60", "promote")
}

// Exec runs SQL in a database.
func (s *Server) Exec(ctx context.Context, database, sql string) error {
	return s.run(ctx, "psql", "-h", s.Dir, "-U", "owner", "-q", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql)
}

// Restore runs what pg_dump wrote.
func (s *Server) Restore(ctx context.Context, database string, dump []byte) error {
	cmd := s.command(ctx, "psql", "-h", s.Dir, "-U", "owner", "-q", "-v", "ON_ERROR_STOP=1", "-d", database)
	cmd.Stdin = bytes.NewReader(dump)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("pgtest: psql: %w: %s", err, out)
	}
	return nil
}

// Output runs one of PostgreSQL's programs against the server, such as pg_dump.
func (s *Server) Output(ctx context.Context, program string, args ...string) ([]byte, error) {
	return s.command(ctx, program, append([]string{"-h", s.Dir, "-U", "owner"}, args...)...).Output()
}

// URL is that of a database, and of a schema unless that is empty.
func (s *Server) URL(database, schema string) string {
	u := "postgres:///" + database + "?host=" + s.Dir + "&user=owner"
	if schema != "" {
		u += "&search_path=" + schema
	}
	return u
}

// Close stops the server and removes its directory.
func (s *Server) Close() error {
	return errors.Join(s.life.Close(), s.janitor.Wait())
}

func (s *Server) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, program), args...)
	cmd.Dir = s.Dir
	cmd.Env = []string{"PATH=" + s.bin + ":/usr/bin:/bin", "LC_ALL=C", "TZ=UTC", "HOME=" + s.Dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	cmd.WaitDelay = time.Second // a server that pg_ctl started keeps its output open
	return cmd
}

// run runs a program and reports what it said if it failed.
func (s *Server) run(ctx context.Context, program string, args ...string) error {
	out, err := s.command(ctx, program, args...).CombinedOutput()
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		log, _ := os.ReadFile(filepath.Join(s.Dir, "log")) // there if it ever started
		return fmt.Errorf("pgtest: %s: %w: %s%s", program, err, out, log[max(0, len(log)-2000):])
	}
	return nil
}
