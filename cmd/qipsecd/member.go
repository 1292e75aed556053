package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/kms/site"
	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// The times of a member.
const (
	recordTimeout = 3 * time.Second // of one write of the recorder
	retryLead     = time.Second     // after a reign that could not begin; also the hint to SAEs
	askLeader     = 2 * time.Second // who leads, for the operator
)

// member is this process as one of those that share an inventory
// (docs/decisions/0011). It leads or stands by; it is the supplier of its SAEs either
// way.
type member struct {
	*kms
	options store.Options
	begin   beginning
	others  *site.Client // nil: none are configured
	inside  http.Handler // calls of other members
	rec     *recorder
	log     *slog.Logger

	mu    sync.Mutex
	since time.Time // it has been leading or standing by
}

// standBy makes this process a member, which leads when it is its turn.
func (k *kms) standBy(n *conf.Node, s *stages, o store.Options, begin beginning, r *recorder, log *slog.Logger) error {
	c := n.KMS
	m := &member{kms: k, options: o, begin: begin, rec: r, log: log.With("part", "site"), since: time.Now()}
	k.site, k.keys = m, m
	var err error
	if m.inside, err = site.NewHandler(site.HandlerOptions{
		Node: n.Name, Supplier: leader{m}, Leads: m.leads, Peer: pki.NodeFromRequest, Event: r.source("site").Event, Log: m.log,
	}); err != nil {
		return err
	}
	if len(c.Members) > 0 {
		t, err := pki.NodeClient(c.Type1, n.Name, log)
		if err != nil {
			return err
		}
		if m.others, err = site.NewClient(site.ClientOptions{Members: c.Members, TLS: t, Local: c.Type1Local}); err != nil {
			return err
		}
		s.atEnd(func() error { m.others.Close(); return nil })
	}
	serveType1, err := server(m, c.Type1Listen.String(), c.Type1, s, log.With("part", "type1"))
	if err != nil {
		return err
	}
	s.add("Type-1", serveType1)
	s.add("inventory", m.run)
	return nil
}

// run leads whenever it is this member's turn, until ctx ends.
func (m *member) run(ctx context.Context) error {
	for ctx.Err() == nil {
		st, err := store.Await(ctx, m.options)
		if ctx.Err() == nil && err != nil {
			return err
		}
		if err == nil {
			err = errors.Join(m.lead(ctx, st), m.close(st))
		}
		switch {
		case ctx.Err() != nil:
		case store.Passes(err):
			m.log.Warn("the inventory was lost before this member could lead", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(retryLead):
			}
		case err != nil:
			return err
		}
	}
	return nil
}

// close closes a store. That a deposed one cannot say goodbye is no fault.
func (m *member) close(st *store.Store) error {
	if err := st.Close(); err != nil {
		m.log.Warn("the store was not closed in order", "err", err)
	}
	return nil
}

// lead serves until ctx ends or another process has taken over. Whatever ends it,
// nothing is supplied any more, and the agents have wiped their keys, when it returns.
func (m *member) lead(ctx context.Context, st *store.Store) error {
	g, err := m.begin(ctx, st)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-st.Deposed():
		case <-ctx.Done():
		}
		cancel()
	})
	defer watch.Wait()
	defer cancel()
	var s stages
	s.add("KMA", g.kma.Run)
	s.add("KSA", g.ksa.Run)
	m.rec.keep(timed{st})
	err = s.run(ctx, stageGrace, m.log, func() { m.crown(g) }, func() {
		m.crown(nil)
		g.supply.shut()
	})
	g.peers.shut()
	m.rec.flush(context.WithoutCancel(ctx))
	m.rec.keep(nil)
	return err
}

// crown makes g the current reign, nil for none.
func (m *member) crown(g *reign) {
	m.mu.Lock()
	m.since = time.Now()
	m.mu.Unlock()
	m.reign.Store(g)
	s := m.rec.source("site")
	if g != nil {
		s.Event("SITE_LEADS", string(store.SeverityRun), "this member has the inventory and leads")
		return
	}
	s.Event("SITE_STANDS_BY", string(store.SeverityRun), "this member leads no more")
}

// state is what the operator is told.
func (m *member) state(ctx context.Context) *operator.Site {
	since, ok := m.leads()
	out := &operator.Site{State: operator.SiteLeader, Since: since}
	if ok {
		return out
	}
	if out.State = operator.SiteStandby; m.reign.Load() != nil {
		out.State = operator.SiteUncertain
		return out
	}
	if m.others == nil {
		return out
	}
	ctx, cancel := context.WithTimeout(ctx, askLeader)
	defer cancel()
	if at, led, ok := m.others.Leader(ctx); ok {
		out.Leader, out.LeaderSince = at.String(), &led
	}
	return out
}

// leads tells whether this member supplies, and since when it has been so.
func (m *member) leads() (since time.Time, ok bool) {
	g := m.reign.Load()
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.since, g != nil && g.store.Held() == nil
}

// ServeHTTP is the Type-1 address: calls of peers, which only the leader answers, and
// of other members.
func (m *member) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, site.Prefix) {
		m.inside.ServeHTTP(w, r)
		return
	}
	g := m.reign.Load()
	if g == nil || !g.peers.enter() {
		type1.StandingBy(w, r)
		return
	}
	defer g.peers.leave()
	if g.store.Held() != nil {
		type1.StandingBy(w, r)
		return
	}
	g.type1.ServeHTTP(w, r)
}

