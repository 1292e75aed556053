package main

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Numbers of RFC 7296.
const (
	headerLen  = 28
	payloadLen = 4 // of a payload's header

	exchangeInit   = 34
	exchangeAuth   = 35
	exchangeCreate = 36

	flagInitiator = 0x08
	flagResponse  = 0x20

	payloadSA     = 33
	payloadKE     = 34
	payloadNonce  = 40
	payloadNotify = 41

	noProposalChosen = 14
	invalidKE        = 17
	cookie           = 16390

	transformKE = 4
	ecp384      = 20 // a group
)

// support is the notify that announces Q-IPsec (docs/plugin-protocol.md).
const support = 40990

var supportData = []byte("Q-IPsec\x01\x01")

// echoed are the notifies of a request that a responder of its abilities repeats:
// IKE fragmentation, signature hashes, IKE_INTERMEDIATE.
var echoed = []uint16{16430, 16431, 16438}

// message is an IKEv2 message; encode gives again what parseMessage took.
type message struct {
	header   [headerLen]byte // its first payload type and its length are set by encode
	payloads []payload
	inner    byte // type that the last payload names as the next: of what is encrypted in it
}

type payload struct {
	kind  byte
	flags byte // critical, and what is reserved
	body  []byte
}

func (m *message) spi() [8]byte   { return [8]byte(m.header[:8]) }
func (m *message) exchange() byte { return m.header[18] }
func (m *message) request() bool  { return m.header[19]&flagResponse == 0 }

// parseHeader takes the header only: what an encrypted message shows.
func parseHeader(b []byte) (*message, error) {
	if len(b) < headerLen {
		return nil, fmt.Errorf("%d bytes are no IKE header", len(b))
	}
	m := &message{header: [headerLen]byte(b)}
	if v := m.header[17]; v>>4 != 2 {
		return nil, fmt.Errorf("IKE version %d.%d", v>>4, v&15)
	}
	if n := binary.BigEndian.Uint32(b[24:]); n != uint32(len(b)) {
		return nil, fmt.Errorf("the header says %d bytes, there are %d", n, len(b))
	}
	return m, nil
}

// parseMessage walks the whole chain. An encrypted payload ends it.
func parseMessage(b []byte) (*message, error) {
	m, err := parseHeader(b)
	if err != nil {
		return nil, err
	}
	kind := b[16]
	for b = b[headerLen:]; len(b) > 0; {
		if kind == 0 {
			return nil, fmt.Errorf("%d bytes behind the last payload", len(b))
		}
		if len(b) < payloadLen {
			return nil, fmt.Errorf("payload %d is cut off in its header", kind)
		}
		n := int(binary.BigEndian.Uint16(b[2:]))
		if n < payloadLen || n > len(b) {
			return nil, fmt.Errorf("payload %d has %d bytes of %d left", kind, n, len(b))
		}
		m.payloads = append(m.payloads, payload{kind: kind, flags: b[1], body: b[payloadLen:n]})
		kind, b = b[0], b[n:]
	}
	m.inner = kind
	return m, nil
}

func (m *message) encode() []byte {
	out := slices.Clone(m.header[:])
	next := 16 // where the type of the next payload belongs
	for _, p := range m.payloads {
		out[next] = p.kind
		next = len(out)
		out = append(out, 0, p.flags)
		out = binary.BigEndian.AppendUint16(out, uint16(payloadLen+len(p.body)))
		out = append(out, p.body...)
	}
	out[next] = m.inner
	binary.BigEndian.PutUint32(out[24:], uint32(len(out)))
	return out
}

// notifyType is that of a notify payload; 0, which is reserved, for others.
func (p payload) notifyType() uint16 {
	if p.kind != payloadNotify || len(p.body) < 4 {
		return 0
	}
	return binary.BigEndian.Uint16(p.body[2:])
}

// first gives the body of the first payload of that kind.
func (m *message) first(kind byte) []byte {
	for _, p := range m.payloads {
		if p.kind == kind {
			return p.body
		}
	}
	return nil
}

// strip takes the notifies of that type out, and says how many there were.
func (m *message) strip(notify uint16) int {
	before := len(m.payloads)
	m.payloads = slices.DeleteFunc(m.payloads, func(p payload) bool { return p.notifyType() == notify })
	return before - len(m.payloads)
}

