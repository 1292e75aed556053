// Command memscan searches the memory of processes, files and directories for
// keys, written in any way that package needle knows. It prints how many it
// found, never which bytes. Exit status 1 if there were any, 2 if it cannot look.
//
//	memscan [-seed N -pair UUID -files N -per-file N [-sae A,B ...]] TARGET...
//
// A TARGET of digits is a process id, of which every writable mapping is
// searched; any other is a path. The keys are those in hex on standard input,
// one a line, and with -seed every master key that qkdsim delivered from this
// seed, and the session key made of it for each pair of SAEs.
package main

import (
	"bufio"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/q-ipsec/q-ipsec/testenv/needle"
)

func main() {
	var sim simulated
	sim.flags(flag.CommandLine)
	flag.Parse()
	n, err := run(&sim, flag.Args(), os.Stdin, os.Stdout)
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "memscan:", err)
		os.Exit(2)
	case n > 0:
		os.Exit(1)
	}
}

// run gives how many keys were found in all targets together.
func run(sim *simulated, targets []string, in io.Reader, out io.Writer) (int, error) {
	if len(targets) == 0 {
		return 0, errors.New("name a process id or a path to search")
	}
	set := needle.NewSet()
	if err := readNeedles(set, in); err != nil {
		return 0, err
	}
	if err := sim.add(set); err != nil {
		return 0, err
	}
	if set.Len() == 0 {
		return 0, errors.New("no keys to look for")
	}
	all := needle.Found{}
	size := 0
	for _, t := range targets {
		look := searchPath
		if _, err := strconv.Atoi(t); err == nil {
			look = searchProcess
		}
		n, err := look(set, t, all)
		if err != nil {
			return 0, err
		}
		if n == 0 {
			return 0, fmt.Errorf("nothing of %s can be read", t)
		}
		size += n
	}
	fmt.Fprintf(out, "%d of %d keys found in %.1f MiB\n", len(all), set.Len(), float64(size)/(1<<20))
	return len(all), nil
}

func readNeedles(set *needle.Set, r io.Reader) error {
	sc := bufio.NewScanner(r)
	for line := 1; sc.Scan(); line++ {
		b, err := hex.DecodeString(strings.TrimPrefix(strings.TrimSpace(sc.Text()), "0x"))
		if err != nil || !set.Add(b) {
			return fmt.Errorf("line %d is no key of at least %d bytes in hex", line, needle.Window)
		}
		clear(b)
	}
	return sc.Err()
}

// chunk is how much of a mapping is read at a time, and overlap how much of it
// again with the next: more than a key in hex.
const chunk, overlap = 4 << 20, 256

// searchProcess looks through every writable mapping that can be read, and
// gives their size.
func searchProcess(set *needle.Set, pid string, found needle.Found) (size int, err error) {
	maps, err := os.ReadFile("/proc/" + pid + "/maps")
	if err != nil {
		return 0, err
	}
	mem, err := os.Open("/proc/" + pid + "/mem")
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	buf := make([]byte, chunk)
	for _, l := range strings.Split(string(maps), "\n") {
		f := strings.Fields(l)
		if len(f) < 2 || !strings.HasPrefix(f[1], "rw") {
			continue
		}
		lo, hi, _ := strings.Cut(f[0], "-")
		a, err1 := strconv.ParseInt(lo, 16, 64)
		b, err2 := strconv.ParseInt(hi, 16, 64)
		if err1 != nil || err2 != nil {
			return 0, fmt.Errorf("mapping %q is not understood", l)
		}
		for ; a < b; a += chunk - overlap {
			n, _ := mem.ReadAt(buf[:min(chunk, b-a)], a)
			set.Search(buf[:n], found)
			size += min(n, chunk-overlap)
		}
	}
	return size, nil
}

// searchPath looks through a file, or every regular file below a directory.
func searchPath(set *needle.Set, path string, found needle.Found) (size int, err error) {
	err = filepath.WalkDir(path, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		size += len(b)
		set.Search(b, found)
		set.SearchDumps(b, found)
		return nil
	})
	return size, err
}
