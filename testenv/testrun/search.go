package main

import (
	"bufio"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
)

// window is how many bytes of a key make a hit.
const window = 16

type needles map[[window]byte]struct{}

var (
	hexRun = regexp.MustCompile(`[0-9A-Fa-f]{32,}`)
	b64Run = regexp.MustCompile(`[A-Za-z0-9+/_-]{22,}`)
)

// search looks in every file below dir for the beginnings of keys that trace
// lists, one in hex per line: as they are, in hex and in Base64.
func search(trace, dir string) (leaks []string, err error) {
	keys, err := readTrace(trace)
	if err != nil {
		return nil, err
	}
	fmt.Printf("     searched all output for %d keys\n", len(keys))
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if keys.in(b) {
			leaks = append(leaks, path)
		}
		return nil
	})
	return leaks, err
}

func readTrace(name string) (needles, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n := needles{}
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		b, err := hex.DecodeString(sc.Text())
		if err == nil && len(b) == window && !plain(b) {
			n[[window]byte(b)] = struct{}{}
		}
	}
	return n, sc.Err()
}

// plain reports whether b cannot be told from what tests print anyway: text,
// or bytes with little variety, as zero keys and counting patterns have.
func plain(b []byte) bool {
	text, kinds, steps := true, map[byte]bool{}, map[byte]bool{}
	for i, c := range b {
		text = text && c >= 0x20 && c < 0x7f
		kinds[c] = true
		if i > 0 {
			steps[c-b[i-1]] = true
		}
	}
	return text || len(kinds) < 8 || len(steps) < 4
}

func (n needles) in(b []byte) bool {
	if n.slide(b) {
		return true
	}
	for _, run := range hexRun.FindAll(b, -1) {
		for _, s := range [][]byte{run, run[1:]} {
			s = s[:len(s)/2*2]
			d := make([]byte, len(s)/2)
			if _, err := hex.Decode(d, s); err == nil && n.slide(d) {
				return true
			}
		}
	}
	for _, run := range b64Run.FindAll(b, -1) {
		for i, c := range run { // one alphabet
			switch c {
			case '-':
				run[i] = '+'
			case '_':
				run[i] = '/'
			}
		}
		for off := range 4 {
			if off >= len(run) {
				break
			}
			s := run[off:]
			s = s[:len(s)/4*4]
			d := make([]byte, len(s))
			if k, err := base64.StdEncoding.Decode(d, s); err == nil && n.slide(d[:k]) {
				return true
			}
		}
	}
	return false
}

func (n needles) slide(b []byte) bool {
	for i := 0; i+window <= len(b); i++ {
		if _, ok := n[[window]byte(b[i:i+window])]; ok {
			return true
		}
	}
	return false
}
