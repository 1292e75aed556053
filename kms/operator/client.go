package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 64 << 20

// Client calls a node's operator API. Its methods may be called at once.
type Client struct{ http *http.Client }

// NewClient calls over the unix socket name. Nothing is connected yet.
func NewClient(name string) *Client {
	var d net.Dialer
	return &Client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", name)
		},
	}}}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status is GET status.
func (c *Client) Status(ctx context.Context) (v Status, err error) {
	return v, c.call(ctx, http.MethodGet, "status", nil, &v)
}

// Events is GET events.
func (c *Client) Events(ctx context.Context, connection string, limit int) (v []Event, err error) {
	q := url.Values{"limit": {strconv.Itoa(limit)}}
	if connection != "" {
		q.Set("connection", connection)
	}
	return v, c.call(ctx, http.MethodGet, "events", q, &v)
}

// Pools is GET pools.
func (c *Client) Pools(ctx context.Context) (v []Pool, err error) {
	return v, c.call(ctx, http.MethodGet, "pools", nil, &v)
}

// Find is GET keys/{id}.
func (c *Client) Find(ctx context.Context, id key.ID) (v Key, err error) {
	return v, c.call(ctx, http.MethodGet, "keys/"+id.String(), nil, &v)
}

// History is GET history.
func (c *Client) History(ctx context.Context, h HistoryQuery) (v []Usage, err error) {
	q := url.Values{}
	if h.Limit > 0 {
		q.Set("limit", strconv.Itoa(h.Limit))
	}
	if h.Pool != uuid.Nil {
		q.Set("pool", h.Pool.String())
	}
	if !h.Key.IsZero() {
		q.Set("key", h.Key.String())
	}
	return v, c.call(ctx, http.MethodGet, "history", q, &v)
}

// Tunnels is GET tunnels.
func (c *Client) Tunnels(ctx context.Context) (v []Tunnel, err error) {
	return v, c.call(ctx, http.MethodGet, "tunnels", nil, &v)
}

// SAs is GET sa.
func (c *Client) SAs(ctx context.Context) (v []SA, err error) {
	return v, c.call(ctx, http.MethodGet, "sa", nil, &v)
}

// Explain is GET explain/{connection}.
func (c *Client) Explain(ctx context.Context, connection string) (v Explanation, err error) {
	return v, c.call(ctx, http.MethodGet, "explain/"+url.PathEscape(connection), nil, &v)
}

// Do is POST tunnels/{connection}/{action}.
func (c *Client) Do(ctx context.Context, connection string, a Action) error {
	var v struct{}
	return c.call(ctx, http.MethodPost, "tunnels/"+url.PathEscape(connection)+"/"+string(a), nil, &v)
}

// call makes one call. An error of the node is its problem's detail, wrapping
// ErrNotFound for 404.
func (c *Client) call(ctx context.Context, method, path string, q url.Values, into any) error {
	u := "http://qipsecd" + prefix + path
	if len(q) > 0 {
		u += "?" + q.Encode()
	}
	r, err := http.NewRequestWithContext(ctx, method, u, nil)
	if err != nil {
		return fmt.Errorf("operator: %w", err)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			return fmt.Errorf("operator: cannot reach qipsecd: %w (is it running, and are you root?)", op)
		}
		return fmt.Errorf("operator: %w", err)
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end or given up
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("operator: read the answer: %w", err)
	}
	if len(b) > maxAnswer {
		return fmt.Errorf("operator: the answer is larger than %d bytes", maxAnswer)
	}
	return decodeAnswer(resp.StatusCode, b, into)
}

// decodeAnswer reads the answer b with that status into what the call gives.
func decodeAnswer(status int, b []byte, into any) error {
	if status != http.StatusOK {
		var p problem
		if json.Unmarshal(b, &p) != nil || p.Detail == "" {
			p.Detail = fmt.Sprintf("%d %s", status, http.StatusText(status))
		}
		if status == http.StatusNotFound {
			return fmt.Errorf("%s: %w", strings.TrimSuffix(p.Detail, ": "+ErrNotFound.Error()), ErrNotFound)
		}
		return errors.New(p.Detail)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("operator: the answer is not understood (is qipsecd of another version?): %w", err)
	}
	return nil
}
