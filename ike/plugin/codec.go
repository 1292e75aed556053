package plugin

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Bounds of single fields, in bytes.
const (
	maxName     = 255  // connection, version
	maxIdentity = 1500 // type byte and data
	maxNonce    = 256  // RFC 7296 section 3.9
	maxKey      = 128  // one chunk
	maxText     = 500  // REFUSE
	maxTS       = 128  // selectors on one side
	maxOff      = 4096 // charon's setting of that name
	sizeConfirm = 32
)

// Query asks for an SA's counters.
type Query struct{ ID SAID }

// End says that an IKE_SA is gone.
type End struct{ SA SA }

// Refusal is REFUSE as the plugin sees it: an error with the server's text.
type Refusal struct{ Text string }

func (e *Refusal) Error() string { return "refused: " + e.Text }

// request is the opening frame of a connection.
type request struct {
	hello    Hello
	deadline time.Duration // on CLOCK_MONOTONIC
	message  any           // Hello, GetKey, Sent, Bind, AddSA, Query, UpdateSA, End or Ignored
}

// AppendRequest gives the frame that opens a connection, in b's memory, which
// must have a capacity of MaxFrame: the caller wipes it. m is a Hello, GetKey,
// Sent, Bind, AddSA, Query, UpdateSA, End or Ignored; deadline is an absolute
// CLOCK_MONOTONIC. It is what the C plugin does (ike/charon); Go needs it for
// tests and measurements. Keys in m stay the caller's.
func AppendRequest(b []byte, h Hello, deadline time.Duration, m any) ([]byte, error) {
	var k kind
	switch m.(type) {
	case Hello:
		k = kindHello
	case GetKey:
		k = kindGetKey
	case Sent:
		k = kindSent
	case Bind:
		k = kindBind
	case AddSA:
		k = kindAddSA
	case Query:
		k = kindQuery
	case UpdateSA:
		k = kindUpdate
	case End:
		k = kindEnd
	case Ignored:
		k = kindIgnored
	default:
		return nil, fmt.Errorf("plugin: %T is no request", m)
	}
	w := newWriter(b, k)
	w.bytes(tagInstance, h.Instance[:])
	w.str(tagVersion, h.Version)
	w.flag(tagMediation, h.Mediation)
	w.u64(tagDeadline, uint64(deadline))
	w.request(m)
	return w.b, w.err
}

func (w *writer) request(m any) {
	switch m := m.(type) {
	case Hello:
		if m.Off != "" {
			w.str(tagOff, m.Off)
		}
	case GetKey:
		w.sa(m.SA, m.Connection)
		w.bytes(tagPeer, m.Peer.AsSlice())
	case Sent:
		w.sa(m.SA, m.Connection)
		w.bytes(tagKeyID, m.KeyID[:])
		w.spis(m.SPIi, m.SPIr)
		w.bytes(tagNi, m.Ni)
		w.identity(tagInitiatorID, m.Initiator)
		w.u8(tagExchange, uint8(m.Exchange))
	case Bind:
		w.bind(m)
	case AddSA:
		w.addSA(m)
	case Query:
		w.said(m.ID)
	case UpdateSA:
		w.said(m.ID)
		w.endpoint(tagNewSrc, m.NewSrc)
		w.endpoint(tagNewDst, m.NewDst)
		w.flag(tagEncap, m.Encap)
		w.flag(tagNewEncap, m.NewEncap)
	case End:
		w.u32(tagUID, m.SA.UID)
	case Ignored:
		w.sa(m.SA, m.Connection)
		w.bytes(tagPeer, m.Peer.AsSlice())
	}
}

func (w *writer) sa(sa SA, connection string) {
	w.u32(tagUID, sa.UID)
	w.str(tagConnection, connection)
}

func (w *writer) spis(i, r [8]byte) {
	w.bytes(tagSPIi, i[:])
	w.bytes(tagSPIr, r[:])
}

func (w *writer) identity(t tag, id Identity) {
	w.bytes(t, append([]byte{id.Type}, id.Data...))
}

func (w *writer) endpoint(t tag, a netip.AddrPort) {
	w.bytes(t, binary.BigEndian.AppendUint16(a.Addr().AsSlice(), a.Port()))
}

func (w *writer) mark(t tag, m Mark) {
	w.bytes(t, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, m.Value), m.Mask))
}

