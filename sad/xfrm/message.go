package xfrm

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// native is the byte order of netlink's own integers.
var native = binary.NativeEndian

// message builds one netlink request in a borrowed buffer. What does not fit
// sets full, which send reports: no size here depends on outside bytes without
// a bound, so it is a defect.
type message struct {
	b    []byte
	n    int
	full bool
}

func align4(n int) int { return (n + 3) &^ 3 }

func (m *message) start(typ nl.XfrmMsgType, flags uint16) {
	clear(m.b)
	m.full = false
	native.PutUint16(m.b[4:], uint16(typ))
	native.PutUint16(m.b[6:], unix.NLM_F_REQUEST|flags)
	m.n = unix.SizeofNlMsghdr
}

// room gives the next n bytes, zeroed, and moves behind them to a multiple of 4.
func (m *message) room(n int) []byte {
	if m.full || m.n+align4(n) > len(m.b) {
		m.full = true
		return nil
	}
	at := m.b[m.n : m.n+n]
	m.n += align4(n)
	return at
}

func (m *message) add(p []byte) { copy(m.room(len(p)), p) }

// attr adds an attribute whose payload is the parts in a row.
func (m *message) attr(typ uint16, parts ...[]byte) {
	n := unix.SizeofRtAttr
	for _, p := range parts {
		n += len(p)
	}
	at := m.room(n)
	if at == nil {
		return
	}
	native.PutUint16(at, uint16(n))
	native.PutUint16(at[2:], typ)
	at = at[unix.SizeofRtAttr:]
	for _, p := range parts {
		at = at[copy(at, p):]
	}
}

func (m *message) uint32Attr(typ uint16, v uint32) { m.attr(typ, native.AppendUint32(nil, v)) }

// finish fills in the header and gives the whole request, still in m's buffer.
func (m *message) finish(seq, pid uint32) ([]byte, error) {
	if m.full {
		return nil, fmt.Errorf("xfrm: request larger than %d bytes", len(m.b))
	}
	native.PutUint32(m.b[0:], uint32(m.n))
	native.PutUint32(m.b[8:], seq)
	// XFRM_MSG_GETAE's answer carries the pid of the request, not the socket's.
	native.PutUint32(m.b[12:], pid)
	return m.b[:m.n], nil
}

// be16 and be32 turn host order into the memory image of network order.
func be16(v uint16) uint16 {
	if native.Uint16([]byte{0, 1}) == 1 {
		return v
	}
	return bits.ReverseBytes16(v)
}

func be32(v uint32) uint32 {
	if native.Uint16([]byte{0, 1}) == 1 {
		return v
	}
	return bits.ReverseBytes32(v)
}

func address(a netip.Addr) (x nl.XfrmAddress) {
	copy(x[:], a.Unmap().AsSlice())
	return x
}

func family(a netip.Addr) uint16 {
	if a.Unmap().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// addrOf is the inverse of address.
func addrOf(x []byte, family uint16) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(x[:4]))
	}
	return netip.AddrFrom16([16]byte(x[:16]))
}

func limit(v uint64) uint64 {
	if v == 0 {
		return nl.XFRM_INF
	}
	return v
}

func unlimit(v uint64) uint64 {
	if v == nl.XFRM_INF {
		return 0
	}
	return v
}

// Check refuses what this package does not install (ErrUnsupported) and what the
// kernel would take in another sense than meant. Add calls it too.
func (sa *SA) Check() error {
	switch {
	case sa.Protocol != ProtoESP:
		return fmt.Errorf("xfrm: IP protocol %d, only ESP: %w", sa.Protocol, ErrUnsupported)
	case sa.IPComp != 0:
		return fmt.Errorf("xfrm: IPComp: %w", ErrUnsupported)
	case sa.Offload != 0:
		return fmt.Errorf("xfrm: hardware offload: %w", ErrUnsupported)
	case sa.Label:
		return fmt.Errorf("xfrm: security label: %w", ErrUnsupported)
	case sa.Mode != Transport && sa.Mode != Tunnel:
		return fmt.Errorf("xfrm: mode %v: %w", sa.Mode, ErrUnsupported)
	case sa.SPI < 256:
		return fmt.Errorf("xfrm: SPI %d is reserved (RFC 4303 section 2.1)", sa.SPI)
	case !sa.Src.IsValid() || !sa.Dst.IsValid() || family(sa.Src.Addr()) != family(sa.Dst.Addr()):
		return fmt.Errorf("xfrm: addresses %v and %v are not of one family", sa.Src.Addr(), sa.Dst.Addr())
	case sa.Window > maxWindow:
		return fmt.Errorf("xfrm: replay window %d exceeds the kernel's %d", sa.Window, maxWindow)
	case sa.ESN && sa.Inbound && sa.Window == 0:
		return fmt.Errorf("xfrm: ESN without a replay window")
	case sa.Mode == Transport && (!sa.SrcTS.IsValid() || !sa.DstTS.IsValid() || family(sa.SrcTS.Addr()) != family(sa.DstTS.Addr())):
		return fmt.Errorf("xfrm: transport mode without traffic selectors of one family")
	}
	_, _, err := sa.Suite.KeySizes()
	return err
}

