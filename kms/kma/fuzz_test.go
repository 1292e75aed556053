package kma

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// deaf is a peer that is never called: Run does not run.
type deaf struct{ Peer }

// FuzzPeer feeds a slave whatever an authenticated peer may send, through the
// real handler, into the real store. Nothing may panic, fail inside, or raise
// the alarm of a restored store more often than our mark rises.
func FuzzPeer(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "node")
	if err := os.Mkdir(dir, 0o700); err != nil {
		f.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	s, err := store.Open(f.Context(), store.Options{URL: "sqlite:" + filepath.Join(dir, "db", "i.db"), RootFile: filepath.Join(dir, "root"), Log: log})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	o := options()
	o.Store, o.Log, o.Peers = &inventory{Store: s}, log, map[string]Peer{"a": deaf{}}
	o.Pools = []Pool{{ID: pairID, Peer: "a", Role: key.Slave, Class: key.Direct}}
	a, err := New(f.Context(), o)
	if err != nil {
		f.Fatal(err)
	}
	h, err := type1.NewHandler(type1.HandlerOptions{
		Agent: a, Supply: noSupply{}, Log: log, PeerOf: a.PeerOf,
		Peer: func(*http.Request) (string, error) { return "a", nil },
	})
	if err != nil {
		f.Fatal(err)
	}
	paths := []string{type1.PathSync, type1.PathLease, type1.PathBurn, type1.PathValidateKey}
	me := uuid.MustParse("11111111-6a0e-4c3b-9b1e-0f1e2d3c4b5a")
	link := type1.Link{From: me, To: a.instance}
	for i, m := range []any{
		type1.SyncRequest{Pool: pairID, SyncState: type1.SyncState{Instance: me, Generation: 1, PeerInstance: a.instance, NewestSeq: 9, Active: []type1.Range{{First: 1, Last: 2}}}},
		type1.LeaseRequest{Pool: pairID, Link: link, Generation: 1, Purpose: "supply", Mark: type1.Position(key.At(1, 4)), Seqs: []uint64{1}},
		type1.BurnRequest{Pool: pairID, Link: link, UpTo: type1.Position(key.At(1, 4))},
		type1.ValidateRequest{Pool: pairID, Link: link, Algorithm: Poly1305, Items: []type1.ValidateItem{{Seq: 1, Tag: make([]byte, 16)}}, Destroyed: []uint64{2}},
	} {
		text, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), string(text))
	}
	f.Fuzz(func(t *testing.T, path uint8, body string) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, paths[path%4], strings.NewReader(body))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code >= 500 {
			t.Fatalf("HTTP %d %s to %s", w.Code, w.Body, body)
		}
	})
}

// FuzzShown: no name of a file breaks a log line.
func FuzzShown(f *testing.F) {
	f.Add("a\nb\x1b[0m")
	f.Fuzz(func(t *testing.T, name string) {
		if s := shown(name); len(s) > 100 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Fatalf("%q", s)
		}
	})
}