// notify is a notify payload of the IKE_SA.
func notify(kind uint16, data []byte) payload {
	return payload{kind: payloadNotify, body: append([]byte{0, 0, byte(kind >> 8), byte(kind)}, data...)}
}

// answer begins a forged IKE_SA_INIT answer to m.
func (m *message) answer(spi [8]byte, payloads ...payload) *message {
	a := &message{header: m.header, payloads: payloads}
	copy(a.header[8:16], spi[:])
	a.header[19] = flagResponse
	return a
}

// complete answers an IKE_SA_INIT request as a responder would that speaks
// Q-IPsec. Nobody keeps the private key: it stands for somebody who cannot
// authenticate.
func (m *message) complete() (*message, error) {
	ke := m.first(payloadKE)
	if len(ke) < 4 {
		return nil, errors.New("the request has no KE payload")
	}
	group := binary.BigEndian.Uint16(ke)
	sa, err := choose(m.first(payloadSA), group)
	if err != nil {
		return nil, err
	}
	public, err := publicKey(group, len(ke)-4)
	if err != nil {
		return nil, err
	}
	a := m.answer([8]byte(random(8)),
		payload{kind: payloadSA, body: sa},
		payload{kind: payloadKE, body: append(slices.Clone(ke[:4]), public...)},
		payload{kind: payloadNonce, body: random(32)})
	for _, p := range m.payloads {
		if slices.Contains(echoed, p.notifyType()) {
			a.payloads = append(a.payloads, p)
		}
	}
	a.payloads = append(a.payloads, notify(support, supportData))
	return a, nil
}

// publicKey makes one for the group of a request whose own has size bytes.
func publicKey(group uint16, size int) ([]byte, error) {
	curve := map[uint16]ecdh.Curve{19: ecdh.P256(), 20: ecdh.P384(), 21: ecdh.P521(), 31: ecdh.X25519()}[group]
	if curve == nil { // modular: any number below the prime; its bytes are as many as the prime's
		if size == 0 {
			return nil, errors.New("the request's KE payload is empty")
		}
		b := random(size)
		b[0] = 0
		return b, nil
	}
	key, err := curve.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	b := key.PublicKey().Bytes()
	if curve != ecdh.X25519() {
		b = b[1:] // IKE has no format byte (RFC 5903)
	}
	return b, nil
}

// choose makes the answer to an SA payload: of the first proposal with that group
// one transform of each type.
func choose(sa []byte, group uint16) ([]byte, error) {
	for len(sa) > 0 {
		if len(sa) < 8 {
			return nil, errors.New("a proposal is cut off in its header")
		}
		n := int(binary.BigEndian.Uint16(sa[2:]))
		spi := int(sa[6])
		if n < 8+spi || n > len(sa) {
			return nil, fmt.Errorf("a proposal has %d bytes of %d left", n, len(sa))
		}
		chosen, err := chooseTransforms(sa[8+spi:n], group)
		if err != nil {
			return nil, err
		}
		if chosen != nil {
			return joinProposal(sa[4], sa[5], chosen), nil
		}
		sa = sa[n:]
	}
	return nil, fmt.Errorf("no proposal has group %d", group)
}

// chooseTransforms gives the first of each type, or nil if none has that group.
func chooseTransforms(b []byte, group uint16) ([][]byte, error) {
	var chosen [][]byte
	var have []byte
	for len(b) > 0 {
		if len(b) < 8 {
			return nil, errors.New("a transform is cut off in its header")
		}
		n := int(binary.BigEndian.Uint16(b[2:]))
		if n < 8 || n > len(b) {
			return nil, fmt.Errorf("a transform has %d bytes of %d left", n, len(b))
		}
		kind, id := b[4], binary.BigEndian.Uint16(b[6:])
		if !slices.Contains(have, kind) && (kind != transformKE || id == group) {
			have = append(have, kind)
			chosen = append(chosen, b[:n])
		}
		b = b[n:]
	}
	if !slices.Contains(have, transformKE) {
		return nil, nil
	}
	return chosen, nil
}

// joinProposal is an SA payload's body with that proposal alone.
func joinProposal(number, protocol byte, transforms [][]byte) []byte {
	b := []byte{0, 0, 0, 0, number, protocol, 0, byte(len(transforms))}
	for i, t := range transforms {
		at := len(b)
		b = append(b, t...)
		b[at] = 3 // more
		if i == len(transforms)-1 {
			b[at] = 0
		}
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	return b
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}
