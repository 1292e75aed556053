package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/ike/plugin/plugintest"
	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/sad"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// Both gateways' addresses, and AES-256-GCM as charon names it.
var (
	gateways = [2]netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}
	gcm      = plugin.Transforms{Protocol: 3, Encr: 20, EncrBits: 256}
)

const chunkSize = 36 // AES-256 key and salt

// kme is a node's Type-2 interface as ike's source of keys.
type kme struct{ *etsi014.Client }

// GetKey gives a fresh key for peer.
func (k kme) GetKey(ctx context.Context, _, peer string) (key.SupplyKey, error) {
	return one(k.Client.GetKey(ctx, peer, 1, 256))
}

// GetKeyWithID gives, once, the key that peer got as id.
func (k kme) GetKeyWithID(ctx context.Context, _, peer string, id key.ID) (key.SupplyKey, error) {
	return one(k.Client.GetKeyWithID(ctx, peer, []key.ID{id}, 256))
}

func one(keys []key.SupplyKey, err error) (key.SupplyKey, error) {
	if err != nil {
		return key.SupplyKey{}, err
	}
	return keys[0], nil // the client gives as many as were asked for
}

// memory is a SAD without a kernel behind it.
type memory struct {
	mu  sync.Mutex
	sas map[xfrm.Key]xfrm.Info
}

// Add keeps what an SA is, not its keys.
func (m *memory) Add(_ context.Context, sa *xfrm.SA, _, _ []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sas[sa.Key()] = xfrm.Info{ID: sa.ID, ReqID: sa.ReqID, Mode: sa.Mode, Suite: sa.Suite, Algorithm: sa.Suite.String()}
	return nil
}

// Delete forgets an SA.
func (m *memory) Delete(_ context.Context, id xfrm.ID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.sas[id.Key()]; !ok {
		return xfrm.ErrNotFound
	}
	delete(m.sas, id.Key())
	return nil
}

// List gives all SAs.
func (m *memory) List(context.Context) ([]xfrm.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []xfrm.Info
	for _, i := range m.sas {
		all = append(all, i)
	}
	return all, nil
}

// Counters are all zero: no packet passes.
func (m *memory) Counters(context.Context, xfrm.ID) (xfrm.Counters, error) {
	return xfrm.Counters{}, nil
}

// SetPorts is not called by a set-up.
func (m *memory) SetPorts(context.Context, xfrm.ID, uint16, uint16) error { return xfrm.ErrUnsupported }

// Move is not called by a set-up.
func (m *memory) Move(context.Context, xfrm.ID, xfrm.Move) error { return xfrm.ErrUnsupported }

// Policies gives none: nothing is sent through these SAs.
func (m *memory) Policies(context.Context) ([]xfrm.Policy, error) { return nil, nil }

// installer is the SAD in the broker's terms.
type installer struct{ *sad.SAD }

// Rollback takes an SA out again.
func (i installer) Rollback(ctx context.Context, id sad.ID) error {
	i.SAD.Rollback(ctx, id)
	return nil
}

// gateway is qipsecd's [ipsec] side as the plugin sees it: broker, SAD and
// journal behind the real socket. Its keys come over mTLS from a real node,
// which costs more than from the KSA of its own process.
type gateway struct {
	charon *plugintest.Charon
	sad    *sad.SAD
	close  func() error
}

func newGateway(ctx context.Context, l *lab, node int, dir string) (g *gateway, err error) {
	name, peer := string("ab"[node]), string("ba"[node])
	t, err := pki.KMEClient(l.sae(node), false, quiet())
	if err != nil {
		return nil, err
	}
	client, err := etsi014.NewClient(etsi014.ClientConfig{URL: l.url(node), TLS: t})
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := sad.Open(&memory{sas: map[xfrm.Key]xfrm.Info{}}, filepath.Join(dir, "sad.journal"), quiet())
	if err != nil {
		return nil, err
	}
	broker, err := ike.NewBroker(ike.Options{
		Connections: []ike.Connection{{
			Name: "a-b", LocalID: name + ".example", RemoteID: peer + ".example", LocalCert: "cert", LocalKey: "key", RemoteCA: "ca",
			LocalSAE: name + "-te", PeerSAE: peer + "-te", KME: "node", Children: []ike.Child{{Name: "net"}},
		}},
		KMEs: map[string]ike.KME{"node": {Address: l.url(node), Source: kme{client}, Class: key.Direct}},
		SAD:  installer{entries}, Log: quiet(), Now: time.Now,
	})
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "plugin.sock")
	srv, err := plugin.Listen(socket, plugin.Options{})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 2)
	go func() { done <- srv.Serve(ctx, broker) }()
	go func() { done <- broker.Run(ctx) }()
	g = &gateway{charon: plugintest.New(socket), sad: entries}
	g.close = func() error {
		cancel()
		err := errors.Join(<-done, <-done)
		broker.Close()
		client.Close()
		return errors.Join(err, entries.Close())
	}
	if err := g.charon.Connect(ctx); err != nil {
		return nil, errors.Join(err, g.close())
	}
	if err := broker.Verify(g.charon.Hello.Version); err != nil { // as the manager does, which has no charon here
		return nil, errors.Join(err, g.close())
	}
	return g, nil
}

