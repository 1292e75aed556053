// Package vici speaks to charon over VICI: it loads and unloads connections and
// keys, initiates, rekeys and terminates, lists SAs and delivers events. It
// knows strongSwan and nothing of QKD.
//
// One Client holds three sessions, because a VICI session answers one command
// at a time and drops events when it is not read: one for events, one for
// commands, one for listings.
package vici

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"

	govici "github.com/strongswan/govici/vici"
)

// Limits of one Client.
const (
	eventBuffer = 1024             // events not yet read; the next listing makes up for lost ones
	listBuffer  = 16384            // IKE_SAs in one listing; more is an error, never a partial list
	callTimeout = 10 * time.Second // Options.Timeout when zero
)

// ErrTruncated says that charon has more IKE_SAs than one listing holds. No
// part of the list is given, because what is missing would look deleted.
var ErrTruncated = errors.New("vici: more than 16384 IKE_SAs in one listing")

// Options say how to reach charon.
type Options struct {
	Socket  string        // path of charon's VICI socket
	Timeout time.Duration // for one command, where the caller's context has no earlier end; 10 s when zero
	Log     *slog.Logger
}

// Client is a connection to one running charon. It does not reconnect: when
// charon goes away, or has no answer to a command within Timeout, Events is
// closed, every call fails and Err tells why; dial a new one then. All methods
// may be called at the same time.
type Client struct {
	opts     Options
	events   *govici.Session
	commands *govici.Session
	out      chan Event
	done     chan struct{}
	readers  sync.WaitGroup
	close    sync.Once

	failMu sync.Mutex
	cause  error // why the Client is of no use any more

	listMu  sync.Mutex
	listing *govici.Session // nil after a listing that failed
	listed  chan govici.Event
}

// Dial connects and subscribes to events. The caller closes the Client.
func Dial(ctx context.Context, o Options) (*Client, error) {
	if o.Timeout == 0 {
		o.Timeout = callTimeout
	}
	c := &Client{opts: o, out: make(chan Event, eventBuffer), done: make(chan struct{})}
	var err error
	if c.commands, err = c.session(ctx); err != nil {
		return nil, err
	}
	if c.events, err = c.session(ctx); err != nil {
		_ = c.commands.Close()
		return nil, err
	}
	// No event comes there: it tells of the session's end.
	ended := make(chan govici.Event)
	c.commands.NotifyEvents(ended)
	raw := make(chan govici.Event, eventBuffer)
	c.events.NotifyEvents(raw)
	if err := c.events.Subscribe("ike-updown", "child-updown", "child-rekey"); err != nil {
		_ = c.commands.Close()
		_ = c.events.Close()
		return nil, fmt.Errorf("vici: subscribe to events at %s: %w", o.Socket, err)
	}
	c.readers.Go(func() { c.deliver(raw) })
	c.readers.Go(func() {
		<-ended
		c.fail(errors.New("vici: charon has ended the command session"))
	})
	return c, nil
}

// fail ends the Client for the first cause that is given. Without its command
// session it could still tell of events, and act on none.
func (c *Client) fail(cause error) {
	c.failMu.Lock()
	if c.cause == nil {
		c.cause = cause
	}
	c.failMu.Unlock()
	_ = c.commands.Close()
	_ = c.events.Close() // and with it Events
}

// Err is why the Client is of no use any more, nil while it is.
func (c *Client) Err() error {
	c.failMu.Lock()
	defer c.failMu.Unlock()
	return c.cause
}

// session opens one VICI session.
func (c *Client) session(ctx context.Context) (*govici.Session, error) {
	s, err := govici.NewSession(govici.WithDialContext(
		func(context.Context, string, string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "unix", c.opts.Socket)
			if err != nil {
				return nil, err
			}
			return &framed{Conn: conn}, nil
		}))
	if err != nil {
		return nil, fmt.Errorf("vici: connect to charon at %s (is it running, is the vici plugin loaded?): %w", c.opts.Socket, err)
	}
	return s, nil
}

// Close ends all sessions and waits for their readers.
func (c *Client) Close() {
	c.close.Do(func() {
		close(c.done)
		_ = c.events.Close()
		_ = c.commands.Close()
		c.listMu.Lock()
		c.dropListing()
		c.listMu.Unlock()
	})
	c.readers.Wait()
}

