package store

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// clocks are a wall clock and a boot clock that a test sets.
type clocks struct {
	wall time.Time
	boot time.Duration
}

// pass lets time go by.
func (c *clocks) pass(d time.Duration) { c.wall, c.boot = c.wall.Add(d), c.boot+d }

// TestAges: how old a block is after all that can become of the clocks.
func TestAges(t *testing.T) {
	const day, year = 24 * time.Hour, 365 * 24 * time.Hour
	onBoth(t, func(t *testing.T, options func(string) Options) {
		opt := options(filepath.Join(t.TempDir(), "s"))
		c := &clocks{wall: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), boot: time.Hour}
		opt.Now = func() time.Time { return c.wall }
		opt.boot = func() time.Duration { return c.boot }
		s, ctx := mustOpen(t, opt), testContext(t)
		must(t, s.EnsurePool(ctx, testPool, "bob", key.Master, key.Direct))
		must(t, s.PutBlock(ctx, testBlock(t, 1, 10)))
		age := func(what string, low, high time.Duration) {
			t.Helper()
			list, err := s.Blocks(ctx, testPool)
			must(t, err)
			if a := list[0].Age; a < low || a > high {
				t.Errorf("%s: the block is %v old, want %v to %v", what, a, low, high)
			}
		}
		restart := func(reboot bool) {
			t.Helper()
			must(t, s.Close())
			if reboot {
				c.boot = 0
			}
			s = mustOpen(t, opt)
		}
		age("at first", 0, 0)
		c.pass(day)
		age("a day later", day, day)
		restart(true)
		age("after a restart of the machine", day, day)
		c.wall = c.wall.Add(-year)
		age("the wall clock is set back a year", day, day)
		c.pass(day)
		age("a day after that", 2*day, 2*day)
		must(t, s.Ratchet(ctx))
		c.pass(time.Hour)
		restart(false)
		age("a restart with that clock costs what passed since the ratchet", 2*day, 2*day)
		restart(true)
		c.pass(day)
		age("and the next day counts", 3*day, 3*day)
		must(t, s.PutBlock(ctx, testBlock(t, 2, 10)))
		if list, err := s.Blocks(ctx, testPool); err != nil || list[1].Age != 0 {
			t.Errorf("a new block meanwhile: %+v, %v", list, err)
		}
		c.wall = c.wall.Add(year)
		age("the wall clock is right again", 3*day, 3*day+2*time.Hour)
		c.wall = c.wall.Add(year)
		age("the wall clock is set forward a year", year, year+4*day)
		c.wall = c.wall.Add(-year)
		age("and back: the clock stays", year, year+4*day)
		must(t, s.PutBlock(ctx, testBlock(t, 3, 10)))
		restart(true)
		if list, err := s.Blocks(ctx, testPool); err != nil || list[2].Age > time.Minute {
			t.Errorf("a block taken in since: %+v, %v", list, err)
		}
	})
}
