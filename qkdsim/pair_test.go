package qkdsim

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/qkdsim/control"
)

// inbox is a Delivery that keeps what it gets, or fails for a while.
type inbox struct {
	mu    sync.Mutex
	files map[string][]byte
	fail  bool
}

func (i *inbox) Deliver(_ context.Context, name string, data []byte) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.fail {
		return errors.New("inbox is closed")
	}
	if i.files == nil {
		i.files = map[string][]byte{}
	}
	i.files[name] = bytes.Clone(data)
	return nil
}
func (i *inbox) Close() error { return nil }

func (i *inbox) setFail(v bool) { i.mu.Lock(); i.fail = v; i.mu.Unlock() }

func (i *inbox) names() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	var n []string
	for k := range i.files {
		n = append(n, k)
	}
	slices.Sort(n)
	return n
}

func testOptions(t *testing.T, a, b Delivery) Options {
	t.Helper()
	return Options{
		Pair:   uuid.MustParse("0192f000-0000-8000-8000-000000000001"),
		Master: End{QKD: uuid.MustParse("0192f000-0000-8000-8000-00000000000a"), Delivery: a},
		Slave:  End{QKD: uuid.MustParse("0192f000-0000-8000-8000-00000000000b"), Delivery: b},
		Link:   testLink(t), KeysPerFile: 50, Seed: 42, Speed: 10, Tick: 5 * time.Millisecond,
		Log: slog.New(slog.DiscardHandler), Now: time.Now,
	}
}

// start runs a pair until the test ends or stop is called.
func start(t *testing.T, opt Options) (p *Pair, stop func()) {
	t.Helper()
	p, err := NewPair(opt)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run does not end")
		}
	})
	t.Cleanup(stop)
	return p, stop
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func decode(t *testing.T, b []byte) *keyfile.File {
	t.Helper()
	f, _, err := keyfile.Decode(bytes.Clone(b), keyfile.DefaultMaxSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Wipe)
	return f
}

func TestBothEndsGetTheSameKeys(t *testing.T) {
	a, b := new(inbox), new(inbox)
	_, stop := start(t, testOptions(t, a, b))
	until(t, "5 files at both ends", func() bool { return len(a.names()) >= 5 && len(b.names()) >= 5 })
	stop()
	for i, name := range a.names()[:5] {
		fa, fb := decode(t, a.files[name]), decode(t, b.files[name])
		if fa.Seq != uint64(i+1) || fa.Role != key.Master || fb.Role != key.Slave || fa.QKD != fb.PeerQKD || fb.QKD != fa.PeerQKD {
			t.Errorf("headers %+v %+v", fa.Header, fb.Header)
		}
		if !fa.Data.Equal(fb.Data) || fa.Data.Len() != 50*32+96 {
			t.Errorf("seq %d: key data of %d and %d bytes differ", fa.Seq, fa.Data.Len(), fb.Data.Len())
		}
		if i > 0 && fa.Data.Equal(decode(t, a.files[a.names()[i-1]]).Data) {
			t.Errorf("seq %d repeats the key data of the file before", fa.Seq)
		}
	}
}

func TestSeqGoesOnAfterARestart(t *testing.T) {
	a, b := new(inbox), new(inbox)
	opt := testOptions(t, a, b)
	opt.StateFile = filepath.Join(t.TempDir(), "seq")
	opt.FirstKeys = 50
	_, stop := start(t, opt)
	until(t, "a file", func() bool { return len(a.names()) >= 1 })
	stop()
	first, err := readSeq(opt.StateFile)
	if err != nil || first == 0 {
		t.Fatalf("seq %d, %v", first, err)
	}
	before := len(a.names())
	p, stop := start(t, opt)
	until(t, "another file", func() bool { return len(a.names()) > before })
	stop()
	if s := p.Status(key.Master); s.Seq <= first {
		t.Errorf("seq %d after %d", s.Seq, first)
	}
	if err := os.WriteFile(opt.StateFile, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewPair(opt); err == nil {
		t.Error("a state file without a seq was taken")
	}
}

func TestLostDamagedTruncated(t *testing.T) {
	for name, c := range map[string]struct {
		w     Weather
		check func(t *testing.T, a, b *inbox)
	}{
		"lost at the slave": {Weather{LoseSlave: 1}, func(t *testing.T, _, b *inbox) {
			if n := len(b.names()); n != 0 {
				t.Errorf("%d files arrived", n)
			}
		}},
		"damaged at the master": {Weather{DamageMaster: 1}, func(t *testing.T, a, b *inbox) {
			n := a.names()[0]
			if decode(t, a.files[n]).Data.Equal(decode(t, b.files[n]).Data) {
				t.Error("the damaged file equals the good one")
			}
		}},
		"truncated at the slave": {Weather{TruncateSlave: 1}, func(t *testing.T, _, b *inbox) {
			if _, _, err := keyfile.Decode(b.files[b.names()[0]], keyfile.DefaultMaxSize); err == nil {
				t.Error("half a file decodes")
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := new(inbox), new(inbox)
			opt := testOptions(t, a, b)
			opt.Weather = c.w
			_, stop := start(t, opt)
			until(t, "3 files at the master", func() bool { return len(a.names()) >= 3 && (len(b.names()) >= 3 || c.w.LoseSlave == 1) })
			stop()
			c.check(t, a, b)
		})
	}
}

// An end that cannot be reached gets its files later; what the backlog cannot
// hold is dropped and counted, and the other end goes on.
func TestUnreachableEnd(t *testing.T) {
	a, b := new(inbox), &inbox{fail: true}
	opt := testOptions(t, a, b)
	opt.Backlog, opt.Speed, opt.BlockBits = 20, 1, 20_000 // small bursts: about one file each
	p, stop := start(t, opt)
	until(t, "dropped files", func() bool { return p.Status(key.Slave).Dropped > 2 })
	if p.Status(key.Master).Dropped != 0 {
		t.Error("the reachable end lost files too")
	}
	b.setFail(false)
	until(t, "files after all", func() bool { return len(b.names()) > 20 })
	stop()
}

func TestOnDemand(t *testing.T) {
	a, b := new(inbox), new(inbox)
	opt := testOptions(t, a, b)
	opt.OnDemand = true
	p, stop := start(t, opt)
	if err := p.Generate(0); err == nil {
		t.Error("0 bytes taken")
	}
	if err := p.Generate(control.MaxGenerate + 1); err == nil {
		t.Error("too many bytes taken")
	}
	per := 50*32 + keyfile.Trailer
	if err := p.Generate(3 * per); err != nil {
		t.Fatal(err)
	}
	until(t, "all that was asked for", func() bool { return p.Status(key.Master).Wanted == 0 && len(a.names()) == 3 })
	p.Stop()
	if s := p.Status(key.Master); s.State != string(Stopped) || s.Seq != 3 {
		t.Errorf("status %+v", s)
	}
	p.Init()
	if s := p.Status(key.Master); s.State != string(Generating) {
		t.Errorf("status %+v", s)
	}
	stop()
}

func TestSeedZeroIsNotRepeatable(t *testing.T) {
	pair := uuid.New()
	one, err := KeyData(0, pair, 1, 128)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Wipe()
	two, err := KeyData(0, pair, 1, 128)
	if err != nil {
		t.Fatal(err)
	}
	defer two.Wipe()
	if one.Equal(two) {
		t.Error("two draws from the kernel are alike")
	}
}