func (w *writer) said(id SAID) {
	w.endpoint(tagSrc, id.Src)
	w.endpoint(tagDst, id.Dst)
	w.u32(tagSPI, id.SPI)
	w.u8(tagProtocol, id.Protocol)
	w.mark(tagMark, id.Mark)
	w.u32(tagIfID, id.IfID)
}

func (w *writer) bind(m Bind) {
	w.sa(m.SA, m.Connection)
	w.flag(tagResponder, m.Responder)
	if !m.KeyID.IsZero() {
		w.bytes(tagKeyID, m.KeyID[:])
	}
	w.bytes(tagNi, m.Ni)
	w.bytes(tagNr, m.Nr)
	w.spis(m.SPIi, m.SPIr)
	w.identity(tagInitiatorID, m.Initiator)
	w.identity(tagReplierID, m.Replier)
	w.identity(tagFirstIDi, m.FirstIDi)
	w.u8(tagExchange, uint8(m.Exchange))
	t := m.Transforms
	v := []byte{t.Protocol}
	for _, n := range []uint16{t.Encr, t.EncrBits, t.Integ} {
		v = binary.BigEndian.AppendUint16(v, n)
	}
	if t.ESN {
		v = append(v, 1)
	} else {
		v = append(v, 0)
	}
	w.bytes(tagTransforms, v)
	w.chunks(tagKeymatEi, m.Keymat)
	w.chunks(tagTokenEi, m.Token)
	if m.Confirm != nil {
		w.bytes(tagConfirm, m.Confirm)
	}
	w.flag(tagPeerSpeaks, m.PeerSpeaks)
}

func (w *writer) chunks(first tag, c Chunks) {
	for i, m := range c.list() {
		w.material(first+tag(i), m)
	}
}

func (w *writer) addSA(m AddSA) {
	w.sa(m.SA, m.Connection)
	w.said(SAID{Src: m.Src, Dst: m.Dst, SPI: m.SPI, Protocol: m.Protocol, Mark: m.Mark, IfID: m.IfID})
	w.u32(tagReqID, m.ReqID)
	w.u8(tagMode, m.Mode)
	w.selectors(tagSrcTS, m.SrcTS)
	w.selectors(tagDstTS, m.DstTS)
	l := m.Lifetime
	var v []byte
	for _, n := range []uint64{l.TimeLife, l.TimeRekey, l.BytesLife, l.BytesRekey, l.PacketsLife, l.PacketsRekey} {
		v = binary.BigEndian.AppendUint64(v, n)
	}
	w.bytes(tagLifetime, v)
	w.u16(tagEncrAlg, m.EncrAlg)
	w.u16(tagIntegAlg, m.IntegAlg)
	w.material(tagToken, m.Token)
	w.u16(tagEncrLen, uint16(m.EncrLen))
	w.u32(tagWindow, m.Window)
	w.u32(tagTFC, m.TFC)
	w.u16(tagIPComp, m.IPComp)
	w.flag(tagEncap, m.Encap)
	w.u8(tagOffload, m.Offload)
	w.mark(tagSetMark, m.SetMark)
	w.flag(tagLabel, m.Label)
	w.flag(tagESN, m.ESN)
	w.flag(tagCopyDF, m.CopyDF)
	w.flag(tagCopyECN, m.CopyECN)
	w.u8(tagCopyDSCP, m.CopyDSCP)
	w.flag(tagInitiator, m.Initiator)
	w.flag(tagInbound, m.Inbound)
	w.flag(tagUpdate, m.Update)
}

func (w *writer) selectors(t tag, list []Selector) {
	for _, s := range list {
		v := []byte{s.Protocol}
		v = binary.BigEndian.AppendUint16(v, s.FromPort)
		v = binary.BigEndian.AppendUint16(v, s.ToPort)
		v = append(v, s.From.AsSlice()...)
		w.bytes(t, append(v, s.To.AsSlice()...))
	}
}

