package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// MaxList is the most entries any list answers with.
const MaxList = 10_000

const (
	defaultList = 100
	callTimeout = 30 * time.Second // the slowest call is a tunnel's initiation
	prefix      = "/operator/v1/"
)

// Options are the parts of a node that the API shows. Keys and Tunnels are nil
// on a node without that role.
type Options struct {
	Node    Node
	Keys    Keys
	Tunnels Tunnels
	Log     *slog.Logger
}

// problem is an error document (RFC 9457).
type problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
}

// httpError is an error with the status that it deserves.
type httpError struct {
	status int
	err    error
}

func (e *httpError) Error() string { return e.err.Error() }
func (e *httpError) Unwrap() error { return e.err }

func bad(format string, args ...any) error {
	return &httpError{http.StatusBadRequest, fmt.Errorf(format, args...)}
}

// NewHandler serves the API. Who may call it is the listener's business.
func NewHandler(o Options) http.Handler {
	mux := http.NewServeMux()
	get := func(path string, f func(*http.Request) (any, error)) {
		mux.Handle("GET "+prefix+path, o.handle(f))
	}
	get("status", func(r *http.Request) (any, error) { return o.Node.Status(r.Context()) })
	get("events", func(r *http.Request) (any, error) {
		limit, err := limitOf(r)
		if err != nil {
			return nil, err
		}
		return o.Node.Events(r.Context(), r.FormValue("connection"), limit)
	})
	get("pools", o.pools)
	get("keys/{id}", o.key)
	get("history", o.history)
	get("tunnels", o.tunnels)
	get("sa", o.sas)
	get("explain/{connection}", o.explain)
	mux.Handle("POST "+prefix+"tunnels/{connection}/{action}", o.handle(o.act))
	mux.Handle("/", o.handle(func(r *http.Request) (any, error) {
		return nil, &httpError{http.StatusNotFound, fmt.Errorf("no such call: %s %s", r.Method, r.URL.Path)}
	}))
	return mux
}

func (o Options) pools(r *http.Request) (any, error) {
	if o.Keys == nil {
		return nil, noRole("kms")
	}
	return o.Keys.Pools(r.Context())
}

func (o Options) key(r *http.Request) (any, error) {
	if o.Keys == nil {
		return nil, noRole("kms")
	}
	id, err := key.ParseID(r.PathValue("id"))
	if err != nil {
		return nil, bad("%w", err)
	}
	return o.Keys.Find(r.Context(), id)
}

func (o Options) history(r *http.Request) (any, error) {
	if o.Keys == nil {
		return nil, noRole("kms")
	}
	var q HistoryQuery
	var err error
	if q.Limit, err = limitOf(r); err != nil {
		return nil, err
	}
	if s := r.FormValue("pool"); s != "" {
		if q.Pool, err = uuid.Parse(s); err != nil {
			return nil, bad("pool %q: %w", s, err)
		}
	}
	if s := r.FormValue("key"); s != "" {
		if q.Key, err = key.ParseID(s); err != nil {
			return nil, bad("%w", err)
		}
	}
	return o.Keys.History(r.Context(), q)
}

func (o Options) tunnels(r *http.Request) (any, error) {
	if o.Tunnels == nil {
		return nil, noRole("ipsec")
	}
	return o.Tunnels.Tunnels(r.Context())
}

func (o Options) sas(r *http.Request) (any, error) {
	if o.Tunnels == nil {
		return nil, noRole("ipsec")
	}
	return o.Tunnels.SAs(r.Context())
}

func (o Options) explain(r *http.Request) (any, error) {
	if o.Tunnels == nil {
		return nil, noRole("ipsec")
	}
	return o.Tunnels.Explain(r.Context(), r.PathValue("connection"))
}

func (o Options) act(r *http.Request) (any, error) {
	if o.Tunnels == nil {
		return nil, noRole("ipsec")
	}
	a := Action(r.PathValue("action"))
	switch a {
	case Initiate, Rekey, Terminate:
	default:
		return nil, bad("action %q is none of initiate, rekey, terminate", a)
	}
	conn := r.PathValue("connection")
	o.Log.Info("operator acts on a tunnel", "connection", conn, "action", string(a))
	return struct{}{}, o.Tunnels.Do(r.Context(), conn, a)
}

func noRole(role string) error {
	return &httpError{http.StatusNotFound, fmt.Errorf("this node has no [%s] role", role)}
}

func limitOf(r *http.Request) (int, error) {
	s := r.FormValue("limit")
	if s == "" {
		return defaultList, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > MaxList {
		return 0, bad("limit %q is not between 1 and %d", s, MaxList)
	}
	return n, nil
}

// handle runs f within callTimeout and writes what it returns, or one problem
// document for what it fails with.
func (o Options) handle(f func(*http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), callTimeout)
		defer cancel()
		r.Body = http.MaxBytesReader(w, r.Body, 1<<10)
		v, err := f(r.WithContext(ctx))
		status := http.StatusOK
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			status = statusOf(err)
			v = problem{Title: http.StatusText(status), Status: status, Detail: err.Error()}
			w.Header().Set("Content-Type", "application/problem+json")
			o.Log.Warn("operator call failed", "call", r.Method+" "+r.URL.Path, "status", status, "error", err)
		}
		b, err := json.Marshal(v)
		if err != nil {
			status = http.StatusInternalServerError
			b = []byte(`{"title":"Internal Server Error","status":500,"detail":"the answer cannot be encoded"}`)
			o.Log.Error("operator answer cannot be encoded", "call", r.URL.Path, "error", err)
		}
		w.WriteHeader(status)
		_, _ = w.Write(append(b, '\n')) // the client is gone if this fails
	})
}

func statusOf(err error) int {
	var h *httpError
	switch {
	case errors.As(err, &h):
		return h.status
	case errors.Is(err, ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, ErrStandby):
		return http.StatusServiceUnavailable
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}
