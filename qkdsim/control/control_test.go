package control

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

type device struct {
	status Status
	asked  int
	calls  []string
}

func (d *device) Status() Status { return d.status }
func (d *device) Generate(n int) error {
	if n > 1000 {
		return errors.New("too much for this device")
	}
	d.asked += n
	return nil
}
func (d *device) Init() { d.calls = append(d.calls, "init") }
func (d *device) Stop() { d.calls = append(d.calls, "stop") }

func serve(t *testing.T, node string) (*Client, *device, *httptest.Server) {
	t.Helper()
	d := &device{status: Status{State: "generating", QBER: 0.015, Rate: 7.5e5, Seq: 9, Alarms: []string{"qber-high"}}}
	id := func(*http.Request) (string, error) {
		if node == "" {
			return "", errors.New("no certificate")
		}
		return node, nil
	}
	s := httptest.NewServer(NewHandler(id, map[string]Device{"a": d}, slog.New(slog.DiscardHandler)))
	t.Cleanup(s.Close)
	return NewClient(s.URL, s.Client()), d, s
}

func TestCalls(t *testing.T) {
	c, d, _ := serve(t, "a")
	s, err := c.Status(t.Context())
	if err != nil || s.Rate != 7.5e5 || s.Seq != 9 || len(s.Alarms) != 1 {
		t.Errorf("status %+v, %v", s, err)
	}
	if err := c.Generate(t.Context(), 500); err != nil || d.asked != 500 {
		t.Errorf("generate: %v, device was asked for %d", err, d.asked)
	}
	if err := errors.Join(c.Stop(t.Context()), c.Init(t.Context())); err != nil || strings.Join(d.calls, " ") != "stop init" {
		t.Errorf("%v, calls %v", err, d.calls)
	}
}

func TestRefusals(t *testing.T) {
	c, d, s := serve(t, "a")
	if err := c.Generate(t.Context(), 5000); err == nil || !strings.Contains(err.Error(), "too much for this device") {
		t.Errorf("the device's refusal reads: %v", err)
	}
	for _, body := range []string{"", "{}", `{"bytes":0}`, `{"bytes":-1}`, `{"bytes":1.5}`, `{"bytes":1,"x":2}`, `{"bytes":1}{"bytes":1}`, "[1]", `{"bytes":1` + strings.Repeat(" ", maxBody) + "}"} {
		resp, err := http.Post(s.URL+"/qkde/v1/generate", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("body %.40q: status %d", body, resp.StatusCode)
		}
	}
	if d.asked != 0 {
		t.Errorf("refused requests asked for %d bytes", d.asked)
	}
	for _, node := range []string{"b", ""} {
		c, d, _ := serve(t, node)
		if err := c.Stop(t.Context()); err == nil || len(d.calls) != 0 {
			t.Errorf("node %q stopped a device that is not its own: %v", node, err)
		}
	}
}

func TestClientRefusesNonsense(t *testing.T) {
	for _, body := range []string{"", "x", "[]", strings.Repeat(" ", maxBody) + "{}"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) }))
		if _, err := NewClient(s.URL, s.Client()).Status(t.Context()); err == nil {
			t.Errorf("answer %.20q taken", body)
		}
		s.Close()
	}
}

func FuzzDecodeGenerate(f *testing.F) {
	f.Add([]byte(`{"bytes":4096}`))
	f.Add([]byte(`{"bytes":1e3}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := decodeGenerate(b); err == nil && (n < 1 || n > MaxGenerate) {
			t.Errorf("%q gives %d", b, n)
		}
	})
}
