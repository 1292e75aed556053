// Package plugintest plays the charon plugin over a real socket, for tests of
// the server and of the broker and for measurements.
package plugintest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
)

// Limit is how long a call of Charon may take unless ctx ends earlier. It is
// longer than the plugin's own limits, so that a busy machine fails no test.
const Limit = 4 * time.Second

// Charon is one run of a charon with the plugin, as qipsecd sees it.
type Charon struct {
	Path  string
	Hello plugin.Hello
	mu    sync.Mutex
	conn  *net.UnixConn
}

// New gives a charon that is not connected, with a fresh instance.
func New(path string) *Charon {
	c := &Charon{Path: path, Hello: plugin.Hello{ABI: plugin.ABI, Version: "5.9.8", Mediation: true}}
	_, _ = rand.Read(c.Hello.Instance[:]) // never fails
	return c
}

// Connect opens the standing connection. A refusal is a *plugin.Refusal.
func (c *Charon) Connect(ctx context.Context) error {
	u, err := c.open(ctx, c.Hello)
	if err != nil {
		return err
	}
	if err := c.answer(u, nil); err != nil {
		return errors.Join(err, u.Close())
	}
	if err := u.SetDeadline(time.Time{}); err != nil {
		return errors.Join(err, u.Close())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = u
	return nil
}

// Disconnect closes the standing connection, as charon's death does.
func (c *Charon) Disconnect() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	return err
}

// Lost waits until the server closes the standing connection.
func (c *Charon) Lost(ctx context.Context) error {
	c.mu.Lock()
	u := c.conn
	c.mu.Unlock()
	if u == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = u.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := u.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("plugintest: the standing connection is still there: %w", err)
	}
	return nil
}

// GetKey and the methods below are the plugin's calls. The SA in a message gets
// c's instance.
func (c *Charon) GetKey(ctx context.Context, m plugin.GetKey) (a plugin.GetKeyAnswer, err error) {
	m.SA.Instance = c.Hello.Instance
	return a, c.call(ctx, m, &a)
}

// Sent tells that Ni leaves.
func (c *Charon) Sent(ctx context.Context, m plugin.Sent) (a plugin.SentAnswer, err error) {
	m.SA.Instance = c.Hello.Instance
	return a, c.call(ctx, m, &a)
}

// Bind asks for a CHILD_SA. The keys in m stay the caller's.
func (c *Charon) Bind(ctx context.Context, m plugin.Bind) (a plugin.BindAnswer, err error) {
	m.SA.Instance = c.Hello.Instance
	return a, c.call(ctx, m, &a)
}

// AddSA asks for an SA and acknowledges it: with Installed it has been
// committed when AddSA returns. The caller wipes the answer's keys.
func (c *Charon) AddSA(ctx context.Context, m plugin.AddSA) (plugin.AddSAAnswer, error) {
	p, a, err := c.StartAddSA(ctx, m)
	if err != nil || a.Verdict != plugin.Installed {
		return a, err
	}
	return a, p.Ack()
}

// Pending is an AddSA whose ACK has not been sent.
type Pending struct {
	c *Charon
	u *net.UnixConn
}

// StartAddSA stops before the ACK. With verdict UseKey there is nothing to
// acknowledge and Pending is nil.
func (c *Charon) StartAddSA(ctx context.Context, m plugin.AddSA) (*Pending, plugin.AddSAAnswer, error) {
	m.SA.Instance = c.Hello.Instance
	var a plugin.AddSAAnswer
	u, err := c.open(ctx, m)
	if err != nil {
		return nil, a, err
	}
	if err := c.answer(u, &a); err != nil || a.Verdict != plugin.Installed {
		return nil, a, errors.Join(err, u.Close())
	}
	return &Pending{c: c, u: u}, a, nil
}

// Ack acknowledges and waits for COMMITTED.
func (p *Pending) Ack() error {
	defer p.Drop()
	if _, err := p.u.Write(plugin.AckFrame()); err != nil {
		return fmt.Errorf("plugintest: ACK: %w", err)
	}
	return p.c.answer(p.u, nil)
}

// Drop closes the connection without an ACK, as a plugin does that was late.
func (p *Pending) Drop() { _ = p.u.Close() }

// QuerySA asks for counters.
func (c *Charon) QuerySA(ctx context.Context, id plugin.SAID) (a plugin.Counters, err error) {
	return a, c.call(ctx, plugin.Query{ID: id}, &a)
}

// UpdateSA moves an SA.
func (c *Charon) UpdateSA(ctx context.Context, m plugin.UpdateSA) error {
	return c.call(ctx, m, nil)
}

// End tells that an IKE_SA is gone and waits for nothing.
func (c *Charon) End(ctx context.Context, uid uint32) error {
	return c.tell(ctx, plugin.End{SA: plugin.SA{Instance: c.Hello.Instance, UID: uid}})
}

// Ignored tells of an ignored IKE_SA_INIT answer and waits for nothing.
func (c *Charon) Ignored(ctx context.Context, m plugin.Ignored) error {
	m.SA.Instance = c.Hello.Instance
	return c.tell(ctx, m)
}

func (c *Charon) tell(ctx context.Context, m any) error {
	u, err := c.open(ctx, m)
	if err != nil {
		return err
	}
	return u.Close()
}

// Raw sends frame as the first of a connection and gives what comes back; nil
// if the server closed without an answer.
func (c *Charon) Raw(ctx context.Context, frame []byte) ([]byte, error) {
	u, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = u.Close() }()
	if _, err := u.Write(frame); err != nil {
		return nil, fmt.Errorf("plugintest: send: %w", err)
	}
	b := make([]byte, plugin.MaxFrame)
	n, err := u.Read(b)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return nil, nil
	}
	return b[:n], err
}

func (c *Charon) call(ctx context.Context, m, want any) error {
	u, err := c.open(ctx, m)
	if err != nil {
		return err
	}
	defer func() { _ = u.Close() }()
	return c.answer(u, want)
}

func (c *Charon) dial(ctx context.Context) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", c.Path)
	if err != nil {
		return nil, fmt.Errorf("plugintest: %w", err)
	}
	end := time.Now().Add(Limit)
	if t, ok := ctx.Deadline(); ok && t.Before(end) {
		end = t
	}
	u := conn.(*net.UnixConn)
	return u, u.SetDeadline(end)
}

// open connects and sends the request m.
func (c *Charon) open(ctx context.Context, m any) (*net.UnixConn, error) {
	left := Limit
	if t, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(t))
	}
	f, err := plugin.AppendRequest(make([]byte, 0, plugin.MaxFrame), c.Hello, Monotonic()+left, m)
	if err != nil {
		return nil, err
	}
	defer clear(f)
	u, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := u.Write(f); err != nil {
		return nil, errors.Join(fmt.Errorf("plugintest: send: %w", err), u.Close())
	}
	return u, nil
}

func (c *Charon) answer(u *net.UnixConn, want any) error {
	b := make([]byte, plugin.MaxFrame)
	defer clear(b)
	n, err := u.Read(b)
	if err != nil {
		return fmt.Errorf("plugintest: no answer: %w", err)
	}
	return plugin.ParseAnswer(b[:n], want)
}

// Monotonic is CLOCK_MONOTONIC, on which the protocol's deadlines are.
func Monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // the kernel has had this clock for twenty years
	}
	return time.Duration(ts.Nano())
}
