package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/q-ipsec/q-ipsec/cmd/internal/guard"
	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/sad"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// warmupTimeout bounds the loading of the kernel's algorithms, which takes
// seconds the first time.
const warmupTimeout = time.Minute

// ipsec is the [ipsec] role.
type ipsec struct {
	conf    *conf.IPsec
	manager *ike.Manager
	sad     *sad.SAD
}

// buildIPsec puts the guard in place, opens the SAD, and makes broker, plugin
// socket and manager. k is nil without [kms]; leave is ike.ManagerOptions.Leave.
func buildIPsec(ctx context.Context, n *conf.Node, s *stages, k *kms, r *recorder, leave func() bool, log *slog.Logger) (*ipsec, error) {
	kernel, err := xfrm.Open()
	if err != nil {
		return nil, err
	}
	s.atEnd(kernel.Close)
	kept, err := installGuard(ctx, n, kernel, log)
	if err != nil {
		return nil, err
	}
	run := filepath.Dir(n.IPsec.Plugin)
	if err := os.MkdirAll(run, 0o700); err != nil {
		return nil, err
	}
	entries, err := sad.Open(kernel, filepath.Join(run, "sad.journal"), log.With("part", "sad"))
	if err != nil {
		return nil, err
	}
	s.atEnd(entries.Close)
	kmes, err := keySources(n, k, s, log)
	if err != nil {
		return nil, err
	}
	conns := connections(n.IPsec)
	log = log.With("part", "ike")
	broker, err := ike.NewBroker(ike.Options{Connections: conns, KMEs: kmes, SAD: sadForIKE{entries}, Events: ikeEvents{r}, Log: log, Now: time.Now})
	if err != nil {
		return nil, err
	}
	s.atEnd(func() error { broker.Close(); return nil })
	srv, err := plugin.Listen(n.IPsec.Plugin, plugin.Options{Log: log})
	if err != nil {
		return nil, err
	}
	s.atEnd(func() error { _ = srv.Close(); return nil }) // for a start that fails half-way
	options := ike.ManagerOptions{
		Connections: conns, Broker: broker, SAD: entries, VICI: n.IPsec.VICI, Levels: levels(kmes), RekeyReserve: n.IPsec.Reserve, Leave: leave, Events: ikeEvents{r}, Log: log,
	}
	if kept != nil {
		options.Guard = kept
	}
	manager, err := ike.NewManager(options)
	if err != nil {
		return nil, err
	}
	s.add("plugin", broker.Run, func(ctx context.Context) error { return srv.Serve(ctx, broker) })
	s.add("tunnels", func(ctx context.Context) error {
		warmUp(ctx, entries, n.IPsec, log)
		return manager.Run(ctx)
	})
	return &ipsec{conf: n.IPsec, manager: manager, sad: entries}, nil
}

// sadForIKE is the SAD in the broker's terms.
type sadForIKE struct{ *sad.SAD }

// Rollback takes an SA out again. What it could not remove it has logged and
// leaves to the next comparison with charon.
func (s sadForIKE) Rollback(ctx context.Context, id sad.ID) error {
	s.SAD.Rollback(ctx, id)
	return nil
}

// keptGuard is the guard of one config, for the manager.
type keptGuard struct {
	*sad.Guard
	config sad.GuardConfig
}

// Keep puts back what is missing of it.
func (k *keptGuard) Keep(ctx context.Context) (sad.GuardState, error) {
	return k.Guard.Keep(ctx, k.config)
}

// installGuard completes the guard, which stays when the daemon ends, and keeps it
// for the boot at which the config has faults; nil if none is wanted. A start does so
// even if the operator has removed it before.
func installGuard(ctx context.Context, n *conf.Node, kernel *xfrm.Conn, log *slog.Logger) (*keptGuard, error) {
	c := guard.Config(n)
	if err := guard.Save(n, "", time.Now()); err != nil {
		log.Error("the guard is not kept for a boot at which the config has faults", "err", err)
	}
	networks := guard.Networks(c)
	if len(networks) == 0 {
		return nil, nil
	}
	marker, err := sad.GuardMarker()
	if err != nil {
		return nil, err
	}
	k := &keptGuard{sad.NewGuard(kernel, marker), c}
	if err := k.Install(ctx, c); err != nil {
		return nil, err
	}
	log.Info("guard in place: these networks are reached through a tunnel or not at all", "networks", networks)
	return k, nil
}

