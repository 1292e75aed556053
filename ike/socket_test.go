package ike

import (
	"errors"
	"strings"
	"testing"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
)

// The same exchange over the real socket protocol at both ends: what the codec
// carries is what the broker needs.
func TestOverSocket(t *testing.T) {
	p := newPair(t, nil)
	p.a.overSocket()
	p.b.overSocket()
	for uid := range uint32(3) {
		r := newTry(uid+1, uid+9)
		if uid == 1 {
			r.exchange, r.transforms = plugin.IKEAuth, cbc
		}
		if err := p.run(r, p.a.mustKey(uid+1)); err != nil {
			t.Fatal(err)
		}
	}
	if p.a.sad.count() != 6 || p.b.sad.count() != 6 {
		t.Fatalf("%d and %d SAs", p.a.sad.count(), p.b.sad.count())
	}
	for k, sa := range p.a.sad.sas {
		if other := p.b.sad.sas[k]; other.fingerprint != sa.fingerprint || !sa.committed || !other.committed {
			t.Errorf("%+v, at the other end %+v", sa, other)
		}
	}

	// Refusals reach charon with their cause.
	r := newTry(5, 6)
	if err := p.a.sent(r, p.a.mustKey(5)); err != nil {
		t.Fatal(err)
	}
	_, err := p.b.bind(r, true, func(m *plugin.Bind) { m.Confirm = nil })
	var refusal *plugin.Refusal
	if !errors.As(err, &refusal) || !strings.Contains(refusal.Text, "C_i is missing") {
		t.Errorf("%v", err)
	}

	// An SA that charon does not acknowledge is taken out, and with it the other
	// direction's token.
	b, err := p.b.bind(r, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := b.addSA(true)
	defer m.Token.Wipe()
	open, _, err := p.b.charon.StartAddSA(t.Context(), m)
	if err != nil || p.b.sad.count() != 7 {
		t.Fatalf("%v, %d SAs", err, p.b.sad.count())
	}
	open.Drop()
	eventually(t, "rolled back", func() bool { return p.b.sad.count() == 6 })
	if err := b.install(false, nil); err == nil {
		t.Error("the other direction was installed")
	}

	// END gives the unsent key back, charon's death too.
	first := p.a.mustKey(20)
	if err := p.a.charon.End(t.Context(), 20); err != nil {
		t.Fatal(err)
	}
	eventually(t, "END handled", func() bool {
		p.a.mu.Lock()
		defer p.a.mu.Unlock()
		return len(p.a.conns["link"].free) == 1
	})
	if p.a.mustKey(21) != first {
		t.Error("another Key-ID")
	}
	if err := p.a.charon.Disconnect(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "gone", func() bool {
		_, ok := p.a.Broker.charon()
		return !ok
	})
	if err := p.a.charon.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p.a.mustKey(1) != first {
		t.Error("the unsent key was lost with charon")
	}
}
