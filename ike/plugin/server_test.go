package plugin_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/ike/plugin/plugintest"
	"github.com/q-ipsec/q-ipsec/kms/key"
)

// fake answers with fixed values and records what happened.
type fake struct {
	mu     sync.Mutex
	log    []string
	left   time.Duration // until ctx's end in the last GetKey
	refuse error         // by every method
	commit error
	addSA  plugin.AddSAAnswer
	token  []byte
}

func (f *fake) note(s string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, s)
	return f.refuse
}

func (f *fake) count(s string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.log {
		if l == s {
			n++
		}
	}
	return n
}

func (f *fake) Hello(_ context.Context, h plugin.Hello) error {
	if h.PID != os.Getpid() || h.UID != os.Geteuid() {
		return errors.New("credentials are not ours")
	}
	return f.note("hello " + h.Version)
}

func (f *fake) GetKey(ctx context.Context, m plugin.GetKey) (plugin.GetKeyAnswer, error) {
	t, _ := ctx.Deadline()
	f.mu.Lock()
	f.left = time.Until(t)
	f.mu.Unlock()
	return plugin.GetKeyAnswer{KeyID: key.ID{1}, Policy: plugin.Required}, f.note("getkey " + m.Connection + " " + m.Peer.String())
}

func (f *fake) Sent(_ context.Context, m plugin.Sent) (plugin.SentAnswer, error) {
	return plugin.SentAnswer{ConfirmI: [32]byte{2}}, f.note("sent " + m.KeyID.String()[:2])
}

func (f *fake) Bind(_ context.Context, m plugin.Bind) (plugin.BindAnswer, error) {
	defer m.Keymat.Wipe()
	defer m.Token.Wipe()
	return plugin.BindAnswer{ConfirmR: bytes.Repeat([]byte{3}, 32)}, f.note("bind " + string(m.Initiator.Data))
}

func (f *fake) AddSA(_ context.Context, m plugin.AddSA) (plugin.AddSAAnswer, error) {
	defer m.Token.Wipe()
	f.mu.Lock()
	f.token = bytes.Clone(m.Token.Bytes())
	f.mu.Unlock()
	return f.addSA, f.note("add")
}

func (f *fake) Commit(context.Context, plugin.SAID) error {
	_ = f.note("commit")
	return f.commit
}

func (f *fake) Rollback(_ context.Context, id plugin.SAID) { _ = f.note("rollback " + id.Dst.String()) }

func (f *fake) QuerySA(context.Context, plugin.SAID) (plugin.Counters, error) {
	return plugin.Counters{Bytes: 1, Packets: 2, LastUse: 3}, f.note("query")
}
func (f *fake) UpdateSA(context.Context, plugin.UpdateSA) error { return f.note("update") }
func (f *fake) End(_ context.Context, sa plugin.SA)             { _ = f.note("end " + string('0'+rune(sa.UID))) }

func (f *fake) Ignored(_ context.Context, m plugin.Ignored) {
	_ = f.note(fmt.Sprintf("ignored %s %d %s", m.Connection, m.SA.UID, m.Peer))
}
func (f *fake) Gone(plugin.Instance) { _ = f.note("gone") }

var _ plugin.Handler = (*fake)(nil)

// serve starts a server; stop ends it and may be called again.
func serve(t testing.TB, path string, h plugin.Handler, o plugin.Options) (stop func()) {
	t.Helper()
	s, err := plugin.Listen(path, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, h) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func socket(t testing.TB) string { return filepath.Join(t.TempDir(), "q", "plugin.sock") }

// connected is a server with one charon.
func connected(t *testing.T) (*fake, *plugintest.Charon) {
	t.Helper()
	f := &fake{addSA: plugin.AddSAAnswer{Verdict: plugin.Installed}}
	path := socket(t)
	serve(t, path, f, plugin.Options{})
	c := plugintest.New(path)
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Disconnect() })
	return f, c
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: did not happen", what)
		}
	}
}

