package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/cmd/internal/version"
	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

const (
	statusAlarms  = 10
	explainEvents = 10
	eventPage     = 1000 // events read from the store at once
	operatorGrace = 2 * time.Second
)

// buildOperator binds the operator socket.
func buildOperator(n *conf.Node, s *stages, op *operatorNode, log *slog.Logger) error {
	log = log.With("part", "operator")
	l, err := operator.Listen(n.Operator.Socket, log)
	if err != nil {
		return err
	}
	s.atEnd(func() error { _ = l.Close(); return nil }) // for a start that fails half-way
	o := operator.Options{Node: op, Log: log}
	if op.keys != nil { // an interface that holds a nil pointer is not nil
		o.Keys = op.keys
	}
	if op.tunnels != nil {
		o.Tunnels = op.tunnels
	}
	h := operator.NewHandler(o)
	s.add("operator API", func(ctx context.Context) error { return operator.Serve(ctx, l, h, operatorGrace, log) })
	return nil
}

// operatorNode answers for the node as a whole.
type operatorNode struct {
	name    string
	started time.Time
	ring    *operator.Ring
	keys    *operatorKeys
	tunnels *operatorTunnels
}

// Status collects what the roles say.
func (o *operatorNode) Status(ctx context.Context) (operator.Status, error) {
	s := operator.Status{Node: o.name, Version: version.String(), Started: o.started, Roles: []string{}}
	var err error
	if o.keys != nil {
		s.Roles = append(s.Roles, "kms")
		if o.keys.site != nil {
			s.Site = o.keys.site.state(ctx)
		}
		if s.Pools, err = o.keys.Pools(ctx); err != nil && !errors.Is(err, operator.ErrStandby) {
			return s, err
		}
	}
	if o.tunnels != nil {
		s.Roles = append(s.Roles, "ipsec")
		if s.Tunnels, err = o.tunnels.Tunnels(ctx); err != nil {
			return s, err
		}
	}
	s.Alarms = o.ring.Latest(statusAlarms, func(e operator.Event) bool { return e.Severity == string(store.SeverityAlarm) })
	return s, nil
}

// Events gives the latest events; with [kms] those of earlier starts as well,
// which the store keeps.
func (o *operatorNode) Events(ctx context.Context, connection string, limit int) ([]operator.Event, error) {
	out := o.ring.Latest(limit, about(connection))
	if o.keys == nil || len(out) == limit {
		return out, nil
	}
	g, err := o.keys.current()
	if err != nil {
		return out, nil // those of earlier starts are with the leader
	}
	before := o.started
	if oldest := o.ring.Latest(ringSize, about("")); len(oldest) > 0 {
		before = oldest[len(oldest)-1].Time
	}
	before = before.Truncate(time.Microsecond) // as the store keeps it
	for q := (store.EventQuery{Limit: eventPage}); ; {
		page, err := g.store.Events(ctx, q)
		if err != nil {
			return nil, err
		}
		for _, v := range page {
			e := fromStore(v)
			if !v.Time.Before(before) || !about(connection)(e) {
				continue
			}
			if out = append(out, e); len(out) == limit {
				return out, nil
			}
		}
		if len(page) < eventPage {
			return out, nil
		}
		q.Before = page[len(page)-1].Serial
	}
}

// fromStore undoes what recorder.add does to an event. Only ike's are of a
// connection; whose name has no space.
func fromStore(v store.LogEvent) operator.Event {
	e := operator.Event{Time: v.Time, Severity: string(v.Severity), Code: v.Code, Source: v.Source, Text: v.Text, Action: v.Action}
	if name, text, ok := strings.Cut(v.Text, ": "); ok && v.Source == ikeSource && !strings.Contains(name, " ") {
		e.Connection, e.Text = name, text
	}
	return e
}

func about(connection string) func(operator.Event) bool {
	return func(e operator.Event) bool { return connection == "" || e.Connection == connection }
}

// operatorKeys answers for [kms].
type operatorKeys struct{ *kms }

// current is the reign to ask about.
func (o *operatorKeys) current() (*reign, error) {
	if g := o.reign.Load(); g != nil {
		return g, nil
	}
	return nil, operator.ErrStandby
}

