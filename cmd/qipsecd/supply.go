package main

import (
	"context"
	"time"

	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/operator"
)

// Status tells the level of keys; localKSA has it from the KSA.
func (c vendorKME) Status(ctx context.Context, _, peer string) (key.SupplyStatus, error) {
	return c.Client.Status(ctx, peer)
}

// levels gives those of the KMEs that tell how many keys they have.
func levels(kmes map[string]ike.KME) map[string]ike.Levels {
	out := map[string]ike.Levels{}
	for name, k := range kmes {
		if l, ok := k.Source.(ike.Levels); ok {
			out[name] = l
		}
	}
	return out
}

// supplyOf is a tunnel's supply in the operator API's terms.
func supplyOf(s *ike.Supply) *operator.Supply {
	if s == nil {
		return nil
	}
	out := &operator.Supply{Pool: s.Pool, Level: s.Level, Reserve: s.Reserve, IntervalS: seconds(s.Interval), Waits: s.Waits}
	if s.Measured {
		out.Rates = &operator.Rates{Supply: s.SupplyRate, Use: s.UseRate}
		if s.Dry >= 0 {
			dry := seconds(s.Dry)
			out.Rates.DryInS = &dry
		}
	}
	return out
}

// rekeyIn is the time until at in seconds; nil if there is none.
func rekeyIn(at time.Time) *int64 {
	if at.IsZero() {
		return nil
	}
	s := seconds(time.Until(at))
	return &s
}

func seconds(d time.Duration) int64 { return int64(d / time.Second) }
