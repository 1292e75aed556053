package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// retryPause is how long a caller waits after an answer 503.
const retryPause = 10 * time.Millisecond

// caller is one client with connections of its own, to either node.
type caller struct {
	http    [2]*http.Client
	ids     []key.ID // of the keys that GetKey gave
	body    bytes.Buffer
	took    []time.Duration // of the calls of this turn
	late    int             // answers 503
	resumed atomic.Int64    // TLS sessions
}

// connection says how a caller connects.
type connection int

const (
	keepAlive connection = iota
	resume               // a new connection for each call, with TLS resumption
	full                 // a new connection for each call, with a full handshake
)

// callers makes n clients.
func (l *lab) callers(n int, how connection) ([]*caller, error) {
	out := make([]*caller, n)
	for i := range out {
		c := &caller{}
		out[i] = c
		for node := range c.http {
			t, err := pki.KMEClient(l.sae(node), false, quiet())
			if err != nil {
				return nil, err
			}
			if how == full {
				t.ClientSessionCache = nil
			}
			t.VerifyConnection = func(s tls.ConnectionState) error {
				if s.DidResume {
					c.resumed.Add(1)
				}
				return nil
			}
			c.http[node] = &http.Client{Timeout: bound, Transport: &http.Transport{TLSClientConfig: t, DisableKeepAlives: how != keepAlive, DisableCompression: true}}
		}
	}
	return out, nil
}

func closeAll(cs []*caller) {
	for _, c := range cs {
		for _, h := range c.http {
			h.CloseIdleConnections()
		}
	}
}

// call posts body to a node's client and keeps the Key-IDs of the answer, which has
// n keys. A node that has no key leased yet is asked again; the time that takes
// counts.
func (c *caller) call(node int, url, body string, n int) error {
	var resp *http.Response
	for start := time.Now(); ; time.Sleep(retryPause) {
		var err error
		if resp, err = c.post(node, url, body); err != nil {
			return err
		}
		if resp.StatusCode != http.StatusServiceUnavailable || time.Since(start) > bound {
			break
		}
		c.late++
	}
	b := c.body.Bytes()
	if resp.StatusCode != http.StatusOK || len(b) != sizes[n] {
		return fmt.Errorf("%s: %s, %d bytes", url, resp.Status, len(b))
	}
	for range n {
		at := bytes.Index(b, []byte(keyIDMark)) + len(keyIDMark)
		if at < len(keyIDMark) {
			return fmt.Errorf("%s: not %d keys", url, n)
		}
		id, err := key.ParseID(string(b[at : at+36]))
		if err != nil {
			return err
		}
		c.ids, b = append(c.ids, id), b[at+36:]
	}
	return nil
}

// post reads the answer's body into c.body.
func (c *caller) post(node int, url, body string) (*http.Response, error) {
	resp, err := c.http[node].Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	c.body.Reset()
	_, err = c.body.ReadFrom(resp.Body)
	return resp, errors.Join(err, resp.Body.Close())
}

// work is one thing to measure: a call or two. errEnough ends the caller's turn.
type work func(c *caller) error

var errEnough = errors.New("enough calls were made")

// upTo is do, so many times in one turn of all callers together.
func (o options) upTo(calls int, do work) work {
	return func(c *caller) error {
		if len(c.took) >= max(1, calls/o.clients) {
			return errEnough
		}
		return do(c)
	}
}

// supply is what the supply rows measure and what stands beside it.
type supply struct {
	*lab
	bare [2]string // URLs
}

// take asks node a for n keys.
func (s *supply) take(c *caller, body string, n int) error {
	return c.call(0, s.url(0)+"/api/v1/keys/b-te/enc_keys", body, n)
}

func (s *supply) getKeys(c *caller) error { return s.take(c, getKey, 1) }

func (s *supply) bareCalls(c *caller) error {
	c.ids = c.ids[:0]
	return c.call(0, s.bare[0], getKey, 1)
}

// batches asks node a for batchKeys at once.
func (s *supply) batches(c *caller) error { return s.take(c, getBatch, batchKeys) }

func (s *supply) bareBatches(c *caller) error {
	c.ids = c.ids[:0]
	return c.call(0, s.bare[0]+batchPath, getBatch, batchKeys)
}

// bothSides asks node a, and then node b for the same key.
func (s *supply) bothSides(c *caller) error {
	c.ids = c.ids[:0]
	if err := s.getKeys(c); err != nil {
		return err
	}
	return c.again(s.url(1) + "/api/v1/keys/a-te/dec_keys")
}