// GetKey and the three below are etsi014.Supplier for the SAEs of this member.
func (m *member) GetKey(ctx context.Context, master, slave string, number, sizeBits int) ([]key.SupplyKey, error) {
	return supply(m, func(s supplier) ([]key.SupplyKey, error) { return s.GetKey(ctx, master, slave, number, sizeBits) }, key.WipeAll)
}

// GetKeyWithID gives, once, the keys that master got as ids.
func (m *member) GetKeyWithID(ctx context.Context, slave, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error) {
	return supply(m, func(s supplier) ([]key.SupplyKey, error) { return s.GetKeyWithID(ctx, slave, master, ids, sizeBits) }, key.WipeAll)
}

// Status says what caller may have for peer.
func (m *member) Status(ctx context.Context, caller, peer string) (key.SupplyStatus, error) {
	return supply(m, func(s supplier) (key.SupplyStatus, error) { return s.Status(ctx, caller, peer) }, nil)
}

// Usage keeps reports.
func (m *member) Usage(ctx context.Context, sae, peer string, reports []key.UsageReport) error {
	_, err := supply(m, func(s supplier) (struct{}, error) { return struct{}{}, s.Usage(ctx, sae, peer, reports) }, nil)
	return err
}

// supply has the KSA here answer, or the leader's.
func supply[T any](m *member, ask func(supplier) (T, error), drop func(T)) (T, error) {
	v, err := here(m, ask, drop)
	switch {
	case errors.Is(err, site.ErrStandby) && m.others != nil:
		return ask(m.others)
	case errors.Is(err, site.ErrStandby), errors.Is(err, store.ErrNotHeld), errors.Is(err, store.ErrDeposed):
		return v, &key.Unavailable{RetryAfter: retryLead, Err: err}
	}
	return v, err
}

// here has the KSA of this process answer: site.ErrStandby if it does not lead, or
// the store's error if that is not certain, also when it has become so meanwhile.
// drop is for an answer that must not be given.
func here[T any](m *member, ask func(supplier) (T, error), drop func(T)) (none T, err error) {
	g := m.reign.Load()
	if g == nil || !g.supply.enter() {
		return none, site.ErrStandby
	}
	defer g.supply.leave()
	if err := g.store.Held(); err != nil {
		return none, err
	}
	v, err := ask(g.ksa)
	if err != nil {
		return none, err
	}
	if err := g.store.Held(); err != nil {
		if drop != nil {
			drop(v)
		}
		return none, err
	}
	return v, nil
}

// leader answers for this member alone: what another one asks is never passed on.
type leader struct{ *member }

// GetKey and the three below are site.Supplier.
func (l leader) GetKey(ctx context.Context, master, slave string, number, sizeBits int) ([]key.SupplyKey, error) {
	return asked(l, func(s supplier) ([]key.SupplyKey, error) { return s.GetKey(ctx, master, slave, number, sizeBits) }, key.WipeAll)
}

// GetKeyWithID gives, once, the keys that master got as ids.
func (l leader) GetKeyWithID(ctx context.Context, slave, master string, ids []key.ID, sizeBits int) ([]key.SupplyKey, error) {
	return asked(l, func(s supplier) ([]key.SupplyKey, error) { return s.GetKeyWithID(ctx, slave, master, ids, sizeBits) }, key.WipeAll)
}

// Status says what caller may have for peer.
func (l leader) Status(ctx context.Context, caller, peer string) (key.SupplyStatus, error) {
	return asked(l, func(s supplier) (key.SupplyStatus, error) { return s.Status(ctx, caller, peer) }, nil)
}

// Usage keeps reports.
func (l leader) Usage(ctx context.Context, sae, peer string, reports []key.UsageReport) error {
	_, err := asked(l, func(s supplier) (struct{}, error) { return struct{}{}, s.Usage(ctx, sae, peer, reports) }, nil)
	return err
}

// asked is here for another member, to which one that may have been succeeded is one
// that stands by.
func asked[T any](l leader, ask func(supplier) (T, error), drop func(T)) (T, error) {
	v, err := here(l.member, ask, drop)
	if errors.Is(err, store.ErrNotHeld) || errors.Is(err, store.ErrDeposed) {
		err = site.ErrStandby
	}
	return v, err
}

// gate lets calls in until it is shut, and shutting waits for those inside.
type gate struct {
	mu   sync.RWMutex
	over bool
}

// enter reports whether the call may go on; then leave must follow.
func (g *gate) enter() bool {
	g.mu.RLock()
	if g.over {
		g.mu.RUnlock()
		return false
	}
	return true
}

func (g *gate) leave() { g.mu.RUnlock() }

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over = true
}

// timed is the store as the recorder's journal: a server that does not answer must
// not keep a reign from ending.
type timed struct{ *store.Store }

// Record adds rows to the usage history.
func (t timed) Record(ctx context.Context, events []store.Event) error {
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	return t.Store.Record(ctx, events)
}

// AppendEvent adds an event.
func (t timed) AppendEvent(ctx context.Context, e store.LogEvent) error {
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	return t.Store.AppendEvent(ctx, e)
}
