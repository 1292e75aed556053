package ike

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/q-ipsec/q-ipsec/ike/identity"
	"github.com/q-ipsec/q-ipsec/ike/plugin"
)

// ParseIdentity is identity.Parse in the plugin's terms.
func ParseIdentity(s string) (plugin.Identity, error) {
	id, err := identity.Parse(s)
	return plugin.Identity(id), err
}

// sameIdentity compares byte for byte; case counts, as in charon's encoding.
func sameIdentity(a, b plugin.Identity) bool {
	return a.Type == b.Type && slices.Equal(a.Data, b.Data)
}

// identityText shows an identity that a peer sent, safely for a log line.
func identityText(id plugin.Identity) string {
	switch id.Type {
	case identity.FQDN, identity.Email:
		return fmt.Sprintf("%q", id.Data)
	case identity.IPv4, identity.IPv6:
		if a, ok := netip.AddrFromSlice(id.Data); ok {
			return a.String()
		}
	}
	return fmt.Sprintf("type %d %x", id.Type, id.Data)
}
