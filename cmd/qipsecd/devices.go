package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/kma"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/qkdsim/control"
)

const (
	deviceEvery   = 5 * time.Second
	deviceTimeout = 2 * time.Second
	unreachable   = "unreachable"
)

// devices watches the QKD devices whose control interface the config names, and
// reports when one changes: an abort, as an eavesdropper causes, is an alarm.
type devices struct {
	events source
	byPool map[uuid.UUID]kma.QKDE // fixed

	mu    sync.Mutex
	state map[uuid.UUID]operator.Device
}

func newDevices(c *conf.KMS, events source, log *slog.Logger) (*devices, error) {
	d := &devices{events: events, byPool: map[uuid.UUID]kma.QKDE{}, state: map[uuid.UUID]operator.Device{}}
	for _, p := range c.Pairs {
		if p.Control == "" {
			continue
		}
		t, err := pki.KMEClient(c.Type1, false, log) // the same rules: TLS 1.3, the server by its URL's name
		if err != nil {
			return nil, err
		}
		d.byPool[p.ID] = qkde{control.NewClient(p.Control, &http.Client{Timeout: deviceTimeout, Transport: &http.Transport{TLSClientConfig: t}})}
	}
	return d, nil
}

// control is the device of a pool; nil if it has none.
func (d *devices) control(pool uuid.UUID) kma.QKDE { return d.byPool[pool] }

// last is what the device of a pool said last; nil if it has none.
func (d *devices) last(pool uuid.UUID) *operator.Device {
	d.mu.Lock()
	defer d.mu.Unlock()
	if v, ok := d.state[pool]; ok {
		return &v
	}
	return nil
}

// run asks all devices now and then until ctx ends.
func (d *devices) run(ctx context.Context) error {
	t := time.NewTicker(deviceEvery)
	defer t.Stop()
	for {
		for pool, dev := range d.byPool {
			d.ask(ctx, pool, dev)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (d *devices) ask(ctx context.Context, pool uuid.UUID, dev kma.QKDE) {
	call, cancel := context.WithTimeout(ctx, deviceTimeout)
	defer cancel()
	s, err := dev.Status(call)
	if ctx.Err() != nil {
		return
	}
	v := operator.Device{State: string(s.State), QBER: s.QBER, Rate: s.Rate, Alarms: s.Alarms}
	if err != nil {
		v = operator.Device{State: unreachable}
	}
	d.mu.Lock()
	old, known := d.state[pool]
	d.state[pool] = v
	d.mu.Unlock()
	if known && old.State == v.State && slices.Equal(old.Alarms, v.Alarms) {
		return
	}
	attrs := []slog.Attr{slog.String("pool", pool.String()), slog.String("state", v.State), slog.String("qber", fmt.Sprintf("%.3f", v.QBER))}
	if len(v.Alarms) > 0 {
		attrs = append(attrs, slog.String("alarms", strings.Join(v.Alarms, " ")))
	}
	if err != nil {
		attrs = append(attrs, slog.String("err", err.Error()))
	}
	severity := "fault"
	switch {
	case s.State == kma.DeviceAborted || len(v.Alarms) > 0:
		severity = "alarm"
	case err == nil && (s.State == kma.DeviceRunning || s.State == kma.DeviceInit || s.State == kma.DeviceStopped):
		severity = "run"
	}
	d.events.Event("QKDE_STATE", severity, "QKD device changed", attrs...)
}

// qkde is a QKD device's control in the KMA's terms.
type qkde struct{ *control.Client }

// Status asks the device. A state that its makers did not tell us of is shown
// as it came.
func (q qkde) Status(ctx context.Context) (kma.DeviceStatus, error) {
	s, err := q.Client.Status(ctx)
	if err != nil {
		return kma.DeviceStatus{}, err
	}
	state, ok := map[string]kma.DeviceState{
		"generating": kma.DeviceRunning, "stopped": kma.DeviceStopped, "aborted": kma.DeviceAborted, "outage": kma.DeviceDown,
	}[s.State]
	if !ok {
		state = kma.DeviceState(s.State)
	}
	return kma.DeviceStatus{State: state, QBER: s.QBER, Rate: s.Rate, Alarms: s.Alarms}, nil
}

// Generate asks for more key data, in bytes.
func (q qkde) Generate(ctx context.Context, bytes int64) error {
	return q.Client.Generate(ctx, int(min(bytes, control.MaxGenerate)))
}
