package ike

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// pending is a key that this side, as exchange initiator, got from its key
// source. It is free (no SA), reserved for an IKE_SA, or sent, which spends it.
// It is kept by Key-ID and not by IKE_SA attempt, because charon resets an
// IKE_SA in mid-attempt (COOKIE, INVALID_KE_PAYLOAD) and keeps its nonce.
type pending struct {
	id       key.ID
	class    key.Class
	material *key.Material
	conn     *connState
	sa       plugin.SA // zero: free
	expires  time.Time
	sent     bool
	message  plugin.Sent // once sent
}

// GetKey reserves a key for the IKE_SA and answers its Key-ID. Asked again
// before SENT, the same IKE_SA gets the same Key-ID; a new attempt gets one
// that an earlier attempt did not send, if there is one.
func (b *Broker) GetKey(ctx context.Context, m plugin.GetKey) (plugin.GetKeyAnswer, error) {
	b.mu.Lock()
	cs, err := b.admit(m.SA, m.Connection)
	b.mu.Unlock()
	if err != nil {
		return plugin.GetKeyAnswer{}, b.refusal("GETKEY", m.Connection, err)
	}
	id, err := b.reserve(ctx, cs, m)
	switch {
	case err == nil:
		return plugin.GetKeyAnswer{KeyID: id, Policy: cs.wirePolicy()}, nil
	case cs.Policy == Optional:
		b.mu.Lock()
		cs.noKey = err.Error()
		b.mu.Unlock()
		b.log.Warn("no quantum key: trying without", "connection", cs.Name, "cause", err)
		return plugin.GetKeyAnswer{Policy: plugin.Optional}, nil
	}
	return plugin.GetKeyAnswer{}, b.refusal("GETKEY", m.Connection, err)
}

func (b *Broker) reserve(ctx context.Context, cs *connState, m plugin.GetKey) (key.ID, error) {
	p, err := b.held(cs, m.SA)
	if err != nil {
		return key.ID{}, err
	}
	if p != nil {
		b.log.Info("key reserved earlier is used", "connection", cs.Name, "key_id", p.id)
		return p.id, nil
	}
	kme := b.kmes[cs.KME]
	b.log.Info("KMS used", "connection", cs.Name, "kme", cs.KME, "address", kme.Address)
	b.log.Info("GetKey sent", "connection", cs.Name, "peer", m.Peer, "kme", cs.KME, "local_sae", cs.LocalSAE, "peer_sae", cs.PeerSAE)
	k, err := kme.Source.GetKey(ctx, cs.LocalSAE, cs.PeerSAE)
	if err != nil {
		return key.ID{}, fmt.Errorf("GetKey at KME %s: %w", cs.KME, err)
	}
	k.Class = kme.classOf(k)
	b.log.Info("key received", "connection", cs.Name, "key_id", k.ID, "class", k.Class.String(), "fingerprint", k.Material.Fingerprint())
	if err := b.fit(cs, k); err != nil {
		k.Material.Wipe()
		return key.ID{}, err
	}
	return b.keep(ctx, cs, m.SA, k)
}

// held gives the key that sa has already, or a free one of the connection; nil
// if one must be fetched.
func (b *Broker) held(cs *connState, sa plugin.SA) (*pending, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	if p := b.bySA[sa]; p != nil {
		switch {
		case p.sent:
			// Exchanges of one IKE_SA follow one another: this one has failed.
			b.failed(p.conn, fmt.Sprintf("the exchange with Key-ID %s made no CHILD_SA", p.id))
			b.drop(p)
		case p.conn == cs && now.Before(p.expires):
			return p, nil
		default:
			b.release(p)
		}
	}
	if wait := cs.notBefore.Sub(now); wait > 0 {
		return nil, fmt.Errorf("backing off for %s after %d failed set-ups, so that the key pool is not drained", wait.Round(time.Second), cs.failures)
	}
	for len(cs.free) > 0 {
		p := cs.free[0]
		if !now.Before(p.expires) {
			b.drop(p)
			continue
		}
		cs.free = cs.free[1:]
		p.sa = sa
		b.bySA[sa] = p
		return p, nil
	}
	if cs.held >= maxReserved {
		return nil, fmt.Errorf("%d keys are reserved for this connection already", cs.held)
	}
	return nil, nil
}

