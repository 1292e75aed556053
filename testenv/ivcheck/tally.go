package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/netip"
	"strings"
)

// shown is how many repeats are printed one by one.
const shown = 10

type tally struct {
	packets, repeats int
	sas              map[uint32]*sa
	order            []*sa
	detail           []string
}

// sa is what was seen of one SPI.
type sa struct {
	spi                      uint32
	packets, repeats, copies int
	seq                      span
	first                    map[[8]byte]sight // by IV
	flows                    []*flow           // in the order in which they were seen
}

// flow is what of an SA went between two ends.
type flow struct {
	src, dst netip.AddrPort
	packets  int
	seq      span
}

// sight is the first packet with an IV.
type sight struct {
	sum   [sha256.Size]byte
	whole bool
	seq   uint32
	where string
}

// span is the lowest and the highest of some sequence numbers.
type span struct {
	low, high uint32
	some      bool
}

func (s *span) add(seq uint32) {
	if !s.some {
		*s = span{seq, seq, true}
	}
	s.low, s.high = min(s.low, seq), max(s.high, seq)
}

func (s span) String() string { return fmt.Sprintf("seq %d-%d", s.low, s.high) }

func newTally() *tally { return &tally{sas: map[uint32]*sa{}} }

func (t *tally) add(p esp, where string) {
	s := t.sas[p.spi]
	if s == nil {
		s = &sa{spi: p.spi, first: map[[8]byte]sight{}}
		t.sas[p.spi] = s
		t.order = append(t.order, s)
	}
	t.packets++
	s.packets++
	s.seq.add(p.seq)
	f := s.flow(p.src, p.dst)
	f.packets++
	f.seq.add(p.seq)

	now := sight{sum: sha256.Sum256(p.body), whole: p.whole, seq: p.seq, where: where}
	old, again := s.first[p.iv]
	switch {
	case !again:
		s.first[p.iv] = now
	case old.whole && now.whole && old.sum == now.sum:
		s.copies++
	default:
		s.repeats++
		t.repeats++
		if len(t.detail) < shown {
			t.detail = append(t.detail, fmt.Sprintf("repeat: SPI %08x, IV %x: seq %d in %s, seq %d in %s",
				p.spi, p.iv, old.seq, old.where, now.seq, now.where))
		}
	}
}

func (s *sa) flow(src, dst netip.AddrPort) *flow {
	for _, f := range s.flows {
		if f.src == src && f.dst == dst {
			return f
		}
	}
	f := &flow{src: src, dst: dst}
	s.flows = append(s.flows, f)
	return f
}

func (t *tally) print(w io.Writer) {
	var b strings.Builder
	for _, s := range t.order {
		fmt.Fprintf(&b, "%08x: %d packets, %d IVs, %d repeats, %d copies, %v:", s.spi, s.packets, len(s.first), s.repeats, s.copies, s.seq)
		for i, f := range s.flows {
			if i > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, " %s > %s %d packets %v", end(f.src), end(f.dst), f.packets, f.seq)
		}
		b.WriteByte('\n')
	}
	for _, d := range t.detail {
		fmt.Fprintln(&b, d)
	}
	fmt.Fprintf(&b, "ivcheck: %d packets, %d SPIs, %d repeats\n", t.packets, len(t.order), t.repeats)
	_, _ = io.WriteString(w, b.String())
}

// end names one end of a flow, with its port if it has one.
func end(a netip.AddrPort) string {
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}
