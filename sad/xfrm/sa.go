// Package xfrm is the only user of the kernel's XFRM netlink interface: SAs
// and policies as Go values, their messages, and one bounded socket.
//
// Messages are built from the structures of netlink's nl package in one locked
// buffer that is wiped after each request, because netlink's own XfrmState
// cannot express what charon installs (AF_UNSPEC, NOECN, replay windows over
// 32, TFC) and leaves copies of keys on the heap.
package xfrm

import (
	"fmt"
	"net/netip"
	"time"
)

// ProtoESP is ESP's IP protocol number.
const ProtoESP uint8 = 50

// Mode is how an SA encapsulates, numbered as in charon (not as in the kernel).
type Mode uint8

// The modes.
const (
	Transport Mode = 1
	Tunnel    Mode = 2
	Beet      Mode = 3 // refused
)

// String is the lower-case name.
func (m Mode) String() string {
	switch m {
	case Transport:
		return "transport"
	case Tunnel:
		return "tunnel"
	case Beet:
		return "beet"
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// CopyDSCP is charon's setting of the DSCP field's fate at the tunnel ends.
type CopyDSCP uint8

// The values, numbered as charon's dscp_copy_t.
const (
	DSCPOutOnly CopyDSCP = 0
	DSCPInOnly  CopyDSCP = 1
	DSCPYes     CopyDSCP = 2
	DSCPNo      CopyDSCP = 3
)

// Mark is an XFRM mark with its mask; the zero Mark is none.
type Mark struct {
	Value uint32 `json:"value"`
	Mask  uint32 `json:"mask"`
}

// Lifetime limits an SA; zero is no limit. Rekey is the soft limit (an EXPIRE
// event), Life the hard one (the kernel removes the SA). Times are seconds
// since the SA was added. The values are charon's: they are randomised there.
type Lifetime struct {
	TimeLife, TimeRekey       uint64
	BytesLife, BytesRekey     uint64
	PacketsLife, PacketsRekey uint64
}

// ID names an SA. The kernel knows an SA by (Dst's address, SPI, Protocol,
// Mark); Src, ports and IfID go with it.
type ID struct {
	Src, Dst netip.AddrPort // ports: of UDP encapsulation, else not used
	SPI      uint32         // host order
	Protocol uint8          // ProtoESP
	Mark     Mark
	IfID     uint32
}

// Key is the part of an ID that tells SAs apart; comparable.
type Key struct {
	Dst      netip.Addr
	SPI      uint32
	Protocol uint8
	Mark     Mark
}

// Key gives the comparable part.
func (id ID) Key() Key { return Key{id.Dst.Addr().Unmap(), id.SPI, id.Protocol, id.Mark} }

// String is "ESP 0xc1234567 192.0.2.1 -> 192.0.2.2".
func (id ID) String() string {
	return fmt.Sprintf("%s 0x%08x %v -> %v", protoName(id.Protocol), id.SPI, id.Src.Addr(), id.Dst.Addr())
}

func protoName(p uint8) string {
	if p == ProtoESP {
		return "ESP"
	}
	return fmt.Sprintf("protocol-%d", p)
}

// SA is everything of an SA but its keys, as charon's add_sa gives it.
type SA struct {
	ID
	ReqID        uint32
	Mode         Mode
	SrcTS, DstTS netip.Prefix // first traffic selectors; the SA's selector in transport mode
	Suite        Suite
	ESN          bool
	Window       uint32 // replay window in packets, at most 4096; see SA.window for outbound
	Inbound      bool
	Larval       bool // charon's "update": an SPI was allocated, the entry is replaced
	Encap        bool // ESP in UDP (RFC 3948) with the ports of Src and Dst
	CopyDF       bool
	CopyECN      bool
	CopyDSCP     CopyDSCP
	TFC          uint32 // pad to this many bytes (tunnel mode only); 0: no
	SetMark      Mark
	Lifetime     Lifetime
	IPComp       uint16 // non-zero: ErrUnsupported
	Offload      uint8  // non-zero: ErrUnsupported
	Label        bool   // true: ErrUnsupported
}

// Counters are an SA's use so far.
type Counters struct {
	Bytes, Packets uint64
	LastUse        time.Duration // CLOCK_MONOTONIC at which traffic was last noticed, 0 if never; filled by sad
}

// Info is what a dump of the SAD tells of one SA; never keys.
type Info struct {
	ID
	ReqID          uint32
	Mode           Mode
	Suite          Suite // zero if it is not in the table
	Algorithm      string
	ESN            bool
	Encap          bool
	Window         uint32
	Flags          uint8 // XFRM_STATE_*
	Lifetime       Lifetime
	Bytes, Packets uint64
	Added          time.Time // zero for a larval SA
	Larval         bool      // an SPI only: no algorithm yet
}

// Move says where an SA goes (Conn.Move).
type Move struct {
	NewSrc, NewDst netip.AddrPort
	NewEncap       bool
}
