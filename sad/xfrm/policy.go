package xfrm

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Dir is the direction of a policy, numbered as in the kernel.
type Dir uint8

// The directions. Packets that are forwarded pass Fwd, then Out.
const (
	In  Dir = 0
	Out Dir = 1
	Fwd Dir = 2
)

// String is "in", "out" or "fwd".
func (d Dir) String() string {
	switch d {
	case In:
		return "in"
	case Out:
		return "out"
	case Fwd:
		return "fwd"
	}
	return fmt.Sprintf("dir(%d)", uint8(d))
}

// Policy is an entry of the kernel's SPD that passes or drops packets without a
// transformation. Src and Dst are of one family; they are those of the packet.
type Policy struct {
	Dir              Dir
	Src, Dst         netip.Prefix
	Protocol         uint8  // 0: any
	SrcPort, DstPort uint16 // 0: any; for ICMPv6 SrcPort is the type
	Block            bool
	Priority         uint32 // the lowest number wins
	// Mark and IfID select packets as well. Ours have none: AddPolicy refuses them.
	Mark Mark
	IfID uint32

	// Only from Policies:
	Index     uint32 // the kernel's
	Templates bool   // has IPsec templates, is therefore not one of ours
	SPI       uint32 // of the SA that its ESP template names; 0: none, or any
}

// Selector is p without what the kernel does not compare: two policies of one
// Selector cannot both exist.
func (p Policy) Selector() Policy {
	return Policy{Dir: p.Dir, Src: p.Src, Dst: p.Dst, Protocol: p.Protocol, SrcPort: p.SrcPort, DstPort: p.DstPort, Mark: p.Mark, IfID: p.IfID}
}

// String is like "block out 0.0.0.0/1 -> 10.2.0.0/16".
func (p Policy) String() string {
	s := "allow"
	if p.Block {
		s = "block"
	}
	s = fmt.Sprintf("%s %v %v -> %v", s, p.Dir, p.Src, p.Dst)
	if p.Protocol != 0 {
		s += fmt.Sprintf(" protocol %d", p.Protocol)
	}
	if p.SrcPort != 0 {
		s += fmt.Sprintf(" sport %d", p.SrcPort)
	}
	if p.DstPort != 0 {
		s += fmt.Sprintf(" dport %d", p.DstPort)
	}
	if p.Mark != (Mark{}) {
		s += fmt.Sprintf(" mark %#x/%#x", p.Mark.Value, p.Mark.Mask)
	}
	if p.IfID != 0 {
		s += fmt.Sprintf(" if_id %d", p.IfID)
	}
	return s
}

func (p Policy) selector() nl.XfrmSelector {
	sel := selector(p.Src, p.Dst)
	sel.Proto = p.Protocol
	if p.SrcPort != 0 {
		sel.Sport, sel.SportMask = be16(p.SrcPort), 0xffff
	}
	if p.DstPort != 0 {
		sel.Dport, sel.DportMask = be16(p.DstPort), 0xffff
	}
	return sel
}

func (p Policy) encode(m *message) error {
	if !p.Src.IsValid() || !p.Dst.IsValid() || family(p.Src.Addr()) != family(p.Dst.Addr()) {
		return fmt.Errorf("xfrm: policy %v: prefixes are not of one family", p)
	}
	if p.Mark != (Mark{}) || p.IfID != 0 {
		return fmt.Errorf("xfrm: policy %v: one with a mark or an if_id is not added here", p)
	}
	m.start(nl.XFRM_MSG_NEWPOLICY, unix.NLM_F_ACK)
	u := nl.XfrmUserpolicyInfo{
		Sel: p.selector(),
		Lft: nl.XfrmLifetimeCfg{
			SoftByteLimit: nl.XFRM_INF, HardByteLimit: nl.XFRM_INF,
			SoftPacketLimit: nl.XFRM_INF, HardPacketLimit: nl.XFRM_INF,
		},
		Priority: p.Priority,
		Dir:      uint8(p.Dir),
	}
	if p.Block {
		u.Action = 1
	}
	m.add(u.Serialize())
	return nil
}

// AddPolicy adds p to the SPD. ErrExists if a policy of that selector is there,
// whatever its priority.
func (c *Conn) AddPolicy(ctx context.Context, p Policy) error {
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	m := c.request()
	if err := p.encode(m); err != nil {
		return err
	}
	if _, err := c.exchange(ctx, m, nil); err != nil {
		return explainPolicy("add", p, err)
	}
	return nil
}

