// Package kma is the key management agent of a node (paper, table 9): it takes
// QKD-Key files in, reformats them into master keys, agrees on them with the
// peer (M102) and moves them, lease by lease, from disk to memory, from where
// the KSA hands them out. docs/architecture.md says what a lease promises.
//
// # Sessions
//
// Every start of an Agent takes a random instance. Two nodes speak about a pool
// within a session of two instances; SYNC opens it, and every other message
// names both, so that nothing that was sent to or by a process that is gone has
// any effect. That goes for SYNC, too: a node meets its peer by an answer to its
// own SYNC, or by one that names its instance, and it is through once an answer
// names it. Any other SYNC is answered and not believed: it may come late. A node
// that meets a new instance of its peer
//
//  1. wipes its own leased keys, whose copies the peer has lost,
//  2. adopts the higher of the marks either side knows,
//  3. destroys blocks that can never be active on both sides,
//
// and supplies nothing until its own SYNC and BURN were answered. Where the peer
// knows a later start of this node than its store does, the store was restored from
// a copy: its generation goes past that. The peer's
// leased keys stay claimable until the peer's BURN arrives: of those the KSA
// keeps what it has supply notices for.
//
// A lease runs (After, Mark]. The receiver takes it only if After is not below
// its mark, or as the exact repeat of the last one; all else is a conflict, and
// the owner burns that lease. A block that is not active at the receiver yet is
// answered "not validated": the owner repeats after M102 has. This is stricter
// than to let the lease confirm the block: the receiver would have to activate
// a block whose proof it has not seen.
//
// # Transfer
//
// A node that has used up its own keys asks the peer for some of the peer's (want),
// which come as a lease with purpose transfer: the owner's mark is durable first,
// it holds the keys for Claim from then on and never hands them out, and the
// receiver may take them once its own record of that mark is durable. What goes by
// position therefore goes by owner, too: floors, BURN, sweep and what may be put
// back. docs/model.md has the rules, decision 0013 who gives how much.
//
// # Expiry
//
// The owner of a key decides alone when it is too old, or one too many, and raises
// its mark past it by a lease that neither side reads (Options.MaxKeyAge, MaxKeys).
// What was leased before is not taken back. Blocks that were never validated expire
// at either side by themselves.
//
// # Locks
//
// Each pool has a turn and a mutex.
//
//   - turn: whoever changes what is on disk, or the session, has it. It is held
//     over calls of the store, and waited for with a context; never over a
//     network call. Two nodes can therefore never wait for each other's.
//   - mu: guards what is in memory. Nothing slow happens under it, and nothing
//     else is locked under it. Of the session, whoever writes has both, whoever
//     reads has either.
//
// One goroutine per pool makes all calls to the peer, one after the other; one
// takes files in. Take and Claim touch memory only.
//
// # M102
//
// The one-time tags are Poly1305 from golang.org/x/crypto/poly1305. The package
// is marked deprecated because a key must never be used twice; here each key
// comes with the key data of one seq, is used for one message, and is wiped.
// Our own implementation would be one more to trust. It keeps 32 bytes of its
// key on the heap for the length of a call.
//
//	TagM = Poly1305(Km, "M" | pair (16) | seq (8) | length (8) | keys | Ks | Kid)
//	TagS = Poly1305(Ks, "S" | pair (16) | seq (8) | length (8) | keys | Kid)
//
// with numbers big-endian and length that of the key data. TagM covers all but
// its own key, so that a slave that agrees holds the same Ks and Kid; a tag
// never covers its own key, for which Poly1305 promises nothing. With the
// options sha-256 and sha3-256 the digest D = H("Q-IPsec v1 M102" | pair | seq |
// length | key data) is kept, and H("M" | D), H("S" | D) are sent. A hash
// tells anyone who can guess the key that the guess was right, so such keys
// never become one-time pads (NoPad).
package kma