// refused checks that err is the server's refusal with text in it.
func refused(t *testing.T, err error, text string) {
	t.Helper()
	var r *plugin.Refusal
	if !errors.As(err, &r) || !strings.Contains(r.Text, text) {
		t.Errorf("error %v, want a refusal with %q", err, text)
	}
}

func material(t testing.TB, n int) *key.Material {
	t.Helper()
	m, err := key.Take(bytes.Repeat([]byte{byte(n)}, n))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	return m
}

func addSA(t testing.TB) plugin.AddSA {
	return plugin.AddSA{
		Connection: "link", Src: netip.MustParseAddrPort("192.0.2.1:500"), Dst: netip.MustParseAddrPort("192.0.2.2:500"),
		SPI: 1, Protocol: 50, Token: material(t, 68), EncrLen: 36,
	}
}

func bind(t testing.TB) plugin.Bind {
	return plugin.Bind{
		Connection: "link", Ni: make([]byte, 56), Nr: make([]byte, 32), Exchange: plugin.IKEAuth,
		Initiator: plugin.Identity{Type: 2, Data: []byte("gw-a")}, Replier: plugin.Identity{Type: 2, Data: []byte("gw-b")},
		Keymat: plugin.Chunks{EncrI: material(t, 36), EncrR: material(t, 36)},
		Token:  plugin.Chunks{EncrI: material(t, 36), EncrR: material(t, 36)},
	}
}

func TestEveryCall(t *testing.T) {
	f, c := connected(t)
	ctx := t.Context()
	sa := plugin.SA{UID: 4}
	if a, err := c.GetKey(ctx, plugin.GetKey{SA: sa, Connection: "link", Peer: netip.MustParseAddr("192.0.2.2")}); err != nil || a.KeyID != (key.ID{1}) || a.Policy != plugin.Required {
		t.Errorf("GetKey: %+v %v", a, err)
	}
	if f.left <= 0 || f.left > plugintest.Limit {
		t.Errorf("the handler had %v, the plugin waits %v", f.left, plugintest.Limit)
	}
	sent := plugin.Sent{SA: sa, Connection: "link", KeyID: key.ID{1}, Ni: make([]byte, 56), Exchange: plugin.IKEAuth}
	if a, err := c.Sent(ctx, sent); err != nil || a.ConfirmI != [32]byte{2} {
		t.Errorf("Sent: %+v %v", a, err)
	}
	if a, err := c.Bind(ctx, bind(t)); err != nil || !bytes.Equal(a.ConfirmR, bytes.Repeat([]byte{3}, 32)) {
		t.Errorf("Bind: %+v %v", a, err)
	}
	if a, err := c.AddSA(ctx, addSA(t)); err != nil || a.Verdict != plugin.Installed {
		t.Errorf("AddSA: %+v %v", a, err)
	}
	if !bytes.Equal(f.token, bytes.Repeat([]byte{68}, 68)) {
		t.Error("the token changed on its way")
	}
	if a, err := c.QuerySA(ctx, said()); err != nil || a != (plugin.Counters{Bytes: 1, Packets: 2, LastUse: 3}) {
		t.Errorf("QuerySA: %+v %v", a, err)
	}
	if err := c.UpdateSA(ctx, plugin.UpdateSA{ID: said(), NewSrc: said().Src, NewDst: said().Dst}); err != nil {
		t.Errorf("UpdateSA: %v", err)
	}
	if err := c.End(ctx, 4); err != nil {
		t.Errorf("End: %v", err)
	}
	eventually(t, "END", func() bool { return f.count("end 4") == 1 })
	if err := c.Ignored(ctx, plugin.Ignored{SA: sa, Connection: "link", Peer: netip.MustParseAddr("192.0.2.2")}); err != nil {
		t.Errorf("Ignored: %v", err)
	}
	eventually(t, "IGNORED", func() bool { return f.count("ignored link 4 192.0.2.2") == 1 })
	for _, s := range []string{"hello 5.9.8", "getkey link 192.0.2.2", "sent 01", "bind gw-a", "add", "commit", "query", "update"} {
		if f.count(s) != 1 {
			t.Errorf("%q seen %d times in %q", s, f.count(s), f.log)
		}
	}
}

