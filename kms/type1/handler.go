package type1

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"

	"github.com/google/uuid"
)

// Agent is the KMA behind the handler. peer is the caller, which is the other
// end of the request's pool. Errors that are no *Problem become Internal.
type Agent interface {
	Validate(ctx context.Context, peer string, r ValidateRequest) (ValidateResponse, error)
	Lease(ctx context.Context, peer string, r LeaseRequest) (LeaseResponse, error)
	Burn(ctx context.Context, peer string, r BurnRequest) (BurnResponse, error)
	Sync(ctx context.Context, peer string, r SyncRequest) (SyncResponse, error)
	Want(ctx context.Context, peer string, r WantRequest) (WantResponse, error)
}

// Supply is the KSA behind the handler.
type Supply interface {
	// SupplyNotice keeps the notices; peer is the other end of all their pools.
	SupplyNotice(ctx context.Context, peer string, r NoticeRequest) error
	// PullNotice answers with those notices that are meant for peer only.
	PullNotice(ctx context.Context, peer string, r PullRequest) (PullResponse, error)
	// PullSettled answers with keys that peer owns only.
	PullSettled(ctx context.Context, peer string, r SettledRequest) (SettledResponse, error)
}

// HandlerOptions are all needed but the limits and Event.
type HandlerOptions struct {
	Agent  Agent
	Supply Supply
	// Peer names the node that sent the request, from its TLS certificate.
	Peer func(*http.Request) (node string, err error)
	// PeerOf names the other end of a pool; false if there is no such pool.
	PeerOf func(pool uuid.UUID) (node string, ok bool)
	// Event reports a refused peer; severity "alarm". May be nil.
	Event func(code, severity, text string, attrs ...slog.Attr)
	Log   *slog.Logger

	MaxBody     int64 // bytes; default DefaultMaxBody
	MaxInFlight int   // requests under way; default 256
}

type handler struct {
	HandlerOptions
	slots chan struct{}
}

// NewHandler serves all of Type-1. The server around it sets timeouts for
// headers and idle connections and demands client certificates.
func NewHandler(o HandlerOptions) (http.Handler, error) {
	if o.Agent == nil || o.Supply == nil || o.Peer == nil || o.PeerOf == nil || o.Log == nil {
		return nil, errors.New("type1: handler needs Agent, Supply, Peer, PeerOf and Log")
	}
	if o.MaxBody == 0 {
		o.MaxBody = DefaultMaxBody
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = 256
	}
	h := &handler{HandlerOptions: o, slots: make(chan struct{}, o.MaxInFlight)}
	mux := http.NewServeMux()
	handle(mux, h, PathValidateKey, o.Agent.Validate)
	handle(mux, h, PathLease, o.Agent.Lease)
	handle(mux, h, PathBurn, o.Agent.Burn)
	handle(mux, h, PathSync, o.Agent.Sync)
	handle(mux, h, PathWant, o.Agent.Want)
	handle(mux, h, PathSupplyNotice, func(ctx context.Context, peer string, r NoticeRequest) (NoticeResponse, error) {
		return NoticeResponse{}, o.Supply.SupplyNotice(ctx, peer, r)
	})
	handle(mux, h, PathPullNotice, o.Supply.PullNotice)
	handle(mux, h, PathPullSettled, o.Supply.PullSettled)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		writeProblem(w, &Problem{NotFound, "no such method of Type-1"})
	})
	return mux, nil
}

// handle serves one path: who, what, whether, and only then the agent.
func handle[R, A any, P interface {
	*R
	request
}](mux *http.ServeMux, h *handler, path string, serve func(context.Context, string, R) (A, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		select {
		case h.slots <- struct{}{}:
			defer func() { <-h.slots }()
		default:
			writeProblem(w, &Problem{Overloaded, "too many requests under way"})
			return
		}
		var in R
		peer, err := h.accept(w, r, P(&in))
		var out A
		if err == nil {
			out, err = serve(r.Context(), peer, in)
		}
		if err != nil {
			h.refuse(w, path, peer, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(out); err != nil {
			h.Log.Debug("type-1 answer not delivered", "path", path, "peer", peer, "err", err)
		}
	})
}

// accept reads and authorises a request.
func (h *handler) accept(w http.ResponseWriter, r *http.Request, in request) (peer string, err error) {
	peer, err = h.Peer(r)
	if err != nil {
		h.event("TYPE1_UNAUTHENTICATED", "a Type-1 caller's certificate names no node", slog.String("remote", r.RemoteAddr))
		return "", &Problem{Unauthenticated, "the certificate names no node"}
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, h.MaxBody))
	if err != nil {
		return peer, &Problem{Malformed, "the body is cut off or too large"}
	}
	if err := decode(b, in); err != nil {
		return peer, &Problem{Malformed, clean(err.Error())}
	}
	if err := in.check(); err != nil {
		return peer, &Problem{Malformed, clean(err.Error())}
	}
	for _, pool := range in.pools() {
		if other, ok := h.PeerOf(pool); !ok || other != peer {
			h.event("TYPE1_NOT_AUTHORISED", "a node spoke about a pool that it does not share", slog.String("peer", peer),
				slog.String("pool", pool.String()), slog.String("path", r.URL.Path))
			return peer, &Problem{NotAuthorised, "pool " + pool.String() + " is not shared with " + peer}
		}
	}
	return peer, nil
}

func (h *handler) refuse(w http.ResponseWriter, path, peer string, err error) {
	var p *Problem
	if !errors.As(err, &p) {
		h.Log.Error("type-1 request failed", "path", path, "peer", peer, "err", err)
		p = &Problem{Internal, "see the log of this node"}
	} else {
		h.Log.Debug("type-1 request refused", "path", path, "peer", peer, "err", err)
	}
	writeProblem(w, p)
}

func (h *handler) event(code, text string, attrs ...slog.Attr) {
	if h.Event != nil {
		h.Event(code, "alarm", text, attrs...)
	}
}

// StandingBy answers every call of Type-1 for a machine that does not have its
// node's inventory.
func StandingBy(w http.ResponseWriter, _ *http.Request) {
	writeProblem(w, &Problem{Standby, "this machine stands by"})
}
