package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"time"
)

const block = 256 << 10 // of one write or read: few calls, as each is slow in user-mode-linux

// sink takes bytes over TCP on -listen until ctx ends, and tells each client at the
// end of its bytes how many they were.
func sink(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench sink", flag.ContinueOnError)
	listen := fs.String("listen", "", "`address:port`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	l, err := net.Listen("tcp4", *listen)
	if err != nil {
		return err
	}
	fmt.Println("listening on", l.Addr())
	return takeAll(ctx, l)
}

// takeAll serves one client after the other.
func takeAll(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	buf := make([]byte, block)
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := swallow(conn, buf); err != nil {
			return err
		}
	}
}

func swallow(conn net.Conn, buf []byte) (err error) {
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(bound)); err != nil {
		return err
	}
	var sum uint64
	for {
		n, err := conn.Read(buf)
		sum += uint64(n)
		if err == io.EOF {
			return binary.Write(conn, binary.BigEndian, sum)
		}
		if err != nil {
			return err
		}
	}
}

// push sends to two sinks by turns, a slice each, and prints the Mbit/s of every
// slice as "ours N" or "stock N". The first two slices are not counted.
func push(ctx context.Context, args []string, w io.Writer) error {
	fs := flag.NewFlagSet("bench push", flag.ContinueOnError)
	ours := fs.String("ours", "", "`address:port` of the sink behind our tunnel")
	stock := fs.String("stock", "", "`address:port` of the sink behind the reference's")
	rounds := fs.Int("rounds", 9, "slices to each")
	slice := fs.Duration("slice", time.Second, "length of one")
	if err := fs.Parse(args); err != nil {
		return err
	}
	sinks := [2][2]string{{"ours", *ours}, {"stock", *stock}}
	buf := make([]byte, block)
	for round := range 1 + *rounds {
		for turn := range sinks {
			s := sinks[(round+turn)%2] // who goes first changes, as the first may have it easier
			rate, err := pushSlice(ctx, s[1], *slice, buf)
			if err != nil {
				return fmt.Errorf("%s: %w", s[0], err)
			}
			if round > 0 {
				fmt.Fprintf(w, "%s %.3f\n", s[0], rate)
			}
		}
	}
	return nil
}

// pushSlice gives the Mbit/s until the last byte has arrived.
func pushSlice(ctx context.Context, address string, slice time.Duration, buf []byte) (float64, error) {
	d := net.Dialer{Timeout: bound}
	conn, err := d.DialContext(ctx, "tcp4", address)
	if err != nil {
		return 0, err
	}
	defer conn.Close() //nolint:errcheck // all that matters has been answered
	start := time.Now()
	if err := conn.SetDeadline(start.Add(slice + bound)); err != nil {
		return 0, err
	}
	var sent uint64
	for time.Since(start) < slice && ctx.Err() == nil {
		n, err := conn.Write(buf)
		sent += uint64(n)
		if err != nil {
			return 0, err
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, err
	}
	var arrived uint64
	if err := binary.Read(conn, binary.BigEndian, &arrived); err != nil {
		return 0, err
	}
	if arrived != sent {
		return 0, fmt.Errorf("%d of %d bytes arrived", arrived, sent)
	}
	return float64(sent) * 8 / 1e6 / time.Since(start).Seconds(), ctx.Err()
}