// parseRequest reads an opening frame. Keys are moved out of b; on error none
// is left. The rest is copied.
func parseRequest(b []byte) (request, error) {
	r, err := parse(b)
	if err != nil {
		return request{}, err
	}
	var q request
	q.hello.ABI = ABI
	q.hello.Instance = Instance(r.bytes(tagInstance, 16, 16))
	q.hello.Version = r.str(tagVersion, maxName)
	q.hello.Mediation = r.flag(tagMediation)
	q.deadline = time.Duration(r.u64(tagDeadline))
	sa := SA{Instance: q.hello.Instance}
	switch r.kind {
	case kindHello:
		if r.there[tagOff] {
			q.hello.Off = r.str(tagOff, maxOff)
		}
		q.message = q.hello
	case kindGetKey:
		m := GetKey{}
		m.SA, m.Connection = r.sa(sa)
		m.Peer = r.peer()
		q.message = m
	case kindSent:
		q.message = r.sent(sa)
	case kindBind:
		q.message = r.bind(sa)
	case kindAddSA:
		q.message = r.addSA(sa)
	case kindQuery:
		q.message = Query{ID: r.said()}
	case kindUpdate:
		m := UpdateSA{ID: r.said()}
		m.NewSrc, m.NewDst = r.endpoint(tagNewSrc), r.endpoint(tagNewDst)
		m.Encap, m.NewEncap = r.flag(tagEncap), r.flag(tagNewEncap)
		q.message = m
	case kindEnd:
		sa.UID = r.u32(tagUID)
		q.message = End{SA: sa}
	case kindIgnored:
		m := Ignored{}
		m.SA, m.Connection = r.sa(sa)
		m.Peer = r.peer()
		q.message = m
	default:
		return request{}, fmt.Errorf("plugin: frame %d opens no request", r.kind)
	}
	if err := r.end(); err != nil {
		wipe(q.message)
		return request{}, err
	}
	return q, nil
}

// wipe wipes the keys of a message.
func wipe(m any) {
	switch m := m.(type) {
	case Bind:
		m.Keymat.Wipe()
		m.Token.Wipe()
	case AddSA:
		m.Token.Wipe()
	case AddSAAnswer:
		m.Encr.Wipe()
		m.Integ.Wipe()
	}
}

func (r *reader) sa(sa SA) (SA, string) {
	sa.UID = r.u32(tagUID)
	return sa, r.str(tagConnection, maxName)
}

func (r *reader) addr(v []byte) netip.Addr {
	a, ok := netip.AddrFromSlice(v)
	if !ok {
		r.fail("an address of %d bytes", len(v))
	}
	return a
}

func (r *reader) peer() netip.Addr { return r.addr(r.bytes(tagPeer, 4, 16)) }

func (r *reader) endpoint(t tag) netip.AddrPort {
	v := r.bytes(t, 6, 18)
	n := len(v) - 2
	return netip.AddrPortFrom(r.addr(v[:n]), binary.BigEndian.Uint16(v[n:]))
}

func (r *reader) identity(t tag) Identity {
	v := r.bytes(t, 1, maxIdentity)
	return Identity{Type: v[0], Data: append([]byte(nil), v[1:]...)}
}

func (r *reader) nonce(t tag) []byte { return append([]byte(nil), r.bytes(t, 16, maxNonce)...) }

func (r *reader) keyID() (id key.ID) {
	copy(id[:], r.optional(tagKeyID, 16, 16))
	return id
}

func (r *reader) exchange() Exchange {
	x := Exchange(r.u8(tagExchange))
	if x != IKEAuth && x != CreateChildSA {
		r.fail("exchange type %d sets up no CHILD_SA", x)
	}
	return x
}

func (r *reader) mark(t tag) Mark {
	v := r.bytes(t, 8, 8)
	return Mark{Value: binary.BigEndian.Uint32(v), Mask: binary.BigEndian.Uint32(v[4:])}
}

func (r *reader) said() SAID {
	return SAID{
		Src: r.endpoint(tagSrc), Dst: r.endpoint(tagDst), SPI: r.u32(tagSPI),
		Protocol: r.u8(tagProtocol), Mark: r.mark(tagMark), IfID: r.u32(tagIfID),
	}
}

func (r *reader) sent(sa SA) Sent {
	var m Sent
	m.SA, m.Connection = r.sa(sa)
	m.KeyID = key.ID(r.bytes(tagKeyID, 16, 16))
	m.SPIi, m.SPIr = [8]byte(r.bytes(tagSPIi, 8, 8)), [8]byte(r.bytes(tagSPIr, 8, 8))
	m.Ni = r.nonce(tagNi)
	m.Initiator = r.identity(tagInitiatorID)
	m.Exchange = r.exchange()
	return m
}

