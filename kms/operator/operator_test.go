package operator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

var (
	pool  = uuid.MustParse("0f4d7c9e-3b1a-8c2d-9e4f-5a6b7c8d9e0f")
	keyID = key.ID(uuid.MustParse("9db7eac5-403a-8272-8de8-26231aa4ae95"))
	when  = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
)

// node plays all roles; it records what it was asked.
type node struct {
	mu   sync.Mutex
	did  []string
	hist HistoryQuery
}

func (n *node) Status(context.Context) (Status, error) {
	return Status{Node: "a", Version: "v", Started: when, Roles: []string{"kms", "ipsec"}}, nil
}

func (n *node) Events(_ context.Context, conn string, limit int) ([]Event, error) {
	return []Event{{Time: when, Severity: "alarm", Code: fmt.Sprint(limit), Connection: conn, Text: "t"}}, nil
}

func (n *node) Pools(context.Context) ([]Pool, error) {
	return []Pool{{ID: pool, Peer: "b", Role: "master", Active: 3, Mark: "1/2"}}, nil
}

func (n *node) Find(_ context.Context, id key.ID) (Key, error) {
	if id != keyID {
		return Key{}, fmt.Errorf("key %v: %w", id, ErrNotFound)
	}
	return Key{ID: id, Pool: pool, Position: "1/2", State: "active"}, nil
}

func (n *node) History(_ context.Context, q HistoryQuery) ([]Usage, error) {
	n.hist = q
	return []Usage{{Time: when, Pool: pool, Key: &keyID, State: "supplied", Count: 1}}, nil
}

func (n *node) Tunnels(context.Context) ([]Tunnel, error) {
	return []Tunnel{{Connection: "a-b", State: "up", Children: []Child{{Name: "net"}}}}, nil
}

func (n *node) SAs(context.Context) ([]SA, error) {
	return nil, errors.New("the kernel is on strike")
}

func (n *node) Explain(_ context.Context, conn string) (Explanation, error) {
	if conn != "a-b" {
		return Explanation{}, fmt.Errorf("connection %q: %w", conn, ErrNotFound)
	}
	return Explanation{Connection: conn, Checks: []Check{{What: "charon", OK: true}}}, nil
}

func (n *node) Do(ctx context.Context, conn string, a Action) error {
	if conn == "slow" {
		<-ctx.Done()
		return ctx.Err()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.did = append(n.did, conn+" "+string(a))
	return nil
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// start serves o on a socket of its own until the test ends.
func start(t *testing.T, o Options) (*Client, string) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "run", "op.sock")
	o.Log = quiet()
	l, err := Listen(name, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, NewHandler(o), time.Second, quiet()) }()
	c := NewClient(name)
	t.Cleanup(func() {
		c.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c, name
}

func TestEveryCall(t *testing.T) {
	n := &node{}
	c, name := start(t, Options{Node: n, Keys: n, Tunnels: n})
	ctx := t.Context()
	if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", fi.Mode(), err)
	}
	want := func(what string, got, want any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v; want %+v", what, got, err, want)
		}
	}
	st, err := c.Status(ctx)
	wantSt, _ := n.Status(ctx)
	want("status", st, wantSt, err)
	ev, err := c.Events(ctx, "a-b", 7)
	wantEv, _ := n.Events(ctx, "a-b", 7)
	want("events", ev, wantEv, err)
	ps, err := c.Pools(ctx)
	wantPs, _ := n.Pools(ctx)
	want("pools", ps, wantPs, err)
	k, err := c.Find(ctx, keyID)
	wantK, _ := n.Find(ctx, keyID)
	want("key", k, wantK, err)
	q := HistoryQuery{Pool: pool, Key: keyID, Limit: 5}
	h, err := c.History(ctx, q)
	want("history query", n.hist, q, nil)
	wantH, _ := n.History(ctx, q)
	want("history", h, wantH, err)
	tu, err := c.Tunnels(ctx)
	wantTu, _ := n.Tunnels(ctx)
	want("tunnels", tu, wantTu, err)
	ex, err := c.Explain(ctx, "a-b")
	wantEx, _ := n.Explain(ctx, "a-b")
	want("explain", ex, wantEx, err)
	for _, a := range []Action{Initiate, Rekey, Terminate} {
		if err := c.Do(ctx, "a-b", a); err != nil {
			t.Error(err)
		}
	}
	want("actions", n.did, []string{"a-b initiate", "a-b rekey", "a-b terminate"}, nil)
}

