package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

func socket(t *testing.T) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func short() *end {
	return &end{rate: 1000, length: 300 * time.Millisecond, wait: 5 * time.Second, linger: 200 * time.Millisecond}
}

// has looks for the fields in an end's result.
func has(t *testing.T, e *end, fields string) {
	t.Helper()
	line := " " + e.result() + " "
	for _, f := range strings.Fields(fields) {
		if !strings.Contains(line, " "+f+" ") {
			t.Errorf("no %s in%s", f, line)
		}
	}
	if !regexp.MustCompile(`^( [a-z_]+=[0-9]+){10} $`).MatchString(line) {
		t.Errorf("not of numbers only:%s", line)
	}
}

// relay passes on what comes in at from; spoil says how often and when: a packet
// of data that is held back follows the next one.
func relay(from, out *net.UDPConn, to netip.AddrPort, spoil func(number uint64) (times int, hold bool)) {
	buf := make([]byte, 1500)
	var held []byte
	for {
		n, _, err := from.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		times, hold := 1, false
		if buf[len(magic)] == data {
			times, hold = spoil(binary.BigEndian.Uint64(buf[len(magic)+1 : n]))
		}
		if hold {
			held = append(held, buf[:n]...)
			continue
		}
		for range times {
			_, _ = out.WriteToUDPAddrPort(buf[:n], to)
		}
		if held != nil {
			_, _ = out.WriteToUDPAddrPort(held, to)
			held = nil
		}
	}
}

// Of 300 packets each way, one way spoiled by a known amount. b starts late.
func TestLossyRelay(t *testing.T) {
	ca, addrA := socket(t)
	cb, addrB := socket(t)
	ra, relayA := socket(t)
	rb, relayB := socket(t)
	go relay(ra, rb, addrB, func(n uint64) (int, bool) {
		switch {
		case n%10 == 0:
			return 0, false
		case n%25 == 3:
			return 2, false
		}
		return 1, n%40 == 7
	})
	go relay(rb, ra, addrA, func(uint64) (int, bool) { return 1, false })
	a, b := short(), short()
	var both sync.WaitGroup
	both.Go(func() { a.exchange(t.Context(), ca, relayA) })
	time.Sleep(300 * time.Millisecond)
	if a.heard() {
		t.Error("a has heard b before there was one")
	}
	both.Go(func() { b.exchange(t.Context(), cb, relayB) })
	both.Wait()
	has(t, a, "sent=300 send_errors=0 peer_sent=300 received=300 lost=0 duplicates=0 reordered=0")
	has(t, b, "sent=300 send_errors=0 peer_sent=300 received=270 lost=30 duplicates=12 reordered=8")
	if a.took < 299*time.Millisecond {
		t.Errorf("300 packets at 1000/s took %v", a.took)
	}
}

// An end that is told to stop says how much it has sent.
func TestStop(t *testing.T) {
	ca, addrA := socket(t)
	cb, addrB := socket(t)
	a, b := short(), short()
	a.length = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	var both sync.WaitGroup
	both.Go(func() { a.exchange(ctx, ca, addrB) })
	both.Go(func() { b.exchange(t.Context(), cb, addrA) })
	both.Wait()
	has(t, b, fmt.Sprintf("peer_sent=%d received=%d lost=0", a.sent, a.sent))
	if due := uint64(a.rate * a.length.Seconds()); a.sent < 100 || a.sent > 600 || a.sent < due {
		t.Errorf("%d sent, %d were due", a.sent, due)
	}
}

// Without the peer's end its losses are unknown, and said to be.
func TestPeerGone(t *testing.T) {
	c, _ := socket(t)
	_, nobody := socket(t)
	e := short()
	e.wait, e.linger = 200*time.Millisecond, 20*time.Millisecond
	e.exchange(t.Context(), c, nobody)
	if r := e.result(); !strings.Contains(r, "sent=300 ") || !strings.Contains(r, " lost=unknown ") {
		t.Error(r)
	}
}

func TestTake(t *testing.T) {
	e := &end{got: map[uint64]bool{}}
	at := time.Now()
	for _, p := range []struct {
		kind   byte
		number uint64
		ms     int
	}{{hello, 0, 0}, {data, 1, 100}, {data, 3, 110}, {data, 2, 150}, {data, 2, 155}, {data, 6, 160}, {last, 6, 900}, {last, 9, 950}} {
		e.take(p.kind, p.number, at.Add(time.Duration(p.ms)*time.Millisecond))
	}
	has(t, e, "peer_sent=6 received=4 lost=2 duplicates=1 reordered=1 longest_gap_ms=40")
}

// The schedule is absolute, never ahead, and catches up in bounded bursts.
func TestNext(t *testing.T) {
	e := &end{rate: 1000, length: 10 * time.Second}
	for _, c := range []struct {
		sent    uint64
		elapsed time.Duration
		want    uint64
	}{
		{0, 0, 1},
		{1, 900 * time.Microsecond, 0},
		{1, time.Millisecond, 1},
		{100, 105 * time.Millisecond, 6},
		{100, 5 * time.Second, 50},
		{9990, time.Minute, 10},
		{200, 100 * time.Millisecond, 0},
	} {
		if e.sent = c.sent; e.next(c.elapsed) != c.want {
			t.Errorf("%d sent after %v: %d, want %d", c.sent, c.elapsed, e.next(c.elapsed), c.want)
		}
	}
}
