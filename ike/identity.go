package ike

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
)

// ID types of RFC 7296 section 3.5.
const (
	idIPv4  = 1
	idFQDN  = 2
	idEmail = 3
	idIPv6  = 5
	idKeyID = 11
)

// ParseIdentity reads an identity by charon's own rules, so that what a
// configuration names and what charon authenticates are the same bytes: an IP
// address, "user@host" (e-mail), "@#hex" (key id), else a host name, with or
// without a leading "@". Wildcards and distinguished names are refused: an
// identity is bound to one SAE and must be exact.
func ParseIdentity(s string) (plugin.Identity, error) {
	switch {
	case s == "" || len(s) > 255:
		return plugin.Identity{}, fmt.Errorf("identity has %d characters, 1 to 255 are allowed", len(s))
	case strings.ContainsAny(s, "*% \t\r\n\x00"):
		return plugin.Identity{}, fmt.Errorf("identity %q holds a wildcard or a blank", s)
	case strings.Contains(s, "="):
		return plugin.Identity{}, fmt.Errorf("identity %q is a distinguished name; use a subjectAltName of the certificate", s)
	case strings.HasPrefix(s, "@#"):
		b, err := hex.DecodeString(s[2:])
		if err != nil || len(b) == 0 {
			return plugin.Identity{}, fmt.Errorf("identity %q is not a key id: hexadecimal digits must follow @#", s)
		}
		return plugin.Identity{Type: idKeyID, Data: b}, nil
	case strings.HasPrefix(s, "@@") && len(s) > 2:
		return plugin.Identity{Type: idEmail, Data: []byte(s[2:])}, nil
	case strings.HasPrefix(s, "@") && len(s) > 1:
		return plugin.Identity{Type: idFQDN, Data: []byte(s[1:])}, nil
	case strings.Contains(s, "@"):
		return plugin.Identity{Type: idEmail, Data: []byte(s)}, nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		if a.Is4() {
			return plugin.Identity{Type: idIPv4, Data: a.AsSlice()}, nil
		}
		return plugin.Identity{Type: idIPv6, Data: a.AsSlice()}, nil
	}
	if strings.Contains(s, ":") {
		return plugin.Identity{}, fmt.Errorf("identity %q is neither an address nor a host name", s)
	}
	return plugin.Identity{Type: idFQDN, Data: []byte(s)}, nil
}

// sameIdentity compares byte for byte; case counts, as in charon's encoding.
func sameIdentity(a, b plugin.Identity) bool {
	return a.Type == b.Type && slices.Equal(a.Data, b.Data)
}

// identityText shows an identity that a peer sent, safely for a log line.
func identityText(id plugin.Identity) string {
	switch id.Type {
	case idFQDN, idEmail:
		return fmt.Sprintf("%q", id.Data)
	case idIPv4, idIPv6:
		if a, ok := netip.AddrFromSlice(id.Data); ok {
			return a.String()
		}
	}
	return fmt.Sprintf("type %d %x", id.Type, id.Data)
}
