// Package qkdsim plays a pair of QKD devices (QKDEs): the same key stream at
// both ends, at the rate and QBER that decoy-state BB84 gives for a distance
// and a device, in bursts, with drift, outages, eavesdroppers and lost or
// damaged files, delivered as QKD-Key files into a directory or over SFTP.
package qkdsim

import (
	"fmt"
	"math"
)

// Device is a QKD device's constants for the decoy-state BB84 model of Ma, Qi,
// Zhao and Lo, Phys. Rev. A 72, 012326 (2005).
type Device struct {
	Name       string
	ClockHz    float64 // pulses per second
	Efficiency float64 // of the detectors, 0..1
	ReceiverDB float64 // loss inside the receiver
	DarkYield  float64 // Y0: background clicks per pulse
	Misaligned float64 // e_d: error rate of a signal click
	Mu, Nu     float64 // mean photons per signal and weak decoy pulse; Nu 0 = infinitely many decoys
	Correction float64 // f: inefficiency of error correction, >= 1
	Sifting    float64 // q: share of clicks kept by basis sifting and pulse kind
	Duty       float64 // share of the time that makes key, 0..1
	CapBits    float64 // what dead time and post-processing allow at most, bit/s; 0 = no cap
}

// The devices by name. Their rates by distance are the golden values of the
// tests.
var devices = map[string]Device{
	"ingaas-1ghz":   {"ingaas-1ghz", 1e9, 0.20, 3, 2e-6, 0.015, 0.5, 0.1, 1.16, 0.5, 0.8, 0},
	"snspd-1ghz":    {"snspd-1ghz", 1e9, 0.80, 2, 5e-8, 0.010, 0.5, 0.1, 1.16, 0.5, 0.8, 0},
	"ingaas-100mhz": {"ingaas-100mhz", 1e8, 0.10, 3, 1e-5, 0.020, 0.5, 0.1, 1.16, 0.5, 0.8, 0},
}

// DeviceByName gives a built-in device: "ingaas-1ghz", "snspd-1ghz" or
// "ingaas-100mhz".
func DeviceByName(name string) (Device, error) {
	d, ok := devices[name]
	if !ok {
		return Device{}, fmt.Errorf("qkdsim: device %q is none of ingaas-1ghz, snspd-1ghz, ingaas-100mhz", name)
	}
	return d, nil
}

// Link is a device pair over a fibre.
type Link struct {
	Device
	Km      float64
	DBPerKm float64 // fibre attenuation, 0.2 for good fibre at 1550 nm
	Extra   float64 // further error rate of signal clicks: drift, and 0.25 per share of pulses that an eavesdropper measures and resends
}

// Point is a link's state of operation.
type Point struct {
	ClickHz  float64 // sifted bits per second
	QBER     float64 // of the sifted bits, 0..1
	SecretHz float64 // secret bits per second after privacy amplification, 0 if none is left
}

// AbortQBER is the error rate above which one-way BB84 gives no secret key
// (1 - 2h(e) = 0).
const AbortQBER = 0.11

// At computes the link's operating point.
func (l Link) At() Point {
	eta := math.Pow(10, -(l.DBPerKm*l.Km+l.ReceiverDB)/10) * l.Efficiency
	rate, qber := secretPerPulse(l.Device, eta, l.Misaligned+l.Extra-2*l.Misaligned*l.Extra)
	gain := l.DarkYield + 1 - math.Exp(-eta*l.Mu)
	p := Point{ClickHz: l.Sifting * gain * l.ClockHz * l.Duty, QBER: qber}
	p.SecretHz = max(0, rate) * l.ClockHz * l.Duty
	if l.CapBits > 0 && p.SecretHz > l.CapBits {
		p.ClickHz *= l.CapBits / p.SecretHz
		p.SecretHz = l.CapBits
	}
	return p
}

// secretPerPulse gives the secret bits per pulse, negative if there is none,
// and the QBER, for overall transmission eta and signal error rate ed.
func secretPerPulse(d Device, eta, ed float64) (rate, qber float64) {
	gain := func(m float64) float64 { return d.DarkYield + 1 - math.Exp(-eta*m) }
	errs := func(m float64) float64 { return d.DarkYield/2 + ed*(1-math.Exp(-eta*m)) } // E*Q
	q := gain(d.Mu)
	qber = errs(d.Mu) / q
	var y1, e1 float64 // yield and error rate of single photons
	if d.Nu == 0 {
		y1 = d.DarkYield + eta
		e1 = (d.DarkYield/2 + ed*eta) / y1
	} else { // vacuum + weak decoy bounds
		mu2, nu2 := d.Mu*d.Mu, d.Nu*d.Nu
		y1 = d.Mu / (d.Mu*d.Nu - nu2) * (gain(d.Nu)*math.Exp(d.Nu) - q*math.Exp(d.Mu)*nu2/mu2 - (mu2-nu2)/mu2*d.DarkYield)
		e1 = (errs(d.Nu)*math.Exp(d.Nu) - d.DarkYield/2) / (y1 * d.Nu)
	}
	q1 := y1 * d.Mu * math.Exp(-d.Mu)
	return d.Sifting * (q1*(1-entropy(e1)) - d.Correction*q*entropy(qber)), qber
}

// entropy is the binary entropy h(x), 1 from x = 1/2 on: such an error rate
// leaves nothing.
func entropy(x float64) float64 {
	switch {
	case x <= 0:
		return 0
	case x >= 0.5:
		return 1
	}
	return -x*math.Log2(x) - (1-x)*math.Log2(1-x)
}
