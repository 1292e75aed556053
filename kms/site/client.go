package site

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// What bounds a call. A leader answers from memory; one that was stopped costs its
// callers callTimeout until another leads.
const (
	connectTimeout = 2 * time.Second
	callTimeout    = 5 * time.Second
	leadTimeout    = time.Second
	maxConns       = 64
	retryAfter     = time.Second // hint to SAEs while nobody leads
)

// ClientOptions say how to reach the other members; Local may be zero.
type ClientOptions struct {
	Members []netip.AddrPort
	TLS     *tls.Config // with our certificate; must accept our own node only
	Local   func(to netip.AddrPort) netip.Addr
}

// Client has the leader answer. It stays with the member that did last. All methods
// may be called at once. Errors are those of Supplier, ErrStandby never: while no
// member leads, it is *key.Unavailable.
type Client struct {
	o  ClientOptions
	h  *http.Client
	at atomic.Uint32 // of Members, the one to call
}

// NewClient does not connect.
func NewClient(o ClientOptions) (*Client, error) {
	if len(o.Members) == 0 || o.TLS == nil {
		return nil, errors.New("site: Members and TLS are needed")
	}
	return &Client{o: o, h: &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{ // no proxy
			DialContext:         o.dial,
			TLSClientConfig:     o.TLS.Clone(),
			TLSHandshakeTimeout: connectTimeout,
			MaxConnsPerHost:     maxConns,
			MaxIdleConnsPerHost: maxConns,
			IdleConnTimeout:     90 * time.Second,
			DisableCompression:  true,
		},
	}}, nil
}

// dial connects from our end of the channel, which the guard knows.
func (o ClientOptions) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := &net.Dialer{Timeout: connectTimeout}
	if to, err := netip.ParseAddrPort(addr); err == nil && o.Local != nil {
		if own := o.Local(to); own.IsValid() {
			d.LocalAddr = &net.TCPAddr{IP: own.AsSlice()}
		}
	}
	return d.DialContext(ctx, network, addr)
}

// Close drops idle connections.
func (c *Client) Close() { c.h.CloseIdleConnections() }

// GetKey has the leader give fresh keys. The caller owns the Materials.
func (c *Client) GetKey(ctx context.Context, master, slave string, number, sizeBits int) ([]key.SupplyKey, error) {
	return c.keys(ctx, pathGetKey, request{SAE: master, Peer: slave, Number: number, SizeBits: sizeBits}, number, nil)
}

// GetKeyWithID has the leader give, once, the keys that master got as ids.
func (c *Client) GetKeyWithID(ctx context.Context, slave, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error) {
	if len(ids) > maxKeys {
		return nil, &key.BadRequest{Message: fmt.Sprintf("number of keys shall be at most %d", maxKeys)}
	}
	return c.keys(ctx, pathGetKeyWithID, request{SAE: slave, Peer: master, KeyIDs: ids, SizeBits: sizeBits}, len(ids), ids)
}

// Status asks the leader.
func (c *Client) Status(ctx context.Context, caller, peer string) (key.SupplyStatus, error) {
	var s key.SupplyStatus
	err := c.call(ctx, pathStatus, request{SAE: caller, Peer: peer}, func(b []byte) error { return decode(b, &s) })
	return s, err
}

// Usage passes reports on.
func (c *Client) Usage(ctx context.Context, sae, peer string, reports []key.UsageReport) error {
	r := request{SAE: sae, Peer: peer}
	for _, v := range reports {
		r.Reports = append(r.Reports, report{v.ID, v.Usage, v.Bytes})
	}
	if len(r.Reports) > maxKeys {
		return &key.BadRequest{Message: fmt.Sprintf("a report shall name at most %d keys", maxKeys)}
	}
	return c.call(ctx, pathUsage, r, func([]byte) error { return nil })
}

// Leader asks who leads, all members if need be; false if none says that it does.
func (c *Client) Leader(ctx context.Context) (at netip.AddrPort, since time.Time, ok bool) {
	first := c.at.Load()
	for i := range c.o.Members {
		at = c.o.Members[(int(first)+i)%len(c.o.Members)]
		var l leads
		one, cancel := context.WithTimeout(ctx, leadTimeout)
		_, err := c.post(one, at, pathLead, nil, func(b []byte) error { return decode(b, &l) })
		cancel()
		if err == nil && l.Leads {
			return at, l.Since, true
		}
	}
	return netip.AddrPort{}, time.Time{}, false
}

// keys makes a call that is answered with number keys.
func (c *Client) keys(ctx context.Context, path string, r request, number int, ids []key.ID) (list []key.SupplyKey, err error) {
	err = c.call(ctx, path, r, func(b []byte) (err error) {
		if list, err = parseContainer(b); err == nil {
			err = checkKeys(list, number, r.SizeBits, ids)
		}
		return err
	})
	if err != nil {
		key.WipeAll(list)
		return nil, err
	}
	return list, nil
}

// call asks the members in turn until one has acted or may have.
func (c *Client) call(ctx context.Context, path string, r request, read func([]byte) error) error {
	body, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("site: encode %s: %w", path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for range c.o.Members {
		at := c.at.Load()
		var acted bool
		if acted, err = c.post(ctx, c.o.Members[at], path, body, read); err == nil {
			return nil
		}
		var bad *key.BadRequest
		var no *key.Unavailable
		if errors.Is(err, key.ErrUnauthorised) || errors.As(err, &bad) || errors.As(err, &no) {
			return err // the leader's word
		}
		c.at.CompareAndSwap(at, (at+1)%uint32(len(c.o.Members)))
		if acted || ctx.Err() != nil {
			break
		}
	}
	return &key.Unavailable{RetryAfter: retryAfter, Err: fmt.Errorf("site: no member that leads has answered: %w", err)}
}

// post calls one member and gives the body of a 200 to read, which must keep no part
// of it: it is wiped. acted is false if the member certainly did nothing.
func (c *Client) post(ctx context.Context, to netip.AddrPort, path string, body []byte, read func([]byte) error) (acted bool, err error) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { acted = true }})
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+to.String()+path, nil)
	if err != nil {
		return false, fmt.Errorf("site: %s of %v: %w", path, to, err)
	}
	if body != nil {
		// No GetBody: then the transport cannot send it again.
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	resp, err := c.h.Do(req)
	if err != nil {
		return acted, fmt.Errorf("site: %s of %v: %w", path, to, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.ContentLength < 0 || resp.ContentLength > maxAnswer {
		return true, fmt.Errorf("site: %s of %v: an answer of %d bytes", path, to, resp.ContentLength)
	}
	buf := make([]byte, resp.ContentLength)
	defer clear(buf)
	if _, err := io.ReadFull(resp.Body, buf); err != nil {
		return true, fmt.Errorf("site: %s of %v: the answer broke off: %w", path, to, err)
	}
	if resp.StatusCode != http.StatusOK {
		var r refusal
		if err := decode(buf, &r); err != nil {
			return true, fmt.Errorf("site: %s of %v: HTTP status %d", path, to, resp.StatusCode)
		}
		return r.Code != standby, fmt.Errorf("site: %s of %v: %w", path, to, r.err())
	}
	if err := read(buf); err != nil {
		return true, fmt.Errorf("site: %s of %v: %w", path, to, err)
	}
	return true, nil
}
