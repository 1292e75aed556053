package ike

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
)

// However many answers are forged, there is one report per connection and
// minute, and only the cause changes: the key stays, nothing backs off.
func TestIgnoredAnswers(t *testing.T) {
	p := newPair(t, nil)
	e := p.a
	id := e.mustKey(1)
	last := netip.MustParseAddr("198.51.100.0")
	flood := func(events int) {
		t.Helper()
		for uid := range uint32(300) {
			last = last.Next()
			e.Ignored(t.Context(), plugin.Ignored{SA: e.sa(uid + 1), Connection: "link", Peer: last})
		}
		lines := 0
		for l := range strings.Lines(e.log.String()) {
			if strings.Contains(l, EventIgnored) {
				lines++
				if !strings.Contains(l, "connection=link") || !strings.Contains(l, "does not speak Q-IPsec (or the answer is forged)") {
					t.Errorf("connection or cause is not in %q", l)
				}
			}
		}
		if n := e.events.count(EventIgnored); n != events || lines != events {
			t.Errorf("%d events, %d log lines, want %d", n, lines, events)
		}
		n := e.note("link")
		if !strings.Contains(n.cause, "the peer at "+last.String()+" does not speak Q-IPsec") || !n.causeAt.Equal(e.clock.Now()) {
			t.Errorf("cause %q of %s", n.cause, n.causeAt)
		}
		if n.failures != 0 || n.backOff != 0 {
			t.Errorf("%d failures, backs off %s", n.failures, n.backOff)
		}
	}
	flood(1)
	e.clock.add(ignoredQuiet - time.Millisecond)
	flood(1)
	e.clock.add(time.Millisecond)
	flood(2)
	if e.mustKey(1) != id {
		t.Error("the reserved key was lost")
	}
	if n := e.note("link"); n.next == "" {
		t.Error("no advice")
	}
	if err := p.run(newTry(1, 2), id); err != nil {
		t.Fatal(err)
	}
	if n := e.note("link"); n.next != "" {
		t.Errorf("the CHILD_SA is up, and the advice is still %q", n.next)
	}
}

// What names no IKE_SA and connection that are served here changes nothing.
func TestIgnoredOfOthers(t *testing.T) {
	e := newPair(t, nil).a
	stranger := e.sa(1)
	stranger.Instance[0] ^= 1
	for _, m := range []plugin.Ignored{
		{SA: e.sa(1), Connection: "other", Peer: addrB},
		{SA: e.sa(0), Connection: "link", Peer: addrB},
		{SA: stranger, Connection: "link", Peer: addrB},
	} {
		e.Ignored(t.Context(), m)
	}
	if n := e.note("link"); n.cause != "" || e.events.count(EventIgnored) != 0 {
		t.Errorf("cause %q, %d events", n.cause, e.events.count(EventIgnored))
	}
}

func TestIgnoredOverSocket(t *testing.T) {
	e := newPair(t, nil).a
	e.overSocket()
	if err := e.charon.Ignored(t.Context(), plugin.Ignored{SA: e.sa(1), Connection: "link", Peer: addrB}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cause", func() bool { return strings.Contains(e.note("link").cause, addrB.String()) })
}
