package etsi014

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

const (
	prefix  = "/api/v1/keys/"
	maxBody = 64 << 10
	maxSAE  = 64
)

// Supplier is the KSA as the handler needs it. Its refusals are
// key.ErrUnauthorised, *key.BadRequest and *key.Unavailable; anything else is a
// fault of ours, and 503 to the SAE. Materials it gives belong to the handler.
type Supplier interface {
	GetKey(ctx context.Context, master, slave string, number, sizeBits int) ([]key.SupplyKey, error)
	GetKeyWithID(ctx context.Context, slave, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error)
	Status(ctx context.Context, caller, peer string) (key.SupplyStatus, error)
	Usage(ctx context.Context, sae, peer string, reports []key.UsageReport) error
}

// Quirks are departures from the standard that one SAE needs.
type Quirks struct {
	NotFound404 bool // 404 instead of 400 for keys that are not there
}

// Options configure a Handler; all but Quirks and RetryWindow are needed.
type Options struct {
	Supplier Supplier
	// Identity names the calling SAE from its certificate. An error is 401.
	Identity func(*http.Request) (sae string, err error)
	Quirks   map[string]Quirks // by SAE id
	// RetryWindow is how long the answer to a dec_keys call is kept, in
	// memory, for the same call with the same certificate whose answer was
	// lost. 0, the standard's way: a second call is 400.
	RetryWindow time.Duration
	Log         *slog.Logger
}

// Handler is the KME's side of ETSI GS QKD 014. Close wipes what it keeps for
// RetryWindow.
type Handler struct {
	o       Options
	retries *retries // nil without RetryWindow
}

// NewHandler checks the options.
func NewHandler(o Options) (*Handler, error) {
	if o.Supplier == nil || o.Identity == nil || o.Log == nil {
		return nil, errors.New("etsi014: Supplier, Identity and Log are needed")
	}
	if o.RetryWindow < 0 || o.RetryWindow > time.Hour {
		return nil, fmt.Errorf("etsi014: retry window %v is not between 0 and 1 h", o.RetryWindow)
	}
	h := &Handler{o: o}
	if o.RetryWindow > 0 {
		h.retries = newRetries(o.RetryWindow)
	}
	return h, nil
}

// Close wipes the answers kept for RetryWindow; later calls keep none.
func (h *Handler) Close() { h.retries.close() }

// call is one call of the API.
type call struct {
	sae, peer string
	r         *http.Request
	body      []byte
}

type method struct {
	verbs []string
	do    func(*Handler, *call) ([]byte, error) // the answer, which is wiped once sent
}

// methods are the calls by the last part of their path.
func methods(name string) (method, bool) {
	switch name {
	case "status":
		return method{[]string{http.MethodGet}, (*Handler).status}, true
	case "enc_keys":
		return method{[]string{http.MethodGet, http.MethodPost}, (*Handler).encKeys}, true
	case "dec_keys":
		return method{[]string{http.MethodGet, http.MethodPost}, (*Handler).decKeys}, true
	case "usage":
		return method{[]string{http.MethodPost}, (*Handler).usage}, true
	}
	return method{}, false
}

// ServeHTTP answers one call.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	sae, err := h.o.Identity(r)
	if err != nil || sae == "" {
		h.o.Log.Warn("caller has no SAE identity", "remote", r.RemoteAddr, "err", err)
		h.refuse(w, r, "", key.ErrUnauthorised)
		return
	}
	peer, name, ok := route(r.URL)
	m, known := methods(name)
	if !ok || !known {
		writeError(w, http.StatusNotFound, "there is no such call", nil)
		return
	}
	if !slices.Contains(m.verbs, r.Method) {
		w.Header().Set("Allow", strings.Join(m.verbs, ", "))
		writeError(w, http.StatusMethodNotAllowed, "the method is not allowed for this call", nil)
		return
	}
	c := &call{sae: sae, peer: peer, r: r}
	if err := c.read(w); err != nil {
		h.refuse(w, r, sae, err)
		return
	}
	body, err := m.do(h, c)
	if err != nil {
		h.refuse(w, r, sae, err)
		return
	}
	defer clear(body)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if _, err := w.Write(body); err != nil {
		h.o.Log.Warn("answer was not delivered; its keys are lost", "sae", sae, "peer_sae", peer, "call", name, "err", err)
	}
}

