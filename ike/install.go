package ike

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// saKey tells SAs apart as the kernel does.
type saKey struct {
	dst   netip.Addr
	spi   uint32
	proto uint8
	mark  sad.Mark
}

func keyOf(id sad.ID) saKey {
	return saKey{dst: id.Dst.Addr().Unmap(), spi: id.SPI, proto: id.Protocol, mark: id.Mark}
}

// installed is an SA that the Broker had put in the SAD. It holds no key.
type installed struct {
	id        sad.ID
	e         *bound
	dir       sad.Direction
	at        time.Time
	committed bool
}

// AddSA puts an SA in the SAD, with the keys that its token stands for. Each
// token works once, for its own direction, within tokenTTL.
func (b *Broker) AddSA(ctx context.Context, m plugin.AddSA) (plugin.AddSAAnswer, error) {
	defer m.Token.Wipe()
	ref, err := b.claimToken(m)
	if err == nil {
		err = b.install(ctx, ref, m)
	}
	if err != nil {
		err = fmt.Errorf("SPI %08x: %w", m.SPI, err)
		return plugin.AddSAAnswer{}, b.refusal("add_sa", m.Connection, err)
	}
	return plugin.AddSAAnswer{Verdict: plugin.Installed}, nil
}

// claimToken finds what the token stands for and makes it void. A request that
// does not fit ends the whole CHILD_SA.
func (b *Broker) claimToken(m plugin.AddSA) (tokenRef, error) {
	t := tokenHash(m.Token)
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, err := b.admit(m.SA, m.Connection); err != nil {
		return tokenRef{}, err
	}
	ref, ok := b.tokens[t]
	if !ok {
		return tokenRef{}, errors.New("the key is not a token of BIND that can be used (unknown, used or older than 3 s): charon's own keys are never installed")
	}
	delete(b.tokens, t)
	if err := b.fits(ref, m); err != nil {
		b.endBound(ref.e, err)
		return tokenRef{}, err
	}
	return ref, nil
}

// fits compares an add_sa with the BIND of its token; b.mu is held.
func (b *Broker) fits(ref tokenRef, m plugin.AddSA) error {
	e := ref.e
	dir := sad.ItoR
	if m.Initiator == m.Inbound {
		dir = sad.RtoI
	}
	suite := sad.Suite{Encr: m.EncrAlg, EncrBits: e.suite.EncrBits, Integ: m.IntegAlg}
	enc, _, _ := e.suite.KeySizes() // register has checked the suite
	switch {
	case !b.now().Before(e.expires):
		return errors.New("the token is older than 3 s")
	case e.sa != m.SA || e.conn.Name != m.Connection:
		return errors.New("the token belongs to another IKE_SA or connection")
	case m.Initiator == e.responder || dir != ref.dir:
		return errors.New("the token belongs to the other direction")
	case m.Protocol != sad.ProtoESP || suite != e.suite || m.ESN != e.esn || m.EncrLen != enc:
		return errors.New("protocol or algorithms are not those of BIND")
	case m.IPComp != 0 || m.Offload != 0 || m.Label:
		return errors.New("IPComp, hardware offload and security labels are not supported")
	}
	return nil
}

// endBound kills e and, where we started the exchange, counts the wasted key;
// b.mu is held.
func (b *Broker) endBound(e *bound, cause error) {
	if !e.dead && !e.responder && e.session != nil {
		b.failed(e.conn, cause.Error())
	}
	b.kill(e)
}

func (b *Broker) install(ctx context.Context, ref tokenRef, m plugin.AddSA) error {
	err := b.putInSAD(ctx, ref, saOf(ref.e, m))
	if err != nil {
		b.mu.Lock()
		b.endBound(ref.e, err)
		b.mu.Unlock()
	}
	return err
}

func (b *Broker) putInSAD(ctx context.Context, ref tokenRef, sa sad.SA) error {
	e := ref.e
	b.mu.Lock() // kill wipes what keys reads
	keys, err := e.keys(ref.dir, sa)
	b.mu.Unlock()
	if err != nil {
		return err
	}
	defer keys.Wipe()
	fingerprint, err := keys.Fingerprint()
	if err != nil {
		return err
	}
	owner := sad.Owner{Connection: e.conn.Name, KeyID: e.keyID, Mix: e.mix}
	if err := b.sad.Install(ctx, sa, keys, owner); err != nil {
		return fmt.Errorf("install in the SAD: %w", err)
	}
	b.mu.Lock()
	dead := e.dead
	if !dead {
		b.installed[keyOf(sa.ID)] = &installed{id: sa.ID, e: e, dir: ref.dir, at: b.now()}
	}
	b.mu.Unlock()
	if dead {
		return errors.Join(errors.New("the IKE_SA ended or the other direction failed meanwhile"), b.sad.Rollback(ctx, sa.ID))
	}
	b.log.Info("SA installed", "connection", e.conn.Name, "key_id", e.keyID, "spi", fmt.Sprintf("%08x", sa.SPI),
		"inbound", sa.Inbound, "algorithm", e.suite.String(), "mix", e.mix.String(), "class", className(e.class), "fingerprint", fingerprint)
	return nil
}

