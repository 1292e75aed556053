// Package store is a node's inventory of quantum keys: sealed blocks of master
// keys, the marks up to which each pool's owners have leased, the usage history
// and the node's events. It is the only package of the project that speaks SQL.
//
// # What is promised
//
// A lease moves a range of keys from disk to memory for ever
// (docs/architecture.md). The store itself enforces the reading half: Load
// gives a range once in the life of the process, only above the marks found at
// Open and only up to a mark that Advance has made durable. What lies at or
// below a mark at Open is never read again, whatever the callers do.
//
// # What is trusted
//
// The database is not: it may be copied, and its older pages live on in the
// write-ahead log, in free pages, in replicas. Every block's keys are sealed
// with AES-256-GCM under a key of the block's own; that key is wrapped under
// the epoch's data key with the block's whole header (state and marks among it)
// as associated data; pool and node rows carry a proof made the same way. A row
// that was changed, moved or taken from another database is detected.
//
// The root file, outside the database and every backup, holds root_n:
//
//	data key n = HKDF-SHA-512(root_n, salt = store UUID, "Q-IPsec v1 data")
//	root_{n+1} = HKDF-SHA-512(root_n, salt = store UUID, "Q-IPsec v1 root")
//
// Ratchet wraps the surviving blocks' keys under data key n+1, seals blocks
// that were read from anew without the keys read, and replaces root_n by
// root_{n+1}. From then on no copy of the database, of any age, gives back a key
// that was read or destroyed before. The epoch of the database is that of the
// root file, or one ahead after a crash within Ratchet, which Open finishes.
// Any other pair was put together from copies, and Open refuses it:
//
//	database behind the root file: an older database was put back. Its keys
//	    cannot be opened any more, its marks cannot be believed (ErrRestored).
//	root file behind by more than one: an older root file was put back. It
//	    could open the database, but a copy of it that lies about undoes the
//	    ratchet, and nobody should learn that by accident (ErrOldRoot).
//
// The remedy for both costs keys, never safety: move both files away and start
// with empty pools. An older database of the same epoch cannot be told from
// the newest one here; the peer's SYNC finds it, see AdoptMark.
//
// # Several nodes
//
// On PostgreSQL several nodes may share an inventory, one at a time
// (docs/decisions/0007): others Await their turn. Every transaction checks that
// its process is still the one; a root file that is behind is stepped forward,
// with an alarm, instead of ErrOldRoot; and a database on another server or
// timeline than its node row says has all its keys given up.
//
// Go's AES keeps expanded keys on the heap, where they cannot be wiped; roots
// and keys themselves are in key.Material.
package store
