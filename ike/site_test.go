package ike

import (
	"context"
	"crypto/rand"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/ike/vici/vicitest"
	"github.com/q-ipsec/q-ipsec/sad"
)

// Reconcile is sad's contract: list twice if there is a difference, delete what
// is ours and not listed, give what is listed and not there.
func (f *fakeSAD) Reconcile(ctx context.Context, list func(context.Context) ([]sad.ID, error)) ([]sad.ID, error) {
	ids, err := list(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	listed := map[saKey]bool{}
	var missing []sad.ID
	for _, id := range ids {
		listed[keyOf(id)] = true
		if _, ok := f.sas[keyOf(id)]; !ok {
			missing = append(missing, id)
		}
	}
	for k := range f.sas {
		if !listed[k] {
			delete(f.sas, k)
		}
	}
	return missing, nil
}

// Steered is sad's contract: the policies lead into every SA but those of lost.
func (f *fakeSAD) Steered(context.Context) (map[uint32]bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	spis := map[uint32]bool{}
	for _, s := range f.sas {
		if !s.Inbound && !f.lost[s.ID.SPI] {
			spis[s.ID.SPI] = true
		}
	}
	return spis, nil
}

// lose takes the policies that lead into an SA away.
func (f *fakeSAD) lose(out uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lost == nil {
		f.lost = map[uint32]bool{}
	}
	f.lost[out] = true
}

func (f *fakeSAD) put(in, out uint32, owner sad.Owner) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, b := netip.AddrPortFrom(addrA, 0), netip.AddrPortFrom(addrB, 0)
	for _, sa := range []sad.SA{
		{ID: sad.ID{Src: b, Dst: a, SPI: in, Protocol: 50}, Inbound: true},
		{ID: sad.ID{Src: a, Dst: b, SPI: out, Protocol: 50}},
	} {
		f.sas[keyOf(sa.ID)] = fakeSA{SA: sa, owner: owner, fingerprint: "f", committed: true}
	}
}

// site is one gateway with a fake charon.
type site struct {
	*Manager
	t       *testing.T
	charon  *vicitest.Charon
	broker  *Broker
	inst    plugin.Instance
	sad     *fakeSAD
	events  *events
	log     *logBuffer
	key     string
	stop    func()
	ownerID uint32
}

func newSite(t *testing.T, change func(*site, []Connection) []Connection) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{t: t, sad: newFakeSAD(), events: &events{}, log: &logBuffer{}, key: filepath.Join(dir, "key")}
	for name, mode := range map[string]os.FileMode{"key": 0o600, "cert": 0o644, "ca": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("the "+name), mode); err != nil {
			t.Fatal(err)
		}
	}
	c := connection("a", "b")
	c.LocalCert, c.LocalKey, c.RemoteCA = filepath.Join(dir, "cert"), s.key, filepath.Join(dir, "ca")
	c.LocalAddrs, c.RemoteAddrs = []netip.Addr{addrA}, []netip.Addr{addrB}
	c.MaxKeyAge = time.Hour
	c.Children = []Child{{
		Name: "net", Start: StartNow, LocalTS: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")},
		RemoteTS: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24")},
	}}
	s.charon = vicitest.Start(t, filepath.Join(dir, "vici"))
	conns := []Connection{c}
	if change != nil {
		conns = change(s, conns)
	}
	log := slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	s.broker, err = NewBroker(Options{
		Connections: conns, KMEs: map[string]KME{"local": {Source: newKMS()}}, SAD: s.sad, Events: s.events, Log: log, Now: time.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Manager, err = NewManager(ManagerOptions{
		Connections: conns, Broker: s.broker, SAD: s.sad, VICI: filepath.Join(dir, "vici"), Events: s.events, Log: log,
		Reconcile: 50 * time.Millisecond, StopTimeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.t, s.Manager.t = t, timing{
		helloGrace: 10 * time.Millisecond, redialMin: time.Millisecond, redialMax: 20 * time.Millisecond,
		retryMin: 4 * time.Millisecond, retryMax: 20 * time.Millisecond, debounce: time.Millisecond, tick: 5 * time.Millisecond, measure: 5 * time.Millisecond, call: 5 * time.Second, follow: 200 * time.Millisecond,
		stall: time.Hour, halfway: time.Hour, // what these tests list is not always in their SAD
	}
	return s
}

// run starts the Manager; stop ends it and waits.
func (s *site) run() {
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	s.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					s.t.Error(err)
				}
			case <-time.After(20 * time.Second):
				s.t.Error("Run does not end")
			}
		})
	}
	s.t.Cleanup(s.stop)
}

func (s *site) hello(version string) {
	s.t.Helper()
	_, _ = rand.Read(s.inst[:])
	if err := s.broker.Hello(s.t.Context(), plugin.Hello{Instance: s.inst, ABI: plugin.ABI, Version: version}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) loaded(name string) bool {
	s.charon.Lock()
	defer s.charon.Unlock()
	_, ok := s.charon.Conns[name]
	return ok
}

func (s *site) state(name string) Status {
	for _, st := range s.Status() {
		if st.Name == name {
			return st
		}
	}
	return Status{}
}

// seen waits for the first view: the comparison before it would end what the
// SAD has not.
func (s *site) seen() {
	s.t.Helper()
	eventually(s.t, "the first view", func() bool {
		s.Manager.mu.Lock()
		defer s.Manager.mu.Unlock()
		return !s.at.IsZero()
	})
}

// connects makes the fake charon answer each initiation with a tunnel whose SAs
// are in the SAD.
func (s *site) connects(owner sad.Owner) {
	s.charon.Lock()
	defer s.charon.Unlock()
	s.charon.OnInitiate = func(conn, child string) {
		s.charon.Lock()
		for _, ike := range s.charon.IKEs {
			if ike.Conn == conn {
				s.charon.Unlock() // charon refuses a duplicate
				return
			}
		}
		s.ownerID++
		ike := ikeOf(conn, child, s.ownerID)
		s.sad.put(ike.Children[0].SPIIn, ike.Children[0].SPIOut, owner)
		s.charon.IKEs = append(s.charon.IKEs, ike)
		s.charon.Unlock()
		s.charon.Emit("child-updown", ike.Up())
	}
}

func ikeOf(conn, child string, id uint32) vicitest.IKE {
	return vicitest.IKE{
		Conn: conn, ID: id, State: "ESTABLISHED", Local: addrA.String(), Remote: addrB.String(),
		Children: []vicitest.Child{{Name: child, ID: 100 + id, State: "INSTALLED", SPIIn: 0xc0000000 + id, SPIOut: 0xcf000000 + id}},
	}
}

func (s *site) is(name string, want State) func() bool {
	return func() bool { return s.state(name).State == want }
}