// route cuts the path into its two variable parts; false if it is no path of
// the API.
func route(u *url.URL) (peer, name string, ok bool) {
	rest, ok := strings.CutPrefix(u.EscapedPath(), prefix)
	if !ok {
		return "", "", false
	}
	peer, name, ok = strings.Cut(rest, "/")
	if !ok {
		return "", "", false
	}
	peer, err := url.PathUnescape(peer)
	return peer, name, err == nil && peer != ""
}

// read takes in the body and checks how it comes.
func (c *call) read(w http.ResponseWriter) error {
	if len(c.peer) > maxSAE {
		return bad("SAE_ID in the path has more than %d characters", maxSAE)
	}
	if c.r.Method == http.MethodGet {
		if c.r.ContentLength != 0 {
			return bad("GET takes no body")
		}
		return nil
	}
	if c.r.URL.RawQuery != "" {
		return bad("POST takes no query parameters")
	}
	if ct := c.r.Header.Get("Content-Type"); ct != "" {
		if t, _, err := mime.ParseMediaType(ct); err != nil || t != "application/json" {
			return bad("Content-Type shall be application/json")
		}
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, c.r.Body, maxBody))
	if errors.As(err, new(*http.MaxBytesError)) {
		return bad("request body shall not exceed %d bytes", maxBody)
	}
	if err != nil {
		return bad("request body is not complete")
	}
	c.body = b
	return nil
}

func (h *Handler) status(c *call) ([]byte, error) {
	if _, err := query(c.r.URL.RawQuery); err != nil {
		return nil, err
	}
	s, err := h.o.Supplier.Status(c.r.Context(), c.sae, c.peer)
	if err != nil {
		return nil, err
	}
	return json.Marshal(statusBody(s))
}

func (h *Handler) encKeys(c *call) ([]byte, error) {
	var req keyRequest
	var err error
	if c.r.Method == http.MethodGet {
		req, err = queryKeyRequest(c.r.URL.RawQuery)
	} else {
		req, err = parseKeyRequest(c.body)
	}
	if err != nil {
		return nil, err
	}
	keys, err := h.o.Supplier.GetKey(c.r.Context(), c.sae, c.peer, req.number, req.size)
	if err != nil {
		return nil, err
	}
	defer key.WipeAll(keys)
	h.o.Log.Debug("GetKey", "sae", c.sae, "peer_sae", c.peer, "keys", len(keys))
	return container(keys), nil
}

func (h *Handler) decKeys(c *call) ([]byte, error) {
	var req keyIDs
	var err error
	if c.r.Method == http.MethodGet {
		req, err = queryKeyIDs(c.r.URL.RawQuery)
	} else {
		req, err = parseKeyIDs(c.body)
	}
	if err != nil {
		return nil, err
	}
	fetch := func() ([]byte, error) {
		keys, err := h.o.Supplier.GetKeyWithID(c.r.Context(), c.sae, c.peer, req.ids, req.size)
		if err != nil {
			return nil, err
		}
		defer key.WipeAll(keys)
		h.o.Log.Debug("GetKeyWithID", "sae", c.sae, "peer_sae", c.peer, "keys", len(keys))
		return container(keys), nil
	}
	if h.retries == nil || c.r.TLS == nil || len(c.r.TLS.PeerCertificates) == 0 {
		return fetch()
	}
	return h.retries.do(c.r.Context(), sameCall(c.r.TLS.PeerCertificates[0].Raw, c.peer, req), fetch)
}

func (h *Handler) usage(c *call) ([]byte, error) {
	reports, err := parseUsage(c.body)
	if err != nil {
		return nil, err
	}
	if err := h.o.Supplier.Usage(c.r.Context(), c.sae, c.peer, reports); err != nil {
		return nil, err
	}
	return []byte("{}"), nil
}

