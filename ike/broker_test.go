package ike

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/identity"
	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// Both ends install the same keys, the two directions differ, every exchange
// has keys of its own, and the log tells the story in order without a key byte.
func TestExchange(t *testing.T) {
	for name, tc := range map[string]struct {
		exchange   plugin.Exchange
		transforms plugin.Transforms
		mix        Mix
	}{
		"first, GCM":       {plugin.IKEAuth, gcm, Hybrid},
		"rekey, GCM":       {plugin.CreateChildSA, gcm, Hybrid},
		"rekey, CBC, ESN":  {plugin.CreateChildSA, plugin.Transforms{Protocol: 3, Encr: 12, EncrBits: 128, Integ: 14, ESN: true}, Hybrid},
		"first, CBC, qkd":  {plugin.IKEAuth, cbc, QKDOnly},
		"rekey, GCM, qkd":  {plugin.CreateChildSA, gcm, QKDOnly},
		"first, CBC, hybr": {plugin.IKEAuth, cbc, Hybrid},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, func(c *Connection) { c.Mix = tc.mix })
			r := newTry(1, 2)
			r.exchange, r.transforms = tc.exchange, tc.transforms
			id := p.a.mustKey(1)
			secret := hex.EncodeToString(p.kms.out[0].Bytes())
			if err := p.run(r, id); err != nil {
				t.Fatal(err)
			}
			if p.a.sad.count() != 2 || p.b.sad.count() != 2 {
				t.Fatalf("%d and %d SAs", p.a.sad.count(), p.b.sad.count())
			}
			prints := map[string]bool{}
			for k, sa := range p.a.sad.sas {
				other, ok := p.b.sad.sas[k]
				if !ok || other.fingerprint != sa.fingerprint || other.Inbound == sa.Inbound || !sa.committed {
					t.Errorf("SA %v: %+v, at the other end %+v", k, sa, other)
				}
				if sa.owner.KeyID != id || sa.owner.Connection != "link" {
					t.Errorf("owner %+v", sa.owner)
				}
				prints[sa.fingerprint] = true
			}
			if len(prints) != 2 {
				t.Error("both directions have one key")
			}
			story(t, p.a.log.String(), "KMS used", "GetKey sent", "key received", "Key-ID in nonce", "SA installed", "SA installed", "session established")
			story(t, p.b.log.String(), "nonce received with Key-ID", "GetKeyWithID sent", "key received", "SA installed", "SA installed", "result sent to the initiator")
			for _, log := range []string{p.a.log.String(), p.b.log.String()} {
				for i := 0; i+8 <= len(secret); i += 8 {
					if strings.Contains(log, secret[i:i+8]) {
						t.Error("key bytes in the log")
					}
				}
			}
		})
	}
}

// story checks that the messages occur in this order, each in a line with the
// connection.
func story(t *testing.T, log string, want ...string) {
	t.Helper()
	i := 0
	for l := range strings.Lines(log) {
		if i < len(want) && strings.Contains(l, `msg="`+want[i]) {
			if !strings.Contains(l, "connection=link") {
				t.Errorf("no connection in %q", l)
			}
			i++
		}
	}
	if i != len(want) {
		t.Errorf("%q is missing, or out of order, in:\n%s", want[i], log)
	}
}

