// Command ivcheck reads captures and looks for an IV that an SA used twice.
//
//	ivcheck FILE.pcap...
//
// It takes ESP over IPv4 and IPv6, bare and in UDP port 4500, to have an IV of 8
// bytes, as AES-GCM does, and names SAs by their SPI alone: an SA that moves to
// other addresses keeps its key. For each SPI it prints one line, at the end
// `ivcheck: N packets, M SPIs, R repeats`.
//
// A repeat is a packet with SPI and IV of an earlier one. Only one that is the
// same in every byte from the SPI to the ICV is counted as a copy instead: the
// same nonce with the same ciphertext tells nobody more than the first one did.
// So the same packet may be in several captures, on either side of a NAT. Of a
// fragment, or a packet that the capture cut off, that cannot be known.
//
// Exit status: 0 no repeat, 1 repeats, 2 a file cannot be read to its end or has
// no ESP in it.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

func main() {
	flag.Usage = func() { fmt.Fprintln(os.Stderr, "usage: ivcheck FILE.pcap...") }
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	os.Exit(run(flag.Args(), os.Stdout, os.Stderr))
}

func run(files []string, out, complaints io.Writer) int {
	t := newTally()
	for _, f := range files {
		if err := t.file(f); err != nil {
			_, _ = fmt.Fprintf(complaints, "ivcheck: %s: %v\n", f, err)
			return 2
		}
	}
	t.print(out)
	if t.repeats > 0 {
		return 1
	}
	return 0
}

// file adds the packets of one capture.
func (t *tally) file(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return t.capture(path, f)
}

func (t *tally) capture(name string, r io.Reader) error {
	before, n := t.packets, 0
	err := readCapture(bufio.NewReader(r), func(frame []byte, whole bool) error {
		n++
		p, ok, err := parseESP(frame, whole)
		if err != nil {
			return fmt.Errorf("packet %d: %w", n, err)
		}
		if ok {
			t.add(p, fmt.Sprintf("%s packet %d", name, n))
		}
		return nil
	})
	if err == nil && t.packets == before {
		err = errors.New("no ESP packet in it")
	}
	return err
}
