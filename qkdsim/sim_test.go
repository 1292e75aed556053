package qkdsim

import (
	"math"
	"reflect"
	"testing"
	"time"
)

func testLink(t *testing.T) Link {
	t.Helper()
	d, err := DeviceByName("ingaas-1ghz")
	if err != nil {
		t.Fatal(err)
	}
	return Link{Device: d, Km: 50, DBPerKm: 0.2}
}

func newSim(t *testing.T, w Weather, seed uint64) *Sim {
	t.Helper()
	s, err := NewSim(testLink(t), w, 1_000_000, seed)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func secret(bursts []Burst) (bits int) {
	for _, b := range bursts {
		bits += b.SecretBits
	}
	return bits
}

func TestRateComesInBursts(t *testing.T) {
	s := newSim(t, Weather{Jitter: 0.03, Drift: 0.001}, 1)
	bursts := s.Step(10 * time.Minute)
	want := testLink(t).At().SecretHz * 600
	if got := float64(secret(bursts)); math.Abs(got-want) > 0.1*want {
		t.Errorf("%.3g secret bits in 10 minutes, want about %.3g", got, want)
	}
	// 1e6 sifted bits at about 2 Mbit/s sifted: far fewer bursts than steps.
	if len(bursts) < 100 || len(bursts) > 3000 {
		t.Errorf("%d bursts in 6,000 steps", len(bursts))
	}
}

func TestSeedRepeatsTheStory(t *testing.T) {
	w := Weather{Jitter: 0.05, Drift: 0.002, OutageEvery: time.Minute, OutageLasts: 10 * time.Second, IntruderEvery: 2 * time.Minute, IntruderLasts: 5 * time.Second, IntruderShare: 1}
	a, b, c := newSim(t, w, 7).Step(10*time.Minute), newSim(t, w, 7).Step(10*time.Minute), newSim(t, w, 8).Step(10*time.Minute)
	if !reflect.DeepEqual(a, b) {
		t.Error("one seed, two stories")
	}
	if reflect.DeepEqual(a, c) {
		t.Error("two seeds, one story")
	}
}

func TestEavesdropperAbortsAndLeaves(t *testing.T) {
	s := newSim(t, Weather{}, 3)
	s.Step(5 * time.Second)
	s.Intrude(20*time.Second, 1)
	for _, b := range s.Step(19 * time.Second) {
		if b.SecretBits != 0 || b.QBER < AbortQBER {
			t.Fatalf("burst %+v while every pulse is measured and resent", b)
		}
	}
	if s.State() != Aborted {
		t.Fatalf("state %s", s.State())
	}
	if got := secret(s.Step(20 * time.Second)); got == 0 || s.State() != Generating {
		t.Errorf("after the eavesdropper left: %d bits, state %s", got, s.State())
	}
}

func TestOutageStopInit(t *testing.T) {
	s := newSim(t, Weather{}, 4)
	s.Cut(30 * time.Second)
	if b := s.Step(29 * time.Second); len(b) != 0 || s.State() != Outage {
		t.Fatalf("%d bursts in an outage, state %s", len(b), s.State())
	}
	if secret(s.Step(10*time.Second)) == 0 {
		t.Fatal("no key after the outage")
	}
	s.Stop()
	if b := s.Step(time.Minute); len(b) != 0 || s.SecretHz() != 0 {
		t.Fatalf("%d bursts while stopped", len(b))
	}
	s.Init()
	if secret(s.Step(10*time.Second)) == 0 {
		t.Fatal("no key after Init")
	}
}

func TestOutagesTakeTheirShare(t *testing.T) {
	s := newSim(t, Weather{OutageEvery: 60 * time.Second, OutageLasts: 60 * time.Second}, 5)
	got := float64(secret(s.Step(2 * time.Hour)))
	full := testLink(t).At().SecretHz * 7200
	if share := got / full; share < 0.3 || share > 0.7 {
		t.Errorf("share of time with light %.2f, want about 0.5", share)
	}
}

func TestNewSimRefusesNonsense(t *testing.T) {
	for _, l := range []Link{{}, {Device: Device{ClockHz: 1}, Km: -1}} {
		if _, err := NewSim(l, Weather{}, 1, 1); err == nil {
			t.Errorf("link %+v taken", l)
		}
	}
	if _, err := NewSim(testLink(t), Weather{}, 0, 1); err == nil {
		t.Error("block of 0 bits taken")
	}
}