// keys gives the keys of one direction; the caller wipes them. b.mu is held.
func (e *bound) keys(dir sad.Direction, sa sad.SA) (sad.Keys, error) {
	if e.session != nil {
		return e.session.SAKey(dir, sa.SPI, sa.Mode)
	}
	k := e.raw[dir]
	var out sad.Keys
	var err error
	if out.Enc, err = k.Enc.Clone(); err != nil {
		return sad.Keys{}, err
	}
	if k.Integ != nil {
		if out.Integ, err = k.Integ.Clone(); err != nil {
			out.Wipe()
			return sad.Keys{}, err
		}
	}
	k.Wipe()
	return out, nil
}

// saOf turns charon's SA into sad's, under the connection's hard limits.
func saOf(e *bound, m plugin.AddSA) sad.SA {
	sa := sad.SA{
		ID:    sad.ID{Src: m.Src, Dst: m.Dst, SPI: m.SPI, Protocol: m.Protocol, Mark: sad.Mark(m.Mark), IfID: m.IfID},
		ReqID: m.ReqID, Mode: sad.Mode(m.Mode), Suite: e.suite, ESN: m.ESN, Window: m.Window,
		Inbound: m.Inbound, Larval: m.Update, Encap: m.Encap,
		CopyDF: m.CopyDF, CopyECN: m.CopyECN, CopyDSCP: sad.CopyDSCP(m.CopyDSCP),
		TFC: m.TFC, SetMark: sad.Mark(m.SetMark), Lifetime: sad.Lifetime(m.Lifetime),
	}
	l := &sa.Lifetime
	limit(&l.TimeLife, &l.TimeRekey, uint64(e.conn.MaxKeyAge/time.Second))
	limit(&l.BytesLife, &l.BytesRekey, e.conn.MaxKeyBytes)
	limit(&l.PacketsLife, &l.PacketsRekey, e.conn.MaxKeyPackets)
	if len(m.SrcTS) > 0 {
		sa.SrcTS = m.SrcTS[0].Prefix()
	}
	if len(m.DstTS) > 0 {
		sa.DstTS = m.DstTS[0].Prefix()
	}
	return sa
}

// limit lowers hard to at most limit, and soft below it; 0 is no limit.
func limit(hard, soft *uint64, limit uint64) {
	if limit == 0 {
		return
	}
	if *hard == 0 || *hard > limit {
		*hard = limit
	}
	if *soft == 0 || *soft >= *hard {
		*soft = *hard - *hard/10
	}
}

// Commit says that charon has acknowledged the SA. With the second direction
// the CHILD_SA is complete.
func (b *Broker) Commit(ctx context.Context, id plugin.SAID) error {
	sid := saID(id)
	if err := b.sad.Commit(ctx, sid); err != nil {
		return fmt.Errorf("commit SPI %08x: %w", id.SPI, err)
	}
	b.mu.Lock()
	rec := b.installed[keyOf(sid)]
	if rec == nil {
		b.mu.Unlock()
		return fmt.Errorf("commit SPI %08x: not an SA of this broker", id.SPI)
	}
	rec.committed = true
	rec.e.up[rec.dir] = true
	whole := rec.e.up[0] && rec.e.up[1]
	if whole {
		b.complete(rec.e)
	}
	b.mu.Unlock()
	if whole && rec.e.fallback != "" {
		b.fellBack(rec.e.conn.Name, rec.e.fallback)
	}
	return nil
}

// fellBack raises the alarm that a connection runs without a quantum key, unless
// that is known.
func (b *Broker) fellBack(name, cause string) {
	b.mu.Lock()
	cs := b.conns[name]
	known := !cs.fell.IsZero()
	cs.fell = b.now()
	b.mu.Unlock()
	if !known {
		report(b.log, b.events, Event{
			Severity: Alarm, Code: EventFallback, Connection: name,
			Text: fmt.Sprintf("connection %q falls back to IKE's own keys: %s", name, cause),
		})
	}
}

