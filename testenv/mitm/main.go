// Command mitm is an attacker on the wire between two gateways: it copies frames
// between two interfaces, which belong to no bridge meanwhile, and attacks IKE.
// Q-IPsec must come to no harm by it: no tunnel, or one with the right keys.
//
// Its modes:
//
//	pass            only copies
//	strip           takes notify 40990 out of IKE_SA_INIT messages
//	forge           answers an IKE_SA_INIT request with NO_PROPOSAL_CHOSEN, first
//	forge-cookie    answers it with a COOKIE, first; three times for an SPI
//	cookie-alone    likewise, and swallows what it answers so
//	forge-ke        answers it with INVALID_KE_PAYLOAD for group 20, once for an SPI,
//	                and swallows it
//	forge-complete  answers it as a Q-IPsec responder would who cannot
//	                authenticate; the real answer is swallowed
//	silence         IKE_SA_INIT and IKE_AUTH get lost
//	replay          each IKE_SA_INIT, IKE_AUTH, CREATE_CHILD_SA datagram and
//	                each ESP packet comes a second time, 200 ms later
//
// Everything else passes unchanged. It prints "mode MODE" when it has begun, a
// line for each attack, and at the end how many ESP packets it replayed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const replayDelay = 200 * time.Millisecond

func main() {
	a := flag.String("a", "port-a", "`interface` of side a")
	b := flag.String("b", "port-b", "`interface` of side b")
	mode := flag.String("mode", "pass", "the attack")
	from := flag.String("direction", "", "attack only what comes from that `side`, a or b")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *a, *b, *mode, *from); err != nil {
		fmt.Fprintln(os.Stderr, "mitm:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, a, b, mode, from string) error {
	att, err := newAttack(mode, from, func(format string, args ...any) { fmt.Printf(format+"\n", args...) })
	if err != nil {
		return err
	}
	portA, err := open(a)
	if err != nil {
		return fmt.Errorf("%s: %w", a, err)
	}
	portB, err := open(b)
	if err != nil {
		return errors.Join(fmt.Errorf("%s: %w", b, err), portA.Close())
	}
	att.say("mode %s", mode)
	return errors.Join(between(ctx, att, portA, portB), portA.Close(), portB.Close())
}

// between copies both ways until ctx ends, or a side fails.
func between(ctx context.Context, att *attack, a, b io.ReadWriter) error {
	errs := make(chan error, 2)
	go func() { errs <- relay(att, "a", a, b) }()
	go func() { errs <- relay(att, "b", b, a) }()
	defer att.sum()
	select {
	case <-ctx.Done():
		return nil
	case err := <-errs:
		return err
	}
}

// vnetLen is the header with which the kernel gives and takes a frame whose
// checksum or segmentation it has left to the device. All zero: nothing is left.
const vnetLen = 10

// open gives a socket for all frames that come in at an interface.
func open(name string) (*os.File, error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket (needs root): %w", err)
	}
	all := uint16(unix.ETH_P_ALL)
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all>>8 | all<<8, Ifindex: ifi.Index}),
	); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}

// relay copies what comes from a side.
func relay(att *attack, side string, from, to io.ReadWriter) error {
	buf := make([]byte, vnetLen+1<<16)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return fmt.Errorf("receive from %s: %w", side, err)
		}
		if n < vnetLen {
			continue
		}
		out := att.meet(side, buf[vnetLen:n])
		if out.back != nil {
			if _, err := from.Write(whole(out.back)); err != nil {
				return fmt.Errorf("send back to %s: %w", side, err)
			}
		}
		if out.swallow {
			continue
		}
		frame := buf[:n]
		if out.instead != nil {
			frame = whole(out.instead)
		}
		if _, err := to.Write(frame); err != nil {
			return fmt.Errorf("send on what came from %s: %w", side, err)
		}
		if out.again {
			again := append([]byte(nil), frame...)
			// an error shows at the next frame, or nobody waits for it any more
			time.AfterFunc(replayDelay, func() { _, _ = to.Write(again) })
		}
	}
}

// whole is a frame of ours as the socket takes it.
func whole(frame []byte) []byte { return append(make([]byte, vnetLen), frame...) }
