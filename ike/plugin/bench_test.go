package plugin_test

import (
	"net/netip"
	"testing"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/ike/plugin/plugintest"
)

// BenchmarkCalls is the socket's share of a CHILD_SA: a connection, a request,
// an answer; for AddSA with ACK and COMMITTED. The handler does nothing.
func BenchmarkCalls(b *testing.B) {
	f := &fake{addSA: plugin.AddSAAnswer{Verdict: plugin.Installed}}
	path := socket(b)
	serve(b, path, f, plugin.Options{})
	c := plugintest.New(path)
	if err := c.Connect(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Disconnect() }()
	ctx, m, add := b.Context(), bind(b), addSA(b)
	get := plugin.GetKey{Connection: "link", Peer: netip.MustParseAddr("192.0.2.2")}
	for name, call := range map[string]func() error{
		"GetKey": func() error { _, err := c.GetKey(ctx, get); return err },
		"Bind":   func() error { _, err := c.Bind(ctx, m); return err },
		"AddSA":  func() error { _, err := c.AddSA(ctx, add); return err },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := call(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
