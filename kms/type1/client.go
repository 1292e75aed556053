package type1

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
	"net/url"
	"sync/atomic"
	"time"
)

// Defaults of a Client.
const (
	DefaultTimeout = 10 * time.Second
	DefaultMaxBody = 8 << 20 // bytes of a request or an answer, either way
)

// connectTimeout is how long one of several machines may take to accept a connection.
const connectTimeout = 3 * time.Second

// ClientOptions say how to reach one peer.
type ClientOptions struct {
	URL       string            // https://host:port
	More      []string          // likewise, of the node's other machines: see Client
	TLS       *tls.Config       // with our certificate; must accept that peer only
	Local     netip.Addr        // source of our connections; zero: the kernel's choice
	Timeout   time.Duration     // of each call; default DefaultTimeout
	MaxBody   int64             // of an answer, in bytes; default DefaultMaxBody
	Transport http.RoundTripper // instead of URL and TLS's own, for tests; nil: a new one
}

// Client calls one peer. It keeps connections alive and may be used by several
// goroutines at once. A call that the peer may have acted on is never repeated by
// the Client: the callers know what may be.
//
// Of several machines of one node only the one that has its inventory acts
// (docs/decisions/0011). The Client stays with the one that answers. From one that
// stands by or that it cannot connect to, it goes on to the next, once around; after
// any other failure only the next call does.
type Client struct {
	o    ClientOptions
	h    *http.Client
	urls []string
	at   atomic.Uint32 // of urls, the one to call
}

// NewClient checks the options; it does not connect.
func NewClient(o ClientOptions) (*Client, error) {
	var urls []string
	for _, s := range append([]string{o.URL}, o.More...) {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "https" || u.Host == "" || (u.Path != "" && u.Path != "/") {
			return nil, fmt.Errorf("type1: peer address %q is not https://host:port", s)
		}
		urls = append(urls, "https://"+u.Host)
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.MaxBody == 0 {
		o.MaxBody = DefaultMaxBody
	}
	if o.Transport == nil {
		if o.TLS == nil {
			return nil, errors.New("type1: client has no TLS configuration")
		}
		connect := o.Timeout
		if len(urls) > 1 {
			connect = min(connect, connectTimeout)
		}
		dialer := &net.Dialer{Timeout: connect}
		if o.Local.IsValid() {
			dialer.LocalAddr = &net.TCPAddr{IP: o.Local.AsSlice()}
		}
		o.Transport = &http.Transport{
			DialContext:         dialer.DialContext,
			TLSClientConfig:     o.TLS.Clone(),
			TLSHandshakeTimeout: connect,
			MaxIdleConnsPerHost: 4,
			MaxConnsPerHost:     16,
			IdleConnTimeout:     90 * time.Second,
			DisableCompression:  true,
			// No proxy: a node talks to its peer itself.
		}
	}
	return &Client{o: o, urls: urls, h: &http.Client{
		Transport:     o.Transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.h.CloseIdleConnections() }

// Validate is M102. Its error, like that of the other calls, wraps *Problem if
// the peer refused; any other error leaves open whether the peer has acted.
func (c *Client) Validate(ctx context.Context, r ValidateRequest) (ValidateResponse, error) {
	var out ValidateResponse
	err := c.call(ctx, PathValidateKey, &r, &out)
	return out, err
}

// Lease announces a lease.
func (c *Client) Lease(ctx context.Context, r LeaseRequest) (LeaseResponse, error) {
	var out LeaseResponse
	err := c.call(ctx, PathLease, &r, &out)
	return out, err
}

// Burn announces that leased keys were lost.
func (c *Client) Burn(ctx context.Context, r BurnRequest) (BurnResponse, error) {
	var out BurnResponse
	err := c.call(ctx, PathBurn, &r, &out)
	return out, err
}

// Sync opens a session.
func (c *Client) Sync(ctx context.Context, r SyncRequest) (SyncResponse, error) {
	var out SyncResponse
	err := c.call(ctx, PathSync, &r, &out)
	return out, err
}

// Want asks for keys that the peer owns.
func (c *Client) Want(ctx context.Context, r WantRequest) (WantResponse, error) {
	var out WantResponse
	err := c.call(ctx, PathWant, &r, &out)
	return out, err
}

// SupplyNotice delivers supply notices: nil means that the peer has all.
func (c *Client) SupplyNotice(ctx context.Context, r NoticeRequest) error {
	return c.call(ctx, PathSupplyNotice, &r, &NoticeResponse{})
}

// PullNotice asks for supply notices.
func (c *Client) PullNotice(ctx context.Context, r PullRequest) (PullResponse, error) {
	var out PullResponse
	err := c.call(ctx, PathPullNotice, &r, &out)
	return out, err
}

// PullSettled asks which of our keys were settled at the peer.
func (c *Client) PullSettled(ctx context.Context, r SettledRequest) (SettledResponse, error) {
	var out SettledResponse
	err := c.call(ctx, PathPullSettled, &r, &out)
	return out, err
}

func (c *Client) call(ctx context.Context, path string, in, out interface{ check() error }) error {
	if err := in.check(); err != nil {
		return fmt.Errorf("type1: %s not sent: %w", path, err)
	}
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("type1: encode %s: %w", path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	for range c.urls {
		at := c.at.Load()
		var acted bool
		if acted, err = c.post(ctx, c.urls[at], path, body, out); err == nil {
			return nil
		}
		if p := (*Problem)(nil); errors.As(err, &p) && p.Code != Standby {
			return err
		}
		c.at.CompareAndSwap(at, (at+1)%uint32(len(c.urls)))
		if acted || ctx.Err() != nil {
			break
		}
	}
	return err
}

// post calls one machine. acted is false if it certainly did nothing.
func (c *Client) post(ctx context.Context, base, path string, body []byte, out interface{ check() error }) (acted bool, err error) {
	var got atomic.Bool // a trace may be called by another goroutine, and after the end of the call
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { got.Store(true) }})
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+path, bytes.NewReader(body))
	if err != nil {
		return false, fmt.Errorf("type1: call %s: %w", path, err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.h.Do(req)
	if err != nil {
		return got.Load(), fmt.Errorf("type1: call %s: %w", path, err)
	}
	err = c.read(resp, path, out)
	return CodeOf(err) != Standby, err
}

// read takes in an answer.
func (c *Client) read(resp *http.Response, path string, out interface{ check() error }) error {
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, c.o.MaxBody+1))
	if err != nil {
		return fmt.Errorf("type1: read the answer to %s: %w", path, err)
	}
	if int64(len(b)) > c.o.MaxBody {
		return fmt.Errorf("type1: the answer to %s has more than %d bytes", path, c.o.MaxBody)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("type1: %s refused: %w", path, readProblem(resp.StatusCode, b))
	}
	if err := decode(b, out); err != nil {
		return fmt.Errorf("type1: decode the answer to %s: %w", path, err)
	}
	if err := out.check(); err != nil {
		return fmt.Errorf("type1: the answer to %s: %w", path, err)
	}
	return nil
}
