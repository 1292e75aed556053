package etsi014_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
)

var hello = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })

func TestServerWantsClientCAs(t *testing.T) {
	authority := newCA(t)
	cfg := authority.serverTLS(t)
	cfg.ClientCAs = nil
	for name, c := range map[string]etsi014.ServerConfig{
		"no client CAs": {Handler: hello, TLS: cfg, Log: quiet},
		"no TLS":        {Handler: hello, Log: quiet},
		"no handler":    {TLS: authority.serverTLS(t), Log: quiet},
	} {
		if _, err := etsi014.NewServer(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestServerAllowsTLS12OnlyIfTold(t *testing.T) {
	authority := newCA(t)
	for _, allow := range []bool{false, true} {
		url := serve(t, etsi014.ServerConfig{Handler: hello, TLS: authority.serverTLS(t), AllowTLS12: allow, Log: quiet})
		cfg := authority.clientTLS(t, "a1")
		cfg.MaxVersion = tls.VersionTLS12
		tr := &http.Transport{TLSClientConfig: cfg}
		resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get(url)
		if (err == nil) != allow {
			t.Errorf("AllowTLS12=%v: %v", allow, err)
		}
		if err == nil {
			_ = resp.Body.Close()
		}
		tr.CloseIdleConnections()
	}
}

// SAEs that reconnect for each call resume their TLS session.
func TestServerResumesSessions(t *testing.T) {
	authority := newCA(t)
	url := serve(t, etsi014.ServerConfig{Handler: hello, TLS: authority.serverTLS(t), Log: quiet})
	tr := &http.Transport{TLSClientConfig: authority.clientTLS(t, "a1"), DisableKeepAlives: true}
	for i := range 3 {
		resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get(url)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.TLS.DidResume != (i > 0) || resp.TLS.Version != tls.VersionTLS13 || resp.ProtoMajor != 1 {
			t.Errorf("connection %d: resumed %v, TLS %x, HTTP/%d", i, resp.TLS.DidResume, resp.TLS.Version, resp.ProtoMajor)
		}
	}
}

func TestServerBoundsConnections(t *testing.T) {
	authority := newCA(t)
	url := serve(t, etsi014.ServerConfig{Handler: hello, TLS: authority.serverTLS(t), MaxConns: 1, Log: quiet})
	first := &http.Transport{TLSClientConfig: authority.clientTLS(t, "a1")}
	second := &http.Transport{TLSClientConfig: authority.clientTLS(t, "a2")}
	t.Cleanup(second.CloseIdleConnections)
	get := func(tr *http.Transport) error {
		resp, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get(url)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		return err
	}
	if err := get(first); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- get(second) }()
	for range 50 {
		if err := get(first); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("a second connection was served beside the first (%v)", err)
	default:
	}
	first.CloseIdleConnections()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Calls under way get their time at the end, and no more.
func TestServerEnds(t *testing.T) {
	authority := newCA(t)
	for name, patient := range map[string]bool{"call ends in time": true, "call never ends": false} {
		t.Run(name, func(t *testing.T) {
			entered, release, cut := make(chan struct{}), make(chan struct{}), make(chan struct{})
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				close(entered)
				select {
				case <-release:
					_, _ = io.WriteString(w, "done")
				case <-r.Context().Done():
					close(cut)
				}
			})
			cfg := etsi014.ServerConfig{Handler: h, TLS: authority.serverTLS(t), Log: quiet, ShutdownTimeout: 10 * time.Second}
			if !patient {
				cfg.ShutdownTimeout = 20 * time.Millisecond
			}
			s, err := etsi014.NewServer(cfg)
			if err != nil {
				t.Fatal(err)
			}
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended, got := make(chan error, 1), make(chan string, 1)
			go func() { ended <- s.Serve(ctx, ln) }()
			tr := &http.Transport{TLSClientConfig: authority.clientTLS(t, "a1")}
			defer tr.CloseIdleConnections()
			go func() {
				resp, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get("https://" + ln.Addr().String())
				if err != nil {
					got <- "error"
					return
				}
				b, _ := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				got <- string(b)
			}()
			<-entered
			cancel()
			want := "error"
			if patient {
				close(release)
				want = "done"
			} else {
				<-cut
			}
			if err := <-ended; err != nil {
				t.Errorf("Serve: %v", err)
			}
			if g := <-got; g != want {
				t.Errorf("the call got %q, want %q", g, want)
			}
			if _, err := net.Dial("tcp", ln.Addr().String()); err == nil {
				t.Error("still listening")
			}
		})
	}
}

func TestServerRefusesHugeHeaders(t *testing.T) {
	w := newWorld(t, 1, nil)
	req, err := http.NewRequestWithContext(t.Context(), "GET", w.url[nodeA]+keysPath+"b1/status", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Filler", strings.Repeat("x", 1<<20))
	resp, err := w.as(t, "a1").Do(req)
	if err == nil {
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("answer %d", resp.StatusCode)
		}
	}
}
