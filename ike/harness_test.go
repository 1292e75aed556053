package ike

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/identity"
	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/ike/plugin/plugintest"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// clock is time that only the test moves.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// kms is the key source of both ends: GetKey makes a key, GetKeyWithID gives it
// once. It remembers every Material it handed out.
type kms struct {
	mu      sync.Mutex
	class   key.Class
	err     error // of both calls
	block   bool  // both wait for ctx's end
	tamper  bool  // GetKeyWithID gives another key
	kept    map[key.ID]*key.Material
	out     []*key.Material
	made    int
	fetched int
	onGet   func() // called within GetKey, unlocked
	fixed   key.ID // given by GetKey instead of a fresh one
}

func newKMS() *kms { return &kms{class: key.Direct, kept: map[key.ID]*key.Material{}} }

func (k *kms) wait(ctx context.Context) error {
	k.mu.Lock()
	err, block, hook := k.err, k.block, k.onGet
	k.mu.Unlock()
	if hook != nil {
		hook()
	}
	if block {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

func (k *kms) GetKey(ctx context.Context, local, peer string) (key.SupplyKey, error) {
	if err := k.wait(ctx); err != nil {
		return key.SupplyKey{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	m, err := key.Random(rand.Reader, 32)
	if err != nil {
		return key.SupplyKey{}, err
	}
	kept, err := m.Clone()
	if err != nil {
		return key.SupplyKey{}, err
	}
	var id key.ID
	_, _ = rand.Read(id[:])
	if !k.fixed.IsZero() {
		id = k.fixed
	}
	k.kept[id] = kept
	k.out = append(k.out, m)
	k.made++
	return key.SupplyKey{ID: id, Class: k.class, Material: m}, nil
}

func (k *kms) GetKeyWithID(ctx context.Context, local, peer string, id key.ID) (key.SupplyKey, error) {
	if err := k.wait(ctx); err != nil {
		return key.SupplyKey{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.kept[id]
	if m == nil {
		return key.SupplyKey{}, &key.BadRequest{Message: "unknown key", NotFound: true}
	}
	delete(k.kept, id)
	if k.tamper {
		m.Bytes()[0] ^= 1
	}
	k.out = append(k.out, m)
	k.fetched++
	return key.SupplyKey{ID: id, Class: k.class, Material: m}, nil
}

func (k *kms) set(f func(k *kms)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(k)
}

func (k *kms) counts() (made, fetched int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.made, k.fetched
}

// leaks counts handed-out Materials that nobody wiped.
func (k *kms) leaks() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for _, m := range k.out {
		if m.Len() > 0 {
			n++
		}
	}
	return n
}

// fakeSAD keeps what was installed, keys by fingerprint.
type fakeSAD struct {
	mu    sync.Mutex
	sas   map[saKey]fakeSA
	err   error
	hook  func() // within Install, unlocked
	moved bool
	seen  []string // fingerprints ever installed
	lost  map[uint32]bool
}

type fakeSA struct {
	sad.SA
	owner       sad.Owner
	fingerprint string
	committed   bool
}

func newFakeSAD() *fakeSAD { return &fakeSAD{sas: map[saKey]fakeSA{}} }

func (f *fakeSAD) Install(_ context.Context, sa sad.SA, keys sad.Keys, owner sad.Owner) error {
	f.mu.Lock()
	hook, err := f.hook, f.err
	f.mu.Unlock()
	if hook != nil {
		hook()
	}
	if err != nil {
		return err
	}
	fp, err := keys.Fingerprint()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sas[keyOf(sa.ID)] = fakeSA{SA: sa, owner: owner, fingerprint: fp}
	f.seen = append(f.seen, fp)
	return nil
}

func (f *fakeSAD) Commit(_ context.Context, id sad.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.sas[keyOf(id)]
	if !ok {
		return sad.ErrNotFound
	}
	s.committed = true
	f.sas[keyOf(id)] = s
	return nil
}

func (f *fakeSAD) Rollback(ctx context.Context, id sad.ID) error {
	f.mu.Lock()
	committed := f.sas[keyOf(id)].committed
	f.mu.Unlock()
	if committed {
		return errors.New("rollback of a committed SA")
	}
	return f.Remove(ctx, id)
}

func (f *fakeSAD) Remove(_ context.Context, id sad.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.sas, keyOf(id))
	return nil
}

func (f *fakeSAD) Query(context.Context, sad.ID) (sad.Counters, error) {
	return sad.Counters{Bytes: 7, Packets: 3}, f.err
}

func (f *fakeSAD) Update(context.Context, sad.Change) (bool, error) { return f.moved, f.err }

func (f *fakeSAD) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.sas)
}

func (f *fakeSAD) State(context.Context) ([]sad.State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []sad.State
	for _, s := range f.sas {
		out = append(out, sad.State{ID: s.ID, Owner: s.owner, Inbound: s.Inbound, Fingerprint: s.fingerprint, Committed: s.committed})
	}
	return out, nil
}

// events collects what was reported.
type events struct {
	mu   sync.Mutex
	list []Event
}

func (e *events) Event(ev Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, ev)
}

func (e *events) count(code string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := 0
	for _, ev := range e.list {
		if ev.Code == code {
			n++
		}
	}
	return n
}

// logBuffer is a log that may be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var (
	addrA = netip.MustParseAddr("192.0.2.1")
	addrB = netip.MustParseAddr("192.0.2.2")
	gcm   = plugin.Transforms{Protocol: 3, Encr: 20, EncrBits: 256}
	cbc   = plugin.Transforms{Protocol: 3, Encr: 12, EncrBits: 256, Integ: 12}
)

