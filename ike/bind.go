package ike

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// bound is a CHILD_SA between BIND and its second add_sa: the keys of its two
// directions and the tokens by which charon will name them.
type bound struct {
	conn      *connState
	sa        plugin.SA
	responder bool // we answer the exchange
	exchange  plugin.Exchange
	keyID     key.ID // zero on fallback
	class     key.Class
	mix       sad.Mix
	fallback  string // why there is no quantum key
	mute      bool   // the peer does not announce Q-IPsec
	suite     sad.Suite
	esn       bool

	session *sad.Session // nil on fallback
	raw     [2]sad.Keys  // on fallback: charon's KEYMAT, as a stock peer uses it
	tokens  [2][32]byte  // SHA-256 of each direction's token, by sad.Direction
	expires time.Time
	dead    bool // failed, ended or expired: neither direction is installed any more
	up      [2]bool
}

// tokenRef says which direction of which bound a token names.
type tokenRef struct {
	e   *bound
	dir sad.Direction
}

// noKeyError is a cause for which an optional connection may fall back; every
// other cause refuses.
type noKeyError struct{ cause error }

func (e noKeyError) Error() string { return e.cause.Error() }
func (e noKeyError) Unwrap() error { return e.cause }

func noKey(format string, a ...any) error { return noKeyError{fmt.Errorf(format, a...)} }

// Bind decides whether a CHILD_SA may be made, and holds its keys until add_sa
// asks for them by token.
func (b *Broker) Bind(ctx context.Context, m plugin.Bind) (plugin.BindAnswer, error) {
	defer func() { m.Keymat.Wipe(); m.Token.Wipe() }()
	b.mu.Lock()
	cs, err := b.admit(m.SA, m.Connection)
	b.mu.Unlock()
	if err != nil {
		return plugin.BindAnswer{}, b.refusal("BIND", m.Connection, err)
	}
	sent := !m.Responder && b.sent(m.SA)
	answer, fallback, err := b.bind(ctx, cs, &m)
	if sent && (err != nil || fallback != "") {
		b.wasted(cs, m.SA, cmp.Or(fallback, fmt.Sprint(err)))
	}
	if err != nil {
		return plugin.BindAnswer{}, b.refusal("BIND", m.Connection, err)
	}
	if fallback != "" {
		// The alarm comes with the CHILD_SA, once for as long as that lasts.
		b.log.Warn("no quantum key for this CHILD_SA", "event", EventFallback, "connection", cs.Name, "cause", fallback)
	}
	return answer, nil
}

// sent reports whether sa has a spent key whose exchange has not ended.
func (b *Broker) sent(sa plugin.SA) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.bySA[sa]
	return p != nil && p.sent
}

// wasted counts a spent key that keyed no CHILD_SA and drops it.
func (b *Broker) wasted(cs *connState, sa plugin.SA, cause string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failed(cs, cause)
	if p := b.bySA[sa]; p != nil && p.sent {
		b.drop(p)
	}
}

// bind gives the answer, or why the CHILD_SA has no quantum key.
func (b *Broker) bind(ctx context.Context, cs *connState, m *plugin.Bind) (answer plugin.BindAnswer, fallback string, err error) {
	if err := checkBind(cs, m); err != nil {
		return plugin.BindAnswer{}, "", err
	}
	e := &bound{
		conn: cs, sa: m.SA, responder: m.Responder, exchange: m.Exchange, mute: !m.PeerSpeaks,
		suite: sad.Suite{Encr: m.Transforms.Encr, EncrBits: m.Transforms.EncrBits, Integ: m.Transforms.Integ},
		esn:   m.Transforms.ESN,
	}
	claim := b.claimInitiator
	if m.Responder {
		claim = b.claimResponder
	}
	var confirm []byte
	k, class, err := claim(ctx, cs, m)
	var none noKeyError
	switch {
	case err == nil:
		defer k.Wipe()
		confirm, err = e.agree(k, class, cs, m)
	case errors.As(err, &none) && cs.Policy == Optional:
		err = e.fallBack(m, none.Error())
	}
	if err != nil {
		return plugin.BindAnswer{}, "", err
	}
	if err := b.register(e, m.Token); err != nil {
		return plugin.BindAnswer{}, "", err
	}
	return plugin.BindAnswer{ConfirmR: confirm}, e.fallback, nil
}