// fit checks a key against the connection's policy.
func (b *Broker) fit(cs *connState, k key.SupplyKey) error {
	switch {
	case k.ID.IsZero() || k.Material.Len() < 16:
		return fmt.Errorf("KME %s gave a key without Key-ID or of less than 16 bytes", cs.KME)
	case k.Class < cs.minClass():
		err := fmt.Errorf("key %s is of class %s, the connection takes %s or better", k.ID, k.Class, cs.minClass())
		report(b.log, b.events, Event{Severity: Alarm, Code: EventKeyUnusable, Connection: cs.Name, Text: err.Error()})
		return err
	}
	return nil
}

// keep takes over k and reserves it for sa. What changed while the source was
// asked leaves the key free for the next attempt.
func (b *Broker) keep(ctx context.Context, cs *connState, sa plugin.SA, k key.SupplyKey) (key.ID, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	cs.taken++
	_, twice := b.used[k.ID]
	if twice || b.pending[k.ID] != nil {
		k.Material.Wipe()
		return key.ID{}, fmt.Errorf("KME %s supplied Key-ID %s a second time", cs.KME, k.ID)
	}
	if b.closed {
		k.Material.Wipe()
		return key.ID{}, errShutdown
	}
	p := &pending{id: k.ID, class: k.Class, material: k.Material, conn: cs, expires: b.now().Add(b.kmes[cs.KME].reserve())}
	b.pending[p.id] = p
	cs.held++
	_, err := b.admit(sa, cs.Name)
	switch {
	case err != nil:
	case ctx.Err() != nil:
		err = fmt.Errorf("the key came after the deadline: %w", ctx.Err())
	case b.bySA[sa] != nil:
		err = errors.New("the IKE_SA asked twice at once")
	default:
		p.sa = sa
		b.bySA[sa] = p
		return p.id, nil
	}
	cs.free = append(cs.free, p)
	return key.ID{}, err
}

// Sent spends the key: from its answer on the Key-ID is never given out again.
func (b *Broker) Sent(_ context.Context, m plugin.Sent) (plugin.SentAnswer, error) {
	b.mu.Lock()
	cs, err := b.admit(m.SA, m.Connection)
	var ci [32]byte
	if err == nil {
		ci, err = b.spend(cs, m)
	}
	b.mu.Unlock()
	if err != nil {
		return plugin.SentAnswer{}, b.refusal("SENT", m.Connection, err)
	}
	b.log.Info("Key-ID in nonce", "connection", m.Connection, "key_id", m.KeyID, "exchange", exchangeName(m.Exchange))
	return plugin.SentAnswer{ConfirmI: ci}, nil
}

// spend does Sent; b.mu is held.
func (b *Broker) spend(cs *connState, m plugin.Sent) ([32]byte, error) {
	p := b.bySA[m.SA]
	id, ok := ParseNonce(m.Ni)
	switch {
	case p == nil || p.id != m.KeyID || p.conn != cs:
		return [32]byte{}, fmt.Errorf("Key-ID %s is not reserved for this IKE_SA", m.KeyID)
	case p.sent:
		return [32]byte{}, fmt.Errorf("Key-ID %s was sent before and is spent", m.KeyID)
	case !b.now().Before(p.expires):
		b.drop(p)
		return [32]byte{}, fmt.Errorf("the reservation of Key-ID %s has expired", m.KeyID)
	case !ok || id != m.KeyID:
		return [32]byte{}, fmt.Errorf("the nonce does not carry Key-ID %s", m.KeyID)
	}
	ci, err := sad.ConfirmI(p.material, p.id, m.SPIi, m.SPIr, m.Ni, sad.Identity(m.Initiator), uint8(m.Exchange))
	if err != nil {
		b.drop(p)
		return [32]byte{}, err
	}
	m.Ni = slices.Clone(m.Ni)
	p.sent, p.message = true, m
	p.expires = b.now().Add(spentTTL)
	b.used[p.id] = use{until: b.now().Add(usedTTL)}
	return ci, nil
}