// end is one gateway: a broker with its fakes.
type end struct {
	*Broker
	t      *testing.T
	name   string
	inst   plugin.Instance
	clock  *clock
	sad    *fakeSAD
	events *events
	log    *logBuffer
	charon *plugintest.Charon // if set, every call goes over a real socket
	own    []*key.Material    // KEYMAT and tokens that the test gave
	ownMu  sync.Mutex
}

func connection(local, peer string) Connection {
	return Connection{
		Name: "link", LocalID: local + ".example", RemoteID: peer + ".example",
		LocalCert: "c", LocalKey: "k", RemoteCA: "ca", LocalSAE: local + "-ipsec", PeerSAE: peer + "-ipsec",
		KME: "local", Children: []Child{{Name: "net"}},
	}
}

func newEnd(t *testing.T, name, peer string, k *kms, c *clock, change func(*Connection)) *end {
	t.Helper()
	conn := connection(name, peer)
	if change != nil {
		change(&conn)
	}
	e := &end{t: t, name: name, clock: c, sad: newFakeSAD(), events: &events{}, log: &logBuffer{}}
	_, _ = rand.Read(e.inst[:])
	b, err := NewBroker(Options{
		Connections: []Connection{conn}, KMEs: map[string]KME{"local": {Address: "in process", Source: k}},
		SAD: e.sad, Events: e.events, Now: c.Now,
		Log: slog.New(slog.NewTextHandler(e.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	e.Broker = b
	e.serve(e.inst)
	t.Cleanup(func() {
		b.Close()
		e.ownMu.Lock()
		defer e.ownMu.Unlock()
		for i, m := range e.own {
			if m.Len() > 0 {
				t.Errorf("end %s: KEYMAT or token %d was not wiped", name, i)
			}
		}
	})
	return e
}

// serve has a charon of that instance say hello and verified.
func (e *end) serve(i plugin.Instance) {
	e.t.Helper()
	if err := e.Hello(context.Background(), plugin.Hello{Instance: i, ABI: plugin.ABI, Version: "5.9.8"}); err != nil {
		e.t.Fatal(err)
	}
	if err := e.Verify("5.9.8"); err != nil {
		e.t.Fatal(err)
	}
}

// pair is two gateways on one key source.
type pair struct {
	a, b *end
	kms  *kms
}

func newPair(t *testing.T, change func(*Connection)) *pair {
	t.Helper()
	k, c := newKMS(), newClock()
	p := &pair{a: newEnd(t, "a", "b", k, c, change), b: newEnd(t, "b", "a", k, c, change), kms: k}
	t.Cleanup(func() {
		p.a.Close()
		p.b.Close()
		if n := k.leaks(); n > 0 {
			t.Errorf("%d supplied keys were not wiped", n)
		}
	})
	return p
}

func (e *end) sa(uid uint32) plugin.SA { return plugin.SA{Instance: e.inst, UID: uid} }

func (e *end) getKey(uid uint32) (key.ID, error) {
	m := plugin.GetKey{SA: e.sa(uid), Connection: "link", Peer: addrB}
	if e.charon != nil {
		a, err := e.charon.GetKey(e.t.Context(), m)
		return a.KeyID, err
	}
	a, err := e.GetKey(e.t.Context(), m)
	return a.KeyID, err
}

// mustKey is getKey of a test that needs a key.
func (e *end) mustKey(uid uint32) key.ID {
	e.t.Helper()
	id, err := e.getKey(uid)
	if err != nil {
		e.t.Fatal(err)
	}
	if id.IsZero() {
		e.t.Fatal("no key")
	}
	return id
}

// try is one exchange as the test wants it, before either end has seen it.
type try struct {
	uidI, uidR uint32
	exchange   plugin.Exchange
	transforms plugin.Transforms
	id         key.ID
	ni, nr     []byte
	spiI, spiR [8]byte
	idI, idR   plugin.Identity
	ci, cr     []byte
	keymat     []byte // four chunks in a row, the same at both ends
	spis       [2]uint32
}

func ident(name string) plugin.Identity {
	return plugin.Identity{Type: identity.FQDN, Data: []byte(name + ".example")}
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

func newTry(uidI, uidR uint32) *try {
	r := &try{
		uidI: uidI, uidR: uidR, exchange: plugin.CreateChildSA, transforms: gcm,
		nr: random(32), idI: ident("a"), idR: ident("b"), keymat: random(256),
	}
	_, _ = rand.Read(r.spiI[:])
	_, _ = rand.Read(r.spiR[:])
	spi := random(8)
	r.spis = [2]uint32{0xc0000000 | uint32(spi[0])<<16 | uint32(spi[1])<<8 | uint32(spi[2]), 0xc1000000 | uint32(spi[4])<<16 | uint32(spi[5])<<8 | uint32(spi[6])}
	return r
}

// sent has the initiator spend id.
func (e *end) sent(r *try, id key.ID) error {
	r.id = id
	ni, err := BuildNonce(rand.Reader, id)
	if err != nil {
		e.t.Fatal(err)
	}
	r.ni = ni
	call := e.Sent
	if e.charon != nil {
		call = e.charon.Sent
	}
	a, err := call(e.t.Context(), r.message(e))
	if err == nil {
		r.ci = a.ConfirmI[:]
	}
	return err
}

func (r *try) message(e *end) plugin.Sent {
	return plugin.Sent{
		SA: e.sa(r.uidI), Connection: "link", KeyID: r.id, SPIi: r.spiI, SPIr: r.spiR,
		Ni: r.ni, Initiator: r.idI, Exchange: r.exchange,
	}
}

// chunks cuts b into Materials of the sizes of the transforms and has the end
// check that they are wiped.
func (e *end) chunks(t plugin.Transforms, b []byte) plugin.Chunks {
	enc, integ, err := sad.Suite{Encr: t.Encr, EncrBits: t.EncrBits, Integ: t.Integ}.KeySizes()
	if err != nil {
		e.t.Fatal(err)
	}
	cut := func(n int) *key.Material {
		if n == 0 {
			return nil
		}
		m, err := key.Take(bytes.Clone(b[:n]))
		if err != nil {
			e.t.Fatal(err)
		}
		b = b[n:]
		e.ownMu.Lock()
		e.own = append(e.own, m)
		e.ownMu.Unlock()
		return m
	}
	return plugin.Chunks{EncrI: cut(enc), IntegI: cut(integ), EncrR: cut(enc), IntegR: cut(integ)}
}

// binding is what one end needs for its two add_sa.
type binding struct {
	e         *end
	r         *try
	responder bool
	token     []byte
}

// bind calls Bind at e; change may spoil the message.
func (e *end) bind(r *try, responder bool, change func(*plugin.Bind)) (*binding, error) {
	uid := r.uidI
	confirm := r.cr
	if responder {
		uid, confirm = r.uidR, r.ci
	}
	b := &binding{e: e, r: r, responder: responder, token: random(256)}
	m := plugin.Bind{
		SA: e.sa(uid), Connection: "link", Responder: responder, KeyID: r.id, Ni: r.ni, Nr: r.nr,
		SPIi: r.spiI, SPIr: r.spiR, Initiator: r.idI, Replier: r.idR, FirstIDi: r.idI, Exchange: r.exchange,
		Transforms: r.transforms, Keymat: e.chunks(r.transforms, r.keymat), Token: e.chunks(r.transforms, b.token),
		Confirm: confirm, PeerSpeaks: true,
	}
	if change != nil {
		change(&m)
	}
	call := e.Bind
	if e.charon != nil {
		call = e.charon.Bind
		defer func() { m.Keymat.Wipe(); m.Token.Wipe() }()
	}
	a, err := call(e.t.Context(), m)
	if err == nil && responder {
		r.cr = a.ConfirmR
	}
	return b, err
}

// addSA is the message of one direction as charon would send it.
func (b *binding) addSA(inbound bool) plugin.AddSA {
	r := b.r
	enc, integ, _ := sad.Suite{Encr: r.transforms.Encr, EncrBits: r.transforms.EncrBits, Integ: r.transforms.Integ}.KeySizes()
	at := 0
	dir := sad.ItoR
	if !b.responder == inbound {
		dir, at = sad.RtoI, enc+integ
	}
	token, err := key.Take(bytes.Clone(b.token[at : at+enc+integ]))
	if err != nil {
		b.e.t.Fatal(err)
	}
	b.e.ownMu.Lock()
	b.e.own = append(b.e.own, token)
	b.e.ownMu.Unlock()
	src, dst := addrA, addrB // i to r
	if dir == sad.RtoI {
		src, dst = dst, src
	}
	uid := r.uidI
	if b.responder {
		uid = r.uidR
	}
	return plugin.AddSA{
		SA: b.e.sa(uid), Connection: "link", Src: netip.AddrPortFrom(src, 0), Dst: netip.AddrPortFrom(dst, 0),
		SPI: r.spis[dir], Protocol: 50, ReqID: 1, Mode: 2, EncrAlg: r.transforms.Encr, IntegAlg: r.transforms.Integ,
		Token: token, EncrLen: enc, ESN: r.transforms.ESN, Initiator: !b.responder, Inbound: inbound, Update: inbound,
	}
}

// install runs add_sa and commit of one direction.
func (b *binding) install(inbound bool, change func(*plugin.AddSA)) error {
	m := b.addSA(inbound)
	if change != nil {
		change(&m)
	}
	if b.e.charon != nil {
		defer m.Token.Wipe()
		_, err := b.e.charon.AddSA(b.e.t.Context(), m) // with ACK and COMMITTED
		return err
	}
	a, err := b.e.AddSA(b.e.t.Context(), m)
	if err != nil {
		return err
	}
	if a.Verdict != plugin.Installed {
		return fmt.Errorf("verdict %d", a.Verdict)
	}
	return b.e.Commit(b.e.t.Context(), said(m))
}

func said(m plugin.AddSA) plugin.SAID {
	return plugin.SAID{Src: m.Src, Dst: m.Dst, SPI: m.SPI, Protocol: m.Protocol, Mark: m.Mark, IfID: m.IfID}
}

func (b *binding) both() error { return errors.Join(b.install(true, nil), b.install(false, nil)) }

// run does a whole exchange, a initiates.
func (p *pair) run(r *try, id key.ID) error {
	if err := p.a.sent(r, id); err != nil {
		return err
	}
	rb, err := p.b.bind(r, true, nil)
	if err != nil {
		return err
	}
	if err := rb.both(); err != nil {
		return err
	}
	ib, err := p.a.bind(r, false, nil)
	if err != nil {
		return err
	}
	return ib.both()
}

// refused checks that err is a refusal that names connection and cause, that it
// was logged once in one line, and that nothing was installed at e.
func (e *end) refused(err error, cause string) {
	e.t.Helper()
	switch {
	case err == nil:
		e.t.Error("not refused")
		return
	case !strings.Contains(err.Error(), cause):
		e.t.Errorf("cause %q is not in %q", cause, err)
	case !strings.Contains(err.Error(), `"link"`):
		e.t.Errorf("%q does not name the connection", err)
	}
	if n := e.sad.count(); n != 0 {
		e.t.Errorf("%d SAs in the SAD after a refusal", n)
	}
	lines := 0
	for l := range strings.Lines(e.log.String()) {
		if strings.Contains(l, EventRefused) {
			lines++
			if !strings.Contains(l, "connection=link") {
				e.t.Errorf("no connection in %q", l)
			}
		}
	}
	if lines != 1 {
		e.t.Errorf("%d refusals in the log:\n%s", lines, e.log)
	}
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// overSocket puts a plugin server before the broker and a charon on its socket.
func (e *end) overSocket() {
	e.t.Helper()
	path := filepath.Join(e.t.TempDir(), "run", "plugin.sock")
	srv, err := plugin.Listen(path, plugin.Options{})
	if err != nil {
		e.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(e.t.Context())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, e.Broker) }()
	e.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			e.t.Error(err)
		}
	})
	e.charon = plugintest.New(path)
	if err := e.charon.Connect(ctx); err != nil {
		e.t.Fatal(err)
	}
	e.inst = e.charon.Hello.Instance
	if err := e.Verify(e.charon.Hello.Version); err != nil {
		e.t.Fatal(err)
	}
}

// last gives the newest event of that code.
func (e *events) last(code string) Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := len(e.list) - 1; i >= 0; i-- {
		if e.list[i].Code == code {
			return e.list[i]
		}
	}
	return Event{}
}