// The rows of what was measured with real charons: which events spend a key.
func TestReservation(t *testing.T) {
	end := func(e *end, uid uint32) { e.End(context.Background(), e.sa(uid)) }
	for name, tc := range map[string]struct {
		do   func(t *testing.T, p *pair)
		made int // keys taken from the source
	}{
		"asked again before SENT: the same Key-ID": {func(t *testing.T, p *pair) {
			if first := p.a.mustKey(1); p.a.mustKey(1) != first {
				t.Error("two Key-IDs")
			}
		}, 1},
		"dead peer, three attempts, then alive: one Key-ID, used at last": {func(t *testing.T, p *pair) {
			first := p.a.mustKey(1)
			for uid := range uint32(3) {
				end(p.a, uid+1)
				if p.a.mustKey(uid+2) != first {
					t.Error("another Key-ID")
				}
			}
			if err := p.run(newTry(4, 1), first); err != nil {
				t.Error(err)
			}
		}, 1},
		"two IKE_SAs at once: a key each": {func(t *testing.T, p *pair) {
			if p.a.mustKey(1) == p.a.mustKey(2) {
				t.Error("one Key-ID for two IKE_SAs")
			}
		}, 2},
		"man in the middle: one key spent per attempt": {func(t *testing.T, p *pair) {
			first := p.a.mustKey(1)
			if err := p.a.sent(newTry(1, 0), first); err != nil {
				t.Fatal(err)
			}
			end(p.a, 1)
			if p.a.mustKey(2) == first {
				t.Error("a spent Key-ID was given out again")
			}
		}, 2},
		"INVALID_KE in CREATE_CHILD_SA: the first key spent, a second one at once": {func(t *testing.T, p *pair) {
			first := p.a.mustKey(1)
			if err := p.a.sent(newTry(1, 0), first); err != nil {
				t.Fatal(err)
			}
			second := p.a.mustKey(1)
			if second == first {
				t.Error("a spent Key-ID was given out again")
			}
			if err := p.run(newTry(1, 2), second); err != nil {
				t.Error(err)
			}
		}, 2},
		"retry inside one IKE_SA with the same Ni after SENT: refused": {func(t *testing.T, p *pair) {
			id := p.a.mustKey(1)
			if err := p.a.sent(newTry(1, 0), id); err != nil {
				t.Fatal(err)
			}
			p.a.refused(p.a.sent(newTry(1, 0), id), "spent")
		}, 1},
		"SENT without reservation": {func(t *testing.T, p *pair) {
			p.a.refused(p.a.sent(newTry(1, 0), key.ID{9}), "not reserved")
		}, 0},
		"SENT by another IKE_SA": {func(t *testing.T, p *pair) {
			id := p.a.mustKey(1)
			p.a.refused(p.a.sent(newTry(2, 0), id), "not reserved")
		}, 1},
		"SENT with another Ni": {func(t *testing.T, p *pair) {
			r := newTry(1, 0)
			if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
				t.Fatal(err)
			}
			id := p.a.mustKey(2)
			m := r.message(p.a)
			m.SA, m.KeyID = p.a.sa(2), id
			_, err := p.a.Sent(t.Context(), m)
			p.a.refused(err, "the nonce does not carry")
		}, 2},
		"reservation too old": {func(t *testing.T, p *pair) {
			id := p.a.mustKey(1)
			p.a.clock.add(KME{}.reserve())
			p.a.refused(p.a.sent(newTry(1, 0), id), "expired")
			if p.a.mustKey(2) == id {
				t.Error("an expired Key-ID was given out")
			}
		}, 2},
		"a source whose keys live shorter": {func(t *testing.T, p *pair) {
			p.a.kmes["local"] = KME{Source: p.kms, KeyLife: 10 * time.Second}
			id := p.a.mustKey(1)
			p.a.clock.add(8*time.Second - 1)
			if p.a.mustKey(1) != id {
				t.Error("dropped too early")
			}
			p.a.clock.add(1)
			if p.a.mustKey(1) == id {
				t.Error("a key that the peer can hardly fetch in time was given out")
			}
		}, 2},
		"swept when too old, free or not": {func(t *testing.T, p *pair) {
			p.a.mustKey(1)
			p.a.mustKey(2)
			end(p.a, 2)
			p.a.clock.add(KME{}.reserve())
			p.a.sweep()
			if n := p.kms.leaks(); n != 0 || len(p.a.pending) != 0 || p.a.conns["link"].held != 0 {
				t.Errorf("%d keys left", n)
			}
		}, 2},
		"charon gone: unsent free, sent wiped": {func(t *testing.T, p *pair) {
			unsent, sent := p.a.mustKey(1), p.a.mustKey(2)
			if err := p.a.sent(newTry(2, 0), sent); err != nil {
				t.Fatal(err)
			}
			p.a.Gone(p.a.inst)
			_, err := p.a.getKey(3)
			p.a.refused(err, "hello")
			if n := p.kms.leaks(); n != 1 {
				t.Errorf("%d keys held, want the unsent one", n)
			}
			p.a.inst[0]++
			p.a.serve(p.a.inst)
			if p.a.mustKey(1) != unsent {
				t.Error("the unsent key was not used by the new charon")
			}
		}, 2},
		"a charon is served from Verify on, and again after it was gone": {func(t *testing.T, p *pair) {
			hello := plugin.Hello{Instance: p.a.inst, ABI: plugin.ABI, Version: "5.9.8"}
			hello.Instance[0]++
			p.a.inst = hello.Instance
			again := func() {
				if err := p.a.Hello(t.Context(), hello); err != nil {
					t.Fatal(err)
				}
			}
			again()
			_, err := p.a.getKey(1)
			p.a.refused(err, "not yet compared")
			if err := p.a.Verify("5.9.8"); err != nil {
				t.Fatal(err)
			}
			p.a.mustKey(1)
			p.a.Gone(hello.Instance)
			again()
			p.a.mustKey(2) // the key of 1, which was not sent
			if err := p.a.Verify("6.0.1"); err == nil {
				t.Error("a plugin of another version was verified")
			}
			again()
			if _, err := p.a.getKey(3); err == nil {
				t.Error("hello made a plugin of another version served")
			}
		}, 1},
		"a new charon takes over: unsent free, the old one refused": {func(t *testing.T, p *pair) {
			unsent, old := p.a.mustKey(1), p.a.inst
			p.a.inst[0]++
			p.a.serve(p.a.inst)
			if err := p.a.Hello(t.Context(), plugin.Hello{Instance: old, ABI: plugin.ABI}); err == nil {
				t.Error("the old charon came back")
			}
			if p.a.mustKey(1) != unsent {
				t.Error("the unsent key was not used by the new charon")
			}
		}, 1},
		"the IKE_SA ended while the key was fetched: the key is free": {func(t *testing.T, p *pair) {
			p.kms.onGet = func() { p.a.Gone(p.a.inst) }
			if _, err := p.a.getKey(1); err == nil {
				t.Error("a Key-ID for a charon that is gone")
			}
			p.kms.onGet = nil
			p.a.serve(p.a.inst)
			p.a.mustKey(2)
		}, 1},
		"a source that gives one Key-ID twice": {func(t *testing.T, p *pair) {
			p.kms.fixed = key.ID{7}
			p.a.mustKey(1)
			_, err := p.a.getKey(2)
			p.a.refused(err, "second time")
		}, 2},
		"too many reservations": {func(t *testing.T, p *pair) {
			for uid := range uint32(maxReserved) {
				p.a.mustKey(uid + 1)
			}
			_, err := p.a.getKey(99)
			p.a.refused(err, "reserved for this connection already")
		}, maxReserved},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, nil)
			tc.do(t, p)
			if made, _ := p.kms.counts(); made != tc.made {
				t.Errorf("%d keys were taken, want %d", made, tc.made)
			}
		})
	}
}

