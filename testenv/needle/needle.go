// Package needle searches memory, logs and other output for key bytes, however
// they may have been written: as they are, in hex, in Base64, and as the hex
// dumps of charon's log.
package needle

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"strconv"
)

// Window is how many bytes in a row of a key make a hit.
const Window = 16

// Set holds the keys to look for. A search passes over its text once, however
// many keys there are.
type Set struct {
	windows map[[Window]byte]int // to the number of the key
	filter  []uint64             // bit n is set if a window begins with these three bytes
	n       int
}

// NewSet gives an empty set.
func NewSet() *Set {
	return &Set{windows: map[[Window]byte]int{}, filter: make([]uint64, 1<<24/64)}
}

// Len is how many keys were taken.
func (s *Set) Len() int { return s.n }

// Add takes a key: each 16 bytes of it, from its beginning, are looked for.
// What cannot be told from ordinary data (text, counting patterns, zeros) or is
// shorter is left out; false says that nothing of the key was taken.
func (s *Set) Add(key []byte) bool {
	taken := false
	for ; len(key) >= Window; key = key[Window:] {
		w := [Window]byte(key)
		if plain(w[:]) {
			continue
		}
		if _, known := s.windows[w]; !known {
			s.windows[w] = s.n
			i := prefix(key)
			s.filter[i/64] |= 1 << (i % 64)
		}
		taken = true
	}
	if taken {
		s.n++
	}
	return taken
}

func prefix(b []byte) uint32 { return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 }

// plain reports whether b is text, or has little variety.
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

// Found collects the keys that searches have come upon, by number.
type Found map[int]struct{}

// Search looks through text and adds to found. It changes nothing of text.
func (s *Set) Search(text []byte, found Found) {
	s.raw(text, found)
	runs(text, &isHex, 2*Window, func(run []byte) {
		d := make([]byte, len(run)/2)
		for off := range 2 {
			n, _ := hex.Decode(d, run[off:off+(len(run)-off)/2*2])
			s.raw(d[:n], found)
		}
	})
	runs(text, &isBase64, Window*4/3+1, func(run []byte) {
		run = bytes.Clone(run)
		for i, c := range run { // one alphabet
			switch c {
			case '-':
				run[i] = '+'
			case '_':
				run[i] = '/'
			}
		}
		d := make([]byte, len(run))
		for off := range 4 {
			n, _ := base64.RawStdEncoding.Decode(d, run[off:off+whole(len(run)-off)])
			s.raw(d[:n], found)
		}
	})
}

// whole is the longest length up to n that unpadded Base64 can have.
func whole(n int) int {
	if n%4 == 1 {
		n--
	}
	return n
}

func (s *Set) raw(b []byte, found Found) {
	for i := 0; i+Window <= len(b); i++ {
		p := prefix(b[i:])
		if s.filter[p/64]&(1<<(p%64)) == 0 {
			continue
		}
		if n, ok := s.windows[[Window]byte(b[i:i+Window])]; ok {
			found[n] = struct{}{}
		}
	}
}

var (
	isHex    = class("0123456789abcdefABCDEF")
	isBase64 = class("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_")
)

func class(chars string) (c [256]bool) {
	for i := range len(chars) {
		c[chars[i]] = true
	}
	return c
}

// runs calls f for every run of at least least bytes of the class.
func runs(b []byte, class *[256]bool, least int, f func([]byte)) {
	start := -1
	for i, c := range b {
		if class[c] {
			if start < 0 {
				start = i
			}
			continue
		}
		if start >= 0 && i-start >= least {
			f(b[start:i])
		}
		start = -1
	}
	if start >= 0 && len(b)-start >= least {
		f(b[start:])
	}
}

// A line of charon's hex dumps: an offset in decimal, up to 16 bytes, then the
// same as text. Everything before the offset is the log's own.
var dumpLine = regexp.MustCompile(`(?m)^.*?\s(\d+): ((?:[0-9A-F]{2} ){1,16})`)

// SearchDumps looks through the hex dumps of a log of charon, whole: a key may
// lie over the end of a line. It returns how many bytes were dumped there.
func (s *Set) SearchDumps(log []byte, found Found) (size int) {
	var dump []byte
	end := func() {
		s.raw(dump, found)
		size += len(dump)
		dump = dump[:0]
	}
	for _, m := range dumpLine.FindAllSubmatch(log, -1) {
		if off, err := strconv.Atoi(string(m[1])); err != nil || off != len(dump) {
			end()
		}
		b, err := hex.DecodeString(string(bytes.ReplaceAll(m[2], []byte(" "), nil)))
		if err == nil {
			dump = append(dump, b...)
		}
	}
	end()
	return size
}
