package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/kma"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// kms is the [kms] role.
type kms struct {
	keys    supplier              // of whoever leads
	reign   atomic.Pointer[reign] // nil: another process has the inventory, or none
	site    *member               // nil with SQLite, where this process always leads
	nodeOf  map[string]string     // node of each SAE
	devices *devices
}

// supplier is the KSA, here or at another member.
type supplier = etsi014.Supplier

// reign is what a process has while it has the inventory.
type reign struct {
	store *store.Store
	kma   *kma.Agent
	ksa   *ksa.Agent
	type1 http.Handler
	since time.Time

	supply, peers gate // calls of SAEs, of peers
}

// buildKMS opens the store, or stands by for it, makes the agents and binds their
// servers. Nothing serves before the stages run.
func buildKMS(ctx context.Context, n *conf.Node, s *stages, r *recorder, log *slog.Logger) (*kms, error) {
	c := n.KMS
	if err := os.MkdirAll(n.StateDir, 0o700); err != nil {
		return nil, err
	}
	credential, err := n.CredentialPath()
	if err != nil {
		return nil, err
	}
	o := store.Options{
		URL: n.Inventory, PasswordFile: n.InventoryPassword, RootFile: n.RootFile, RootCredential: credential, Log: log.With("part", "store"),
	}
	k := &kms{nodeOf: map[string]string{}}
	for _, v := range c.SAEs {
		k.nodeOf[v.ID] = v.Node
	}
	clients, err := type1Clients(c, log)
	if err != nil {
		return nil, err
	}
	if k.devices, err = newDevices(c, r.source("qkde"), log); err != nil {
		return nil, err
	}
	begin := func(ctx context.Context, st *store.Store) (*reign, error) {
		return k.begin(ctx, n, st, clients, r, log)
	}
	if n.Shared() {
		err = k.standBy(n, s, o, begin, r, log)
	} else {
		err = k.rule(ctx, c, s, o, begin, r, log)
	}
	if err != nil {
		return nil, err
	}
	s.add("QKD devices", k.devices.run)
	if !c.Type2Listen.IsValid() {
		return k, nil
	}
	serveType2, err := k.type2Server(c, s, log)
	if err != nil {
		return nil, err
	}
	s.add("Type-2", serveType2)
	return k, nil
}

// rule opens an inventory that is this process's alone.
func (k *kms) rule(ctx context.Context, c *conf.KMS, s *stages, o store.Options, begin beginning, r *recorder, log *slog.Logger) error {
	st, err := store.Open(ctx, o)
	if err != nil {
		return err
	}
	s.atEnd(st.Close)
	r.keep(st)
	g, err := begin(ctx, st)
	if err != nil {
		return err
	}
	k.reign.Store(g)
	k.keys = g.ksa
	serveType1, err := server(g.type1, c.Type1Listen.String(), c.Type1, s, log.With("part", "type1"))
	if err != nil {
		return err
	}
	s.add("KMA and Type-1", g.kma.Run, serveType1)
	s.add("KSA", g.ksa.Run)
	return nil
}

// beginning makes the agents over a store that was opened.
type beginning func(context.Context, *store.Store) (*reign, error)

func (k *kms) begin(ctx context.Context, n *conf.Node, st *store.Store, clients map[string]*type1.Client, r *recorder, log *slog.Logger) (*reign, error) {
	g := &reign{store: st, since: time.Now()}
	var err error
	if g.kma, err = newKMA(ctx, n.KMS, st, clients, k.devices, r, log); err != nil {
		return nil, err
	}
	if g.ksa, err = newKSA(n, g.kma, clients, r, log); err != nil {
		return nil, err
	}
	g.kma.OnBurn(g.ksa.KeepOnBurn)
	g.type1, err = type1.NewHandler(type1.HandlerOptions{
		Agent: g.kma, Supply: supplyForType1{g.ksa}, Peer: pki.NodeFromRequest, PeerOf: g.kma.PeerOf,
		Event: r.source("type1").Event, Log: log.With("part", "type1"),
	})
	return g, err
}

