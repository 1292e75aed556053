// Package identity reads IKE identities as charon does. It is apart from package
// ike so that the config is held to the same rules.
package identity

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
)

// Identity is an IKE identity: ID type and data of RFC 7296 section 3.5.
type Identity struct {
	Type uint8
	Data []byte
}

// The ID types that Parse gives.
const (
	IPv4  = 1
	FQDN  = 2
	Email = 3
	IPv6  = 5
	KeyID = 11
)

// Parse reads an identity by charon's own rules, so that what a
// configuration names and what charon authenticates are the same bytes: an IP
// address, "user@host" (e-mail), "@#hex" (key id), else a host name, with or
// without a leading "@". Wildcards and distinguished names are refused: an
// identity is bound to one SAE and must be exact.
func Parse(s string) (Identity, error) {
	switch {
	case s == "" || len(s) > 255:
		return Identity{}, fmt.Errorf("identity has %d characters, 1 to 255 are allowed", len(s))
	case strings.ContainsAny(s, "*% \t\r\n\x00"):
		return Identity{}, fmt.Errorf("identity %q holds a wildcard or a blank", s)
	case strings.Contains(s, "="):
		return Identity{}, fmt.Errorf("identity %q is a distinguished name; use a subjectAltName of the certificate", s)
	case strings.HasPrefix(s, "@#"):
		b, err := hex.DecodeString(s[2:])
		if err != nil || len(b) == 0 {
			return Identity{}, fmt.Errorf("identity %q is not a key id: hexadecimal digits must follow @#", s)
		}
		return Identity{Type: KeyID, Data: b}, nil
	case strings.HasPrefix(s, "@@") && len(s) > 2:
		return Identity{Type: Email, Data: []byte(s[2:])}, nil
	case strings.HasPrefix(s, "@") && len(s) > 1:
		return Identity{Type: FQDN, Data: []byte(s[1:])}, nil
	case strings.Contains(s, "@"):
		return Identity{Type: Email, Data: []byte(s)}, nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		if a.Is4() {
			return Identity{Type: IPv4, Data: a.AsSlice()}, nil
		}
		return Identity{Type: IPv6, Data: a.AsSlice()}, nil
	}
	if strings.Contains(s, ":") {
		return Identity{}, fmt.Errorf("identity %q is neither an address nor a host name", s)
	}
	return Identity{Type: FQDN, Data: []byte(s)}, nil
}