// refuse is the one place where errors become answers.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, sae string, err error) {
	log := h.o.Log.With("sae", sae, "path", r.URL.Path, "remote", r.RemoteAddr)
	var badReq *key.BadRequest
	var unavailable *key.Unavailable
	switch {
	case errors.Is(err, key.ErrUnauthorised):
		log.Warn("key supply refused", "status", http.StatusUnauthorized)
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(http.StatusUnauthorized)
	case errors.As(err, &badReq):
		status := http.StatusBadRequest
		if badReq.NotFound && h.o.Quirks[sae].NotFound404 {
			status = http.StatusNotFound
		}
		log.Info("key supply refused", "status", status, "why", badReq.Message)
		writeError(w, status, badReq.Message, badReq.Details)
	case errors.As(err, &unavailable):
		log.Warn("key supply unavailable", "status", http.StatusServiceUnavailable, "err", err)
		seconds := max(1, int(math.Ceil(unavailable.RetryAfter.Seconds())))
		w.Header().Set("Retry-After", strconv.Itoa(seconds))
		writeError(w, http.StatusServiceUnavailable, "no key can be supplied now", nil)
	default:
		log.Error("key supply failed", "status", http.StatusServiceUnavailable, "err", err)
		w.Header().Set("Retry-After", "1")
		writeError(w, http.StatusServiceUnavailable, "error on server side", nil)
	}
}

// writeError sends the standard's "Error" data format.
func writeError(w http.ResponseWriter, status int, message string, details []key.Detail) {
	e := struct {
		Message string              `json:"message"`
		Details []map[string]string `json:"details,omitempty"`
	}{Message: message}
	for _, d := range details {
		e.Details = append(e.Details, map[string]string{d.Name: d.Value})
	}
	b, err := json.Marshal(e)
	if err != nil { // strings only: cannot be
		b = []byte(`{"message":"error on server side"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b) // a caller that is gone needs no error
}

// container is the standard's "Key container" data format, by hand: the keys'
// only copy outside their Materials is the buffer returned, which has its full
// size from the start and which the caller wipes.
func container(keys []key.SupplyKey) []byte {
	const perKey = len(`{"key_ID":"01234567-89ab-cdef-0123-456789abcdef","key":""},`)
	n := len(`{"keys":[]}`)
	for _, k := range keys {
		n += perKey + base64.StdEncoding.EncodedLen(k.Material.Len())
	}
	b := append(make([]byte, 0, n), `{"keys":[`...)
	for i, k := range keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"key_ID":"`...)
		b = append(b, k.ID.String()...)
		b = append(b, `","key":"`...)
		b = base64.StdEncoding.AppendEncode(b, k.Material.Bytes())
		runtime.KeepAlive(k.Material)
		b = append(b, `"}`...)
	}
	return append(b, "]}"...)
}

// statusWire is the standard's "Status" data format.
type statusWire struct {
	SourceKMEID      string `json:"source_KME_ID"`
	TargetKMEID      string `json:"target_KME_ID"`
	MasterSAEID      string `json:"master_SAE_ID"`
	SlaveSAEID       string `json:"slave_SAE_ID"`
	KeySize          int    `json:"key_size"`
	StoredKeyCount   int    `json:"stored_key_count"`
	MaxKeyCount      int    `json:"max_key_count"`
	MaxKeyPerRequest int    `json:"max_key_per_request"`
	MaxKeySize       int    `json:"max_key_size"`
	MinKeySize       int    `json:"min_key_size"`
	MaxSAEIDCount    int    `json:"max_SAE_ID_count"`
}

func statusBody(s key.SupplyStatus) statusWire {
	return statusWire{
		SourceKMEID: s.SourceKME, TargetKMEID: s.TargetKME, MasterSAEID: s.MasterSAE, SlaveSAEID: s.SlaveSAE,
		KeySize: s.KeySize, StoredKeyCount: s.StoredKeyCount, MaxKeyCount: s.MaxKeyCount,
		MaxKeyPerRequest: s.MaxKeyPerRequest, MaxKeySize: s.MaxKeySize, MinKeySize: s.MinKeySize,
		MaxSAEIDCount: s.MaxSAEIDCount,
	}
}
