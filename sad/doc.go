// Package sad owns the keys and the entries of the kernel's SAD: the key
// schedule that turns a QKD key and charon's KEYMAT into ESP keys
// (docs/key-schedule.md), the installation of SAs with a journal of intents,
// their comparison with what charon knows, and the guard policies that keep
// traffic from leaving in the clear.
//
// # What is refused
//
// IPComp, hardware offload, security labels, BEET mode, protocols other than
// ESP and transforms that are not in Suite's table are refused with
// ErrUnsupported before anything is written. A caller that still wants the SA
// may let charon install it with the derived keys (plugin.UseKey).
//
// # What cannot be wiped
//
// Keys live in key.Material and in the locked buffers of sad/xfrm. The HMAC
// states inside the standard library (crypto/hkdf, crypto/hmac) are on the Go
// heap until they are reused; the kernel keeps its own copies.
package sad
