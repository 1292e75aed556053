package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// DefaultSocket is where the plugin looks unless charon's setting
// plugins.qipsec.socket says otherwise.
const DefaultSocket = "/run/q-ipsec/plugin.sock"

const (
	firstFrame  = time.Second     // from accept to the opening frame
	maxDeadline = 5 * time.Second // of a request; the plugin's own limits are far below
	helloLimit  = 2 * time.Second
	tellLimit   = time.Second // for a frame that nobody waits for
	// A rollback must also come through when qipsecd is being stopped.
	rollbackLimit = 2 * time.Second
	acceptPause   = 100 * time.Millisecond // while there is no file descriptor or memory for a connection
)

// Options of a Server. The zero value serves.
type Options struct {
	Log      *slog.Logger // nil: no log
	MaxConns int          // at the same time, standing ones included; 0: 64. charon has 16 threads
}

// Server is qipsecd's end of the plugin's socket.
type Server struct {
	l       *net.UnixListener
	h       Handler
	log     *slog.Logger
	slots   chan struct{}
	mu      sync.Mutex
	greeted map[Instance]bool // by standing connection; true once Hello is accepted
}

// Listen makes the socket, mode 0600, in a directory that it makes with mode
// 0700 or finds with no access for others. A socket left by a dead server is
// replaced; one that is served is an error.
func Listen(path string, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.MaxConns == 0 {
		o.MaxConns = 64
	}
	if err := clearWay(path); err != nil {
		return nil, fmt.Errorf("plugin: socket %s: %w", path, err)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("plugin: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("plugin: %w", err), l.Close())
	}
	return &Server{l: l, log: o.Log, slots: make(chan struct{}, o.MaxConns), greeted: map[Instance]bool{}}, nil
}

func clearWay(path string) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || fi.Mode().Perm()&0o077 != 0 || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("directory %s must belong to the user of qipsecd and be closed to others (chmod 0700)", dir)
	}
	fi, err = os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return errors.New("the path exists and is no socket: move it away")
	}
	c, err := net.DialTimeout("unixpacket", path, time.Second)
	if err == nil {
		return errors.Join(errors.New("another process serves it: stop that one first"), c.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) { // its owner lives, if only to let the queue run full
		return fmt.Errorf("cannot tell whether another process serves it: %w", err)
	}
	return os.Remove(path)
}

// Close closes the socket without serving, for a caller that cannot go on.
func (s *Server) Close() error { return s.l.Close() }

// Serve answers until ctx ends, then closes the socket and returns nil once
// every connection and every call of h has ended. It must be called once.
func (s *Server) Serve(ctx context.Context, h Handler) error {
	s.h = h
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	defer func() { _ = s.l.Close() }() // also what ends Accept, below
	stop := context.AfterFunc(ctx, func() { _ = s.l.Close() })
	defer stop()
	for {
		c, err := s.accept(ctx)
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case s.slots <- struct{}{}:
		default: // the plugin sees EOF, which is a refusal
			s.log.Warn("plugin socket: too many connections", "limit", cap(s.slots))
			_ = c.Close()
			continue
		}
		conns.Go(func() {
			defer func() { <-s.slots }()
			s.serve(ctx, c)
		})
	}
}