// The third failure in a row waits, each further one longer up to a minute, and
// a CHILD_SA ends it.
func TestBackOff(t *testing.T) {
	p := newPair(t, nil)
	uid := uint32(1)
	fail := func() {
		t.Helper()
		if err := p.a.sent(newTry(uid, 0), p.a.mustKey(uid)); err != nil {
			t.Fatal(err)
		}
		p.a.End(t.Context(), p.a.sa(uid))
		uid++
	}
	fail()
	fail()
	fail()
	for _, wait := range []time.Duration{5, 10, 20, 40, 60, 60, 60} {
		wait *= time.Second
		p.a.clock.add(wait - time.Millisecond)
		if _, err := p.a.getKey(uid); err == nil || !strings.Contains(err.Error(), "backing off") {
			t.Fatalf("%s after the failure: %v", wait, err)
		}
		p.a.clock.add(time.Millisecond)
		fail()
	}
	p.a.clock.add(backOffMax)
	if err := p.run(newTry(uid, 1), p.a.mustKey(uid)); err != nil {
		t.Fatal(err)
	}
	uid++
	fail()
	fail() // no wait after a success
}

func TestBindRefusals(t *testing.T) {
	change := func(f func(*plugin.Bind)) func(*pair, *try, *plugin.Bind) {
		return func(_ *pair, _ *try, m *plugin.Bind) { f(m) }
	}
	for name, tc := range map[string]struct {
		responder bool
		spoil     func(p *pair, r *try, m *plugin.Bind)
		cause     string
		fetched   int // keys the responder got from its source
	}{
		"C_i missing":      {true, change(func(m *plugin.Bind) { m.Confirm = nil }), "C_i is missing", 0},
		"C_i short":        {true, change(func(m *plugin.Bind) { m.Confirm = m.Confirm[:31] }), "31 bytes", 0},
		"C_i wrong":        {true, change(func(m *plugin.Bind) { m.Confirm = bytes.Repeat([]byte{1}, 32) }), "confirmation differs", 1},
		"keys differ":      {true, func(p *pair, _ *try, _ *plugin.Bind) { p.kms.tamper = true }, "confirmation differs", 1},
		"other IDi":        {true, change(func(m *plugin.Bind) { m.FirstIDi = ident("c") }), "confirmation differs", 1},
		"other SPI":        {true, change(func(m *plugin.Bind) { m.SPIi[0] ^= 1 }), "confirmation differs", 1},
		"wrong peer":       {true, change(func(m *plugin.Bind) { m.Initiator = ident("c") }), `authenticated as "c.example"`, 0},
		"peer, other type": {true, change(func(m *plugin.Bind) { m.Initiator.Type = identity.Email }), "authenticated as", 0},
		"wrong self":       {true, change(func(m *plugin.Bind) { m.Replier = ident("c") }), "we authenticated as", 0},
		"stock peer":       {true, change(func(m *plugin.Bind) { m.Ni, m.KeyID, m.PeerSpeaks = m.Ni[:32], key.ID{}, false }), "does not announce", 0},
		"peer without key": {true, change(func(m *plugin.Bind) { m.Ni, m.KeyID = m.Ni[:32], key.ID{} }), "it got no key", 0},
		"Key-ID not in Ni": {true, change(func(m *plugin.Bind) { m.KeyID[0] ^= 1 }), "not the one in Ni", 0},
		"Ni has a Key-ID":  {true, change(func(m *plugin.Bind) { m.KeyID = key.ID{} }), "not the one in Ni", 0},
		"unknown key":      {true, func(p *pair, _ *try, _ *plugin.Bind) { clear(p.kms.kept) }, "unknown key", 0},
		"source down":      {true, func(p *pair, _ *try, _ *plugin.Bind) { p.kms.err = errors.New("connection refused") }, "connection refused", 0},
		"class too low": {true, func(p *pair, _ *try, _ *plugin.Bind) {
			p.kms.class, p.b.conns["link"].MinClass = key.Derived, key.Relayed
		}, "class derived", 1},
		"AH":                {true, change(func(m *plugin.Bind) { m.Transforms.Protocol = 2 }), "not ESP", 0},
		"IKE_SA_INIT":       {true, change(func(m *plugin.Bind) { m.Exchange = 34 }), "makes no CHILD_SA", 0},
		"unknown algorithm": {true, change(func(m *plugin.Bind) { m.Transforms.Encr = 3 }), "transform 3", 1},
		"other charon":      {true, change(func(m *plugin.Bind) { m.SA.Instance[0] ^= 1 }), "hello", 0},
		"plugin version":    {true, func(p *pair, _ *try, _ *plugin.Bind) { _ = p.b.Verify("6.0.1") }, "built for strongSwan 5.9.8, charon is 6.0.1", 0},
		"no IKE_SA":         {true, change(func(m *plugin.Bind) { m.SA.UID = 0 }), "no IKE_SA", 0},
		"tokens alike":      {true, change(func(m *plugin.Bind) { copy(m.Token.EncrR.Bytes(), m.Token.EncrI.Bytes()) }), "not unique", 1},
		"token missing":     {true, change(func(m *plugin.Bind) { m.Token.EncrR.Wipe() }), "size of the keys", 1},
		"stopped":           {true, func(p *pair, _ *try, _ *plugin.Bind) { p.b.Close() }, "shutting down", 0},

		"C_r missing":        {false, change(func(m *plugin.Bind) { m.Confirm = nil }), "C_r is missing", 1},
		"C_r wrong":          {false, change(func(m *plugin.Bind) { m.Confirm[0] ^= 1 }), "confirmation differs", 1},
		"Nr changed":         {false, change(func(m *plugin.Bind) { m.Nr[0] ^= 1 }), "confirmation differs", 1},
		"KEYMAT differs":     {false, change(func(m *plugin.Bind) { m.Keymat.EncrI.Bytes()[0] ^= 1 }), "confirmation differs", 1},
		"wrong responder":    {false, change(func(m *plugin.Bind) { m.Replier = ident("c") }), `authenticated as "c.example"`, 1},
		"other exchange":     {false, change(func(m *plugin.Bind) { m.SPIr[0] ^= 1 }), "sent in another exchange", 1},
		"other exchange two": {false, change(func(m *plugin.Bind) { m.Exchange = plugin.IKEAuth }), "sent in another exchange", 1},
		"other IKE_SA":       {false, change(func(m *plugin.Bind) { m.SA.UID = 77 }), "not pending", 1},
		"too late":           {false, func(p *pair, _ *try, _ *plugin.Bind) { p.a.clock.add(spentTTL) }, "expired", 1},
		"C_i sent back":      {false, func(_ *pair, r *try, m *plugin.Bind) { m.Confirm = r.ci }, "confirmation differs", 1},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, nil)
			r := newTry(1, 2)
			if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
				t.Fatal(err)
			}
			e := p.b
			if !tc.responder {
				e = p.a
				if _, err := p.b.bind(r, true, nil); err != nil {
					t.Fatal(err)
				}
			}
			_, err := e.bind(r, tc.responder, func(m *plugin.Bind) { tc.spoil(p, r, m) })
			e.refused(err, tc.cause)
			if _, fetched := p.kms.counts(); fetched != tc.fetched {
				t.Errorf("%d keys fetched, want %d", fetched, tc.fetched)
			}
			if len(e.tokens) != 0 || len(e.bounds) != 0 {
				t.Error("tokens are left")
			}
		})
	}
}

