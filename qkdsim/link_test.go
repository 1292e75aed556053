package qkdsim

import (
	"math"
	"testing"
)

// The worked example of Ma et al. 2005 with infinitely many decoys.
func TestSecretPerPulseGolden(t *testing.T) {
	d := Device{DarkYield: 1.7e-6, Mu: 0.48, Correction: 1.22, Sifting: 0.5}
	r, _ := secretPerPulse(d, 0.045, 0.033)
	if math.Abs(r-2.5546e-3) > 5e-8 {
		t.Errorf("rate %.5e bit/pulse, want 2.5546e-3", r)
	}
}

// Computed once for the three devices by an independent program: 0.2 dB/km.
func TestDevicesByDistance(t *testing.T) {
	for _, c := range []struct {
		device   string
		km       float64
		bits     float64 // bit/s, 0 = none
		qberPart float64 // percent, 0 = not given
	}{
		{"ingaas-1ghz", 0, 7.8e6, 1.5},
		{"ingaas-1ghz", 25, 2.4e6, 0},
		{"ingaas-1ghz", 50, 768e3, 1.5},
		{"ingaas-1ghz", 75, 240e3, 0},
		{"ingaas-1ghz", 100, 74e3, 1.7},
		{"ingaas-1ghz", 120, 27e3, 0},
		{"ingaas-1ghz", 140, 9.1e3, 0},
		{"snspd-1ghz", 0, 47e6, 1.0},
		{"snspd-1ghz", 25, 14e6, 0},
		{"snspd-1ghz", 50, 4.5e6, 0},
		{"snspd-1ghz", 75, 1.4e6, 0},
		{"snspd-1ghz", 100, 446e3, 0},
		{"snspd-1ghz", 120, 177e3, 0},
		{"snspd-1ghz", 140, 70e3, 0},
		{"ingaas-100mhz", 0, 334e3, 2.0},
		{"ingaas-100mhz", 25, 104e3, 0},
		{"ingaas-100mhz", 50, 32e3, 2.2},
		{"ingaas-100mhz", 75, 9.0e3, 0},
		{"ingaas-100mhz", 100, 1.9e3, 3.8},
		{"ingaas-100mhz", 120, 44, 6.4},
		{"ingaas-100mhz", 140, 0, 11.7},
	} {
		d, err := DeviceByName(c.device)
		if err != nil {
			t.Fatal(err)
		}
		p := Link{Device: d, Km: c.km, DBPerKm: 0.2}.At()
		if math.Abs(p.SecretHz-c.bits) > 0.025*c.bits {
			t.Errorf("%s at %v km: %.4g bit/s, want %.4g", c.device, c.km, p.SecretHz, c.bits)
		}
		if c.qberPart > 0 && math.Abs(100*p.QBER-c.qberPart) > 0.06 {
			t.Errorf("%s at %v km: QBER %.2f %%, want %.1f", c.device, c.km, 100*p.QBER, c.qberPart)
		}
	}
}

func TestCapKeepsTheShareOfSecretBits(t *testing.T) {
	d, _ := DeviceByName("snspd-1ghz")
	free := Link{Device: d, Km: 10, DBPerKm: 0.2}.At()
	d.CapBits = 1e6
	capped := Link{Device: d, Km: 10, DBPerKm: 0.2}.At()
	if capped.SecretHz != 1e6 || math.Abs(capped.ClickHz/capped.SecretHz-free.ClickHz/free.SecretHz) > 1e-9 {
		t.Errorf("capped %+v, free %+v", capped, free)
	}
}

// An eavesdropper who measures and resends every pulse adds 25 %.
func TestEavesdropperLeavesNoKey(t *testing.T) {
	d, _ := DeviceByName("ingaas-1ghz")
	p := Link{Device: d, Km: 25, DBPerKm: 0.2, Extra: 0.25}.At()
	if p.QBER < AbortQBER || p.SecretHz != 0 {
		t.Errorf("QBER %.3f, %.3g bit/s under a full intercept-resend attack", p.QBER, p.SecretHz)
	}
}