// Events delivers what charon reports. The channel is closed when charon goes
// away or the Client is closed. Events may be lost if it is not read; SAs is
// the truth.
func (c *Client) Events() <-chan Event { return c.out }

// deliver turns raw events into typed ones until the session ends.
func (c *Client) deliver(raw <-chan govici.Event) {
	defer func() {
		c.fail(errors.New("vici: charon has ended the event session"))
		close(c.out)
	}()
	for e := range raw {
		evs, err := parseEvent(e.Name, e.Message)
		if err != nil {
			c.opts.Log.Warn("charon's event not understood", "event", e.Name, "cause", err)
			continue
		}
		for _, ev := range evs {
			select {
			case c.out <- ev:
			case <-c.done:
				return
			default:
				c.opts.Log.Warn("event dropped: not read in time", "event", e.Name)
			}
		}
	}
}

// call runs one command on the command session. One that charon leaves without
// an answer is the end of the Client.
func (c *Client) call(ctx context.Context, cmd string, in *govici.Message) (*govici.Message, error) {
	within, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	out, err := c.commands.Call(within, cmd, in)
	if err == nil {
		return out, nil
	}
	if within.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("vici: %s: charon has no answer after %v", cmd, c.opts.Timeout)
		c.fail(err)
		return nil, err
	}
	return nil, fmt.Errorf("vici: %s: %w", cmd, err)
}

// Version is charon's own version, for example "5.9.8".
func (c *Client) Version(ctx context.Context) (string, error) {
	m, err := c.call(ctx, "version", nil)
	if err != nil {
		return "", err
	}
	return text(m, "version"), nil
}

// Plugins are the names of the plugins that charon has loaded.
func (c *Client) Plugins(ctx context.Context) ([]string, error) {
	m, err := c.call(ctx, "stats", nil)
	if err != nil {
		return nil, err
	}
	return list(m, "plugins"), nil
}

// LoadConn loads or replaces a connection.
func (c *Client) LoadConn(ctx context.Context, conn Conn) error {
	m, err := conn.message()
	if err != nil {
		return fmt.Errorf("vici: load-conn %s: %w", conn.Name, err)
	}
	if _, err := c.call(ctx, "load-conn", m); err != nil {
		return fmt.Errorf("connection %s: %w", conn.Name, err)
	}
	return nil
}

// UnloadConn takes a connection out; its SAs stay.
func (c *Client) UnloadConn(ctx context.Context, name string) error {
	_, err := c.call(ctx, "unload-conn", message("name", name))
	return err
}

// Conns are the names of all loaded connections.
func (c *Client) Conns(ctx context.Context) ([]string, error) {
	m, err := c.call(ctx, "get-conns", nil)
	if err != nil {
		return nil, err
	}
	return list(m, "conns"), nil
}

// LoadKey loads a private key in PEM or DER form, unencrypted, and gives the id
// by which UnloadKey takes it out. The bytes pass through Go strings, which
// cannot be wiped: this is the authentication key of IKE, never a QKD key.
func (c *Client) LoadKey(ctx context.Context, data []byte) (id string, err error) {
	m, err := c.call(ctx, "load-key", message("type", "any", "data", string(data)))
	if err != nil {
		return "", err
	}
	return text(m, "id"), nil
}

// UnloadKey takes a private key out.
func (c *Client) UnloadKey(ctx context.Context, id string) error {
	_, err := c.call(ctx, "unload-key", message("id", id))
	return err
}

// Initiate brings a child up. With wait zero it returns once charon has queued
// it; otherwise it waits at most that long for the result, on a session of its
// own.
func (c *Client) Initiate(ctx context.Context, conn, child string, wait time.Duration) error {
	m := message("ike", conn, "child", child)
	if wait <= 0 {
		_ = m.Set("timeout", "-1")
		_, err := c.call(ctx, "initiate", m)
		return err
	}
	_ = m.Set("timeout", strconv.FormatInt(max(wait.Milliseconds(), 1), 10))
	_, err := c.waiting(ctx, "initiate", m, wait)
	return err
}