func (s *supply) bareTwice(c *caller) error {
	if err := s.bareCalls(c); err != nil {
		return err
	}
	return c.again(s.bare[1])
}

// again asks node b for the one key that c has just been given.
func (c *caller) again(url string) error {
	id := c.ids[0]
	if err := c.call(1, url, fmt.Sprintf(getWithID, id), 1); err != nil {
		return err
	}
	if c.ids[1] != id {
		return fmt.Errorf("asked for %s, got %s", id, c.ids[1])
	}
	c.ids = c.ids[:0]
	return nil
}

// turn is what one slice of work came to.
type turn struct {
	rate, p50, p99, cpu float64 // 1/s, then µs
	late                int     // answers 503
}

// drive runs do from all callers at once for d. Processor time is that of all
// processes, ours included: what a call costs however busy the machine is.
func (l *lab) drive(ctx context.Context, cs []*caller, do work, d time.Duration) (turn, error) {
	before, err := l.cpu()
	if err != nil {
		return turn{}, err
	}
	var wg sync.WaitGroup
	errs := make([]error, len(cs))
	start := time.Now()
	for i, c := range cs {
		c.took = c.took[:0]
		wg.Go(func() {
			for ctx.Err() == nil {
				begin := time.Now()
				if begin.Sub(start) >= d {
					return
				}
				if errs[i] = do(c); errs[i] != nil {
					if errs[i] == errEnough {
						errs[i] = nil
					}
					return
				}
				c.took = append(c.took, time.Since(begin))
			}
			errs[i] = ctx.Err()
		})
	}
	wg.Wait()
	took := time.Since(start)
	if err := errors.Join(errs...); err != nil {
		return turn{}, err
	}
	after, err := l.cpu()
	if err != nil {
		return turn{}, err
	}
	var all []time.Duration
	late := 0
	for _, c := range cs {
		all = append(all, c.took...)
		late, c.late = late+c.late, 0
	}
	slices.Sort(all)
	µs := func(q int) float64 { return float64(all[len(all)*q/100].Nanoseconds()) / 1000 }
	cost := float64((after - before).Microseconds()) / float64(len(all))
	return turn{float64(len(all)) / took.Seconds(), µs(50), µs(99), cost, late}, nil
}

// drain fetches at node b what was supplied at node a, so that no round finds
// more keys waiting than the one before.
func drain(ctx context.Context, slave *etsi014.Client, cs []*caller) error {
	for _, c := range cs {
		for ids := range slices.Chunk(c.ids, 128) {
			keys, err := slave.GetKeyWithID(ctx, "a-te", ids, 256)
			key.WipeAll(keys)
			if err != nil {
				return fmt.Errorf("fetch at node b what node a supplied: %w", err)
			}
		}
		c.ids = c.ids[:0]
	}
	return nil
}

// side is what is measured, or its reference.
type side struct {
	do   work
	how  connection
	bare bool // of the bare server
}

// match is one comparison.
type match struct {
	name, against   string
	ours, reference side
	keys            int // of node a's own that are there before each round
	slice           time.Duration
	of              float64 // keys of one call
	least, p99      float64 // goals of the rates' and of the p99's ratio
}

// compare lets both sides of m take turns; who begins changes.
func (s *supply) compare(ctx context.Context, o options, m match) (value, ref []turn, err error) {
	slave, err := s.slave()
	if err != nil {
		return nil, nil, err
	}
	defer slave.Close()
	sides := [2]side{m.ours, m.reference}
	var cs [2][]*caller
	for i, side := range sides {
		if cs[i], err = s.callers(o.clients, side.how); err != nil {
			return nil, nil, err
		}
		defer closeAll(cs[i])
	}
	for round := -1; round < o.rounds; round++ { // the first one warms up
		if err := s.topUp(ctx, m.keys, 50_000); err != nil {
			return nil, nil, err
		}
		var got [2]turn
		for i := range got {
			which := (i + round + 2) % 2
			if got[which], err = s.drive(ctx, cs[which], sides[which].do, m.slice); err != nil {
				return nil, nil, err
			}
			if sides[which].bare {
				continue
			}
			if err := drain(ctx, slave, cs[which]); err != nil {
				return nil, nil, err
			}
		}
		if round >= 0 {
			value, ref = append(value, got[0]), append(ref, got[1])
		}
	}
	for i, side := range sides {
		var resumed int64
		for _, c := range cs[i] {
			resumed += c.resumed.Load()
		}
		if (side.how == resume) != (resumed > 0) {
			return nil, nil, fmt.Errorf("%d TLS sessions were resumed", resumed)
		}
	}
	return value, ref, nil
}