// Keys that the policy does not take are refused at the initiator too, and a
// source that hangs costs no more than the plugin's deadline.
func TestGetKeyRefusals(t *testing.T) {
	p := newPair(t, func(c *Connection) { c.Mix = QKDOnly })
	p.kms.class = key.Relayed
	_, err := p.a.getKey(1)
	p.a.refused(err, "class relayed, the connection takes direct")
	if n := p.a.events.count(EventKeyUnusable); n != 1 {
		t.Errorf("%d alarms", n)
	}

	p = newPair(t, nil)
	p.kms.err = &key.Unavailable{Err: errors.Join(errors.New("pool is empty"), errors.New("peer is away"))}
	_, err = p.a.getKey(1)
	p.a.refused(err, "pool is empty; peer is away")

	p = newPair(t, nil)
	p.kms.block = true
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = p.a.GetKey(ctx, plugin.GetKey{SA: p.a.sa(1), Connection: "link"})
	p.a.refused(err, context.Canceled.Error())

	r := newTry(1, 2)
	p = newPair(t, nil)
	if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
		t.Fatal(err)
	}
	p.kms.set(func(k *kms) { k.block = true })
	p.b.t = nil
	_, err = p.b.Bind(ctx, plugin.Bind{
		SA: p.b.sa(2), Connection: "link", Responder: true, KeyID: r.id, Ni: r.ni, Nr: r.nr, Initiator: r.idI, Replier: r.idR,
		FirstIDi: r.idI, Exchange: r.exchange, Transforms: gcm, Confirm: r.ci,
	})
	p.b.t = t
	p.b.refused(err, context.Canceled.Error())

	p = newPair(t, nil)
	_, err = p.a.GetKey(t.Context(), plugin.GetKey{SA: p.a.sa(1), Connection: "other"})
	if err == nil || !strings.Contains(err.Error(), `"other"`) || !strings.Contains(err.Error(), "not configured") {
		t.Errorf("%v", err)
	}
	p = newPair(t, func(c *Connection) { c.Policy = Off })
	_, err = p.a.getKey(1)
	p.a.refused(err, "policy is off")
	if err := p.a.Hello(t.Context(), plugin.Hello{ABI: plugin.ABI + 1}); err == nil {
		t.Error("a plugin of another ABI was taken")
	}
}