func TestErrors(t *testing.T) {
	n := &node{}
	c, _ := start(t, Options{Node: n, Keys: n, Tunnels: n})
	bare, _ := start(t, Options{Node: n})
	ctx := t.Context()
	other := keyID
	other[0]++
	for what, tc := range map[string]struct {
		err  func() error
		text string
		is   error
	}{
		"unknown key":        {func() error { _, err := c.Find(ctx, other); return err }, "key " + other.String() + ": not found", ErrNotFound},
		"unknown connection": {func() error { _, err := c.Explain(ctx, "x/../y"); return err }, `connection "x/../y": not found`, ErrNotFound},
		"kernel":             {func() error { _, err := c.SAs(ctx); return err }, "on strike", nil},
		"action":             {func() error { return c.Do(ctx, "a-b", "paint") }, "none of initiate", nil},
		"limit":              {func() error { _, err := c.Events(ctx, "", MaxList+1); return err }, "between 1 and", nil},
		"no kms":             {func() error { _, err := bare.Pools(ctx); return err }, "no [kms] role", ErrNotFound},
		"no ipsec":           {func() error { return bare.Do(ctx, "a-b", Rekey) }, "no [ipsec] role", ErrNotFound},
		"cancelled": {func() error {
			ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			return c.Do(ctx, "slow", Rekey)
		}, "", context.DeadlineExceeded},
		"no daemon": {func() error { _, err := NewClient(filepath.Join(t.TempDir(), "none")).Status(ctx); return err }, "is it running", nil},
	} {
		err := tc.err()
		if err == nil || !strings.Contains(err.Error(), tc.text) || tc.is != nil && !errors.Is(err, tc.is) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestRawRequests(t *testing.T) {
	n := &node{}
	c, _ := start(t, Options{Node: n, Keys: n, Tunnels: n})
	for what, tc := range map[string]struct {
		method, path string
		status       int
	}{
		"method":      {"DELETE", "status", 404},
		"no such":     {"GET", "keys", 404},
		"bad key id":  {"GET", "keys/{" + keyID.String() + "}", 400},
		"bad pool":    {"GET", "history?pool=x", 400},
		"bad key":     {"GET", "history?key=x", 400},
		"limit zero":  {"GET", "history?limit=0", 400},
		"action GET":  {"GET", "tunnels/a-b/rekey", 404},
		"sa fails":    {"GET", "sa", 500},
		"status fine": {"GET", "status", 200},
	} {
		r, err := http.NewRequestWithContext(t.Context(), tc.method, "http://x"+prefix+tc.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			t.Fatal(err)
		}
		kind := resp.Header.Get("Content-Type")
		if resp.StatusCode != tc.status || (tc.status != 200) != (kind == "application/problem+json") || !bytes.HasPrefix(b, []byte("{")) {
			t.Errorf("%s: %d %s %s, want %d", what, resp.StatusCode, kind, b, tc.status)
		}
	}
}

func TestListenReplacesOnlyADeadSocket(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "s")
	l, err := Listen(name, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(name, quiet()); err == nil || !strings.Contains(err.Error(), "another qipsecd") {
		t.Errorf("a living socket: %v", err)
	}
	l.(*peerListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, err = Listen(name, quiet())
	if err != nil {
		t.Fatalf("a dead socket: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file, quiet()); err == nil {
		t.Error("a file was replaced")
	}
	if b, _ := os.ReadFile(file); string(b) != "x" {
		t.Error("the file is gone")
	}
}

// A process of another user is hung up on even where the socket's mode would
// let it in.
func TestOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	dir, err := os.MkdirTemp("/tmp", "qop")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	name := filepath.Join(dir, "s")
	var log bytes.Buffer
	l, err := Listen(name, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o711), os.Chmod(name, 0o666)); err != nil {
		t.Fatal(err)
	}
	accepted := make(chan string, 2)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := make([]byte, 1)
			_, _ = io.ReadFull(c, b)
			accepted <- string(b)
			_ = c.Close()
		}
	}()
	for _, who := range []struct {
		uid  uintptr
		says string
	}{{65534, "x"}, {0, "y"}} {
		if err := sayAs(who.uid, name, who.says); err != nil {
			t.Fatalf("uid %d: %v", who.uid, err)
		}
	}
	if got := <-accepted; got != "y" {
		t.Errorf("served %q, want root's y only", got)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	<-done
	if !strings.Contains(log.String(), "process refused") {
		t.Errorf("no word of the refusal: %s", &log)
	}
}

// sayAs connects as another user, which one thread becomes and then dies of, and
// waits to be hung up on.
func sayAs(uid uintptr, name, word string) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		done <- func() error {
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); e != 0 {
				return e
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd) //nolint:errcheck // the test's own
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
				return err
			}
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: name}); err != nil {
				return err
			}
			_, _ = unix.Write(fd, []byte(word)) // the refused one may be hung up on first
			n, err := unix.Read(fd, make([]byte, 1))
			if n > 0 || errors.Is(err, unix.EAGAIN) {
				return fmt.Errorf("was not hung up on: %d bytes, %w", n, err)
			}
			return nil
		}()
	}()
	return <-done
}

func TestConnectionsAreBounded(t *testing.T) {
	name := filepath.Join(t.TempDir(), "s")
	l, err := Listen(name, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // the test is over
	conns := make(chan net.Conn, maxConns+1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	var held []net.Conn
	for range maxConns {
		c, err := net.Dial("unix", name)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close() //nolint:errcheck // the test is over
		held = append(held, <-conns)
	}
	extra, err := net.Dial("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close() //nolint:errcheck // the test is over
	if err := extra.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := extra.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("one too many was not hung up on: %v", err)
	}
	for _, c := range held {
		_, _ = c.Close(), c.Close() // twice, as net/http may
	}
	again, err := net.Dial("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close() //nolint:errcheck // the test is over
	select {
	case c := <-conns:
		_ = c.Close()
	case <-time.After(10 * time.Second):
		t.Error("slots did not come back")
	}
}

func TestRing(t *testing.T) {
	r := NewRing(3)
	all := func(Event) bool { return true }
	codes := func(es []Event) (s string) {
		for _, e := range es {
			s += e.Code
		}
		return s
	}
	for i, want := range []string{"0", "10", "210", "321", "432", "543", "654"} {
		r.Add(Event{Code: fmt.Sprint(i), Connection: fmt.Sprint(i % 2)})
		if got := codes(r.Latest(10, all)); got != want {
			t.Errorf("after %d: %s, want %s", i, got, want)
		}
	}
	if got := codes(r.Latest(1, func(e Event) bool { return e.Connection == "1" })); got != "5" {
		t.Errorf("filtered: %s", got)
	}
}