// slave is a client of node b's.
func (l *lab) slave() (*etsi014.Client, error) {
	t, err := pki.KMEClient(l.sae(1), false, quiet())
	if err != nil {
		return nil, err
	}
	return etsi014.NewClient(etsi014.ClientConfig{URL: l.url(1), TLS: t})
}

func column(turns []turn, of func(turn) float64) sample {
	out := make(sample, len(turns))
	for i, t := range turns {
		out[i] = of(t)
	}
	return out
}

// newSupply starts two nodes and, with each one's certificate, a bare server; number
// and edit are newLab's.
func newSupply(ctx context.Context, o options, number int, edit func(string) string) (*supply, error) {
	l, err := newLab(ctx, o, number, edit, func(int) []string { return nil })
	if err != nil {
		return nil, err
	}
	s := &supply{lab: l}
	self, err := os.Executable()
	for i, node := range []string{"a", "b"} {
		p := l.dir + "/" + node + "/pki/"
		if err == nil {
			err = l.spawn(self, "bare", "-listen", l.ip[i]+":8443", "-ca", p+"sae-ca.crt", "-cert", p+"kme.crt", "-key", p+"kme.key")
		}
		s.bare[i] = "https://" + l.ip[i] + ":8443/api/v1/keys/b-te/enc_keys"
		if err == nil {
			err = await(ctx, "the bare server", func() error {
				c, err := net.Dial("tcp", l.ip[i]+":8443")
				if err == nil {
					err = c.Close()
				}
				return err
			})
		}
	}
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return s, nil
}

// supplyRows measures the calls of SAEs, and the set-up of tunnels with keys of
// the same nodes.
func supplyRows(ctx context.Context, o options, t *table) (err error) {
	s, err := newSupply(ctx, o, 0, func(s string) string { return s })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	const keys, many = 40_000, 100_000
	const handler = "bare mTLS handler"
	for _, m := range []match{
		{
			name: "GetKey over mTLS, keep-alive, durable, sealed", ours: side{do: s.getKeys}, reference: side{do: s.bareCalls, bare: true},
			against: handler, keys: keys, slice: o.slice, of: 1, least: 0.6, p99: 3,
		}, {
			name: "GetKey, a new connection per call", ours: side{do: s.getKeys, how: resume}, reference: side{do: s.bareCalls, how: resume, bare: true},
			against: handler, keys: keys, slice: o.slice, of: 1, least: 0.9,
		}, {
			name: "GetKey, a new connection per call, TLS resumed", ours: side{do: s.getKeys, how: resume}, reference: side{do: s.getKeys, how: full},
			against: "a full handshake", keys: keys, slice: o.slice, of: 1,
		}, {
			name: "GetKey + GetKeyWithID across two nodes", ours: side{do: s.bothSides}, reference: side{do: s.bareTwice, bare: true},
			against: "two bare calls", keys: keys, slice: o.slice, of: 1, least: 0.5,
		}, { // last, as it fills the usage history
			name: "GetKey, batches of number=100", ours: side{do: o.upTo(many*9/10/batchKeys, s.batches)}, reference: side{do: s.bareBatches, bare: true},
			against: handler, keys: many, slice: o.slice, of: batchKeys,
		},
	} {
		if !o.only.MatchString(m.name) {
			continue
		}
		value, ref, err := s.compare(ctx, o, m)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		m.rows(value, ref, t)
	}
	return tunnelRow(ctx, o, s.lab, t)
}

// rows adds what both sides came to.
func (m match) rows(value, ref []turn, t *table) {
	late := 0
	for _, v := range value {
		late += v.late
	}
	if late > 0 {
		t.note("%s: %d answers were 503, no key leased yet, and repeated", m.name, late)
	}
	add := func(what, unit string, of func(turn) float64, g goal) {
		v, r := column(value, of), column(ref, of)
		if slices.Min(v) > 0 && slices.Min(r) > 0 { // ticks of processor time are too coarse for short turns
			t.add(m.name+what, unit, v, r, m.against, g)
		}
	}
	unit := "1/s"
	if m.of > 1 {
		unit = "keys/s"
	}
	add("", unit, func(t turn) float64 { return m.of * t.rate }, goal{least: m.least})
	add(": median", "µs", func(t turn) float64 { return t.p50 }, goal{})
	add(": processor time, all processes", "µs", func(t turn) float64 { return t.cpu }, goal{})
	add(": p99", "µs", func(t turn) float64 { return t.p99 }, goal{most: m.p99})
}