// checkBind checks everything that needs no key, so that a refused request
// costs none.
func checkBind(cs *connState, m *plugin.Bind) error {
	local, peer := m.Initiator, m.Replier
	if m.Responder {
		local, peer = peer, local
	}
	id, carried := ParseNonce(m.Ni)
	switch {
	case m.Transforms.Protocol != 3:
		return fmt.Errorf("IPsec protocol %d is not ESP", m.Transforms.Protocol)
	case m.Exchange != plugin.IKEAuth && m.Exchange != plugin.CreateChildSA:
		return fmt.Errorf("%s makes no CHILD_SA", exchangeName(m.Exchange))
	case !sameIdentity(peer, cs.peerID):
		return fmt.Errorf("the peer authenticated as %s; SAE %s is bound to %s", identityText(peer), cs.PeerSAE, cs.RemoteID)
	case !sameIdentity(local, cs.localID):
		return fmt.Errorf("we authenticated as %s; SAE %s is bound to %s", identityText(local), cs.LocalSAE, cs.LocalID)
	case m.KeyID != id || carried == m.KeyID.IsZero():
		return errors.New("the Key-ID is not the one in Ni")
	}
	return nil
}

// claimInitiator takes the key that was sent with this Ni out of the pending
// ones.
func (b *Broker) claimInitiator(_ context.Context, cs *connState, m *plugin.Bind) (*key.Material, key.Class, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.bySA[m.SA]
	switch {
	case m.KeyID.IsZero() && cs.noKey != "":
		return nil, 0, noKey("Ni carries no Key-ID: %s", cs.noKey)
	case m.KeyID.IsZero():
		return nil, 0, noKey("Ni carries no Key-ID")
	case p == nil || p.id != m.KeyID || p.conn != cs:
		return nil, 0, fmt.Errorf("Key-ID %s is not pending for this IKE_SA (used, expired or never reserved)", m.KeyID)
	case !p.sent && !m.PeerSpeaks:
		// The key was neither sent with a confirmation nor used: it stays reserved.
		return nil, 0, noKey("the peer does not announce Q-IPsec in IKE_SA_INIT")
	case !p.sent:
		return nil, 0, fmt.Errorf("Key-ID %s was not reported as sent", m.KeyID)
	case p.message.SPIi != m.SPIi || p.message.SPIr != m.SPIr || p.message.Exchange != m.Exchange || !bytes.Equal(p.message.Ni, m.Ni):
		return nil, 0, fmt.Errorf("Key-ID %s was sent in another exchange", m.KeyID)
	case !b.now().Before(p.expires):
		return nil, 0, fmt.Errorf("Key-ID %s has expired", m.KeyID)
	case len(m.Confirm) == 0:
		return nil, 0, noKey("the peer confirms no key (C_r is missing)")
	}
	return b.take(p), p.class, nil
}

// claimResponder fetches the key that Ni names, after everything that can be
// checked without it: a stripped or forged request must not cost a key.
func (b *Broker) claimResponder(ctx context.Context, cs *connState, m *plugin.Bind) (*key.Material, key.Class, error) {
	switch {
	case m.KeyID.IsZero() && !m.PeerSpeaks:
		return nil, 0, noKey("the peer does not announce Q-IPsec and its Ni carries no Key-ID")
	case m.KeyID.IsZero():
		return nil, 0, noKey("the peer's Ni carries no Key-ID: it got no key")
	}
	b.log.Info("nonce received with Key-ID", "connection", cs.Name, "key_id", m.KeyID, "exchange", exchangeName(m.Exchange))
	switch {
	case len(m.Confirm) == 0:
		return nil, 0, noKey("C_i is missing, Key-ID %s is not fetched", m.KeyID)
	case len(m.Confirm) != sad.ConfirmSize:
		return nil, 0, fmt.Errorf("the peer's C_i has %d bytes, not %d", len(m.Confirm), sad.ConfirmSize)
	}
	if err := b.markUsed(cs, m.KeyID); err != nil {
		return nil, 0, err
	}
	kme := b.kmes[cs.KME]
	b.log.Info("GetKeyWithID sent", "connection", cs.Name, "key_id", m.KeyID, "kme", cs.KME,
		"address", kme.Address, "local_sae", cs.LocalSAE, "peer_sae", cs.PeerSAE)
	k, err := kme.Source.GetKeyWithID(ctx, cs.LocalSAE, cs.PeerSAE, m.KeyID)
	if err != nil {
		return nil, 0, noKey("GetKeyWithID at KME %s for Key-ID %s: %w", cs.KME, m.KeyID, err)
	}
	k.Class = kme.classOf(k)
	b.log.Info("key received", "connection", cs.Name, "key_id", k.ID, "class", k.Class.String(), "fingerprint", k.Material.Fingerprint())
	err = b.fit(cs, k)
	if err == nil && k.ID != m.KeyID {
		err = fmt.Errorf("KME %s gave Key-ID %s for %s", cs.KME, k.ID, m.KeyID)
	}
	if err == nil {
		err = sad.VerifyConfirmI(m.Confirm, k.Material, k.ID, m.SPIi, m.SPIr, m.Ni, sad.Identity(m.FirstIDi), uint8(m.Exchange))
	}
	if err != nil {
		k.Material.Wipe()
		return nil, 0, err
	}
	return k.Material, k.Class, nil
}