// A Key-ID works once per side, in either role.
func TestKeyIDReplay(t *testing.T) {
	p := newPair(t, nil)
	r := newTry(1, 2)
	id := p.a.mustKey(1)
	if err := p.run(r, id); err != nil {
		t.Fatal(err)
	}
	p.kms.kept[id], _ = key.Take(random(32)) // a source that would give it again
	defer p.kms.kept[id].Wipe()
	if _, err := p.b.bind(r, true, nil); err == nil || !strings.Contains(err.Error(), "used before") {
		t.Errorf("replay at the responder: %v", err)
	}
	if _, err := p.a.bind(r, false, nil); err == nil || !strings.Contains(err.Error(), "not pending") {
		t.Errorf("replay at the initiator: %v", err)
	}
	// a's own Key-ID comes back to a as if b had chosen it.
	own := p.a.mustKey(5)
	back := newTry(9, 9)
	back.idI, back.idR = ident("b"), ident("a")
	back.id, back.ci = own, random(32)
	back.ni, _ = BuildNonce(bytes.NewReader(random(32)), own)
	if _, err := p.a.bind(back, true, nil); err == nil || !strings.Contains(err.Error(), "reflection") {
		t.Errorf("reflection: %v", err)
	}
	if _, fetched := p.kms.counts(); fetched != 1 {
		t.Errorf("%d keys fetched", fetched)
	}
}

