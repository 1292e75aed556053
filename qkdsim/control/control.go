// Package control is the QKDE control interface: JSON over mutual TLS by which
// a node asks its QKD device how it is and tells it to generate, start or
// stop. Key material never crosses it.
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
)

// Status is what a QKDE says of itself.
type Status struct {
	State     string   `json:"state"`            // "generating", "stopped", "outage", "aborted"
	QBER      float64  `json:"qber"`             // of the last block, 0..1
	Rate      float64  `json:"secret_rate_bps"`  // now, bit/s
	Seq       uint64   `json:"seq"`              // of the last QKD-Key file
	Wanted    int      `json:"wanted_bytes"`     // asked for by Generate, not made yet
	Backlog   int      `json:"backlog_files"`    // not delivered yet to this device's node
	Dropped   uint64   `json:"dropped_files"`    // lost because the backlog was full
	Generated uint64   `json:"generated_files"`  // since the device's start
	Alarms    []string `json:"alarms,omitempty"` // present ones, by name
}

// MaxGenerate bounds what may be asked for and not made yet, in bytes.
const MaxGenerate = 1 << 30

const maxBody = 64 << 10

// Device is what the interface controls.
type Device interface {
	Status() Status
	Generate(n int) error // n bytes more; an error says why they cannot be made
	Init()
	Stop()
}

// problem is an RFC 9457 answer.
type problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
}

// NewHandler serves the devices: identify gives the calling node's name from
// its verified certificate, and devices the device that is that node's own. A
// node without one gets 403.
func NewHandler(identify func(*http.Request) (string, error), devices map[string]Device, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, do func(Device, []byte) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			node, err := identify(r)
			dev, ok := devices[node]
			if err != nil || !ok {
				log.Warn("QKDE control refused", "node", node, "err", err)
				answer(w, http.StatusForbidden, problem{"no device of the caller's here", http.StatusForbidden, ""})
				return
			}
			body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
			if err != nil {
				answer(w, http.StatusBadRequest, problem{"body cannot be read", http.StatusBadRequest, err.Error()})
				return
			}
			v, err := do(dev, body)
			if err != nil {
				answer(w, http.StatusBadRequest, problem{"request refused", http.StatusBadRequest, err.Error()})
				return
			}
			answer(w, http.StatusOK, v)
		})
	}
	handle("GET /qkde/v1/status", func(d Device, _ []byte) (any, error) { return d.Status(), nil })
	handle("POST /qkde/v1/generate", func(d Device, body []byte) (any, error) {
		n, err := decodeGenerate(body)
		if err != nil {
			return nil, err
		}
		if err := d.Generate(n); err != nil {
			return nil, err
		}
		return d.Status(), nil
	})
	handle("POST /qkde/v1/init", func(d Device, _ []byte) (any, error) { d.Init(); return d.Status(), nil })
	handle("POST /qkde/v1/stop", func(d Device, _ []byte) (any, error) { d.Stop(); return d.Status(), nil })
	return mux
}

type generate struct {
	Bytes *int `json:"bytes"`
}

func decodeGenerate(body []byte) (int, error) {
	var g generate
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&g); err != nil {
		return 0, fmt.Errorf("want {\"bytes\": N}: %w", err)
	}
	if d.More() || g.Bytes == nil || *g.Bytes < 1 || *g.Bytes > MaxGenerate {
		return 0, fmt.Errorf("want {\"bytes\": N} with N between 1 and %d", MaxGenerate)
	}
	return *g.Bytes, nil
}

func answer(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code, b = http.StatusInternalServerError, []byte(`{"title":"answer cannot be encoded","status":500}`)
	}
	if _, ok := v.(problem); ok {
		w.Header().Set("Content-Type", "application/problem+json")
	} else {
		w.Header().Set("Content-Type", "application/json")
	}
	w.WriteHeader(code)
	_, _ = w.Write(b) // a caller that went away needs no answer
}

// Client controls one device. Its methods may be called at the same time.
type Client struct {
	url  string
	http *http.Client
}

// NewClient talks to the device at url ("https://host:port") through hc, which
// brings the TLS configuration and, with ctx, bounds each call.
func NewClient(url string, hc *http.Client) *Client { return &Client{url: url, http: hc} }

// Status asks how the device is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return c.call(ctx, http.MethodGet, "status", nil)
}

// Generate asks for n bytes of key more, between 1 and MaxGenerate.
func (c *Client) Generate(ctx context.Context, n int) error {
	b, err := json.Marshal(generate{&n})
	if err != nil {
		return err
	}
	_, err = c.call(ctx, http.MethodPost, "generate", b)
	return err
}

// Init starts generation anew.
func (c *Client) Init(ctx context.Context) error {
	_, err := c.call(ctx, http.MethodPost, "init", nil)
	return err
}

// Stop ends generation until Init.
func (c *Client) Stop(ctx context.Context) error {
	_, err := c.call(ctx, http.MethodPost, "stop", nil)
	return err
}

func (c *Client) call(ctx context.Context, method, what string, body []byte) (Status, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url+"/qkde/v1/"+what, bytes.NewReader(body))
	if err != nil {
		return Status{}, fmt.Errorf("QKDE control: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return Status{}, fmt.Errorf("QKDE control: %s: %w", what, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil {
		return Status{}, fmt.Errorf("QKDE control: %s: %w", what, err)
	}
	if resp.StatusCode != http.StatusOK {
		return Status{}, fmt.Errorf("QKDE control: %s: %w", what, refusal(resp.StatusCode, b))
	}
	var s Status
	if len(b) > maxBody {
		return Status{}, fmt.Errorf("QKDE control: %s: answer is above %d bytes", what, maxBody)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return Status{}, fmt.Errorf("QKDE control: %s: answer is not a status: %w", what, err)
	}
	return s, nil
}

func refusal(code int, b []byte) error {
	var p problem
	if json.Unmarshal(b, &p) != nil || p.Title == "" {
		return fmt.Errorf("HTTP status %d", code)
	}
	if p.Detail == "" {
		return errors.New(p.Title)
	}
	return fmt.Errorf("%s: %s", p.Title, p.Detail)
}