// markUsed refuses a Key-ID that was used on this side before, in either role and by
// whichever connection. That comes before the key is fetched, so that two requests at
// once cannot both pass; and what one peer names is bounded, so that it takes the
// room of nobody else.
func (b *Broker) markUsed(cs *connState, id key.ID) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.used[id]; ok || b.pending[id] != nil {
		return fmt.Errorf("Key-ID %s was used before (a replay or a reflection)", id)
	}
	if cs.used >= maxUsed {
		return fmt.Errorf("the peer has named %d Key-IDs within %v: no more are taken from it for now", cs.used, usedTTL)
	}
	cs.used++
	b.used[id] = use{until: b.now().Add(usedTTL), by: cs}
	return nil
}

// agree makes the session from the key and checks or makes C_r. k and KEYMAT
// are borrowed.
func (e *bound) agree(k *key.Material, class key.Class, cs *connState, m *plugin.Bind) ([]byte, error) {
	e.keyID, e.class, e.mix = m.KeyID, class, sad.MixHybrid
	if cs.Mix == QKDOnly {
		e.mix = sad.MixQKD
	}
	keymat := []*key.Material{m.Keymat.EncrI, m.Keymat.IntegI, m.Keymat.EncrR, m.Keymat.IntegR}
	s, err := sad.NewSession(k, keymat, sad.Context{
		Mix: e.mix, Class: class, KeyID: m.KeyID, SPIi: m.SPIi, SPIr: m.SPIr,
		Initiator: sad.Identity(m.Initiator), Responder: sad.Identity(m.Replier),
		Exchange: uint8(m.Exchange), Ni: m.Ni, Nr: m.Nr, Suite: e.suite, ESN: e.esn,
	})
	if err != nil {
		return nil, err
	}
	if !m.Responder {
		if err := s.VerifyConfirmR(m.Confirm); err != nil {
			s.Wipe()
			return nil, err
		}
		e.session = s
		return nil, nil
	}
	cr, err := s.ConfirmR()
	if err != nil {
		s.Wipe()
		return nil, err
	}
	e.session = s
	return cr[:], nil
}

// fallBack takes KEYMAT out of m as the keys of the SAs.
func (e *bound) fallBack(m *plugin.Bind, cause string) error {
	if _, _, err := e.suite.KeySizes(); err != nil {
		return err
	}
	e.mix, e.fallback = sad.MixClassical, cause
	e.raw[sad.ItoR] = sad.Keys{Enc: m.Keymat.EncrI, Integ: m.Keymat.IntegI}
	e.raw[sad.RtoI] = sad.Keys{Enc: m.Keymat.EncrR, Integ: m.Keymat.IntegR}
	m.Keymat = plugin.Chunks{}
	return nil
}

// tokenHash is what is kept of a token: enough to know it again, of no use to
// one who reads it.
func tokenHash(parts ...*key.Material) [32]byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p.Bytes())
	}
	return [32]byte(h.Sum(nil))
}

// register makes e wait for its two add_sa. On error e is wiped.
func (b *Broker) register(e *bound, t plugin.Chunks) error {
	e.tokens = [2][32]byte{tokenHash(t.EncrI, t.IntegI), tokenHash(t.EncrR, t.IntegR)}
	b.mu.Lock()
	defer b.mu.Unlock()
	_, err := b.admit(e.sa, e.conn.Name) // it may have ended while a key was fetched
	enc, integ, sizeErr := e.suite.KeySizes()
	switch {
	case err != nil:
	case sizeErr != nil:
		err = sizeErr
	case t.EncrI.Len()+t.IntegI.Len() != enc+integ || t.EncrR.Len()+t.IntegR.Len() != enc+integ:
		err = errors.New("a token has not the size of the keys it stands for")
	case e.tokens[0] == e.tokens[1] || b.tokens[e.tokens[0]].e != nil || b.tokens[e.tokens[1]].e != nil:
		err = errors.New("a token is not unique")
	}
	if err != nil {
		b.kill(e)
		return err
	}
	e.expires = b.now().Add(tokenTTL)
	b.bounds[e] = struct{}{}
	b.tokens[e.tokens[0]] = tokenRef{e, sad.ItoR}
	b.tokens[e.tokens[1]] = tokenRef{e, sad.RtoI}
	return nil
}

// kill wipes the keys of e and makes its tokens void; b.mu is held.
func (b *Broker) kill(e *bound) {
	e.dead = true
	delete(b.bounds, e)
	for _, t := range e.tokens {
		if b.tokens[t].e == e {
			delete(b.tokens, t)
		}
	}
	e.session.Wipe()
	for _, k := range e.raw {
		k.Wipe()
	}
}