func TestAddSARefusals(t *testing.T) {
	change := func(f func(*plugin.AddSA)) func(*end, *plugin.AddSA) { return func(_ *end, m *plugin.AddSA) { f(m) } }
	for name, tc := range map[string]struct {
		spoil func(e *end, m *plugin.AddSA)
		cause string
		alive bool // the token's CHILD_SA can still be installed
	}{
		"no token":          {change(func(m *plugin.AddSA) { m.Token.Bytes()[0] ^= 1 }), "not a token", true},
		"no IKE_SA":         {change(func(m *plugin.AddSA) { m.SA.UID = 0 }), "no IKE_SA", true},
		"other charon":      {change(func(m *plugin.AddSA) { m.SA.Instance[0] ^= 1 }), "hello", true},
		"other IKE_SA":      {change(func(m *plugin.AddSA) { m.SA.UID++ }), "another IKE_SA", false},
		"wrong direction":   {change(func(m *plugin.AddSA) { m.Inbound = !m.Inbound }), "other direction", false},
		"wrong role":        {change(func(m *plugin.AddSA) { m.Initiator = !m.Initiator; m.Inbound = !m.Inbound }), "other direction", false},
		"AH":                {change(func(m *plugin.AddSA) { m.Protocol = 51 }), "not those of BIND", false},
		"other algorithm":   {change(func(m *plugin.AddSA) { m.EncrAlg = 12 }), "not those of BIND", false},
		"other key length":  {change(func(m *plugin.AddSA) { m.EncrLen = 20 }), "not those of BIND", false},
		"other ESN":         {change(func(m *plugin.AddSA) { m.ESN = true }), "not those of BIND", false},
		"IPComp":            {change(func(m *plugin.AddSA) { m.IPComp = 2 }), "IPComp", false},
		"offload":           {change(func(m *plugin.AddSA) { m.Offload = 1 }), "offload", false},
		"label":             {change(func(m *plugin.AddSA) { m.Label = true }), "labels", false},
		"too late":          {func(e *end, _ *plugin.AddSA) { e.clock.add(tokenTTL) }, "older than 3 s", false},
		"too late, swept":   {func(e *end, _ *plugin.AddSA) { e.clock.add(tokenTTL); e.sweep() }, "not a token", false},
		"IKE_SA ended":      {func(e *end, m *plugin.AddSA) { e.End(context.Background(), m.SA) }, "not a token", false},
		"kernel refuses":    {func(e *end, _ *plugin.AddSA) { e.sad.err = errors.New("ENOSYS") }, "ENOSYS", false},
		"ended meanwhile":   {func(e *end, m *plugin.AddSA) { sa := m.SA; e.sad.hook = func() { e.End(context.Background(), sa) } }, "meanwhile", false},
		"stopped":           {func(e *end, _ *plugin.AddSA) { e.Close() }, "shutting down", false},
		"stopped meanwhile": {func(e *end, _ *plugin.AddSA) { e.sad.hook = e.Close }, "meanwhile", false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, nil)
			r := newTry(1, 2)
			if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
				t.Fatal(err)
			}
			b, err := p.b.bind(r, true, nil)
			if err != nil {
				t.Fatal(err)
			}
			err = b.install(true, func(m *plugin.AddSA) { tc.spoil(p.b, m) })
			p.b.refused(err, tc.cause)
			p.b.sad.err, p.b.sad.hook = nil, nil
			if err := b.both(); (err == nil) != tc.alive {
				t.Errorf("afterwards: %v", err)
			}
			if n := p.b.sad.count(); !tc.alive && n != 0 {
				t.Errorf("%d SAs left", n)
			}
		})
	}
}

