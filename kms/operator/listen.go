package operator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxConns bounds the connections served at once; more wait in the kernel.
const maxConns = 32

// Listen makes the unix socket name, mode 0600, in a directory that is made
// (0700) if absent. The processes of uids 0, our own and those of more are
// accepted (SO_PEERCRED); others are hung up on, whatever the file's mode. A
// socket left behind by a dead process is replaced, a living one is an error.
func Listen(name string, log *slog.Logger, more ...int) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, fmt.Errorf("operator: %w", err)
	}
	if err := removeStale(name); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("operator: %w", err)
	}
	if err := os.Chmod(name, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("operator: %w", err), l.Close())
	}
	uids := append([]int{0, os.Geteuid()}, more...)
	return &peerListener{UnixListener: l, uids: uids, log: log, slots: make(chan struct{}, maxConns)}, nil
}

func removeStale(name string) error {
	fi, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("operator: %w", err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("operator: %s is in the way and not a socket: remove it", name)
	}
	c, err := net.DialTimeout("unix", name, time.Second)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("operator: a process already serves %s: is another qipsecd running?", name)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("operator: %s: %w", name, err)
	}
	if err := os.Remove(name); err != nil {
		return fmt.Errorf("operator: %w", err)
	}
	return nil
}

// peerListener accepts processes of its uids only, and maxConns at once.
type peerListener struct {
	*net.UnixListener
	uids  []int
	log   *slog.Logger
	slots chan struct{}
}

// Accept waits for the next process that may connect.
func (l *peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		cred, err := peer(c)
		if err != nil || !slices.Contains(l.uids, int(cred.Uid)) {
			l.log.Warn("operator socket: process refused", "peer", cred, "error", err)
			_ = c.Close()
			continue
		}
		select {
		case l.slots <- struct{}{}:
			return &slotConn{UnixConn: c, free: func() { <-l.slots }}, nil
		default:
			l.log.Warn("operator socket: too many connections", "limit", maxConns)
			_ = c.Close()
		}
	}
}

// slotConn gives its slot back once it is closed.
type slotConn struct {
	*net.UnixConn
	free func()
	once sync.Once
}

// Close closes the connection.
func (c *slotConn) Close() error {
	c.once.Do(c.free)
	return c.UnixConn.Close()
}

// peer reads who is at the other end.
func peer(c *net.UnixConn) (cred unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return cred, fmt.Errorf("operator: %w", err)
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		var u *unix.Ucred
		if u, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner == nil {
			cred = *u
		}
	})
	if err := errors.Join(err, inner); err != nil {
		return cred, fmt.Errorf("operator: read peer credentials: %w", err)
	}
	return cred, nil
}

// Serve serves h on l until ctx ends, then lets calls under way finish for up
// to grace. It closes l.
func Serve(ctx context.Context, l net.Listener, h http.Handler, grace time.Duration, log *slog.Logger) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      callTimeout + 10*time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("operator: %w", err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	err := s.Shutdown(end)
	if err != nil {
		err = fmt.Errorf("operator: calls still under way were cut off: %w", errors.Join(err, s.Close()))
	}
	<-served
	return err
}
