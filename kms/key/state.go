package key

import "fmt"

// Class says what protected a key on its way; it is fixed at birth and the
// minimum over all that protected it. A larger Class is a better one.
type Class uint8

// The classes of docs/architecture.md; their numbers are on the wire and on
// disk and never change.
const (
	Derived Class = 1 // by key expansion (paper 3.2)
	Relayed Class = 2 // by one-time pads over trusted nodes
	Direct  Class = 3 // from the pair's own QKD link
)

// String is the lower-case name.
func (c Class) String() string {
	switch c {
	case Derived:
		return "derived"
	case Relayed:
		return "relayed"
	case Direct:
		return "direct"
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// ParseClass is the inverse of String.
func ParseClass(s string) (Class, error) {
	for _, c := range []Class{Derived, Relayed, Direct} {
		if c.String() == s {
			return c, nil
		}
	}
	return 0, fmt.Errorf("key: class %q is none of derived, relayed, direct", s)
}

// State is a key's place in its life cycle (ITU-T Y.3803, NIST SP 800-57).
type State uint8

// The states; their numbers are on disk and never change.
const (
	Received    State = 1 // taken in, the peer has not agreed yet
	Active      State = 2 // agreed by M102, free for its owner to lease
	Leased      State = 3 // in a lease: in memory on both sides, not on disk any more
	Supplied    State = 4 // handed to its consumer on this side
	Destroyed   State = 5 // gone, unused
	Expired     State = 6 // gone by age or count
	Compromised State = 7 // gone because its bytes may be known
	Stranded    State = 8 // supplied on one side, lost on the other, gone on both
)

// String is the lower-case name.
func (s State) String() string {
	switch s {
	case Received:
		return "received"
	case Active:
		return "active"
	case Leased:
		return "leased"
	case Supplied:
		return "supplied"
	case Destroyed:
		return "destroyed"
	case Expired:
		return "expired"
	case Compromised:
		return "compromised"
	case Stranded:
		return "stranded"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}