func said() plugin.SAID {
	return plugin.SAID{Src: netip.MustParseAddrPort("192.0.2.1:500"), Dst: netip.MustParseAddrPort("192.0.2.2:500"), SPI: 1, Protocol: 50}
}

func TestRefusalsReachThePlugin(t *testing.T) {
	f, c := connected(t)
	f.mu.Lock()
	f.refuse = errors.New("connection link: no key")
	f.mu.Unlock()
	ctx := t.Context()
	_, err := c.GetKey(ctx, plugin.GetKey{Connection: "link", Peer: netip.MustParseAddr("192.0.2.2")})
	refused(t, err, "connection link: no key")
	_, err = c.Bind(ctx, bind(t))
	refused(t, err, "no key")
	_, err = c.AddSA(ctx, addSA(t))
	refused(t, err, "no key")
	refused(t, c.UpdateSA(ctx, plugin.UpdateSA{ID: said(), NewSrc: said().Src, NewDst: said().Dst}), "no key")
	if f.count("commit")+f.count("rollback 192.0.2.2:500") != 0 {
		t.Error("a refused SA was committed or rolled back")
	}
}

func TestWithoutACKTheSAIsRolledBack(t *testing.T) {
	f, c := connected(t)
	p, _, err := c.StartAddSA(t.Context(), addSA(t))
	if err != nil {
		t.Fatal(err)
	}
	p.Drop()
	eventually(t, "rollback", func() bool { return f.count("rollback 192.0.2.2:500") == 1 })
	if f.count("commit") != 0 {
		t.Error("committed without an ACK")
	}
}

func TestLateACKIsRolledBack(t *testing.T) {
	f, c := connected(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	p, _, err := c.StartAddSA(ctx, addSA(t))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "rollback", func() bool { return f.count("rollback 192.0.2.2:500") == 1 })
	if err := p.Ack(); err == nil {
		t.Error("an ACK after the deadline was answered with COMMITTED")
	}
	if f.count("commit") != 0 {
		t.Error("committed too late")
	}
}

func TestFailedCommitIsRolledBack(t *testing.T) {
	f, c := connected(t)
	f.commit = errors.New("journal is full")
	_, err := c.AddSA(t.Context(), addSA(t))
	refused(t, err, "journal is full")
	if f.count("rollback 192.0.2.2:500") != 1 {
		t.Error("not rolled back")
	}
}

func TestUseKey(t *testing.T) {
	encr, integ := material(t, 36), material(t, 32)
	f := &fake{addSA: plugin.AddSAAnswer{Verdict: plugin.UseKey, Encr: encr, Integ: integ}}
	path := socket(t)
	stop := serve(t, path, f, plugin.Options{})
	c := plugintest.New(path)
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	a, err := c.AddSA(t.Context(), addSA(t))
	if err != nil || a.Verdict != plugin.UseKey {
		t.Fatalf("AddSA: %+v %v", a, err)
	}
	defer a.Encr.Wipe()
	defer a.Integ.Wipe()
	if !bytes.Equal(a.Encr.Bytes(), bytes.Repeat([]byte{36}, 36)) || a.Integ.Len() != 32 {
		t.Error("other keys than the handler's")
	}
	if f.count("commit") != 0 {
		t.Error("committed an SA that charon installs")
	}
	stop() // joins the server's goroutines, which owned the keys
	if encr.Len() != 0 || integ.Len() != 0 {
		t.Error("the server did not wipe the keys it sent")
	}
	_ = c.Disconnect()
}

func TestOnlyGreetedInstancesAreServed(t *testing.T) {
	f, c := connected(t)
	stranger := plugintest.New(c.Path)
	_, err := stranger.Bind(t.Context(), bind(t))
	refused(t, err, "no standing connection")
	f.mu.Lock()
	f.refuse = errors.New("built for another strongSwan")
	f.mu.Unlock()
	refused(t, stranger.Connect(t.Context()), "built for another strongSwan")
	_, err = stranger.Bind(t.Context(), bind(t))
	refused(t, err, "no standing connection")
	if f.count("bind gw-a") != 0 {
		t.Error("the handler was asked for an instance it refused")
	}
}