func (r *reader) bind(sa SA) Bind {
	var m Bind
	m.SA, m.Connection = r.sa(sa)
	m.Responder = r.flag(tagResponder)
	m.KeyID = r.keyID()
	m.Ni, m.Nr = r.nonce(tagNi), r.nonce(tagNr)
	m.SPIi, m.SPIr = [8]byte(r.bytes(tagSPIi, 8, 8)), [8]byte(r.bytes(tagSPIr, 8, 8))
	m.Initiator, m.Replier, m.FirstIDi = r.identity(tagInitiatorID), r.identity(tagReplierID), r.identity(tagFirstIDi)
	m.Exchange = r.exchange()
	v := r.bytes(tagTransforms, 8, 8)
	m.Transforms = Transforms{
		Protocol: v[0], Encr: binary.BigEndian.Uint16(v[1:]), EncrBits: binary.BigEndian.Uint16(v[3:]),
		Integ: binary.BigEndian.Uint16(v[5:]), ESN: v[7] == 1,
	}
	if v[7] > 1 {
		r.fail("ESN is no flag")
	}
	m.Keymat = r.chunks(tagKeymatEi)
	m.Token = r.chunks(tagTokenEi)
	if v := r.optional(tagConfirm, sizeConfirm, sizeConfirm); v != nil {
		m.Confirm = append([]byte(nil), v...)
	}
	m.PeerSpeaks = r.flag(tagPeerSpeaks)
	for i, k := range m.Keymat.list() {
		if m.Token.list()[i].Len() != k.Len() {
			r.fail("KEYMAT and token differ in length")
		}
	}
	return m
}

func (r *reader) chunks(first tag) Chunks {
	return Chunks{
		EncrI: r.material(first, maxKey), IntegI: r.material(first+1, maxKey),
		EncrR: r.material(first+2, maxKey), IntegR: r.material(first+3, maxKey),
	}
}

func (r *reader) addSA(sa SA) AddSA {
	var m AddSA
	m.SA, m.Connection = r.sa(sa)
	id := r.said()
	m.Src, m.Dst, m.SPI, m.Protocol, m.Mark, m.IfID = id.Src, id.Dst, id.SPI, id.Protocol, id.Mark, id.IfID
	m.ReqID = r.u32(tagReqID)
	m.Mode = r.u8(tagMode)
	m.SrcTS, m.DstTS = r.selectors(tagSrcTS), r.selectors(tagDstTS)
	v := r.bytes(tagLifetime, 48, 48)
	l := &m.Lifetime
	for i, n := range []*uint64{&l.TimeLife, &l.TimeRekey, &l.BytesLife, &l.BytesRekey, &l.PacketsLife, &l.PacketsRekey} {
		*n = binary.BigEndian.Uint64(v[8*i:])
	}
	m.EncrAlg, m.IntegAlg = r.u16(tagEncrAlg), r.u16(tagIntegAlg)
	m.Token = r.material(tagToken, 2*maxKey)
	m.EncrLen = int(r.u16(tagEncrLen))
	if m.EncrLen > m.Token.Len() || m.Token.Len() == 0 {
		r.fail("token of %d bytes with an encryption key of %d", m.Token.Len(), m.EncrLen)
	}
	m.Window, m.TFC, m.IPComp = r.u32(tagWindow), r.u32(tagTFC), r.u16(tagIPComp)
	m.Encap, m.Offload, m.SetMark = r.flag(tagEncap), r.u8(tagOffload), r.mark(tagSetMark)
	m.Label, m.ESN = r.flag(tagLabel), r.flag(tagESN)
	m.CopyDF, m.CopyECN, m.CopyDSCP = r.flag(tagCopyDF), r.flag(tagCopyECN), r.u8(tagCopyDSCP)
	m.Initiator, m.Inbound, m.Update = r.flag(tagInitiator), r.flag(tagInbound), r.flag(tagUpdate)
	return m
}

func (r *reader) selectors(t tag) []Selector {
	list := r.ts[t-tagSrcTS]
	r.ts[t-tagSrcTS] = nil
	if len(list) > maxTS {
		r.fail("%d selectors, at most %d", len(list), maxTS)
		return nil
	}
	var out []Selector
	for _, v := range list {
		if len(v) != 5+8 && len(v) != 5+32 {
			r.fail("a selector of %d bytes", len(v))
			return nil
		}
		n := (len(v) - 5) / 2
		s := Selector{
			Protocol: v[0], FromPort: binary.BigEndian.Uint16(v[1:]), ToPort: binary.BigEndian.Uint16(v[3:]),
			From: r.addr(v[5 : 5+n]), To: r.addr(v[5+n:]),
		}
		if s.To.Less(s.From) {
			r.fail("a selector that ends before it begins")
		}
		out = append(out, s)
	}
	return out
}