// Pools gives every pool.
func (o *operatorKeys) Pools(ctx context.Context) ([]operator.Pool, error) {
	g, err := o.current()
	if err != nil {
		return nil, err
	}
	list, err := g.store.Pools(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]operator.Pool, len(list))
	for i, p := range list {
		out[i] = operator.Pool{
			ID: p.ID, Peer: p.Peer, Role: p.Role.String(), Class: p.Class.String(), Received: p.Received, Active: p.Active, OwnActive: p.OwnActive,
			NewestSeq: p.NewestSeq, Mark: p.Mark.String(), PeerMark: p.PeerMark.String(),
		}
		out[i].Device = o.devices.last(p.ID)
		blocks, err := g.store.Blocks(ctx, p.ID)
		if err != nil {
			return nil, err
		}
		for _, b := range blocks {
			if b.Left > 0 {
				out[i].OldestS = max(out[i].OldestS, int64(b.Age/time.Second))
			}
		}
		// A pool that is in the store and no more in the config has no level.
		if l, err := g.kma.Level(p.Peer); err == nil {
			out[i].Leased, out[i].Synced = l.Leased, l.Synced
		}
	}
	return out, nil
}

// Find looks a key up.
func (o *operatorKeys) Find(ctx context.Context, id key.ID) (operator.Key, error) {
	g, err := o.current()
	if err != nil {
		return operator.Key{}, err
	}
	k, err := g.store.Find(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return operator.Key{}, fmt.Errorf("key %v: %w", id, operator.ErrNotFound)
	}
	if err != nil {
		return operator.Key{}, err
	}
	return operator.Key{ID: k.ID, Pool: k.Pool, Position: k.Position.String(), Class: k.Class.String(), State: k.State.String(), Owner: k.Side.String()}, nil
}

// History gives rows of the usage history.
func (o *operatorKeys) History(ctx context.Context, q operator.HistoryQuery) ([]operator.Usage, error) {
	g, err := o.current()
	if err != nil {
		return nil, err
	}
	list, err := g.store.History(ctx, store.HistoryQuery{Pool: q.Pool, ID: q.Key, Limit: q.Limit})
	if err != nil {
		return nil, err
	}
	out := make([]operator.Usage, len(list))
	for i, e := range list {
		out[i] = operator.Usage{Time: e.Time, Pool: e.Pool, State: e.State.String(), Count: e.Count, Text: e.Detail, Position: e.First.String()}
		if e.Last != e.First {
			out[i].Position += " to " + e.Last.String()
		}
		if id := e.ID; !id.IsZero() {
			out[i].Key = &id
		}
	}
	return out, nil
}

// operatorTunnels answers for [ipsec].
type operatorTunnels struct {
	*ipsec
	kms  *kms // nil without [kms]
	ring *operator.Ring
}

// Tunnels gives every connection.
func (o *operatorTunnels) Tunnels(ctx context.Context) ([]operator.Tunnel, error) {
	o.manager.Refresh(ctx)
	out := []operator.Tunnel{}
	for _, s := range o.manager.Status() {
		t := operator.Tunnel{
			Connection: s.Name, Policy: s.Policy, Mix: s.Mix, KME: s.KME, LocalSAE: s.LocalSAE, PeerSAE: s.PeerSAE,
			State: string(s.State), Supply: supplyOf(s.Supply), Children: []operator.Child{},
		}
		if s.State != ike.StateUp {
			t.Why = s.Cause
		}
		for _, c := range s.Children {
			v := operator.Child{
				Name: c.Name, State: c.State, SPIIn: spi(c.SPIIn), SPIOut: spi(c.SPIOut), KeyClass: c.Class,
				BytesIn: c.BytesIn, BytesOut: c.BytesOut, RekeyInS: rekeyIn(c.NextRekey),
			}
			if !c.Since.IsZero() {
				v.AgeS = int64(time.Since(c.Since).Seconds())
			}
			if !c.KeyID.IsZero() {
				v.KeyID = c.KeyID.String()
			}
			t.Children = append(t.Children, v)
		}
		out = append(out, t)
	}
	return out, nil
}