// Each token works once; a rollback takes the SA out and ends the other
// direction, before and after COMMITTED.
func TestTokenAndRollback(t *testing.T) {
	p := newPair(t, nil)
	r := newTry(1, 2)
	if err := p.run(r, p.a.mustKey(1)); err != nil {
		t.Fatal(err)
	}
	r = newTry(1, 2)
	if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
		t.Fatal(err)
	}
	b, err := p.b.bind(r, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.install(true, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.install(true, nil); err == nil || !strings.Contains(err.Error(), "not a token") {
		t.Errorf("a token worked twice: %v", err)
	}
	m := b.addSA(false)
	if _, err := p.b.AddSA(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	in := said(m)
	in.Src, in.Dst, in.SPI = m.Dst, m.Src, r.spis[sad.ItoR]
	p.b.Rollback(t.Context(), said(m)) // not acknowledged
	p.b.Rollback(t.Context(), in)      // was committed
	if n := p.b.sad.count(); n != 2 {
		t.Errorf("%d SAs, want those of the first exchange", n)
	}
	if err := p.b.Commit(t.Context(), said(m)); err == nil {
		t.Error("an SA that was rolled back was committed")
	}
	if _, err := p.b.QuerySA(t.Context(), said(m)); err != nil {
		t.Error(err)
	}
}

func TestOptional(t *testing.T) {
	optional := func(c *Connection) { c.Policy = Optional }
	for name, tc := range map[string]struct {
		prepare func(p *pair, r *try) // after SENT
		spoilR  func(*plugin.Bind)
		spoilI  func(*plugin.Bind)
		cause   string
	}{
		"no key at the initiator": {func(p *pair, r *try) { r.ni, r.id, r.ci = r.ni[:32], key.ID{}, nil }, nil, nil, "Ni carries no Key-ID"},
		"responder's source down": {func(p *pair, r *try) { p.kms.err = errors.New("down") }, nil, nil, "down"},
		"stock initiator": {func(p *pair, r *try) { r.ni, r.id, r.ci = r.ni[:32], key.ID{}, nil }, func(m *plugin.Bind) {
			m.PeerSpeaks = false
		}, nil, "does not announce"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, optional)
			r := newTry(1, 2)
			if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
				t.Fatal(err)
			}
			tc.prepare(p, r)
			rb, err := p.b.bind(r, true, tc.spoilR)
			if err != nil {
				t.Fatal(err)
			}
			if r.cr != nil {
				t.Error("C_r without a key")
			}
			ib, err := p.a.bind(r, false, tc.spoilI)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(rb.both(), ib.both()); err != nil {
				t.Fatal(err)
			}
			// charon's own keys, so that a stock peer understands them.
			for k, sa := range p.a.sad.sas {
				enc, _ := key.Take(bytes.Clone(r.keymat[:36]))
				if sa.Dst.Addr() == addrA {
					enc, _ = key.Take(bytes.Clone(r.keymat[36:72]))
				}
				if fp := enc.Fingerprint(); sa.fingerprint != fp || p.b.sad.sas[k].fingerprint != fp {
					t.Error("not the keys of KEYMAT")
				}
				enc.Wipe()
				if !sa.owner.KeyID.IsZero() || sa.owner.Mix != sad.MixClassical {
					t.Errorf("owner %+v", sa.owner)
				}
			}
			if n := p.b.events.count(EventFallback); n != 1 {
				t.Errorf("%d alarms at the responder", n)
			}
			if n := p.a.events.count(EventFallback); n != 1 {
				t.Errorf("%d alarms at the initiator", n)
			}
			if !strings.Contains(p.a.log.String()+p.b.log.String(), tc.cause) {
				t.Errorf("cause %q is not logged", tc.cause)
			}
		})
	}
	t.Run("the source is down at GETKEY", func(t *testing.T) {
		p := newPair(t, optional)
		p.kms.err = errors.New("down")
		a, err := p.a.GetKey(t.Context(), plugin.GetKey{SA: p.a.sa(1), Connection: "link"})
		if err != nil || !a.KeyID.IsZero() || a.Policy != plugin.Optional {
			t.Errorf("%+v, %v", a, err)
		}
	})
	t.Run("a wrong confirmation is refused all the same", func(t *testing.T) {
		p := newPair(t, optional)
		r := newTry(1, 2)
		if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
			t.Fatal(err)
		}
		r.ci[0] ^= 1
		_, err := p.b.bind(r, true, nil)
		p.b.refused(err, "confirmation differs")
	})
	t.Run("stock responder: the key stays reserved", func(t *testing.T) {
		p := newPair(t, optional)
		r := newTry(1, 2)
		r.id = p.a.mustKey(1)
		r.ni, _ = BuildNonce(bytes.NewReader(random(32)), r.id)
		b, err := p.a.bind(r, false, func(m *plugin.Bind) { m.PeerSpeaks = false })
		if err != nil {
			t.Fatal(err)
		}
		if err := b.both(); err != nil {
			t.Error(err)
		}
		p.a.End(t.Context(), p.a.sa(1))
		if p.a.mustKey(2) != r.id {
			t.Error("the unused key was lost")
		}
	})
}

// A required initiator whose peer is stock gets its key back.
func TestStockPeer(t *testing.T) {
	p := newPair(t, nil)
	r := newTry(1, 2)
	r.id = p.a.mustKey(1)
	r.ni, _ = BuildNonce(bytes.NewReader(random(32)), r.id)
	_, err := p.a.bind(r, false, func(m *plugin.Bind) { m.PeerSpeaks = false })
	p.a.refused(err, "does not announce Q-IPsec")
	p.a.End(t.Context(), p.a.sa(1))
	if p.a.mustKey(2) != r.id {
		t.Error("the unused key was lost")
	}
}

