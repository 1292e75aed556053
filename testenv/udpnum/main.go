// Command udpnum measures what a tunnel loses: it sends numbered UDP packets to
// another udpnum at a steady rate, receives that one's, and prints one line at
// the end:
//
//	sent=30000 send_errors=0 took_ms=30001 behind_ms=12 peer_sent=30000
//	received=30000 lost=0 duplicates=0 reordered=0 longest_gap_ms=14
//
// (on one line). took_ms is how long the sending took, behind_ms how far it fell
// behind its schedule at most; after a stall it catches up, 50 ms' worth of packets
// at a time. lost counts the peer's numbers that never came, "unknown" if the peer
// has not told how many there were. The exit status is 0 whatever was lost.
// SIGTERM ends the sending early.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	peer := flag.String("peer", "", "`address:port` of the other end")
	listen := flag.String("listen", "", "own `address:port`")
	e := &end{wait: 30 * time.Second, linger: 2 * time.Second}
	flag.Float64Var(&e.rate, "rate", 1000, "packets per second")
	flag.DurationVar(&e.length, "for", 30*time.Second, "how long to send")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := e.run(ctx, *listen, *peer); err != nil {
		fmt.Fprintln(os.Stderr, "udpnum:", err)
		os.Exit(1)
	}
	fmt.Println(e.result())
}

func (e *end) run(ctx context.Context, listen, peer string) error {
	to, err := netip.ParseAddrPort(peer)
	if err != nil {
		return fmt.Errorf("-peer: %w", err)
	}
	from, err := netip.ParseAddrPort(listen)
	if err != nil {
		return fmt.Errorf("-listen: %w", err)
	}
	if e.rate <= 0 || e.rate > 1e6 || e.length <= 0 {
		return fmt.Errorf("-rate %v for %v: want 0 < rate <= 1000000 and some time", e.rate, e.length)
	}
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(from))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	// what the tunnel has delivered must not be lost in the socket
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	if err := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	}); err != nil {
		return err
	}
	if err != nil { // not root: as far as the system allows
		if err := conn.SetReadBuffer(32 << 20); err != nil {
			return err
		}
	}
	e.exchange(ctx, conn, to)
	return nil
}
