package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// The calls, as an SAE makes them. bodyForm is the answer to GetKey for one key
// of 256 bits, which the bare server gives with other digits.
const (
	getKey    = `{"number":1,"size":256}`
	getWithID = `{"key_IDs":[{"key_ID":"%s"}]}`
	bodyForm  = `{"keys":[{"key_ID":"%s","key":"%s"}]}`
	keyIDMark = `"key_ID":"`

	retryPause = 10 * time.Millisecond
)

// bare serves any POST on -listen with an answer as long as that of GetKey, over
// plain net/http and the TLS configuration of a node, until ctx ends.
func bare(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench bare", flag.ContinueOnError)
	listen := fs.String("listen", "", "`address:port`")
	var f pki.Files
	fs.StringVar(&f.CA, "ca", "", "CA `file` of the clients")
	fs.StringVar(&f.Cert, "cert", "", "certificate `file`")
	fs.StringVar(&f.Key, "key", "", "key `file`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	t, err := pki.Server(f, quiet())
	if err != nil {
		return err
	}
	t.NextProtos = []string{"http/1.1"}
	body := fmt.Appendf(nil, bodyForm, key.ID{15: 1}, strings.Repeat("A", 43)+"=")
	srv := &http.Server{TLSConfig: t, ReadHeaderTimeout: bound, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body) // the client sees what is missing
	})}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// caller is one client with connections of its own, to either node.
type caller struct {
	http [2]*http.Client
	ids  []key.ID // of the keys that GetKey gave
	body bytes.Buffer
	took []time.Duration
	late int // answers 503
}

