package ike

import (
	"testing"
	"time"
)

// Whatever the limits, charon is told to rekey before the SA ends, at the
// configured time, and the hard limits are the connection's.
func TestChildLimits(t *testing.T) {
	const hour, min10 = time.Hour, 10 * time.Minute
	for name, c := range map[string]struct {
		conn                  Connection
		child                 Child
		rekey, life           time.Duration
		rekeyBytes, lifeBytes uint64
	}{
		"plain":         {Connection{}, Child{}, hour, 0, 0, 0},
		"age far above": {Connection{MaxKeyAge: hour}, Child{RekeyTime: min10}, min10, hour, 0, 0},
		"age below":     {Connection{MaxKeyAge: min10}, Child{RekeyTime: hour}, 8 * time.Minute, min10, 0, 0},
		"soft bytes":    {Connection{}, Child{RekeyBytes: 500}, hour, 0, 500, 0},
		"both bytes":    {Connection{MaxKeyBytes: 5000}, Child{RekeyBytes: 500}, hour, 0, 500, 5000},
		"hard bytes":    {Connection{MaxKeyBytes: 5000}, Child{}, hour, 0, 4000, 5000},
	} {
		v := viciChild(c.conn, c.child)
		if v.RekeyTime != c.rekey || v.LifeTime != c.life || v.RekeyBytes != c.rekeyBytes || v.LifeBytes != c.lifeBytes {
			t.Errorf("%s: %+v", name, v)
		}
	}
}