func TestLimits(t *testing.T) {
	p := newPair(t, func(c *Connection) { c.MaxKeyAge, c.MaxKeyBytes, c.MaxKeyPackets = time.Minute, 1000, 20 })
	r := newTry(1, 2)
	if err := p.a.sent(r, p.a.mustKey(1)); err != nil {
		t.Fatal(err)
	}
	b, err := p.b.bind(r, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = b.install(true, func(m *plugin.AddSA) {
		m.Lifetime = plugin.Lifetime{TimeLife: 4000, TimeRekey: 30, BytesLife: 0, BytesRekey: 0, PacketsLife: 90, PacketsRekey: 9}
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, sa := range p.b.sad.sas {
		if want := (sad.Lifetime{TimeLife: 60, TimeRekey: 30, BytesLife: 1000, BytesRekey: 900, PacketsLife: 20, PacketsRekey: 9}); sa.Lifetime != want {
			t.Errorf("%+v, want %+v", sa.Lifetime, want)
		}
	}
}

// An SA that was moved is found under its new name and queued for a rekeying.
func TestUpdateSA(t *testing.T) {
	p := newPair(t, nil)
	if err := p.run(newTry(1, 2), p.a.mustKey(1)); err != nil {
		t.Fatal(err)
	}
	var id sad.ID
	for _, sa := range p.a.sad.sas {
		id = sa.ID
	}
	to := id.Dst
	m := plugin.UpdateSA{ID: plugin.SAID{Src: id.Src, Dst: id.Dst, SPI: id.SPI, Protocol: id.Protocol}, NewSrc: id.Src, NewDst: to}
	if err := p.a.UpdateSA(t.Context(), m); err != nil || len(p.a.rekeys) != 0 {
		t.Errorf("%v, %d rekeyings for a change of ports", err, len(p.a.rekeys))
	}
	p.a.sad.moved = true
	m.NewDst = id.Src
	if err := p.a.UpdateSA(t.Context(), m); err != nil || len(p.a.rekeys) != 1 {
		t.Errorf("%v, %d rekeyings for a change of address", err, len(p.a.rekeys))
	}
	id.Dst = id.Src
	if _, ok := p.a.class(id); !ok {
		t.Error("the moved SA is not known")
	}
	p.a.prune(nil, p.a.clock.Now())
	if _, ok := p.a.class(id); !ok {
		t.Error("an SA of this instant was forgotten")
	}
	p.a.prune(nil, p.a.clock.Now().Add(1))
	if _, ok := p.a.class(id); ok {
		t.Error("an SA that is gone is still known")
	}
}

func FuzzIdentityText(f *testing.F) {
	f.Add(uint8(2), []byte("b.example"))
	f.Add(uint8(1), []byte{192, 0, 2, 1})
	f.Fuzz(func(t *testing.T, typ uint8, b []byte) {
		if s := identityText(plugin.Identity{Type: typ, Data: b}); s == "" || strings.ContainsAny(s, "\n\r\x00") {
			t.Errorf("%d %x is shown as %q", typ, b, s)
		}
	})
}

func TestValidate(t *testing.T) {
	good := connection("a", "b")
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Connection){
		"name":        func(c *Connection) { c.Name = "a b" },
		"local id":    func(c *Connection) { c.LocalID = "*" },
		"remote id":   func(c *Connection) { c.RemoteID = "" },
		"certificate": func(c *Connection) { c.LocalCert = "" },
		"peer's CA":   func(c *Connection) { c.RemoteCA = "" },
		"unique":      func(c *Connection) { c.Unique = "maybe" },
		"same SAE":    func(c *Connection) { c.PeerSAE = c.LocalSAE },
		"SAE":         func(c *Connection) { c.PeerSAE = "a/b" },
		"key age":     func(c *Connection) { c.MaxKeyAge = time.Second },
		"no child":    func(c *Connection) { c.Children = nil },
		"child twice": func(c *Connection) { c.Children = append(slices.Clone(c.Children), c.Children[0]) },
		"policy":      func(c *Connection) { c.Policy = 9 },
	} {
		c := good
		spoil(&c)
		if err := c.Validate(); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
	_, err := NewBroker(Options{Connections: []Connection{good, good}, SAD: newFakeSAD(), Now: time.Now, Log: discard()})
	if err == nil || !strings.Contains(err.Error(), "twice") || !strings.Contains(err.Error(), `kme "local"`) {
		t.Errorf("%v", err)
	}
	if s := fmt.Sprint(Required, Optional, Off, Hybrid, QKDOnly); s != "required optional off hybrid qkd" {
		t.Error(s)
	}
}