// DeletePolicy deletes the policy that Policies listed, by its Index: never
// another one that has taken its selector. ErrNotFound if it is gone.
func (c *Conn) DeletePolicy(ctx context.Context, p Policy) error {
	if p.Index == 0 {
		return fmt.Errorf("xfrm: delete policy %v: it has no index", p)
	}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	m := c.request()
	m.start(nl.XFRM_MSG_DELPOLICY, unix.NLM_F_ACK)
	id := nl.XfrmUserpolicyId{Sel: p.selector(), Index: p.Index, Dir: uint8(p.Dir)}
	m.add(id.Serialize())
	if _, err := c.exchange(ctx, m, nil); err != nil {
		return explainPolicy("delete", p, err)
	}
	return nil
}

func explainPolicy(what string, p Policy, err error) error {
	var k *kernelError
	if errors.As(err, &k) && k.errno == syscall.ENOENT {
		return fmt.Errorf("xfrm: %s policy %v: %w", what, p, ErrNotFound)
	}
	return explain(what+" policy", p, err)
}

// Policies lists the SPD of the namespace without the policies of sockets.
func (c *Conn) Policies(ctx context.Context) ([]Policy, error) {
	if err := c.acquire(ctx); err != nil {
		return nil, err
	}
	defer c.release()
	for range maxDumps {
		var all []Policy
		m := c.request()
		m.start(nl.XFRM_MSG_GETPOLICY, unix.NLM_F_DUMP)
		interrupted, err := c.exchange(ctx, m, func(typ uint16, body []byte) error {
			if typ != nl.XFRM_MSG_NEWPOLICY {
				return nil
			}
			p, ok, err := parsePolicy(body)
			if ok {
				all = append(all, p)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("xfrm: list policies: %w", err)
		}
		if !interrupted {
			return all, nil
		}
	}
	return nil, fmt.Errorf("xfrm: list policies: the SPD changed during each of %d dumps", maxDumps)
}

// parsePolicy reads the body of XFRM_MSG_NEWPOLICY; ok is false for policies
// of sockets.
func parsePolicy(body []byte) (p Policy, ok bool, err error) {
	if len(body) < nl.SizeofXfrmUserpolicyInfo {
		return p, false, errors.New("XFRM_MSG_NEWPOLICY is too short")
	}
	u := *nl.DeserializeXfrmUserpolicyInfo(body)
	if u.Dir > uint8(Fwd) {
		return p, false, nil
	}
	if u.Sel.Family != unix.AF_INET && u.Sel.Family != unix.AF_INET6 {
		return p, false, nil // AF_UNSPEC: a socket's, or of another tool's making
	}
	p = Policy{
		Dir:      Dir(u.Dir),
		Src:      netip.PrefixFrom(addrOf(u.Sel.Saddr[:], u.Sel.Family), int(u.Sel.PrefixlenS)),
		Dst:      netip.PrefixFrom(addrOf(u.Sel.Daddr[:], u.Sel.Family), int(u.Sel.PrefixlenD)),
		Protocol: u.Sel.Proto, SrcPort: be16(u.Sel.Sport), DstPort: be16(u.Sel.Dport),
		Block: u.Action == 1, Priority: u.Priority, Index: u.Index,
	}
	err = attributes(body[nl.SizeofXfrmUserpolicyInfo:], func(typ uint16, b []byte) error {
		switch typ {
		case nl.XFRMA_TMPL:
			p.Templates = p.Templates || len(b) > 0
			p.SPI = espSPI(b)
		case nl.XFRMA_MARK:
			if len(b) >= nl.SizeofXfrmMark {
				p.Mark = Mark{native.Uint32(b), native.Uint32(b[4:])}
			}
		case nl.XFRMA_IF_ID:
			if len(b) >= 4 {
				p.IfID = native.Uint32(b)
			}
		}
		return nil
	})
	return p, true, err
}

// espSPI is the SPI of the first ESP template of XFRMA_TMPL; 0 if there is none.
func espSPI(b []byte) uint32 {
	for ; len(b) >= nl.SizeofXfrmUserTmpl; b = b[nl.SizeofXfrmUserTmpl:] {
		if id := nl.DeserializeXfrmUserTmpl(b).XfrmId; id.Proto == ProtoESP {
			return be32(id.Spi)
		}
	}
	return 0
}
