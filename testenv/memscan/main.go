// Command memscan searches a process's readable memory for byte strings, given
// in hex on standard input, one a line: as they are and as hexadecimal text. It
// prints how many it found, never which bytes. Exit status 1 if there were any.
package main

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: memscan PID <needles")
		os.Exit(2)
	}
	needles, err := readNeedles(os.Stdin)
	if err == nil && len(needles) == 0 {
		err = fmt.Errorf("no needles on standard input")
	}
	var hits, size int
	if err == nil {
		hits, size, err = scan(os.Args[1], needles)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "memscan:", err)
		os.Exit(2)
	}
	fmt.Printf("%d of %d needles found in %d MiB\n", hits, len(needles), size>>20)
	if hits > 0 {
		os.Exit(1)
	}
}

func readNeedles(r io.Reader) ([][]byte, error) {
	var out [][]byte
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		b, err := hex.DecodeString(strings.TrimPrefix(strings.TrimSpace(sc.Text()), "0x"))
		if err != nil || len(b) < 16 {
			return nil, fmt.Errorf("line %d is not at least 16 bytes in hex", len(out)+1)
		}
		out = append(out, b)
	}
	return out, sc.Err()
}

// scan looks through every readable mapping; it fails if nothing can be read.
func scan(pid string, needles [][]byte) (hits, size int, err error) {
	maps, err := os.ReadFile("/proc/" + pid + "/maps")
	if err != nil {
		return 0, 0, err
	}
	mem, err := os.Open("/proc/" + pid + "/mem")
	if err != nil {
		return 0, 0, err
	}
	defer mem.Close()
	found := make([]bool, len(needles))
	for _, l := range strings.Split(string(maps), "\n") {
		f := strings.Fields(l)
		if len(f) < 2 || !strings.HasPrefix(f[1], "rw") {
			continue
		}
		lo, hi, _ := strings.Cut(f[0], "-")
		a, err1 := strconv.ParseInt(lo, 16, 64)
		b, err2 := strconv.ParseInt(hi, 16, 64)
		if err1 != nil || err2 != nil {
			continue // [vsyscall] lies beyond int64
		}
		buf := make([]byte, b-a)
		n, _ := mem.ReadAt(buf, a)
		size += n
		for i, w := range needles {
			text := hex.EncodeToString(w)
			if bytes.Contains(buf[:n], w) || bytes.Contains(buf[:n], []byte(text)) || bytes.Contains(buf[:n], []byte(strings.ToUpper(text))) {
				found[i] = true
			}
		}
	}
	if size == 0 {
		return 0, 0, fmt.Errorf("no memory of process %s can be read", pid)
	}
	for _, f := range found {
		if f {
			hits++
		}
	}
	return hits, size, nil
}