// Rekey asks charon to rekey the CHILD_SA with that unique id and gives the
// number of SAs that matched. It returns when the rekeying is queued.
func (c *Client) Rekey(ctx context.Context, childID uint32) (matches int, err error) {
	m, err := c.call(ctx, "rekey", message("child-id", strconv.FormatUint(uint64(childID), 10)))
	if err != nil {
		return 0, err
	}
	return number(m, "matches"), nil
}

// TerminateChild closes one CHILD_SA by its unique id. With wait zero it
// returns at once.
func (c *Client) TerminateChild(ctx context.Context, childID uint32, wait time.Duration) error {
	return c.terminate(ctx, message("child-id", strconv.FormatUint(uint64(childID), 10)), wait)
}

// TerminateConn closes all IKE_SAs of a connection with their CHILD_SAs. With
// wait zero it returns at once; otherwise an IKE_SA whose peer has not answered
// by then is destroyed without it.
func (c *Client) TerminateConn(ctx context.Context, conn string, wait time.Duration) error {
	return c.terminate(ctx, message("ike", conn, "force", "yes"), wait)
}

func (c *Client) terminate(ctx context.Context, m *govici.Message, wait time.Duration) error {
	if wait <= 0 {
		_ = m.Set("timeout", "-1")
		_, err := c.call(ctx, "terminate", m)
		return err
	}
	_ = m.Set("timeout", strconv.FormatInt(max(wait.Milliseconds(), 1), 10))
	_, err := c.waiting(ctx, "terminate", m, wait)
	return err
}

// waiting runs a command that blocks in charon on a session of its own, so that
// others need not wait for it.
func (c *Client) waiting(ctx context.Context, cmd string, m *govici.Message, wait time.Duration) (*govici.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, wait+c.opts.Timeout)
	defer cancel()
	s, err := c.session(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.Close() }()
	out, err := s.Call(ctx, cmd, m)
	if err != nil {
		return nil, fmt.Errorf("vici: %s: %w", cmd, err)
	}
	return out, nil
}

// SAs lists all IKE_SAs with their CHILD_SAs, those not of ours too. The list
// is whole or there is an error.
func (c *Client) SAs(ctx context.Context) ([]IKESA, error) {
	ctx, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	c.listMu.Lock()
	defer c.listMu.Unlock()
	if err := c.openListing(ctx); err != nil {
		return nil, err
	}
	// Called this way and not streamed: a streaming call of govici drops what
	// exceeds 128 packets without a word. Not with noblock: charon would leave
	// out the IKE_SAs that are busy.
	if _, err := c.listing.Call(ctx, "list-sas", nil); err != nil {
		c.dropListing() // late entries of this answer must not enter the next list
		return nil, fmt.Errorf("vici: list-sas: %w", err)
	}
	if len(c.listed) == cap(c.listed) {
		c.dropListing()
		return nil, ErrTruncated
	}
	var sas []IKESA
	for {
		select {
		case e, ok := <-c.listed:
			if !ok {
				c.dropListing()
				return nil, errors.New("vici: list-sas: charon went away")
			}
			more, err := parseIKESAs(e.Message)
			if err != nil {
				c.dropListing()
				return nil, fmt.Errorf("vici: list-sas: %w", err)
			}
			sas = append(sas, more...)
		default:
			return sas, nil
		}
	}
}

// openListing makes the listing session; the caller holds listMu.
func (c *Client) openListing(ctx context.Context) error {
	if c.listing != nil {
		return nil
	}
	select {
	case <-c.done:
		return errors.New("vici: client is closed")
	default:
	}
	s, err := c.session(ctx)
	if err != nil {
		return err
	}
	ch := make(chan govici.Event, listBuffer)
	s.NotifyEvents(ch)
	if err := s.Subscribe("list-sa"); err != nil {
		_ = s.Close()
		return fmt.Errorf("vici: subscribe to list-sa: %w", err)
	}
	c.listing, c.listed = s, ch
	return nil
}

// dropListing closes the listing session; the caller holds listMu.
func (c *Client) dropListing() {
	if c.listing != nil {
		_ = c.listing.Close()
		c.listing = nil
	}
}
