package sad

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// The SA model is that of sad/xfrm; the names here are for callers that must
// not import it.
type (
	SA       = xfrm.SA
	ID       = xfrm.ID
	Suite    = xfrm.Suite
	Mode     = xfrm.Mode
	Mark     = xfrm.Mark
	Lifetime = xfrm.Lifetime
	Counters = xfrm.Counters
	CopyDSCP = xfrm.CopyDSCP
)

// Constants of sad/xfrm.
const (
	ProtoESP  = xfrm.ProtoESP
	Transport = xfrm.Transport
	Tunnel    = xfrm.Tunnel
	Beet      = xfrm.Beet
)

// Errors of sad/xfrm that callers tell apart.
var (
	// ErrUnsupported: charon could install the SA, this package does not.
	ErrUnsupported = xfrm.ErrUnsupported
	// ErrNoESP: the kernel lacks ESP or one of its algorithms.
	ErrNoESP = xfrm.ErrNoESP
	// ErrExists: the SAD or the journal has an SA of that ID already.
	ErrExists = xfrm.ErrExists
	// ErrNotFound: the SAD has no SA of that ID.
	ErrNotFound = xfrm.ErrNotFound
	// ErrSequence: an SA cannot be moved, its sequence numbers are used up.
	ErrSequence = xfrm.ErrSequence
)

// Owner says for whom an SA was made; for logs, the journal and State.
type Owner struct {
	Connection string
	KeyID      key.ID // zero for a classical SA
	Mix        Mix
}

// ParseTS reads a traffic selector in charon's text form ("10.1.0.0/24",
// "192.0.2.1/32[tcp/80]", "10.0.0.4..10.0.0.7") as the smallest prefix that
// holds it. Protocol and ports are dropped, as charon does for the selector of
// a transport mode SA by default.
func ParseTS(s string) (netip.Prefix, error) {
	text, _, _ := strings.Cut(s, "[")
	if from, to, isRange := strings.Cut(text, ".."); isRange {
		a, errA := netip.ParseAddr(from)
		b, errB := netip.ParseAddr(to)
		if errA != nil || errB != nil || a.BitLen() != b.BitLen() || b.Less(a) {
			return netip.Prefix{}, fmt.Errorf("sad: traffic selector %q is not a range of addresses", s)
		}
		bits := a.BitLen()
		for netip.PrefixFrom(a, bits).Masked().Addr() != netip.PrefixFrom(b, bits).Masked().Addr() {
			bits--
		}
		return netip.PrefixFrom(a, bits).Masked(), nil
	}
	if !strings.Contains(text, "/") {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("sad: traffic selector %q: %w", s, err)
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("sad: traffic selector %q: %w", s, err)
	}
	return p.Masked(), nil
}