// keyed says that at that time no CHILD_SA of a connection was without a quantum
// key: up tells whether there was one at all.
func (b *Broker) keyed(name string, at time.Time, up bool) {
	b.mu.Lock()
	cs := b.conns[name]
	over := !cs.fell.IsZero() && cs.fell.Before(at)
	if over {
		cs.fell = time.Time{}
	}
	b.mu.Unlock()
	if over && up {
		report(b.log, b.events, Event{
			Severity: Run, Code: EventFallback, Connection: name,
			Text: fmt.Sprintf("connection %q is keyed with quantum keys again", name),
		})
	}
}

// keyID gives the Key-ID of an SA that this Broker installed; zero without one.
func (b *Broker) keyID(id sad.ID) key.ID {
	b.mu.Lock()
	defer b.mu.Unlock()
	if rec := b.installed[keyOf(id)]; rec != nil {
		return rec.e.keyID
	}
	return key.ID{}
}

// complete notes a CHILD_SA with both SAs in the SAD; b.mu is held.
func (b *Broker) complete(e *bound) {
	cs := e.conn
	cs.fallback, cs.mute, cs.next = e.fallback, e.mute && e.fallback != "", "" // what called for that step is over
	if e.fallback == "" && !e.responder {
		cs.failures, cs.notBefore = 0, time.Time{}
	}
	delete(b.bounds, e)
	line := "session established"
	if e.responder {
		line = "result sent to the initiator" // who may still refuse it: C_r is on its way
	}
	b.log.Info(line, "connection", cs.Name, "key_id", e.keyID, "exchange", exchangeName(e.exchange), "mix", e.mix.String())
}

// Rollback takes an SA out again that charon did not acknowledge in time.
func (b *Broker) Rollback(ctx context.Context, id plugin.SAID) {
	sid := saID(id)
	b.mu.Lock()
	rec := b.installed[keyOf(sid)]
	delete(b.installed, keyOf(sid))
	undo := b.sad.Rollback
	if rec != nil {
		if rec.committed {
			undo = b.sad.Remove
		}
		b.endBound(rec.e, errors.New("charon did not acknowledge an SA"))
	}
	b.mu.Unlock()
	if err := undo(ctx, sid); err != nil {
		b.log.Warn("SA not rolled back, the next comparison removes it", "spi", fmt.Sprintf("%08x", id.SPI), "cause", err)
	}
}

// QuerySA gives an SA's counters without reading its key.
func (b *Broker) QuerySA(ctx context.Context, id plugin.SAID) (plugin.Counters, error) {
	c, err := b.sad.Query(ctx, saID(id))
	if err != nil {
		return plugin.Counters{}, fmt.Errorf("query SPI %08x: %w", id.SPI, err)
	}
	return plugin.Counters(c), nil
}

// UpdateSA moves an SA to new addresses or ports. One that had to be taken out
// and added anew is queued for a rekeying.
func (b *Broker) UpdateSA(ctx context.Context, m plugin.UpdateSA) error {
	from := saID(m.ID)
	moved, err := b.sad.Update(ctx, sad.Change{ID: from, NewSrc: m.NewSrc, NewDst: m.NewDst, NewEncap: m.NewEncap})
	if err != nil {
		return fmt.Errorf("update SPI %08x: %w", m.ID.SPI, err)
	}
	to := from
	to.Src, to.Dst = m.NewSrc, m.NewDst
	b.mu.Lock()
	if rec := b.installed[keyOf(from)]; rec != nil {
		delete(b.installed, keyOf(from))
		rec.id = to
		b.installed[keyOf(to)] = rec
	}
	b.mu.Unlock()
	if !moved {
		return nil
	}
	select {
	case b.rekeys <- to:
	default:
		b.log.Warn("moved SA not queued for rekeying: the queue is full", "spi", fmt.Sprintf("%08x", to.SPI))
	}
	return nil
}

func saID(id plugin.SAID) sad.ID {
	return sad.ID{Src: id.Src, Dst: id.Dst, SPI: id.SPI, Protocol: id.Protocol, Mark: sad.Mark(id.Mark), IfID: id.IfID}
}

// prune forgets SAs that were installed before t and are not among present.
func (b *Broker) prune(present []sad.State, t time.Time) {
	there := map[saKey]bool{}
	for _, s := range present {
		there[keyOf(s.ID)] = true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for k, rec := range b.installed {
		if !there[k] && rec.at.Before(t) {
			delete(b.installed, k)
		}
	}
}

// className is the class for logs and status; "none" without a quantum key.
func className(c key.Class) string {
	if c == 0 {
		return "none"
	}
	return c.String()
}
