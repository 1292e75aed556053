package main

import (
	"context"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/kms/key"
)

// mute is a source of keys that tells no level.
type mute struct{}

func (mute) GetKey(context.Context, string, string) (key.SupplyKey, error) {
	return key.SupplyKey{}, nil
}

func (mute) GetKeyWithID(context.Context, string, string, key.ID) (key.SupplyKey, error) {
	return key.SupplyKey{}, nil
}

func TestLevelsOfWhoTellsThem(t *testing.T) {
	got := levels(map[string]ike.KME{"local": {Source: localKSA{}}, "vendor": {Source: vendorKME{}}, "mute": {Source: mute{}}})
	if len(got) != 2 || got["local"] == nil || got["vendor"] == nil {
		t.Errorf("%v", got)
	}
}

func TestSupplyForTheOperator(t *testing.T) {
	if supplyOf(nil) != nil || rekeyIn(time.Time{}) != nil {
		t.Error("what is not known is told")
	}
	if s := supplyOf(&ike.Supply{Level: 7, Interval: 90 * time.Second, Dry: -1}); s.Rates != nil || s.Level != 7 || s.IntervalS != 90 {
		t.Errorf("%+v", s)
	}
	s := supplyOf(&ike.Supply{Measured: true, SupplyRate: 1, UseRate: 2, Dry: time.Minute, Waits: true})
	if s.Rates == nil || s.Rates.Supply != 1 || s.Rates.Use != 2 || s.Rates.DryInS == nil || *s.Rates.DryInS != 60 || !s.Waits {
		t.Errorf("%+v", s)
	}
	if s := supplyOf(&ike.Supply{Measured: true, Dry: -1}); s.Rates.DryInS != nil {
		t.Errorf("dry in %d s, never meant", *s.Rates.DryInS)
	}
	if v := rekeyIn(time.Now().Add(61 * time.Second)); v == nil || *v < 59 || *v > 61 {
		t.Errorf("%v", v)
	}
}
