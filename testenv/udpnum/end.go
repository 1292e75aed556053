package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

// A packet is the magic, its kind and a number, big-endian.
const (
	magic     = "udpnum\x00"
	packetLen = 16

	hello = 1 // no number: "I can receive"
	data  = 2 // numbers from 1
	last  = 3 // how many data packets there were
)

// helloEvery and lastEvery are the pauses between repeats.
const (
	helloEvery = 100 * time.Millisecond
	lastEvery  = 100 * time.Millisecond
)

func packet(kind byte, number uint64) []byte {
	return binary.BigEndian.AppendUint64(append([]byte(magic), kind), number)
}

// end is one of the two.
type end struct {
	rate   float64
	length time.Duration
	wait   time.Duration // for the peer to appear
	linger time.Duration // still receiving after the end of both

	sent, failed uint64
	took, behind time.Duration

	mu       sync.Mutex
	met      bool      // the peer has been heard
	ended    time.Time // when the peer said that it has
	peerSent uint64
	got      map[uint64]bool
	highest  uint64
	again    uint64
	late     uint64
	newest   time.Time
	gap      time.Duration
}

// exchange sends and receives until both have ended; the end of ctx ends the sending.
func (e *end) exchange(ctx context.Context, conn *net.UDPConn, peer netip.AddrPort) {
	e.got = map[uint64]bool{}
	var receiver sync.WaitGroup
	receiver.Go(func() { e.receive(conn) })
	e.greet(ctx, conn, peer)
	e.send(ctx, conn, peer)
	e.finish(conn, peer)
	_ = conn.SetReadDeadline(time.Now())
	receiver.Wait()
}

// greet waits for the peer, so that nothing is sent to a port that is not open.
func (e *end) greet(ctx context.Context, conn *net.UDPConn, peer netip.AddrPort) {
	for limit := time.Now().Add(e.wait); !e.heard() && time.Now().Before(limit) && ctx.Err() == nil; {
		e.write(conn, peer, packet(hello, 0))
		pause(ctx, helloEvery)
	}
	// the peer may have heard none of ours yet
	e.write(conn, peer, packet(hello, 0))
}

// send keeps an absolute schedule: packet n is due n/rate after the start. When
// ctx ends, it sends what was due by then.
func (e *end) send(ctx context.Context, conn *net.UDPConn, peer netip.AddrPort) {
	start := time.Now()
	for e.sent < e.total() {
		elapsed := time.Since(start)
		if ctx.Err() != nil {
			e.length = min(e.length, elapsed)
			ctx = context.WithoutCancel(ctx)
		}
		e.behind = max(e.behind, elapsed-e.at(e.sent))
		for range e.next(elapsed) {
			e.sent++
			if !e.write(conn, peer, packet(data, e.sent)) {
				e.failed++
			}
		}
		pause(ctx, max(time.Millisecond, e.at(e.sent)-time.Since(start)))
	}
	e.took = time.Since(start)
}

func (e *end) total() uint64 { return uint64(e.rate * e.length.Seconds()) }

// next is how many packets to send at once: those that are due, 50 ms' worth at most.
func (e *end) next(elapsed time.Duration) uint64 {
	due := min(e.total(), uint64(elapsed.Seconds()*e.rate)+1)
	return min(max(due, e.sent)-e.sent, uint64(max(1, e.rate/20)))
}

// at is when the packet after the first n is due.
func (e *end) at(n uint64) time.Duration {
	return time.Duration(float64(n) / e.rate * float64(time.Second))
}

// finish tells the peer how many there were, until linger has passed since both
// have ended. A peer that does not end is given up after ten times linger.
func (e *end) finish(conn *net.UDPConn, peer netip.AddrPort) {
	for own := time.Now(); ; time.Sleep(lastEvery) {
		e.write(conn, peer, packet(last, e.sent))
		theirs := e.endOfPeer()
		both := !theirs.IsZero() && time.Since(theirs) > e.linger && time.Since(own) > e.linger
		if both || time.Since(own) > 10*e.linger {
			return
		}
	}
}

func (e *end) endOfPeer() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ended
}

func (e *end) write(conn *net.UDPConn, peer netip.AddrPort, b []byte) bool {
	_, err := conn.WriteToUDPAddrPort(b, peer)
	return err == nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (e *end) heard() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.met
}

// receive ends with the socket's deadline.
func (e *end) receive(conn *net.UDPConn) {
	buf := make([]byte, packetLen+1)
	for {
		n, _, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if n == packetLen && string(buf[:len(magic)]) == magic {
			e.take(buf[len(magic)], binary.BigEndian.Uint64(buf[len(magic)+1:]), time.Now())
		}
	}
}

// take counts one packet.
func (e *end) take(kind byte, number uint64, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.met = true
	switch kind {
	case last:
		if e.ended.IsZero() {
			e.ended, e.peerSent = now, number
		}
	case data:
		if !e.newest.IsZero() {
			e.gap = max(e.gap, now.Sub(e.newest))
		}
		e.newest = now
		switch {
		case e.got[number]:
			e.again++
			return
		case number < e.highest:
			e.late++
		default:
			e.highest = number
		}
		e.got[number] = true
	}
}

func (e *end) result() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	peer, lost := "unknown", "unknown"
	if !e.ended.IsZero() {
		peer, lost = strconv.FormatUint(e.peerSent, 10), strconv.FormatUint(e.peerSent-uint64(len(e.got)), 10)
	}
	return fmt.Sprintf("sent=%d send_errors=%d took_ms=%d behind_ms=%d peer_sent=%s received=%d lost=%s duplicates=%d reordered=%d longest_gap_ms=%d",
		e.sent, e.failed, e.took.Milliseconds(), e.behind.Milliseconds(), peer, len(e.got), lost, e.again, e.late, e.gap.Milliseconds())
}
