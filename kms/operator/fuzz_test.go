package operator

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Whatever is asked, the answer is JSON with a status that the call knows, and what
// reaches a node is within its bounds.
func FuzzRequest(f *testing.F) {
	for _, s := range []struct{ method, target, body string }{
		{"GET", "status", ""},
		{"GET", "events?connection=a-b&limit=7", ""},
		{"GET", "keys/" + keyID.String(), ""},
		{"GET", "history?pool=" + pool.String() + "&key=" + keyID.String() + "&limit=10001", ""},
		{"GET", "explain/a%2Fb", ""},
		{"POST", "tunnels/a-b/rekey", "limit=3"},
		{"POST", "tunnels//initiate", strings.Repeat("x", 2000)},
		{"PUT", "../../etc", "{}"},
	} {
		f.Add(s.method, s.target, s.body)
	}
	f.Fuzz(func(t *testing.T, method, target, body string) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://qipsecd"+prefix+target, strings.NewReader(body))
		if err != nil {
			return
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if strings.Contains(r.URL.Path, "/slow/") {
			return // the node that waits
		}
		n := &node{}
		w := httptest.NewRecorder()
		NewHandler(Options{Node: n, Keys: n, Tunnels: n, Log: slog.New(slog.DiscardHandler)}).ServeHTTP(w, r)
		switch w.Code {
		case http.StatusOK, http.StatusBadRequest, http.StatusNotFound, http.StatusInternalServerError:
			if !json.Valid(w.Body.Bytes()) {
				t.Errorf("%s %q: %q", method, target, w.Body)
			}
		case http.StatusMovedPermanently, http.StatusTemporaryRedirect: // the mux, of a path that is not clean
		default:
			t.Errorf("%s %q: status %d", method, target, w.Code)
		}
		if n.hist.Limit < 0 || n.hist.Limit > MaxList {
			t.Errorf("%q asks the node for %d entries", target, n.hist.Limit)
		}
		for _, did := range n.did {
			if w.Code == http.StatusOK && method != http.MethodPost {
				t.Errorf("%s %q did %s", method, target, did)
			}
		}
	})
}

// An answer gives a value or an error, and ErrNotFound for 404 alone.
func FuzzAnswer(f *testing.F) {
	f.Add(200, []byte(`{"node":"a","version":"v","started":"2026-11-22T10:00:00Z","roles":["kms"],"pools":[{"peer":"b"}],"alarms":[{}]}`))
	f.Add(200, []byte(`[{"connection":"a-b","children":[{"key_id":"x"}],"supply":{"rates":{}}}]`))
	f.Add(404, []byte(`{"title":"Not Found","status":404,"detail":"key: not found"}`))
	f.Add(500, []byte(`{"detail":7}`))
	f.Fuzz(func(t *testing.T, status int, b []byte) {
		for _, into := range []any{new(Status), new([]Pool), new(Key), new([]Usage), new([]Event), new([]Tunnel), new([]SA), new(Explanation), new(struct{})} {
			err := decodeAnswer(status, b, into)
			if status != http.StatusOK && (err == nil || err.Error() == "") {
				t.Errorf("status %d gives %v", status, err)
			}
			if errors.Is(err, ErrNotFound) != (status == http.StatusNotFound) {
				t.Errorf("status %d gives %v", status, err)
			}
		}
	})
}