func spi(v uint32) string {
	if v == 0 {
		return ""
	}
	return fmt.Sprintf("0x%08x", v)
}

// SAs gives the SAs that this node put in the kernel.
func (o *operatorTunnels) SAs(ctx context.Context) ([]operator.SA, error) {
	list, err := o.sad.State(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]operator.SA, len(list))
	for i, s := range list {
		out[i] = operator.SA{
			Connection: s.Connection, Direction: "out", Src: s.Src.Addr().String(), Dst: s.Dst.Addr().String(), SPI: spi(s.SPI),
			Algorithm: s.Algorithm, Fingerprint: s.Fingerprint, Committed: s.Committed, Bytes: s.Bytes, Packets: s.Packets,
		}
		if s.Inbound {
			out[i].Direction = "in"
		}
		if !s.KeyID.IsZero() {
			out[i].KeyID = s.KeyID.String()
		}
	}
	return out, nil
}

// Explain checks what a tunnel depends on, keys first.
func (o *operatorTunnels) Explain(ctx context.Context, name string) (operator.Explanation, error) {
	o.manager.Refresh(ctx)
	text, err := o.manager.Explain(name)
	if err != nil {
		return operator.Explanation{}, notFound(name, err)
	}
	e := operator.Explanation{Connection: name, Events: o.ring.Latest(explainEvents, func(e operator.Event) bool {
		return about(name)(e) && e.Code != ike.EventRekeyed // the CHILD_SAs have their age
	})}
	for _, c := range o.conf.Connection {
		if c.Name == name && c.KME == conf.Local && o.kms != nil && c.Policy != conf.Off {
			e.Checks = append(e.Checks, o.keyChecks(c.PeerSAE)...)
		}
	}
	for _, s := range o.manager.Status() {
		if s.Name == name {
			e.Up = s.State == ike.StateUp || s.State == ike.StateFallback
		}
	}
	e.Checks = append(e.Checks, operator.Check{What: "tunnel", OK: e.Up, Text: text})
	return e, nil
}

// keyChecks say whether the KMS can supply keys for an SAE.
func (o *operatorTunnels) keyChecks(peerSAE string) []operator.Check {
	node := o.kms.nodeOf[peerSAE]
	g := o.kms.reign.Load()
	if g == nil {
		return []operator.Check{{What: "keys", OK: true, Text: "keys come from the member of this site that leads: qipsec status"}}
	}
	l, err := g.kma.Level(node)
	if err != nil {
		return []operator.Check{{What: "keys", Text: fmt.Sprintf("no keys are shared with node %q: %v", node, err), Advice: "configure a [[kms.pair]] with that node"}}
	}
	sync := operator.Check{What: "sync", OK: l.Synced, Text: fmt.Sprintf("node %q has agreed where both stand", node)}
	if !l.Synced {
		sync.Text = fmt.Sprintf("node %q has not agreed yet where both stand", node)
		sync.Advice = "look whether the peer's qipsecd runs and its KM channel (Type-1) can be reached"
	}
	keys := operator.Check{What: "keys", OK: l.Active+l.Leased > 0, Text: fmt.Sprintf("%d keys ready, %d more on disk", l.Leased, l.Active)}
	if !keys.OK {
		keys.Advice = "look whether the QKD devices deliver files at both ends: qipsec keys; qipsec events"
	}
	return []operator.Check{sync, keys}
}

// Do acts on a tunnel.
func (o *operatorTunnels) Do(ctx context.Context, name string, a operator.Action) error {
	var err error
	switch a {
	case operator.Initiate:
		err = o.manager.Initiate(ctx, name)
	case operator.Rekey:
		err = o.manager.Rekey(ctx, name)
	case operator.Terminate:
		err = o.manager.Terminate(ctx, name)
	default:
		err = fmt.Errorf("unknown action %q", a)
	}
	return notFound(name, err)
}

// notFound gives ike's unknown connection in the operator API's terms.
func notFound(name string, err error) error {
	if errors.Is(err, ike.ErrUnknownConnection) {
		return fmt.Errorf("connection %q: %w", name, operator.ErrNotFound)
	}
	return err
}
