package etsi014

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

const (
	callTimeout = 10 * time.Second // if ctx has no earlier deadline
	maxAnswer   = 1 << 20
	maxNumber   = 1024 // keys of one call
	maxSizeBits = 1 << 16
)

// ClientConfig configures a Client; URL and TLS are needed.
type ClientConfig struct {
	URL string      // https://host[:port], with a path if the KME's API is not at /api/v1/keys
	TLS *tls.Config // the SAE's certificate, the KME's CA; TLS 1.2 at least
	// GETOnly is for KMEs that have no POST. Each call then has a connection
	// of its own: HTTP clients repeat a GET that fails on a connection used
	// before, and a repeated enc_keys is a burned key.
	GETOnly bool
	// StringIDs is for KMEs that take {"key_IDs":["..."]} instead of the
	// standard's {"key_IDs":[{"key_ID":"..."}]}.
	StringIDs bool
}

// Client is an SAE's side of ETSI GS QKD 014. Who the SAE is, its certificate
// says. It never sends a call twice: a call whose answer is lost may have
// burned its keys, and is an error. All methods may be called at once.
//
// Errors: key.ErrUnauthorised (401), *key.BadRequest (400, or a 404 of
// dec_keys), *key.Unavailable (503, and a KME that cannot be reached); others
// for an answer that is not what was asked for, of which nothing is used.
type Client struct {
	cfg  ClientConfig
	base string
	http *http.Client
}

// NewClient checks the configuration; it does not call the KME.
func NewClient(cfg ClientConfig) (*Client, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("etsi014: URL of the KME: %w", err)
	}
	if u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("etsi014: URL of the KME %q is not of the form https://host[:port][/path]", u.Redacted())
	}
	if cfg.TLS == nil || cfg.TLS.InsecureSkipVerify && cfg.TLS.VerifyConnection == nil {
		return nil, errors.New("etsi014: TLS is needed, and the KME's certificate must be verified")
	}
	t := cfg.TLS.Clone()
	t.MinVersion = max(t.MinVersion, tls.VersionTLS12)
	t.NextProtos = []string{"http/1.1"}
	base := strings.TrimSuffix(cfg.URL, "/") + "/"
	if strings.Trim(u.Path, "/") == "" {
		base = "https://" + u.Host + prefix
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	return &Client{cfg: cfg, base: base, http: &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{ // no proxy: the KME is called directly or not at all
			DialContext:            dialer.DialContext,
			TLSClientConfig:        t,
			TLSHandshakeTimeout:    5 * time.Second,
			DisableKeepAlives:      cfg.GETOnly,
			DisableCompression:     true,
			MaxIdleConnsPerHost:    16,
			IdleConnTimeout:        20 * time.Second,
			MaxResponseHeaderBytes: maxHeader,
		},
	}}, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks what the KME has for the SAE peer.
func (c *Client) Status(ctx context.Context, peer string) (key.SupplyStatus, error) {
	var s key.SupplyStatus
	err := c.call(ctx, http.MethodGet, peer, "status", nil, nil, maxAnswer, func(b []byte) (err error) {
		s, err = parseStatus(b)
		return err
	})
	return s, err
}

// GetKey asks for number new keys of sizeBits bits (a multiple of 8) to share
// with the SAE slave. It gives exactly those or an error. The caller owns the
// Materials.
func (c *Client) GetKey(ctx context.Context, slave string, number, sizeBits int) ([]key.SupplyKey, error) {
	if number < 1 || number > maxNumber || sizeBits < 8 || sizeBits > maxSizeBits || sizeBits%8 != 0 {
		return nil, bad("%d keys of %d bits: not 1 to %d of 8 to %d bits, by 8", number, sizeBits, maxNumber, maxSizeBits)
	}
	verb, q, body := http.MethodPost, url.Values(nil), []byte(nil)
	if c.cfg.GETOnly {
		verb, q = http.MethodGet, url.Values{"number": {strconv.Itoa(number)}, "size": {strconv.Itoa(sizeBits)}}
	} else {
		body = fmt.Appendf(nil, `{"number":%d,"size":%d}`, number, sizeBits)
	}
	var keys []key.SupplyKey
	err := c.call(ctx, verb, slave, "enc_keys", q, body, answerSize(number, sizeBits), func(b []byte) (err error) {
		if keys, err = parseContainer(b, sizeBits); err == nil && len(keys) != number {
			err = fmt.Errorf("etsi014: asked for %d keys, got %d", number, len(keys))
		}
		return err
	})
	if err != nil {
		key.WipeAll(keys)
		return nil, err
	}
	return keys, nil
}