// appendAnswer gives the answer frame, in b's memory. m is a GetKeyAnswer,
// SentAnswer, BindAnswer, AddSAAnswer (not wiped), Counters or kind for an
// answer with no fields, or an error for REFUSE.
func appendAnswer(b []byte, m any) ([]byte, error) {
	w := newWriter(b, kindOK)
	switch m := m.(type) {
	case kind:
		w = newWriter(b, m)
	case GetKeyAnswer:
		if !m.KeyID.IsZero() {
			w.bytes(tagKeyID, m.KeyID[:])
		}
		w.u8(tagPolicy, uint8(m.Policy))
	case SentAnswer:
		w.bytes(tagConfirm, m.ConfirmI[:])
	case BindAnswer:
		if m.ConfirmR != nil {
			w.bytes(tagConfirm, m.ConfirmR)
		}
	case AddSAAnswer:
		if m.Verdict == Installed {
			w = newWriter(b, kindInstalled)
			break
		}
		w = newWriter(b, kindUseKey)
		w.material(tagEncrKey, m.Encr)
		w.material(tagIntegKey, m.Integ)
	case Counters:
		w.u64(tagBytes, m.Bytes)
		w.u64(tagPackets, m.Packets)
		w.u64(tagLastUse, uint64(m.LastUse))
	case error:
		w = newWriter(b, kindRefuse)
		w.str(tagText, printable(m.Error()))
	default:
		w.err = fmt.Errorf("plugin: %T is no answer", m)
	}
	return w.b, w.err
}

// ParseAnswer reads the server's answer to a request of want's kind into want,
// a *GetKeyAnswer, *SentAnswer, *BindAnswer, *AddSAAnswer (its keys are the
// caller's) or *Counters, or nil for one without fields. REFUSE is returned as
// *Refusal. Like AppendRequest it is for tests and measurements.
func ParseAnswer(b []byte, want any) error {
	r, err := parse(b)
	if err != nil {
		return err
	}
	if r.kind == kindRefuse {
		text := r.str(tagText, maxText)
		if err := r.end(); err != nil {
			return err
		}
		return &Refusal{Text: text}
	}
	expect := kindOK
	switch m := want.(type) {
	case nil:
		if r.kind == kindCommitted {
			expect = kindCommitted
		}
	case *GetKeyAnswer:
		*m = GetKeyAnswer{KeyID: r.keyID(), Policy: Policy(r.u8(tagPolicy))}
	case *SentAnswer:
		m.ConfirmI = [32]byte(r.bytes(tagConfirm, sizeConfirm, sizeConfirm))
	case *BindAnswer:
		m.ConfirmR = append([]byte(nil), r.optional(tagConfirm, sizeConfirm, sizeConfirm)...)
	case *AddSAAnswer:
		if expect = kindInstalled; r.kind == kindUseKey {
			expect = kindUseKey
			*m = AddSAAnswer{Verdict: UseKey, Encr: r.material(tagEncrKey, maxKey), Integ: r.material(tagIntegKey, maxKey)}
		} else {
			*m = AddSAAnswer{Verdict: Installed}
		}
	case *Counters:
		*m = Counters{Bytes: r.u64(tagBytes), Packets: r.u64(tagPackets), LastUse: time.Duration(r.u64(tagLastUse))}
	default:
		return fmt.Errorf("plugin: %T is no answer", want)
	}
	if r.kind != expect {
		r.fail("is not the answer")
	}
	return r.end()
}

// printable bounds an error's text for REFUSE.
func printable(s string) string {
	b := make([]rune, 0, len(s))
	n := 0
	for _, c := range s {
		if c < 0x20 || c == 0x7f || c >= 0x80 && c < 0xa0 {
			c = ' '
		}
		if n += len(string(c)); n > maxText {
			break
		}
		b = append(b, c)
	}
	if len(b) == 0 {
		return "no reason given"
	}
	return string(b)
}

// AckFrame is the ACK of INSTALLED.
func AckFrame() []byte { return newWriter(make([]byte, 0, headerSize), kindAck).b }