// callers makes n clients.
func (l *lab) callers(n int, reconnect bool) ([]*caller, error) {
	out := make([]*caller, n)
	for i := range out {
		out[i] = &caller{}
		for node := range out[i].http {
			t, err := pki.KMEClient(l.sae(node), false, quiet())
			if err != nil {
				return nil, err
			}
			out[i].http[node] = &http.Client{Timeout: bound, Transport: &http.Transport{TLSClientConfig: t, DisableKeepAlives: reconnect, DisableCompression: true}}
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

// call posts body to a node's client and gives the Key-ID of the answer. A node
// that has no key leased yet is asked again; the time that takes counts.
func (c *caller) call(node int, url, body string) (key.ID, error) {
	var resp *http.Response
	for start := time.Now(); ; time.Sleep(retryPause) {
		var err error
		if resp, err = c.post(node, url, body); err != nil {
			return key.ID{}, err
		}
		if resp.StatusCode != http.StatusServiceUnavailable || time.Since(start) > bound {
			break
		}
		c.late++
	}
	answer := c.body.Bytes()
	at := bytes.Index(answer, []byte(keyIDMark)) + len(keyIDMark)
	if resp.StatusCode != http.StatusOK || at < len(keyIDMark) || len(answer) != len(bodyForm)-4+36+44 {
		return key.ID{}, fmt.Errorf("%s: %s, %d bytes", url, resp.Status, len(answer))
	}
	return key.ParseID(string(answer[at : at+36]))
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

// work is one thing to measure: a call or two.
type work func(c *caller) error

// supply is what the supply rows measure and what stands beside it.
type supply struct {
	*lab
	bare [2]string // URLs
}

// getKeys asks node a.
func (s *supply) getKeys(c *caller) error {
	id, err := c.call(0, s.url(0)+"/api/v1/keys/b-te/enc_keys", getKey)
	if err == nil {
		c.ids = append(c.ids, id)
	}
	return err
}

func (s *supply) bareCalls(c *caller) error {
	id, err := c.call(0, s.bare[0], getKey)
	if err == nil {
		c.ids = append(c.ids, id)
	}
	return err
}

// bothSides asks node a, and then node b for the same key.
func (s *supply) bothSides(c *caller) error {
	id, err := c.call(0, s.url(0)+"/api/v1/keys/b-te/enc_keys", getKey)
	if err != nil {
		return err
	}
	again, err := c.call(1, s.url(1)+"/api/v1/keys/a-te/dec_keys", fmt.Sprintf(getWithID, id))
	if err == nil && again != id {
		err = fmt.Errorf("asked for %s, got %s", id, again)
	}
	return err
}

func (s *supply) bareTwice(c *caller) error {
	id, err := c.call(0, s.bare[0], getKey)
	if err != nil {
		return err
	}
	_, err = c.call(1, s.bare[1], fmt.Sprintf(getWithID, id))
	return err
}

// turn is what one slice of work came to.
type turn struct{ rate, p50, p99, cpu float64 } // 1/s, then µs

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
	for _, c := range cs {
		all = append(all, c.took...)
	}
	slices.Sort(all)
	µs := func(q int) float64 { return float64(all[len(all)*q/100].Nanoseconds()) / 1000 }
	cost := float64((after - before).Microseconds()) / float64(len(all))
	return turn{float64(len(all)) / took.Seconds(), µs(50), µs(99), cost}, nil
}

// drain fetches at node b what was supplied at node a, so that no round finds
// more keys waiting than the one before.
func (s *supply) drain(ctx context.Context, slave *etsi014.Client, cs []*caller) error {
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

// compare lets ours and reference take turns; who begins changes.
func (s *supply) compare(ctx context.Context, o options, reconnect bool, ours, reference work) (value, ref []turn, late int, err error) {
	t, err := pki.KMEClient(s.sae(1), false, quiet())
	if err != nil {
		return nil, nil, 0, err
	}
	slave, err := etsi014.NewClient(etsi014.ClientConfig{URL: s.url(1), TLS: t})
	if err != nil {
		return nil, nil, 0, err
	}
	defer slave.Close()
	cs, err := s.callers(o.clients, reconnect)
	if err != nil {
		return nil, nil, 0, err
	}
	defer closeAll(cs)
	for round := -1; round < o.rounds; round++ { // the first one warms up
		if err := s.topUp(ctx, 40_000); err != nil {
			return nil, nil, 0, err
		}
		var got [2]turn
		for i := range got {
			which := (i + round + 2) % 2
			if got[which], err = s.drive(ctx, cs, [2]work{ours, reference}[which], o.slice); err != nil {
				return nil, nil, 0, err
			}
			if which == 1 {
				for _, c := range cs {
					c.ids = c.ids[:0] // the bare server's
				}
			} else if err := s.drain(ctx, slave, cs); err != nil {
				return nil, nil, 0, err
			}
		}
		if round >= 0 {
			value, ref = append(value, got[0]), append(ref, got[1])
		}
	}
	for _, c := range cs {
		late += c.late
	}
	return value, ref, late, nil
}

func column(turns []turn, of func(turn) float64) sample {
	out := make(sample, len(turns))
	for i, t := range turns {
		out[i] = of(t)
	}
	return out
}

// newSupply starts two nodes and, with each one's certificate, a bare server.
func newSupply(ctx context.Context, o options) (*supply, error) {
	l, err := newLab(ctx, o, 0, func(s string) string { return s }, func(int) []string { return nil })
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
	s, err := newSupply(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	rate := func(t turn) float64 { return t.rate }
	for _, r := range []struct {
		name            string
		reconnect       bool
		ours, reference work
		against         string
		least, p99      float64
	}{
		{"GetKey over mTLS, keep-alive, durable, sealed", false, s.getKeys, s.bareCalls, "bare mTLS handler", 0.6, 3},
		{"GetKey, a new connection per call", true, s.getKeys, s.bareCalls, "bare mTLS handler", 0.9, 0},
		{"GetKey + GetKeyWithID across two nodes", false, s.bothSides, s.bareTwice, "two bare calls", 0.5, 0},
	} {
		if !o.only.MatchString(r.name) {
			continue
		}
		value, ref, late, err := s.compare(ctx, o, r.reconnect, r.ours, r.reference)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		if late > 0 {
			t.note("%s: %d answers were 503, no key leased yet, and repeated", r.name, late)
		}
		t.add(r.name, "1/s", column(value, rate), column(ref, rate), r.against, goal{least: r.least})
		p50, p99 := func(t turn) float64 { return t.p50 }, func(t turn) float64 { return t.p99 }
		t.add(r.name+": median", "µs", column(value, p50), column(ref, p50), r.against, goal{})
		cpu := func(t turn) float64 { return t.cpu }
		if v, ref := column(value, cpu), column(ref, cpu); slices.Min(v) > 0 && slices.Min(ref) > 0 { // ticks of 10 ms are too coarse for short turns
			t.add(r.name+": processor time, all processes", "µs", v, ref, r.against, goal{})
		}
		t.add(r.name+": p99", "µs", column(value, p99), column(ref, p99), r.against, goal{most: r.p99})
	}
	return tunnelRow(ctx, o, s.lab, t)
}