// accept waits through a lack of resources, which others may cause: a server
// that gave up would stop qipsecd, and with it every tunnel.
func (s *Server) accept(ctx context.Context) (*net.UnixConn, error) {
	said := false
	for {
		c, err := s.l.AcceptUnix()
		switch {
		case err == nil:
			return c, nil
		case !scarce(err):
			return nil, fmt.Errorf("plugin: accept: %w", err)
		case !said:
			s.log.Error("plugin socket: connections wait", "err", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(acceptPause):
		}
	}
}

func scarce(err error) bool {
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// conn is one connection with its frame buffer, which is locked memory because
// keys pass through it.
type conn struct {
	*net.UnixConn
	buf *key.Material
}

// read gives the next frame, valid until the next read or write. io.EOF: the
// plugin has closed.
func (c conn) read() ([]byte, error) {
	b := c.buf.Bytes()
	clear(b)
	n, _, flags, _, err := c.ReadMsgUnix(b, nil)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	if flags&unix.MSG_TRUNC != 0 {
		return nil, fmt.Errorf("plugin: frame larger than %d bytes", MaxFrame)
	}
	return b[:n], nil
}

// answer sends an answer as appendAnswer makes it.
func (c conn) answer(m any) error {
	b := c.buf.Bytes()
	defer clear(b)
	f, err := appendAnswer(b, m)
	if err != nil {
		return err
	}
	_, err = c.Write(f)
	return err
}

func (s *Server) serve(ctx context.Context, u *net.UnixConn) {
	stop := context.AfterFunc(ctx, func() { _ = u.Close() })
	defer func() {
		if stop() {
			_ = u.Close()
		}
	}()
	pid, uid, err := peer(u)
	if err != nil {
		s.log.Warn("plugin socket: connection refused", "uid", uid, "pid", pid, "err", err)
		return
	}
	buf, err := key.New(MaxFrame)
	if err != nil {
		s.log.Error("plugin socket: no locked memory for a connection", "err", err)
		return
	}
	defer buf.Wipe()
	c := conn{UnixConn: u, buf: buf}
	_ = c.SetDeadline(time.Now().Add(firstFrame)) // fails only when closed, and so does the read
	b, err := c.read()
	if errors.Is(err, io.EOF) {
		return
	}
	var q request
	if err == nil {
		q, err = parseRequest(b)
		clear(b)
	}
	if err != nil {
		s.log.Warn("plugin socket: frame refused", "pid", pid, "err", err)
		_ = c.answer(err)
		return
	}
	q.hello.PID, q.hello.UID = pid, uid
	if _, ok := q.message.(Hello); ok {
		s.standing(ctx, c, q.hello)
		return
	}
	s.request(ctx, c, q)
}

// peer gives the process at the other end, with an error if it is not root or
// our own user.
func peer(u *net.UnixConn) (pid, uid int, err error) {
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, -1, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, -1, err
	}
	return int(cred.Pid), int(cred.Uid), allowed(int(cred.Uid), os.Geteuid())
}

// allowed says whether a process of user uid is served by one of user own.
func allowed(uid, own int) error {
	if uid != 0 && uid != own {
		return errors.New("neither root nor the user of qipsecd")
	}
	return nil
}

// standing keeps an instance's standing connection until either side goes.
func (s *Server) standing(ctx context.Context, c conn, h Hello) {
	if !s.claim(h.Instance) {
		_ = c.answer(errors.New("this instance has a standing connection"))
		return
	}
	defer s.set(h.Instance, false, true)
	hctx, cancel := context.WithTimeout(ctx, helloLimit)
	err := s.h.Hello(hctx, h)
	cancel()
	if err != nil {
		s.log.Warn("charon plugin refused", "pid", h.PID, "strongswan", h.Version, "err", err)
		_ = c.answer(err)
		return
	}
	defer s.h.Gone(h.Instance) // before the instance is free for a new Hello
	s.set(h.Instance, true, false)
	_ = c.SetDeadline(time.Time{})
	if err := c.answer(kindOK); err != nil {
		return
	}
	if _, err := c.read(); err == nil {
		s.log.Warn("plugin socket: a frame on the standing connection: closed", "pid", h.PID)
	}
	s.set(h.Instance, false, false)
}

// claim makes this connection the instance's only standing one.
func (s *Server) claim(i Instance) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.greeted[i]; taken {
		return false
	}
	s.greeted[i] = false
	return true
}

func (s *Server) set(i Instance, accepted, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.greeted[i] = accepted
	if gone {
		delete(s.greeted, i)
	}
}

func (s *Server) accepted(i Instance) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.greeted[i]
}

