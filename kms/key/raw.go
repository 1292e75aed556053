package key

import (
	"fmt"

	"github.com/google/uuid"
)

// RawPurpose is what a key's own bytes are used as, instead of deriving from it;
// the numbers are on disk and never change.
type RawPurpose uint8

// The raw uses.
const (
	Pad RawPurpose = 1 // one-time pad
	MAC RawPurpose = 2 // key of a one-time MAC
)

// String is "pad" or "mac".
func (p RawPurpose) String() string {
	switch p {
	case Pad:
		return "pad"
	case MAC:
		return "mac"
	}
	return fmt.Sprintf("purpose(%d)", uint8(p))
}

// Direction is that of a batch on its path; the numbers are on disk and never
// change.
type Direction uint8

// The directions.
const (
	Forward  Direction = 1 // from the batch's origin to its destination
	Backward Direction = 2
)

// String is "forward" or "backward".
func (d Direction) String() string {
	switch d {
	case Forward:
		return "forward"
	case Backward:
		return "backward"
	}
	return fmt.Sprintf("direction(%d)", uint8(d))
}

// RawUse is the one thing that some keys are used raw for.
type RawUse struct {
	Purpose   RawPurpose
	Batch     uuid.UUID
	Attempt   uint32
	Hop       uint16
	Direction Direction
}

// String is for errors and the history.
func (u RawUse) String() string {
	return fmt.Sprintf("%s of batch %s, attempt %d, hop %d %s", u.Purpose, u.Batch, u.Attempt, u.Hop, u.Direction)
}

// Range is one owner's keys from First to Last, both included, of one block.
type Range struct{ First, Last Position }

// String is "first-last".
func (r Range) String() string { return r.First.String() + "-" + r.Last.String() }

// Count is how many keys of their owner it has: every second one.
func (r Range) Count() int { return int(r.Last-r.First)/2 + 1 }

// Binding binds a range to a use.
type Binding struct {
	Range
	RawUse
}

// Check holds b against what a binding of role's keys must be.
func (b *Binding) Check(role Role) error {
	switch {
	case b.First == 0 || b.First > b.Last || b.First.Seq() != b.Last.Seq() || b.Last.Seq() > MaxSeq:
		return fmt.Errorf("key: range %s is empty, or not of one block", b.Range)
	case !role.Owns(b.First) || !role.Owns(b.Last):
		return fmt.Errorf("key: range %s does not begin and end with the owner's keys", b.Range)
	case b.Purpose != Pad && b.Purpose != MAC, b.Direction != Forward && b.Direction != Backward, b.Batch == uuid.Nil:
		return fmt.Errorf("key: use %s is none", b.RawUse)
	}
	return nil
}

// RawEnd is how a binding ends.
type RawEnd uint8

// The ends.
const (
	RawUsed   RawEnd = 1 // the bytes did their work
	RawBurned RawEnd = 2 // they never will
)
