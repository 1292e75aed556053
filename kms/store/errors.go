package store

import "errors"

// What callers tell apart with errors.Is. The wrapped text says which pool,
// block or file, and what to do.
var (
	ErrClosed        = errors.New("store is closed")
	ErrNoPool        = errors.New("no such pool")
	ErrNoBlock       = errors.New("no such block")
	ErrNotFound      = errors.New("no such key")
	ErrConflict      = errors.New("pool exists with another peer, role or class")
	ErrOldSeq        = errors.New("seq is not above the newest one taken in")
	ErrOrder         = errors.New("an older block has not been decided yet")
	ErrState         = errors.New("block is not in the state for this")
	ErrBackwards     = errors.New("mark would go back")
	ErrOldGeneration = errors.New("message is from an earlier start of the peer")
	ErrAhead         = errors.New("position is ahead of what is recorded")
	ErrSpent         = errors.New("range was read or given up before")
	ErrFull          = errors.New("no space left for the database")

	ErrInUse     = errors.New("store is in use by another process")
	ErrNewer     = errors.New("database was written by a newer version")
	ErrForeign   = errors.New("file is not a Q-IPsec store")
	ErrDamaged   = errors.New("store is damaged")
	ErrNoRoot    = errors.New("root file is missing")
	ErrWrongRoot = errors.New("root file belongs to another store")
	ErrOldRoot   = errors.New("root file is an older copy")
	ErrRestored  = errors.New("database is an older copy")
	ErrAccess    = errors.New("file may be read or changed by others")

	ErrUnreachable = errors.New("database server cannot be reached")
	ErrReadOnly    = errors.New("database server takes no changes")
	ErrDenied      = errors.New("database server refuses this user")
	ErrBusy        = errors.New("database server has no connection left")
	ErrDeposed     = errors.New("another process has taken the inventory over")
	ErrNotHeld     = errors.New("whether this process still has the inventory is not known")
)

// errRootFile is in every error of the step that replaces the root file.
var errRootFile = errors.New("cannot replace root file")