// monotonic is CLOCK_MONOTONIC, the clock of the plugin's deadlines.
func monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("plugin: CLOCK_MONOTONIC: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// request answers one request that is not a hello. The handler owns the keys
// from its call on.
func (s *Server) request(ctx context.Context, c conn, q request) {
	if !s.accepted(q.hello.Instance) {
		wipe(q.message)
		_ = c.answer(errors.New("no standing connection of this charon: it is being set up, try again"))
		return
	}
	if s.told(ctx, q.message) {
		return
	}
	now, err := monotonic()
	left := q.deadline - now
	if err != nil || left <= 0 || left > maxDeadline {
		wipe(q.message)
		_ = c.answer(fmt.Errorf("deadline %v ahead is not between 0 and %v", left, maxDeadline))
		return
	}
	_ = c.SetDeadline(time.Now().Add(left))
	ctx, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	if m, ok := q.message.(AddSA); ok {
		s.addSA(ctx, c, m)
		return
	}
	answer, err := s.decide(ctx, q.message)
	if err != nil {
		answer = err
	}
	if err := c.answer(answer); err != nil {
		s.log.Warn("plugin socket: answer not delivered", "err", err)
	}
}

// told passes on a message without an answer; false: m wants one.
func (s *Server) told(ctx context.Context, m any) bool {
	ctx, cancel := context.WithTimeout(ctx, tellLimit)
	defer cancel()
	switch m := m.(type) {
	case End:
		s.h.End(ctx, m.SA)
	case Ignored:
		s.h.Ignored(ctx, m)
	default:
		return false
	}
	return true
}

// decide asks the handler.
func (s *Server) decide(ctx context.Context, m any) (any, error) {
	switch m := m.(type) {
	case GetKey:
		return s.h.GetKey(ctx, m)
	case Sent:
		return s.h.Sent(ctx, m)
	case Bind:
		return s.h.Bind(ctx, m)
	case Query:
		return s.h.QuerySA(ctx, m.ID)
	case UpdateSA:
		return kindOK, s.h.UpdateSA(ctx, m)
	}
	return nil, fmt.Errorf("plugin: %T has no answer", m)
}

// addSA runs INSTALLED, ACK, COMMITTED. Whatever breaks it before COMMITTED is
// on its way rolls back, so that charon never sees FAILED while the SA stays.
func (s *Server) addSA(ctx context.Context, c conn, m AddSA) {
	id := SAID{Src: m.Src, Dst: m.Dst, SPI: m.SPI, Protocol: m.Protocol, Mark: m.Mark, IfID: m.IfID}
	a, err := s.h.AddSA(ctx, m)
	defer wipe(a)
	if err != nil {
		_ = c.answer(err)
		return
	}
	if a.Verdict == UseKey {
		if err := c.answer(a); err != nil {
			s.log.Warn("plugin socket: key not delivered", "spi", id.SPI, "err", err)
		}
		return
	}
	if err := s.acknowledged(ctx, c, a, id); err != nil {
		s.log.Warn("SA rolled back", "connection", m.Connection, "spi", fmt.Sprintf("%08x", id.SPI), "err", err)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackLimit)
		defer cancel()
		s.h.Rollback(ctx, id)
		_ = c.answer(err)
	}
}

func (s *Server) acknowledged(ctx context.Context, c conn, a AddSAAnswer, id SAID) error {
	if err := c.answer(a); err != nil {
		return fmt.Errorf("INSTALLED not delivered: %w", err)
	}
	b, err := c.read()
	if err != nil {
		return fmt.Errorf("no ACK: %w", err)
	}
	r, err := parse(b)
	if err == nil && r.kind != kindAck {
		r.fail("is no ACK")
	}
	if err == nil {
		err = r.end()
	}
	if err != nil {
		return fmt.Errorf("no ACK: %w", err)
	}
	if err := s.h.Commit(ctx, id); err != nil {
		return err
	}
	if err := c.answer(kindCommitted); err != nil {
		return fmt.Errorf("COMMITTED not delivered: %w", err)
	}
	return nil
}