func TestTwoInstances(t *testing.T) {
	f, a := connected(t)
	b := plugintest.New(a.Path)
	if err := b.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	twice := &plugintest.Charon{Path: a.Path, Hello: a.Hello}
	refused(t, twice.Connect(t.Context()), "has a standing connection")
	if err := a.Disconnect(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "Gone", func() bool { return f.count("gone") == 1 })
	if _, err := b.Bind(t.Context(), bind(t)); err != nil {
		t.Errorf("the other instance is served no more: %v", err)
	}
	eventually(t, "the same instance comes back", func() bool { return a.Connect(t.Context()) == nil })
	if f.count("hello 5.9.8") != 3 {
		t.Errorf("hellos: %q", f.log)
	}
}

func TestServerRestart(t *testing.T) {
	path := socket(t)
	f := &fake{addSA: plugin.AddSAAnswer{Verdict: plugin.Installed}}
	stop := serve(t, path, f, plugin.Options{})
	c := plugintest.New(path)
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	stop()
	if f.count("gone") != 1 {
		t.Error("Serve returned before the instance was gone")
	}
	if err := c.Lost(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := c.Bind(t.Context(), bind(t)); err == nil {
		t.Error("a stopped server answered")
	}
	serve(t, path, f, plugin.Options{})
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Bind(t.Context(), bind(t)); err != nil {
		t.Error(err)
	}
	if err := c.Disconnect(); err != nil {
		t.Error(err)
	}
}

func TestBadFrames(t *testing.T) {
	f, c := connected(t)
	good, err := plugin.AppendRequest(make([]byte, 0, plugin.MaxFrame), c.Hello, plugintest.Monotonic()+time.Second, plugin.End{})
	if err != nil {
		t.Fatal(err)
	}
	abi := bytes.Clone(good)
	abi[5]++
	for name, tt := range map[string]struct {
		frame []byte
		text  string
	}{
		"other ABI": {abi, "ABI 2"},
		"truncated": {good[:len(good)-1], "bytes"},
		"oversized": {append(bytes.Clone(good), make([]byte, plugin.MaxFrame)...), "larger than"},
		"not ours":  {[]byte("GET / HTTP/1.1"), "not a frame"},
		"an ACK":    {plugin.AckFrame(), "opens no request"},
	} {
		b, err := c.Raw(t.Context(), tt.frame)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		err = plugin.ParseAnswer(b, nil)
		var r *plugin.Refusal
		if !errors.As(err, &r) || !strings.Contains(r.Text, tt.text) {
			t.Errorf("%s: answer %v, want a refusal with %q", name, err, tt.text)
		}
	}
	if f.count("end 0") != 0 {
		t.Error("the handler saw a bad frame")
	}
}

func TestDeadlineIsBounded(t *testing.T) {
	f, c := connected(t)
	for _, left := range []time.Duration{-time.Second, 0, time.Hour} {
		b, err := plugin.AppendRequest(make([]byte, 0, plugin.MaxFrame), c.Hello, plugintest.Monotonic()+left, plugin.Query{ID: said()})
		if err != nil {
			t.Fatal(err)
		}
		b, err = c.Raw(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		refused(t, plugin.ParseAnswer(b, &plugin.Counters{}), "deadline")
	}
	if f.count("query") != 0 {
		t.Error("the handler was asked")
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	path := socket(t)
	f := &fake{}
	serve(t, path, f, plugin.Options{MaxConns: 1})
	c := plugintest.New(path)
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.QuerySA(t.Context(), said()); err == nil {
		t.Error("a second connection was served")
	}
	if err := c.Disconnect(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the slot is free again", func() bool { return c.Connect(t.Context()) == nil })
}

// writeFunc is an io.Writer.
type writeFunc func(p []byte)

func (f writeFunc) Write(p []byte) (int, error) { f(p); return len(p), nil }

// Others of this process may use up the file descriptors; the server must be
// there again when there are some.
func TestNoFileDescriptorIsWaitedOut(t *testing.T) {
	path := socket(t)
	waits := make(chan struct{}, 1)
	log := slog.New(slog.NewTextHandler(writeFunc(func(p []byte) {
		if bytes.Contains(p, []byte("connections wait")) {
			waits <- struct{}{}
		}
	}), nil))
	serve(t, path, &fake{}, plugin.Options{Log: log})
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(fd) + 16, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	var taken []int
	release := func() {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
		for _, v := range taken {
			_ = unix.Close(v)
		}
		taken = nil
	}
	defer release()
	for {
		v, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			break
		}
		taken = append(taken, v)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-waits:
	case <-time.After(10 * time.Second):
		t.Error("the server did not wait")
	}
	release()
	c := plugintest.New(path)
	if err := c.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Disconnect(); err != nil {
		t.Fatal(err)
	}
}

func TestListen(t *testing.T) {
	t.Run("modes", func(t *testing.T) {
		path := socket(t)
		serve(t, path, &fake{}, plugin.Options{})
		for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
			if fi, err := os.Stat(p); err != nil || fi.Mode().Perm() != want {
				t.Errorf("%s: %v %v, want %o", p, fi.Mode(), err, want)
			}
		}
		if _, err := plugin.Listen(path, plugin.Options{}); err == nil || !strings.Contains(err.Error(), "another process") {
			t.Errorf("second server: %v", err)
		}
	})
	t.Run("open directory", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o750); err != nil {
			t.Fatal(err)
		}
		if _, err := plugin.Listen(filepath.Join(dir, "s"), plugin.Options{}); err == nil || !strings.Contains(err.Error(), "0700") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("not a socket", func(t *testing.T) {
		path := socket(t)
		if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("mine"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if _, err := plugin.Listen(path, plugin.Options{}); err == nil {
			t.Error("a file was replaced")
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
			t.Errorf("the file is %q, %v", b, err)
		}
	})
	t.Run("served by one that hangs", func(t *testing.T) {
		path := socket(t)
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		open := func() int {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Close(fd) })
			return fd
		}
		at := &unix.SockaddrUnix{Name: path}
		l := open()
		if err := errors.Join(unix.Bind(l, at), unix.Listen(l, 0)); err != nil {
			t.Fatal(err)
		}
		for unix.Connect(open(), at) == nil {
		}
		if _, err := plugin.Listen(path, plugin.Options{}); err == nil {
			t.Error("the socket of a living server was replaced")
		}
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	})
	t.Run("stale socket", func(t *testing.T) {
		path := socket(t)
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		serve(t, path, &fake{}, plugin.Options{})
		c := plugintest.New(path)
		if err := c.Connect(t.Context()); err != nil {
			t.Error(err)
		}
		_ = c.Disconnect()
	})
}

// TestOtherUserIsRefused connects from a thread whose user is nobody, past the
// modes of directory and socket, which are opened for it.
func TestOtherUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	f, c := connected(t)
	if err := os.Chmod(c.Path, 0o666); err != nil {
		t.Fatal(err)
	}
	d := c.Path // in three directories of this test's own, the outer two by TempDir
	for range 3 {
		d = filepath.Dir(d)
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	hello := plugintest.New(c.Path).Hello
	frame, err := plugin.AppendRequest(make([]byte, 0, plugin.MaxFrame), hello, plugintest.Monotonic()+time.Second, hello)
	if err != nil {
		t.Fatal(err)
	}
	n := make(chan int, 1)
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its user
		if _, _, e := syscall.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); e != 0 {
			failed <- e
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
		if err != nil {
			failed <- err
			return
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: c.Path}); err != nil {
			failed <- err
			return
		}
		_, _ = unix.Write(fd, frame)             // the server may have closed already
		got, _ := unix.Read(fd, make([]byte, 1)) // EOF or a reset: nothing is said to a stranger
		n <- got
	}()
	select {
	case err := <-failed:
		t.Fatal(err)
	case got := <-n:
		if got > 0 {
			t.Error("another user was answered")
		}
	}
	if f.count("hello 5.9.8") != 1 {
		t.Error("the handler was asked")
	}
}
