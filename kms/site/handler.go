package site

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Supplier is the KSA of the member that leads. Its errors are those of
// etsi014.Supplier, and ErrStandby where another member leads.
type Supplier interface {
	GetKey(ctx context.Context, master, slave string, number, sizeBits int) ([]key.SupplyKey, error)
	GetKeyWithID(ctx context.Context, slave, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error)
	Status(ctx context.Context, caller, peer string) (key.SupplyStatus, error)
	Usage(ctx context.Context, sae, peer string, reports []key.UsageReport) error
}

// HandlerOptions are all needed but Event.
type HandlerOptions struct {
	Node     string // our own name, which is every member's
	Supplier Supplier
	Leads    func() (since time.Time, ok bool)
	// Peer names the node that sent the request, from its TLS certificate.
	Peer func(*http.Request) (node string, err error)
	// Event reports a refused caller; severity "alarm". May be nil.
	Event func(code, severity, text string, attrs ...slog.Attr)
	Log   *slog.Logger
}

// inFlight bounds the calls under way; further ones get 503.
const inFlight = 512

type handler struct {
	HandlerOptions
	slots chan struct{}
}

// NewHandler answers the other members. The server around it sets timeouts and
// demands client certificates.
func NewHandler(o HandlerOptions) (http.Handler, error) {
	if o.Node == "" || o.Supplier == nil || o.Leads == nil || o.Peer == nil || o.Log == nil {
		return nil, errors.New("site: Node, Supplier, Leads, Peer and Log are needed")
	}
	h := &handler{HandlerOptions: o, slots: make(chan struct{}, inFlight)}
	mux := http.NewServeMux()
	h.handle(mux, pathGetKey, func(ctx context.Context, r request) ([]byte, error) {
		return keys(o.Supplier.GetKey(ctx, r.SAE, r.Peer, r.Number, r.SizeBits))
	})
	h.handle(mux, pathGetKeyWithID, func(ctx context.Context, r request) ([]byte, error) {
		return keys(o.Supplier.GetKeyWithID(ctx, r.SAE, r.Peer, r.KeyIDs, r.SizeBits))
	})
	h.handle(mux, pathStatus, func(ctx context.Context, r request) ([]byte, error) {
		s, err := o.Supplier.Status(ctx, r.SAE, r.Peer)
		if err != nil {
			return nil, err
		}
		return json.Marshal(s)
	})
	h.handle(mux, pathUsage, func(ctx context.Context, r request) ([]byte, error) {
		list := make([]key.UsageReport, len(r.Reports))
		for i, v := range r.Reports {
			list[i] = key.UsageReport{ID: v.KeyID, Usage: v.Usage, Bytes: v.Bytes}
		}
		return []byte("{}"), o.Supplier.Usage(ctx, r.SAE, r.Peer, list)
	})
	mux.HandleFunc("POST "+pathLead, func(w http.ResponseWriter, r *http.Request) {
		if h.member(w, r) {
			since, ok := o.Leads()
			b, _ := json.Marshal(leads{ok, since}) // cannot fail
			answer(w, http.StatusOK, b)
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, http.StatusNotFound, refusal{Code: malformed, Message: "no such call"})
	})
	return mux, nil
}

// keys makes an answer of a Supplier's, whose Materials it wipes.
func keys(list []key.SupplyKey, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer key.WipeAll(list)
	return container(list), nil
}

// handle serves one path: who, what, and only then the Supplier.
func (h *handler) handle(mux *http.ServeMux, path string, serve func(context.Context, request) ([]byte, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		select {
		case h.slots <- struct{}{}:
			defer func() { <-h.slots }()
		default:
			refuse(w, http.StatusServiceUnavailable, refusal{Code: unavailable, Message: "too many calls of members under way"})
			return
		}
		if !h.member(w, r) {
			return
		}
		b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
		var in request
		if err == nil {
			in, err = parseRequest(b)
		}
		if err != nil {
			h.Log.Warn("call of a member cannot be read", "path", path, "remote", r.RemoteAddr, "err", err)
			refuse(w, http.StatusBadRequest, refusal{Code: malformed, Message: err.Error()})
			return
		}
		out, err := serve(r.Context(), in)
		if err != nil {
			status, no := refusalOf(err)
			h.Log.Debug("call of a member refused", "path", path, "sae", in.SAE, "peer_sae", in.Peer, "err", err)
			refuse(w, status, no)
			return
		}
		defer clear(out)
		if err := answer(w, http.StatusOK, out); err != nil {
			h.Log.Warn("answer to a member was not delivered; its keys are lost", "path", path, "sae", in.SAE, "err", err)
		}
	})
}

// member lets only our own node in.
func (h *handler) member(w http.ResponseWriter, r *http.Request) bool {
	node, err := h.Peer(r)
	if err == nil && node == h.Node {
		return true
	}
	h.Log.Warn("caller is no member of this site", "node", node, "remote", r.RemoteAddr, "err", err)
	if h.Event != nil {
		h.Event("SITE_NOT_AUTHORISED", "alarm", "one that is no member of this site has called it as one", slog.String("peer", node), slog.String("path", r.URL.Path))
	}
	refuse(w, http.StatusForbidden, refusal{Code: forbidden})
	return false
}

func refuse(w http.ResponseWriter, status int, r refusal) {
	b, _ := json.Marshal(r)  // cannot fail
	_ = answer(w, status, b) // a caller that is gone needs no error
}

func answer(w http.ResponseWriter, status int, b []byte) error {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, err := w.Write(b)
	return err
}
