package plugin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// The frame (docs/plugin-protocol.md): a header of 8 bytes, then TLVs, all
// numbers big-endian. One SOCK_SEQPACKET message is one frame.
const (
	// MaxFrame is the largest frame, in bytes, in either direction.
	MaxFrame = 8192
	// ABI is this version of the protocol. A header of another one is answered
	// with REFUSE and nothing else of the frame is read.
	ABI uint16 = 1

	headerSize = 8
	magic      = 0x51495053 // "QIPS"
)

// kind is a frame's type.
type kind uint8

const (
	kindHello   kind = 1
	kindGetKey  kind = 2
	kindSent    kind = 3
	kindBind    kind = 4
	kindAddSA   kind = 5
	kindQuery   kind = 6
	kindUpdate  kind = 7
	kindEnd     kind = 8
	kindIgnored kind = 9
	kindAck     kind = 16

	kindOK        kind = 128 // with the request's answer
	kindInstalled kind = 129
	kindCommitted kind = 130
	kindUseKey    kind = 131
	kindRefuse    kind = 132
)

// tag names a TLV.
type tag uint16

const (
	tagInstance    tag = 1
	tagVersion     tag = 2
	tagMediation   tag = 3
	tagDeadline    tag = 4
	tagUID         tag = 5
	tagConnection  tag = 6
	tagPeer        tag = 7
	tagKeyID       tag = 8
	tagPolicy      tag = 9
	tagSPIi        tag = 10
	tagSPIr        tag = 11
	tagNi          tag = 12
	tagNr          tag = 13
	tagInitiatorID tag = 14
	tagReplierID   tag = 15
	tagFirstIDi    tag = 16
	tagExchange    tag = 17
	tagResponder   tag = 18
	tagTransforms  tag = 19
	tagKeymatEi    tag = 20
	tagKeymatIi    tag = 21
	tagKeymatEr    tag = 22
	tagKeymatIr    tag = 23
	tagTokenEi     tag = 24
	tagTokenIi     tag = 25
	tagTokenEr     tag = 26
	tagTokenIr     tag = 27
	tagConfirm     tag = 28
	tagPeerSpeaks  tag = 29
	tagSrc         tag = 30
	tagDst         tag = 31
	tagSPI         tag = 32
	tagProtocol    tag = 33
	tagMark        tag = 34
	tagIfID        tag = 35
	tagReqID       tag = 36
	tagMode        tag = 37
	tagSrcTS       tag = 38 // may repeat
	tagDstTS       tag = 39 // may repeat
	tagLifetime    tag = 40
	tagEncrAlg     tag = 41
	tagIntegAlg    tag = 42
	tagToken       tag = 43
	tagEncrLen     tag = 44
	tagWindow      tag = 45
	tagTFC         tag = 46
	tagIPComp      tag = 47
	tagEncap       tag = 48
	tagOffload     tag = 49
	tagSetMark     tag = 50
	tagLabel       tag = 51
	tagESN         tag = 52
	tagCopyDF      tag = 53
	tagCopyECN     tag = 54
	tagCopyDSCP    tag = 55
	tagInitiator   tag = 56
	tagInbound     tag = 57
	tagUpdate      tag = 58
	tagNewSrc      tag = 59
	tagNewDst      tag = 60
	tagNewEncap    tag = 61
	tagBytes       tag = 62
	tagPackets     tag = 63
	tagLastUse     tag = 64
	tagText        tag = 65
	tagEncrKey     tag = 66
	tagIntegKey    tag = 67
	tagOff         tag = 68
	tagEnd         tag = 69 // one more than the last
)

// maxTLVs bounds a frame's TLVs: all once and 128 selectors on either side.
const maxTLVs = int(tagEnd) + 256

var errNotOurs = errors.New("plugin: not a frame of this protocol")

// wrongABI is a frame of another version of this protocol.
type wrongABI uint16

func (e wrongABI) Error() string {
	return fmt.Sprintf("plugin: the frame speaks ABI %d, this is ABI %d: build the charon plugin and qipsecd from one release", uint16(e), ABI)
}

// writer appends a frame to a buffer of the caller's that is large enough for
// every frame, so that key bytes are never left behind in a smaller one.
type writer struct {
	b   []byte
	err error
}

func newWriter(b []byte, k kind) *writer {
	w := &writer{b: b[:0]}
	w.b = binary.BigEndian.AppendUint32(w.b, magic)
	w.b = binary.BigEndian.AppendUint16(w.b, ABI)
	w.b = append(w.b, byte(k), 0)
	return w
}

func (w *writer) bytes(t tag, v []byte) {
	if w.err != nil {
		return
	}
	if len(w.b)+4+len(v) > min(MaxFrame, cap(w.b)) {
		w.err = fmt.Errorf("plugin: TLV %d of %d bytes does not fit a frame of %d", t, len(v), MaxFrame)
		return
	}
	w.b = binary.BigEndian.AppendUint16(w.b, uint16(t))
	w.b = binary.BigEndian.AppendUint16(w.b, uint16(len(v)))
	w.b = append(w.b, v...)
}

func (w *writer) str(t tag, s string) { w.bytes(t, []byte(s)) }
func (w *writer) u8(t tag, v uint8)   { w.bytes(t, []byte{v}) }
func (w *writer) u16(t tag, v uint16) { w.bytes(t, binary.BigEndian.AppendUint16(nil, v)) }
func (w *writer) u32(t tag, v uint32) { w.bytes(t, binary.BigEndian.AppendUint32(nil, v)) }
func (w *writer) u64(t tag, v uint64) { w.bytes(t, binary.BigEndian.AppendUint64(nil, v)) }