const maxWindow = 4096 // XFRMA_REPLAY_ESN_MAX

// window is the replay window to install: kernel-netlink's rule, none for
// outbound SAs, but 1 with ESN, where the kernel refuses 0.
func (sa *SA) window() uint32 {
	switch {
	case sa.Inbound:
		return sa.Window
	case sa.ESN:
		return 1
	}
	return 0
}

func (sa *SA) flags() (flags uint8, extra uint32) {
	if !sa.CopyDF {
		flags |= nl.XFRM_STATE_NOPMTUDISC
	}
	if !sa.CopyECN {
		flags |= nl.XFRM_STATE_NOECN
	}
	if sa.Inbound && (sa.CopyDSCP == DSCPYes || sa.CopyDSCP == DSCPInOnly) {
		flags |= nl.XFRM_STATE_DECAP_DSCP
	}
	if !sa.Inbound && (sa.CopyDSCP == DSCPNo || sa.CopyDSCP == DSCPInOnly) {
		extra |= nl.XFRM_SA_XFLAG_DONT_ENCAP_DSCP
	}
	if sa.Mode == Tunnel {
		flags |= nl.XFRM_STATE_AF_UNSPEC // inner packets may be of either family
	}
	if sa.ESN {
		flags |= nl.XFRM_STATE_ESN
	}
	return flags, extra
}

func selector(src, dst netip.Prefix) nl.XfrmSelector {
	return nl.XfrmSelector{
		Daddr: address(dst.Masked().Addr()), PrefixlenD: uint8(dst.Bits()),
		Saddr: address(src.Masked().Addr()), PrefixlenS: uint8(src.Bits()),
		Family: family(dst.Addr()),
	}
}

func (sa *SA) info() *nl.XfrmUsersaInfo {
	flags, _ := sa.flags()
	u := &nl.XfrmUsersaInfo{
		Id:    nl.XfrmId{Daddr: address(sa.Dst.Addr()), Spi: be32(sa.SPI), Proto: sa.Protocol},
		Saddr: address(sa.Src.Addr()),
		Lft: nl.XfrmLifetimeCfg{
			SoftByteLimit: limit(sa.Lifetime.BytesRekey), HardByteLimit: limit(sa.Lifetime.BytesLife),
			SoftPacketLimit: limit(sa.Lifetime.PacketsRekey), HardPacketLimit: limit(sa.Lifetime.PacketsLife),
			SoftAddExpiresSeconds: sa.Lifetime.TimeRekey, HardAddExpiresSeconds: sa.Lifetime.TimeLife,
		},
		Reqid:  sa.ReqID,
		Family: family(sa.Dst.Addr()),
		Flags:  flags,
	}
	if sa.Mode == Tunnel {
		u.Mode = 1
	} else {
		u.Sel = selector(sa.SrcTS, sa.DstTS)
	}
	if !sa.longReplay() {
		u.ReplayWindow = uint8(sa.window())
	}
	return u
}

// longReplay: the window goes into XFRMA_REPLAY_ESN_VAL, not the legacy field.
func (sa *SA) longReplay() bool { return sa.ESN || sa.window() > 32 }