// GetKeyWithID asks for the keys that the SAE master got under ids, and gives
// exactly those, in their order. sizeBits other than 0 is the size each must
// have; it is not sent. The caller owns the Materials.
func (c *Client) GetKeyWithID(ctx context.Context, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error) {
	if len(ids) < 1 || len(ids) > maxNumber || sizeBits < 0 || sizeBits > maxSizeBits || sizeBits%8 != 0 {
		return nil, bad("%d keys of %d bits: not 1 to %d of up to %d bits, by 8", len(ids), sizeBits, maxNumber, maxSizeBits)
	}
	if c.cfg.GETOnly && len(ids) > 1 {
		return nil, bad("a KME without POST gives one key by its id, not %d at once", len(ids))
	}
	verb, q, body := http.MethodPost, url.Values(nil), []byte(nil)
	if c.cfg.GETOnly {
		verb, q = http.MethodGet, url.Values{"key_ID": {ids[0].String()}}
	} else {
		body = c.idsBody(ids)
	}
	limit := answerSize(len(ids), sizeBits)
	if sizeBits == 0 {
		limit = maxAnswer
	}
	var keys []key.SupplyKey
	err := c.call(ctx, verb, master, "dec_keys", q, body, limit, func(b []byte) (err error) {
		if keys, err = parseContainer(b, sizeBits); err == nil {
			err = order(keys, ids)
		}
		return err
	})
	if err != nil {
		key.WipeAll(keys)
		return nil, err
	}
	return keys, nil
}

// Usage reports what became of keys shared with the SAE peer (F205). It is our
// extension: other makers' KMEs answer with an error.
func (c *Client) Usage(ctx context.Context, peer string, reports []key.UsageReport) error {
	type line struct {
		KeyID key.ID    `json:"key_ID"`
		Usage key.Usage `json:"usage"`
		Bytes uint64    `json:"bytes"`
	}
	lines := make([]line, len(reports))
	for i, r := range reports {
		lines[i] = line{r.ID, r.Usage, r.Bytes}
	}
	body, err := json.Marshal(map[string]any{"reports": lines})
	if err != nil {
		return fmt.Errorf("etsi014: usage report: %w", err)
	}
	return c.call(ctx, http.MethodPost, peer, "usage", nil, body, maxAnswer, func([]byte) error { return nil })
}

func (c *Client) idsBody(ids []key.ID) []byte {
	open, end := `{"key_ID":"`, `"}`
	if c.cfg.StringIDs {
		open, end = `"`, `"`
	}
	b := []byte(`{"key_IDs":[`)
	for i, id := range ids {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, open...), id.String()...), end...)
	}
	return append(b, "]}"...)
}

// answerSize is a fair bound on a container of n keys, with room for white
// space and extensions.
func answerSize(n, sizeBits int) int {
	return min(maxAnswer, 4096+n*(512+2*base64.StdEncoding.EncodedLen(sizeBits/8)))
}

// call makes one call, once, and gives the body of a 200 to read, which must
// not keep any part of it: it is wiped afterwards.
func (c *Client) call(ctx context.Context, verb, peer, name string, q url.Values, body []byte, limit int, read func([]byte) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	u := c.base + url.PathEscape(peer) + "/" + name
	if len(q) > 0 {
		u += "?" + q.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, verb, u, nil)
	if err != nil {
		return fmt.Errorf("etsi014: %s of %q: %w", name, peer, err)
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
		// No GetBody: then the transport cannot send it again.
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return &key.Unavailable{Err: fmt.Errorf("etsi014: %s of %q: %w", name, peer, err)}
	}
	defer func() { _ = resp.Body.Close() }() // read to its end, or not worth it
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("etsi014: %s of %q: %w", name, peer, refusal(resp, name))
	}
	buf := make([]byte, limit+1)
	defer clear(buf)
	n, err := io.ReadFull(resp.Body, buf)
	if err == nil {
		return fmt.Errorf("etsi014: %s of %q: the answer has more than %d bytes", name, peer, limit)
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) || resp.ContentLength >= 0 && int64(n) != resp.ContentLength {
		return &key.Unavailable{Err: fmt.Errorf("etsi014: %s of %q: the answer broke off: %w", name, peer, err)}
	}
	if err := read(buf[:n]); err != nil {
		return fmt.Errorf("etsi014: %s of %q: %w", name, peer, err)
	}
	return nil
}

// refusal turns an answer other than 200 into an error.
func refusal(resp *http.Response, name string) error {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // as much as there is
	message := errorMessage(b)
	switch s := resp.StatusCode; {
	case s == http.StatusUnauthorized, s == http.StatusForbidden:
		return key.ErrUnauthorised
	case s == http.StatusNotFound && name == "dec_keys":
		return &key.BadRequest{Message: message, NotFound: true}
	case s == http.StatusBadRequest:
		return &key.BadRequest{Message: message, NotFound: name == "dec_keys" && strings.Contains(message, "not found")}
	case s == http.StatusServiceUnavailable, s == http.StatusTooManyRequests:
		after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if err != nil || after < 0 || after > 3600 {
			after = 0
		}
		return &key.Unavailable{RetryAfter: time.Duration(after) * time.Second, Err: fmt.Errorf("the KME answers %s: %s", resp.Status, message)}
	}
	return fmt.Errorf("the KME answers %d: %s", resp.StatusCode, message)
}