func (w *writer) flag(t tag, v bool) {
	if v {
		w.u8(t, 1)
	} else {
		w.u8(t, 0)
	}
}

// material appends m's bytes; an absent key is an absent TLV.
func (w *writer) material(t tag, m *key.Material) {
	if m.Len() > 0 {
		w.bytes(t, m.Bytes())
	}
}

// reader holds a frame's TLVs, borrowed from the buffer the frame is in. Every
// getter takes its TLV out; what is left at the end was not expected.
type reader struct {
	kind  kind
	tlv   [tagEnd][]byte
	there [tagEnd]bool
	ts    [2][][]byte // tagSrcTS, tagDstTS
	err   error
}

// parseHeader checks the 8 bytes before the TLVs.
func parseHeader(b []byte) (kind, error) {
	if len(b) < headerSize || len(b) > MaxFrame || binary.BigEndian.Uint32(b) != magic {
		return 0, errNotOurs
	}
	if v := binary.BigEndian.Uint16(b[4:]); v != ABI {
		return 0, wrongABI(v)
	}
	if b[7] != 0 {
		return 0, errNotOurs
	}
	return kind(b[6]), nil
}

// parse splits a frame. The values are borrowed from b.
func parse(b []byte) (*reader, error) {
	k, err := parseHeader(b)
	if err != nil {
		return nil, err
	}
	r := &reader{kind: k}
	b = b[headerSize:]
	for n := 0; len(b) > 0; n++ {
		if len(b) < 4 || n == maxTLVs {
			return nil, fmt.Errorf("plugin: frame %d: cut off or too many TLVs (at TLV %d)", k, n)
		}
		t, size := tag(binary.BigEndian.Uint16(b)), int(binary.BigEndian.Uint16(b[2:]))
		b = b[4:]
		if size > len(b) {
			return nil, fmt.Errorf("plugin: frame %d: TLV %d says %d bytes, %d are left", k, t, size, len(b))
		}
		if err := r.put(t, b[:size:size]); err != nil {
			return nil, err
		}
		b = b[size:]
	}
	return r, nil
}

func (r *reader) put(t tag, v []byte) error {
	switch {
	case t == 0 || t >= tagEnd:
		return fmt.Errorf("plugin: frame %d: unknown TLV %d", r.kind, t)
	case t == tagSrcTS || t == tagDstTS:
		r.ts[t-tagSrcTS] = append(r.ts[t-tagSrcTS], v)
	case r.there[t]:
		return fmt.Errorf("plugin: frame %d: TLV %d twice", r.kind, t)
	default:
		r.tlv[t], r.there[t] = v, true
	}
	return nil
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("plugin: frame %d: "+format, append([]any{r.kind}, args...)...)
	}
}

// optional takes a TLV of lo to hi bytes; nil if it is not there.
func (r *reader) optional(t tag, lo, hi int) []byte {
	v, ok := r.tlv[t], r.there[t]
	r.tlv[t], r.there[t] = nil, false
	if ok && (len(v) < lo || len(v) > hi) {
		r.fail("TLV %d has %d bytes, not %d to %d", t, len(v), lo, hi)
		return nil
	}
	return v
}

// bytes takes a TLV that must be there. After an error it is lo zero bytes, so
// that fixed-size readers need no check of their own.
func (r *reader) bytes(t tag, lo, hi int) []byte {
	if !r.there[t] {
		r.fail("TLV %d is missing", t)
	}
	v := r.optional(t, lo, hi)
	if r.err != nil {
		return make([]byte, lo)
	}
	return v
}

func (r *reader) u8(t tag) uint8   { return r.bytes(t, 1, 1)[0] }
func (r *reader) u16(t tag) uint16 { return binary.BigEndian.Uint16(r.bytes(t, 2, 2)) }
func (r *reader) u32(t tag) uint32 { return binary.BigEndian.Uint32(r.bytes(t, 4, 4)) }
func (r *reader) u64(t tag) uint64 { return binary.BigEndian.Uint64(r.bytes(t, 8, 8)) }

func (r *reader) flag(t tag) bool {
	v := r.u8(t)
	if v > 1 {
		r.fail("TLV %d is no flag", t)
	}
	return v == 1
}

// str takes text of 1 to hi bytes, which must be printable: it goes to logs.
func (r *reader) str(t tag, hi int) string {
	v := r.bytes(t, 1, hi)
	if !utf8.Valid(v) || bytes.ContainsFunc(v, unicode.IsControl) {
		r.fail("TLV %d is not printable text", t)
	}
	return string(v)
}

// material moves an optional key of at most hi bytes out of the frame, wiping
// it there.
func (r *reader) material(t tag, hi int) *key.Material {
	v := r.optional(t, 1, hi)
	if v == nil || r.err != nil {
		return nil
	}
	m, err := key.Take(v)
	if err != nil {
		r.fail("TLV %d: %w", t, err)
		return nil
	}
	return m
}

// end is the first error, or that of a TLV nobody asked for.
func (r *reader) end() error {
	for t := range r.there {
		if r.there[t] {
			r.fail("TLV %d does not belong there", t)
		}
	}
	if len(r.ts[0])+len(r.ts[1]) > 0 {
		r.fail("selectors do not belong there")
	}
	return r.err
}
