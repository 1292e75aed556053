package xfrm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

const (
	txSize = 8 << 10  // largest request: an SA with a replay window of 4096
	rxSize = 64 << 10 // the kernel sends dumps in pieces of at most 32 KiB
	// maxWait bounds the wait for one answer when ctx has no earlier end. The
	// kernel answers before send returns, save for what it must load first.
	maxWait = 10 * time.Second
)

// socket is a netlink socket as far as Conn uses it.
type socket interface {
	send(b []byte) error
	// recv waits at most d; syscall.EAGAIN when nothing came. truncated says
	// that b was too small.
	recv(b []byte, d time.Duration) (n int, truncated bool, err error)
	pid() uint32
	close() error
}

// Conn is one XFRM netlink socket, and one for routes, in the network namespace
// of the thread that opened them. Its methods may be called at the same time; each waits for its
// turn, and for the kernel, until its context ends or 10 seconds have passed.
// One wait is not bounded: while the kernel loads an algorithm's module it does
// not return from the request (seconds, once; SAD.Warmup takes it beforehand).
type Conn struct {
	turn   chan struct{} // holds one token: the right to use all below
	sock   socket
	seq    uint32
	tx, rx *key.Material // requests and answers may hold keys
	routes *netlink.Handle
}

// Open opens the sockets. It needs CAP_NET_ADMIN to be of use.
func Open() (*Conn, error) {
	s, err := openNetlink()
	if err != nil {
		return nil, err
	}
	c, err := newConn(s)
	if err != nil {
		_ = s.close()
		return nil, err
	}
	c.routes, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	if err == nil {
		err = c.routes.SetSocketTimeout(maxWait)
	}
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("xfrm: open route socket: %w", err)
	}
	return c, nil
}

func newConn(s socket) (*Conn, error) {
	tx, err := key.New(txSize)
	if err != nil {
		return nil, err
	}
	rx, err := key.New(rxSize)
	if err != nil {
		tx.Wipe()
		return nil, err
	}
	return &Conn{turn: make(chan struct{}, 1), sock: s, tx: tx, rx: rx}, nil
}

// Close ends the use of c; requests under way finish first.
func (c *Conn) Close() error {
	c.turn <- struct{}{}
	defer c.release()
	if c.tx.Len() == 0 {
		return nil
	}
	c.tx.Wipe()
	c.rx.Wipe()
	if c.routes != nil {
		c.routes.Close()
	}
	return c.sock.close()
}

// acquire waits for the turn; release must follow when it gives nil.
func (c *Conn) acquire(ctx context.Context) error {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("xfrm: wait for the netlink socket: %w", ctx.Err())
	}
	if c.tx.Len() == 0 {
		c.release()
		return errors.New("xfrm: the netlink socket is closed")
	}
	return nil
}

// release wipes both buffers and gives the turn on.
func (c *Conn) release() {
	clear(c.tx.Bytes())
	clear(c.rx.Bytes())
	<-c.turn
}

// request is the message that the holder of the turn builds.
func (c *Conn) request() *message { return &message{b: c.tx.Bytes()} }

// exchange sends m, hands each answer of it to each (which may be nil) and
// waits for its end. What each gets is valid only during the call. interrupted
// tells that a dump was not consistent. The caller holds the turn.
func (c *Conn) exchange(ctx context.Context, m *message, each func(typ uint16, body []byte) error) (interrupted bool, err error) {
	defer runtime.KeepAlive(c)
	if err := ctx.Err(); err != nil {
		return false, err
	}
	until := time.Now().Add(maxWait)
	if d, ok := ctx.Deadline(); ok && d.Before(until) {
		until = d
	}
	c.seq++
	b, err := m.finish(c.seq, c.sock.pid())
	if err != nil {
		return false, err
	}
	err = c.sock.send(b)
	clear(b)
	if err != nil {
		return false, fmt.Errorf("send: %w", err)
	}
	for {
		n, err := c.receive(until)
		if err != nil {
			return interrupted, fmt.Errorf("%w: %w", ErrUnknown, err)
		}
		done, intr, err := answers(c.rx.Bytes()[:n], c.seq, each)
		interrupted = interrupted || intr
		if done {
			return interrupted, err
		}
		if err != nil {
			return interrupted, fmt.Errorf("%w: %w", ErrUnknown, err)
		}
	}
}

// receive gives the next datagram from the kernel in c.rx.
func (c *Conn) receive(until time.Time) (int, error) {
	for {
		wait := time.Until(until)
		if wait <= 0 {
			return 0, errors.New("time is up")
		}
		n, truncated, err := c.sock.recv(c.rx.Bytes(), wait)
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return 0, errors.New("time is up")
		case err != nil:
			return 0, err
		case truncated:
			return 0, fmt.Errorf("more than %d bytes in one answer", rxSize)
		default:
			return n, nil
		}
	}
}

// answers walks the netlink messages in b. Those with another sequence number
// belong to an earlier request that was given up.
func answers(b []byte, seq uint32, each func(uint16, []byte) error) (done, interrupted bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(native.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return false, interrupted, errors.New("malformed netlink message")
		}
		typ, flags := native.Uint16(b[4:]), native.Uint16(b[6:])
		ours, body := native.Uint32(b[8:]) == seq, b[unix.SizeofNlMsghdr:size]
		b = b[min(align4(size), len(b)):]
		if !ours {
			continue
		}
		interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch typ {
		case unix.NLMSG_NOOP:
		case unix.NLMSG_ERROR, unix.NLMSG_DONE:
			return true, interrupted, verdict(body, flags)
		default:
			if each == nil {
				continue
			}
			if err := each(typ, body); err != nil {
				return false, interrupted, err
			}
		}
	}
	return false, interrupted, nil
}