// End frees the key that the IKE_SA had not sent; a sent one is wiped.
func (b *Broker) End(_ context.Context, sa plugin.SA) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.bySA[sa]; p != nil {
		if p.sent {
			b.failed(p.conn, fmt.Sprintf("the IKE_SA ended before Key-ID %s was used", p.id))
		}
		b.release(p)
	}
	for e := range b.bounds {
		if e.sa == sa {
			b.kill(e)
		}
	}
}

// Ignored notes that an IKE_SA_INIT answer was ignored. Anyone who sees our
// request can forge such answers: they change the cause that is shown, and
// neither what the connection does nor, however many come, how much is logged.
func (b *Broker) Ignored(_ context.Context, m plugin.Ignored) {
	cause := fmt.Sprintf("the peer at %s does not speak Q-IPsec (or the answer is forged)", m.Peer)
	if b.ignored(m, cause) {
		report(b.log, b.events, Event{
			Severity: Fault, Code: EventIgnored, Connection: m.Connection,
			Text: fmt.Sprintf("connection %q: IKE_SA_INIT answer ignored: %s", m.Connection, cause),
		})
	}
}

// ignored sets the cause and says whether it is to be reported too.
func (b *Broker) ignored(m plugin.Ignored, cause string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	cs, err := b.admit(m.SA, m.Connection)
	if err != nil {
		return false // its GETKEY was refused for that, with a report
	}
	b.blame(cs, cause, fmt.Sprintf("at %s, see whether qipsecd and the qipsec plugin run, and whether its connection has the same addresses and IKE proposals (`qipsec explain` and charon's log there); if so, somebody forges answers.", m.Peer))
	now := b.now()
	if now.Before(cs.quietUntil) {
		return false
	}
	cs.quietUntil = now.Add(ignoredQuiet)
	return true
}

// release takes the IKE_SA from a pending key: unsent it becomes free, sent it
// is dropped; b.mu is held.
func (b *Broker) release(p *pending) {
	if p.sent || !b.now().Before(p.expires) {
		b.drop(p)
		return
	}
	delete(b.bySA, p.sa)
	p.sa = plugin.SA{}
	p.conn.free = append(p.conn.free, p)
}

// take removes p from the broker's state; the caller owns its material now.
// b.mu is held.
func (b *Broker) take(p *pending) *key.Material {
	delete(b.pending, p.id)
	if b.bySA[p.sa] == p {
		delete(b.bySA, p.sa)
	}
	if i := slices.Index(p.conn.free, p); i >= 0 {
		p.conn.free = slices.Delete(p.conn.free, i, i+1)
	}
	p.conn.held--
	return p.material
}

// drop wipes p and forgets it; b.mu is held.
func (b *Broker) drop(p *pending) { b.take(p).Wipe() }

// failed counts a set-up that cost a key and made no SA; b.mu is held. From the
// third in a row on the connection waits before it asks for another key.
func (b *Broker) failed(cs *connState, cause string) {
	cs.failures++
	b.blame(cs, cause, "")
	if n := cs.failures - backOffAfter; n > 0 {
		wait := min(backOffBase<<min(n-1, 8), backOffMax)
		cs.notBefore = b.now().Add(wait)
	}
	b.log.Warn("set-up failed after its key was spent", "connection", cs.Name, "cause", cause, "failures", cs.failures)
}

func exchangeName(e plugin.Exchange) string {
	switch e {
	case plugin.IKEAuth:
		return "IKE_AUTH"
	case plugin.CreateChildSA:
		return "CREATE_CHILD_SA"
	}
	return fmt.Sprintf("exchange %d", uint8(e))
}
