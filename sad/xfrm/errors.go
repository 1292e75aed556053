package xfrm

import "errors"

// Errors that callers tell apart; all are wrapped with the SA and the kernel's
// own words.
var (
	// ErrUnsupported: charon could install the SA, this package will not.
	ErrUnsupported = errors.New("not supported by qipsecd")
	// ErrNoESP: the kernel has no ESP, or not with this algorithm.
	ErrNoESP = errors.New("the kernel lacks ESP or this algorithm (modules esp4, esp6, gcm, seqiv, authenc, chacha20poly1305)")
	// ErrExists: an SA or policy of that name is there already.
	ErrExists = errors.New("already there")
	// ErrNotFound: the kernel has no such SA or policy.
	ErrNotFound = errors.New("not in the kernel")
	// ErrSequence: adding 2^20 to the outbound sequence number would wrap it.
	ErrSequence = errors.New("sequence numbers used up")
	// ErrUnknown: the request left, its result was not seen (no answer in time,
	// a damaged answer). It may have been carried out.
	ErrUnknown = errors.New("the kernel's answer was not seen")
)