// verdict reads a struct nlmsgerr (or the result in NLMSG_DONE): nil for 0.
func verdict(body []byte, flags uint16) error {
	if len(body) < 4 {
		return nil // NLMSG_DONE without a result
	}
	errno := syscall.Errno(-int32(native.Uint32(body)))
	if errno == 0 {
		return nil
	}
	return &kernelError{errno: errno, text: extendedText(body, flags)}
}

// extendedText finds the kernel's own words (NLMSGERR_ATTR_MSG) behind the
// header of the request, which NETLINK_CAP_ACK keeps from being followed by
// the request itself.
func extendedText(body []byte, flags uint16) string {
	const head = 4 + unix.SizeofNlMsghdr
	if flags&unix.NLM_F_ACK_TLVS == 0 || flags&unix.NLM_F_CAPPED == 0 || len(body) < head {
		return ""
	}
	text := ""
	_ = attributes(body[head:], func(typ uint16, p []byte) error {
		if typ == unix.NLMSGERR_ATTR_MSG {
			text = strings.TrimRight(string(p), "\x00")
		}
		return nil
	})
	return text
}

const nlaTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER

// attributes walks route attributes. A payload is borrowed from b.
func attributes(b []byte, each func(typ uint16, payload []byte) error) error {
	for len(b) >= unix.SizeofRtAttr {
		size := int(native.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return errors.New("malformed netlink attribute")
		}
		if err := each(native.Uint16(b[2:])&nlaTypeMask, b[unix.SizeofRtAttr:size]); err != nil {
			return err
		}
		b = b[min(align4(size), len(b)):]
	}
	return nil
}

// kernelError is an errno with the kernel's explanation, if it gave one.
type kernelError struct {
	errno syscall.Errno
	text  string
}

func (e *kernelError) Error() string {
	if e.text == "" {
		return e.errno.Error()
	}
	return fmt.Sprintf("%v (%s)", e.errno, e.text)
}

func (e *kernelError) Unwrap() error { return e.errno }

// explain wraps the error of what was done to an object.
func explain(what string, object fmt.Stringer, err error) error {
	var k *kernelError
	if !errors.As(err, &k) {
		return fmt.Errorf("xfrm: %s %v: %w", what, object, err)
	}
	switch k.errno {
	case syscall.EEXIST:
		return fmt.Errorf("xfrm: %s %v: %w", what, object, ErrExists)
	case syscall.ESRCH:
		return fmt.Errorf("xfrm: %s %v: %w", what, object, ErrNotFound)
	case syscall.ENOSYS, syscall.EPROTONOSUPPORT, syscall.ENOENT, syscall.EAFNOSUPPORT:
		// ENOENT is also a policy's "not found"; policies have their own explain.
		return fmt.Errorf("xfrm: %s %v: %w: %w", what, object, ErrNoESP, k)
	case syscall.EPERM:
		return fmt.Errorf("xfrm: %s %v: %w: CAP_NET_ADMIN is needed", what, object, k)
	}
	return fmt.Errorf("xfrm: %s %v: %w", what, object, k)
}

// netlinkSocket is the real socket.
type netlinkSocket struct {
	fd   int
	port uint32
}

func openNetlink() (*netlinkSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_XFRM)
	if err != nil {
		return nil, fmt.Errorf("xfrm: open netlink socket: %w (does the kernel have XFRM_USER?)", err)
	}
	s := &netlinkSocket{fd: fd}
	if err := s.setUp(); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return s, nil
}

func (s *netlinkSocket) setUp() error {
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("xfrm: bind netlink socket: %w", err)
	}
	name, err := unix.Getsockname(s.fd)
	if err != nil {
		return fmt.Errorf("xfrm: name of the netlink socket: %w", err)
	}
	local, ok := name.(*unix.SockaddrNetlink)
	if !ok {
		return fmt.Errorf("xfrm: netlink socket has an address of type %T", name)
	}
	s.port = local.Pid
	for _, option := range []int{unix.NETLINK_CAP_ACK, unix.NETLINK_EXT_ACK} {
		// CAP_ACK keeps error answers from repeating the request with its keys.
		if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, option, 1); err != nil {
			return fmt.Errorf("xfrm: netlink option %d: %w", option, err)
		}
	}
	return nil
}

func (s *netlinkSocket) pid() uint32 { return s.port }

func (s *netlinkSocket) close() error { return unix.Close(s.fd) }

func (s *netlinkSocket) send(b []byte) error {
	return unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

func (s *netlinkSocket) recv(b []byte, d time.Duration) (int, bool, error) {
	tv := unix.NsecToTimeval(max(d, time.Microsecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return 0, false, fmt.Errorf("set receive timeout: %w", err)
	}
	n, _, flags, from, err := unix.Recvmsg(s.fd, b, nil, 0)
	if err != nil {
		return 0, false, err
	}
	if k, ok := from.(*unix.SockaddrNetlink); !ok || k.Pid != 0 {
		return 0, false, nil // not from the kernel: nothing
	}
	return n, flags&unix.MSG_TRUNC != 0, nil
}