func type1Clients(c *conf.KMS, log *slog.Logger) (map[string]*type1.Client, error) {
	clients := map[string]*type1.Client{}
	for _, p := range c.Peers {
		t, err := pki.NodeClient(c.Type1, p.Name, log)
		if err != nil {
			return nil, err
		}
		o := type1.ClientOptions{URL: "https://" + p.Address.String(), TLS: t, Local: c.Type1Local(p.Address)}
		for _, to := range p.More {
			o.More = append(o.More, "https://"+to.String())
		}
		if clients[p.Name], err = type1.NewClient(o); err != nil {
			return nil, err
		}
	}
	return clients, nil
}

func newKMA(ctx context.Context, c *conf.KMS, st *store.Store, clients map[string]*type1.Client, devices *devices, r *recorder, log *slog.Logger) (*kma.Agent, error) {
	o := kma.Options{
		Store: storeForKMA{st}, Peers: map[string]kma.Peer{}, Log: log.With("part", "kma"), Events: r.source("kma"),
		IntakeInterval: c.IntakeInterval, LeaseSize: c.Lease, RatchetInterval: c.RatchetInterval, RatchetKeys: c.RatchetKeys,
		Reserve: c.Reserve, MaxKeyAge: c.MaxKeyAge, MaxKeys: c.MaxKeys,
	}
	for name, cl := range clients {
		o.Peers[name] = cl
	}
	for _, p := range c.Pairs {
		uid, err := conf.FeederUID(p.Feeder)
		if err != nil {
			return nil, err
		}
		o.Pools = append(o.Pools, kma.Pool{
			ID: p.ID, Peer: p.Peer, Role: p.Role, Class: key.Direct,
			Intake: p.Intake, QKD: p.QKDID, PeerQKD: p.PeerQKDID, FeederUID: uid, Algorithm: string(p.Algorithm),
			Device: devices.control(p.ID),
		})
	}
	return kma.New(ctx, o)
}

func newKSA(n *conf.Node, keys *kma.Agent, clients map[string]*type1.Client, r *recorder, log *slog.Logger) (*ksa.Agent, error) {
	o := ksa.Options{
		Node: n.Name, Keys: keysForKSA{keys}, Peers: peersForKSA(clients), Log: log.With("part", "ksa"),
		Reserve: n.KMS.Reserve, TTL: n.KMS.NoticeTTL, Events: r.supply, Usage: r.reports,
	}
	for _, s := range n.KMS.SAEs {
		// What an SAE may take is its own node's to say.
		o.SAEs = append(o.SAEs, ksa.SAE{ID: s.ID, Node: s.Node, Peers: s.Peers, IPsec: s.IPsec && s.Node == n.Name, Rate: float64(s.Rate), Burst: s.Burst})
	}
	return ksa.New(o)
}

// type2Server binds the ETSI GS QKD 014 interface.
func (k *kms) type2Server(c *conf.KMS, s *stages, log *slog.Logger) (func(context.Context) error, error) {
	log = log.With("part", "type2")
	quirks := map[string]etsi014.Quirks{}
	for _, sae := range c.SAEs {
		quirks[sae.ID] = etsi014.Quirks{NotFound404: sae.NotFound404}
	}
	h, err := etsi014.NewHandler(etsi014.Options{Supplier: k.keys, Identity: pki.SAEFromRequest, Quirks: quirks, RetryWindow: c.RetryWindow, Log: log})
	if err != nil {
		return nil, err
	}
	s.atEnd(func() error { h.Close(); return nil })
	return server(h, c.Type2Listen.String(), c.Type2, s, log)
}

// server binds one HTTPS server and gives what serves on it.
func server(h http.Handler, addr string, f pki.Files, s *stages, log *slog.Logger) (func(context.Context) error, error) {
	t, err := pki.Server(f, log)
	if err != nil {
		return nil, err
	}
	srv, err := etsi014.NewServer(etsi014.ServerConfig{Handler: h, TLS: t, Log: log})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	s.atEnd(func() error { _ = l.Close(); return nil }) // for a start that fails half-way
	return func(ctx context.Context) error { return srv.Serve(ctx, l) }, nil
}