// warmUp loads the kernel's algorithms. A kernel without ESP is not hopeless:
// each connection will say so when it is set up.
func warmUp(ctx context.Context, entries *sad.SAD, c *conf.IPsec, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, warmupTimeout)
	defer cancel()
	six := false
	for _, v := range c.Connection {
		six = six || v.LocalAddr.Is6()
	}
	start := time.Now()
	if err := entries.Warmup(ctx, xfrm.Suites(), six); err != nil {
		level := slog.LevelWarn
		if errors.Is(err, context.Canceled) {
			level = slog.LevelDebug
		}
		log.Log(ctx, level, "the kernel's ESP algorithms are not all there", "err", err)
		return
	}
	log.Debug("kernel's ESP algorithms loaded", "took", time.Since(start))
}

// keySources gives the KMEs that connections name.
func keySources(n *conf.Node, k *kms, s *stages, log *slog.Logger) (map[string]ike.KME, error) {
	out := map[string]ike.KME{}
	if k != nil {
		out[conf.Local] = ike.KME{Address: n.Name + ", in process", Source: localKSA{k.keys}, KeyLife: n.KMS.NoticeTTL}
	}
	for _, c := range n.IPsec.KMEs {
		t, err := pki.KMEClient(c.Files, c.TLS12, log)
		if err != nil {
			return nil, err
		}
		cl, err := etsi014.NewClient(etsi014.ClientConfig{URL: c.URL, TLS: t, GETOnly: c.UseGET, StringIDs: c.StringIDs})
		if err != nil {
			return nil, err
		}
		s.atEnd(func() error { cl.Close(); return nil })
		out[c.Name] = ike.KME{Address: c.URL, Source: vendorKME{cl}, Class: c.Class}
	}
	return out, nil
}

// connections gives the config's connections in ike's terms. The config has
// checked its words; an unknown one is required and hybrid.
func connections(c *conf.IPsec) []ike.Connection {
	var out []ike.Connection
	for _, v := range c.Connection {
		conn := ike.Connection{
			Name: v.Name, LocalAddrs: []netip.Addr{v.LocalAddr}, RemoteAddrs: []netip.Addr{v.RemoteAddr},
			LocalID: v.LocalID, RemoteID: v.RemoteID, LocalCert: c.Files.Cert, LocalKey: c.Files.Key, RemoteCA: c.Files.CA,
			Proposals: v.Proposals, IKERekeyTime: v.RekeyTime, ReauthTime: v.ReauthTime, DPDDelay: v.DPDDelay, Encap: v.Encap, MOBIKE: v.MOBIKE,
			LocalSAE: v.LocalSAE, PeerSAE: v.PeerSAE, KME: v.KME, MinClass: v.MinClass, AllowRelayedOnly: v.AllowRelayedOnly,
			MaxKeyAge: v.MaxKeyAge, MaxKeyBytes: v.MaxKeyBytes, MaxKeyPackets: v.MaxKeyPackets,
		}
		switch v.Policy {
		case conf.Optional:
			conn.Policy = ike.Optional
		case conf.Off:
			conn.Policy = ike.Off
		}
		if v.Mix == conf.QKD {
			conn.Mix = ike.QKDOnly
		}
		for _, ch := range v.Children {
			child := ike.Child{
				Name: ch.Name, LocalTS: ch.LocalTS, RemoteTS: ch.RemoteTS, Proposals: ch.ESPProposals, Transport: ch.Transport,
				RekeyTime: ch.RekeyTime, RekeyBytes: ch.RekeyBytes, RekeyPackets: ch.RekeyPackets, ReplayWindow: uint32(ch.ReplayWindow),
				MarkIn: sad.Mark(ch.MarkIn), MarkOut: sad.Mark(ch.MarkOut), SetMarkIn: sad.Mark(ch.SetMarkIn), SetMarkOut: sad.Mark(ch.SetMarkOut),
				IfIDIn: ch.IfIDIn, IfIDOut: ch.IfIDOut, NoCopyDF: !ch.CopyDF, NoCopyECN: !ch.CopyECN, CopyDSCP: string(ch.CopyDSCP),
			}
			switch ch.Start {
			case conf.StartNow:
				child.Start = ike.StartNow
			case conf.StartTrap:
				child.Start = ike.StartTrap
			}
			conn.Children = append(conn.Children, child)
		}
		out = append(out, conn)
	}
	return out
}
