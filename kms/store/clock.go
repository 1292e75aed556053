package store

import (
	"context"
	"database/sql"
	"fmt"
	"sync"
	"time"
)

// clock is what the ages of keys go by. It never goes back: it is the highest of
// the wall clock, of any time that it gave before, and, over restarts, of the times
// on disk: that of the newest block, and one written with every ratchet. While the
// process runs it goes on at the pace of CLOCK_BOOTTIME, whatever becomes of the
// wall clock. So a wall clock that is set back makes keys older than it says by what
// it was set back; what is lost is the time in which no process ran meanwhile, and
// at a restart what has passed since the last write. One that is set forward makes
// keys too old: that costs keys.
//
// The times on disk are not sealed: whoever can write to the database can make keys
// older or younger, as he can delete them.
type clock struct {
	wall func() time.Time
	boot func() time.Duration

	mu   sync.Mutex
	last int64 // microseconds since 1970, given at the boot time at
	at   time.Duration
}

// now is the time in microseconds since 1970.
func (c *clock) now() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	boot := c.boot()
	c.last = max(c.last+(boot-c.at).Microseconds(), c.wall().UnixMicro())
	c.at = boot
	return c.last
}

// reach makes sure that the clock is not before t.
func (c *clock) reach(t int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last, c.at = max(c.last+(c.boot()-c.at).Microseconds(), t), c.boot()
}

// startClock goes on where the clock was, and begins the ages of blocks that are
// from before there were any.
func (s *Store) startClock(ctx context.Context, tx *sql.Tx) error {
	var node int64
	var block sql.NullInt64
	if err := tx.QueryRowContext(ctx, `SELECT clock FROM node WHERE one = 1`).Scan(&node); err != nil {
		return fmt.Errorf("read the clock: %w", err)
	}
	if err := tx.QueryRowContext(ctx, `SELECT max(taken_in) FROM block`).Scan(&block); err != nil {
		return fmt.Errorf("read the clock: %w", err)
	}
	s.clock.reach(max(node, block.Int64))
	_, err := tx.ExecContext(ctx, `UPDATE block SET taken_in = $1 WHERE taken_in = 0`, s.clock.now())
	return err
}

// age is how long h has been here at now.
func (h *header) age(now int64) time.Duration {
	return time.Duration(max(0, now-h.takenIn)) * time.Microsecond
}