// encode writes the SA with its keys as a request of type typ (NEWSA, UPDSA).
// The order of attributes is kernel-netlink's.
func (sa *SA) encode(m *message, typ nl.XfrmMsgType, enc, integ []byte) error {
	if err := sa.Check(); err != nil {
		return err
	}
	e, err := sa.Suite.encr()
	if err != nil {
		return err
	}
	i, err := sa.Suite.integ()
	if err != nil {
		return err
	}
	if len(enc) != e.bytes || len(integ) != i.bytes {
		return fmt.Errorf("xfrm: keys of %d and %d bytes, %v takes %d and %d", len(enc), len(integ), sa.Suite, e.bytes, i.bytes)
	}
	m.start(typ, unix.NLM_F_ACK)
	m.add(sa.info().Serialize())
	if _, extra := sa.flags(); extra != 0 {
		m.uint32Attr(nl.XFRMA_SA_EXTRA_FLAGS, extra)
	}
	if sa.Suite.aead() {
		m.algorithm(nl.XFRMA_ALG_AEAD, e, true, enc)
	} else {
		m.algorithm(nl.XFRMA_ALG_CRYPT, e, false, enc)
		m.algorithm(nl.XFRMA_ALG_AUTH_TRUNC, i, true, integ)
	}
	if sa.Encap {
		m.encap(sa.Src.Port(), sa.Dst.Port())
	}
	m.mark(sa.Mark)
	if sa.IfID != 0 {
		m.uint32Attr(nl.XFRMA_IF_ID, sa.IfID)
	}
	if sa.SetMark != (Mark{}) {
		m.uint32Attr(nl.XFRMA_SET_MARK, sa.SetMark.Value)
		m.uint32Attr(nl.XFRMA_SET_MARK_MASK, sa.SetMark.Mask)
	}
	if sa.TFC != 0 && sa.Mode == Tunnel {
		m.uint32Attr(nl.XFRMA_TFCPAD, sa.TFC)
	}
	if sa.longReplay() {
		words := (sa.window() + 31) / 32
		esn := nl.XfrmReplayStateEsn{BmpLen: words, ReplayWindow: sa.window()}
		m.attr(nl.XFRMA_REPLAY_ESN_VAL, esn.Serialize(), make([]byte, 4*words))
	}
	return nil
}

// algorithm adds struct xfrm_algo (name, key bits) or, with the ICV or
// truncation length behind, xfrm_algo_aead and xfrm_algo_auth. The key goes
// from the caller's locked memory to m's without a copy in between.
func (m *message) algorithm(typ uint16, a algorithm, icv bool, key []byte) {
	var head [72]byte
	copy(head[:63], a.name)
	native.PutUint32(head[64:], uint32(len(key))*8)
	n := 68
	if icv {
		native.PutUint32(head[68:], a.icv)
		n = 72
	}
	m.attr(typ, head[:n], key)
}

const encapESPinUDP = 2

func (m *message) encap(srcPort, dstPort uint16) {
	t := nl.XfrmEncapTmpl{EncapType: encapESPinUDP, EncapSport: be16(srcPort), EncapDport: be16(dstPort)}
	m.attr(nl.XFRMA_ENCAP, t.Serialize())
}

func (m *message) mark(k Mark) {
	if k != (Mark{}) {
		x := nl.XfrmMark(k)
		m.attr(nl.XFRMA_MARK, x.Serialize())
	}
}

// named starts a request about an existing SA (GETSA, DELSA).
func (m *message) named(typ nl.XfrmMsgType, id ID) {
	m.start(typ, unix.NLM_F_ACK)
	m.add(usersaID(id))
	m.mark(id.Mark)
	if id.IfID != 0 {
		m.uint32Attr(nl.XFRMA_IF_ID, id.IfID)
	}
}

func usersaID(id ID) []byte {
	u := nl.XfrmUsersaId{Daddr: address(id.Dst.Addr()), Spi: be32(id.SPI), Family: family(id.Dst.Addr()), Proto: id.Protocol}
	return u.Serialize()
}

const sizeofAeventID = 48 // xfrm_usersa_id 24, saddr 16, flags 4, reqid 4

func (m *message) getAE(id ID) {
	m.start(nl.XFRM_MSG_GETAE, unix.NLM_F_ACK)
	src := address(id.Src.Addr())
	m.add(append(append(usersaID(id), src[:]...), make([]byte, 8)...))
	m.mark(id.Mark)
}
