package sad

import (
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