// child is one CHILD_SA in the making, as the two charons negotiate it.
type child struct {
	uid        uint32
	id         key.ID
	ni, nr     []byte
	spiI, spiR [8]byte
	keymat     []byte    // the same at both ends
	spis       [2]uint32 // i to r, r to i
	ci, cr     []byte
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

func newChild(n int) *child {
	c := &child{uid: uint32(n + 1), nr: random(32), keymat: random(2 * chunkSize)}
	copy(c.spiI[:], random(8))
	copy(c.spiR[:], random(8))
	for i := range c.spis {
		c.spis[i] = 0xc0000000 + uint32(2*n+i)
	}
	return c
}

func identity(node int) plugin.Identity {
	return plugin.Identity{Type: 2, Data: []byte(string("ab"[node]) + ".example")}
}

// initiate is GETKEY and SENT.
func (c *child) initiate(ctx context.Context, g *gateway) error {
	a, err := g.charon.GetKey(ctx, plugin.GetKey{SA: plugin.SA{UID: c.uid}, Connection: "a-b", Peer: gateways[1]})
	if err != nil {
		return err
	}
	if c.id = a.KeyID; c.id.IsZero() {
		return errors.New("no Key-ID")
	}
	if c.ni, err = ike.BuildNonce(rand.Reader, c.id); err != nil {
		return err
	}
	s, err := g.charon.Sent(ctx, plugin.Sent{
		SA: plugin.SA{UID: c.uid}, Connection: "a-b", KeyID: c.id, SPIi: c.spiI, SPIr: c.spiR,
		Ni: c.ni, Initiator: identity(0), Exchange: plugin.CreateChildSA,
	})
	c.ci = s.ConfirmI[:]
	return err
}

// materials cuts b in two.
func materials(b []byte) (plugin.Chunks, error) {
	i, err := key.Take(bytes.Clone(b[:chunkSize]))
	if err != nil {
		return plugin.Chunks{}, err
	}
	r, err := key.Take(bytes.Clone(b[chunkSize:]))
	return plugin.Chunks{EncrI: i, EncrR: r}, err
}

// finish is BIND and both ADD of one end, inbound first as charon does.
func (c *child) finish(ctx context.Context, g *gateway, responder bool) error {
	token := random(2 * chunkSize)
	keymat, err := materials(c.keymat)
	defer keymat.Wipe()
	if err != nil {
		return err
	}
	tokens, err := materials(token)
	defer tokens.Wipe()
	if err != nil {
		return err
	}
	confirm := c.cr
	if responder {
		confirm = c.ci
	}
	b, err := g.charon.Bind(ctx, plugin.Bind{
		SA: plugin.SA{UID: c.uid}, Connection: "a-b", Responder: responder, KeyID: c.id, Ni: c.ni, Nr: c.nr,
		SPIi: c.spiI, SPIr: c.spiR, Initiator: identity(0), Replier: identity(1), FirstIDi: identity(0),
		Exchange: plugin.CreateChildSA, Transforms: gcm, Keymat: keymat, Token: tokens, Confirm: confirm, PeerSpeaks: true,
	})
	if err != nil {
		return err
	}
	if responder {
		c.cr = b.ConfirmR
	}
	for _, inbound := range []bool{true, false} {
		if err := c.add(ctx, g, responder, inbound, tokens); err != nil {
			return err
		}
	}
	return nil
}

// id names the SA of a direction, 0 from initiator to responder.
func (c *child) name(dir int) sad.ID {
	return sad.ID{Src: netip.AddrPortFrom(gateways[dir], 0), Dst: netip.AddrPortFrom(gateways[1-dir], 0), SPI: c.spis[dir], Protocol: sad.ProtoESP}
}

func (c *child) add(ctx context.Context, g *gateway, responder, inbound bool, tokens plugin.Chunks) error {
	dir, token := 0, tokens.EncrI
	if responder != inbound {
		dir, token = 1, tokens.EncrR
	}
	id := c.name(dir)
	a, err := g.charon.AddSA(ctx, plugin.AddSA{
		SA: plugin.SA{UID: c.uid}, Connection: "a-b", Src: id.Src, Dst: id.Dst, SPI: id.SPI, Protocol: id.Protocol, ReqID: 1,
		Mode: 2, EncrAlg: gcm.Encr, Token: token, EncrLen: chunkSize, Initiator: !responder, Inbound: inbound, Update: inbound,
	})
	if err == nil && a.Verdict != plugin.Installed {
		err = fmt.Errorf("verdict %d", a.Verdict)
	}
	return err
}

// remove is what charon does when the CHILD_SA ends.
func (c *child) remove(ctx context.Context, g *gateway) error {
	for dir := range c.spis {
		if err := g.sad.Remove(ctx, c.name(dir)); err != nil {
			return err
		}
	}
	return g.charon.End(ctx, c.uid)
}

// tunnelRow measures all that plugin and daemon of both gateways do for one
// CHILD_SA, one after the other. The kernel's share is not in it: SAs go to a
// SAD in memory, as kernels without ESP have none.
func tunnelRow(ctx context.Context, o options, l *lab, t *table) (err error) {
	const name = "tunnel set-up: plugin and daemon, both ends, per CHILD_SA (real socket, keys over mTLS, SAD in memory)"
	if !o.only.MatchString(name) {
		return nil
	}
	if err := l.topUp(ctx, 4*o.children, 50_000); err != nil {
		return err
	}
	run, err := os.MkdirTemp(volatile(), "qipsec-bench-") // qipsecd's journal lies below /run
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(run)) }()
	var ends [2]*gateway
	for node := range ends {
		g, err := newGateway(ctx, l, node, filepath.Join(run, string("ab"[node])))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, g.close()) }()
		ends[node] = g
	}
	if o.profile != "" {
		f, err := os.Create(o.profile)
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // a profile
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	names := []string{"GETKEY, SENT at the initiator", "BIND, 2 ADD at the responder", "BIND, 2 ADD at the initiator"}
	var all sample
	parts := make([]sample, len(names))
	const warm = 20
	for n := range warm + o.children {
		c := newChild(n)
		var ms [4]float64
		begin := time.Now()
		for i, step := range []func() error{
			func() error { return c.initiate(ctx, ends[0]) },
			func() error { return c.finish(ctx, ends[1], true) },
			func() error { return c.finish(ctx, ends[0], false) },
		} {
			start := time.Now()
			if err := step(); err != nil {
				return fmt.Errorf("%s: %w", names[i], err)
			}
			ms[i] = since(start)
		}
		ms[3] = since(begin)
		if n >= warm {
			all = append(all, ms[3])
			for i := range parts {
				parts[i] = append(parts[i], ms[i])
			}
		}
		for _, g := range ends {
			if err := c.remove(ctx, g); err != nil {
				return err
			}
		}
	}
	t.add(name, "ms", all, nil, "", goal{most: 5})
	t.note("tunnel set-up: the kernel's and charon's own time and the ratio to stock charon are not measured here")
	for i, part := range names {
		t.add("  of it "+part, "ms", parts[i], nil, "", goal{})
	}
	return nil
}

func since(t time.Time) float64 { return float64(time.Since(t).Nanoseconds()) / 1e6 }

// volatile is a directory in memory, as /run is where qipsecd runs, if the
// machine has one.
func volatile() string {
	for _, d := range []string{"/run", "/dev/shm"} {
		var st unix.Statfs_t
		if unix.Statfs(d, &st) == nil && st.Type == unix.TMPFS_MAGIC && unix.Access(d, unix.W_OK) == nil {
			return d
		}
	}
	return ""
}
