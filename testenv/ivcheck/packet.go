package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
)

const (
	etherHeader = 14
	etherIPv4   = 0x0800
	etherIPv6   = 0x86dd

	protoUDP = 17
	protoESP = 50

	portNATT = 4500
	ivEnd    = 16 // SPI, sequence number, IV
)

// esp is one ESP packet. Ports are 0 without UDP.
type esp struct {
	src, dst netip.AddrPort
	spi, seq uint32
	iv       [8]byte
	body     []byte // from the SPI on
	whole    bool   // body is all of it
}

// parseESP finds the ESP packet in an Ethernet frame. ok is false if there is
// none; an error says that there is one without its IV.
func parseESP(frame []byte, whole bool) (p esp, ok bool, err error) {
	if len(frame) < etherHeader {
		return esp{}, false, nil
	}
	ip := ipPacket{payload: frame[etherHeader:], whole: whole}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherIPv4:
		ok = ip.v4()
	case etherIPv6:
		ok = ip.v6()
	}
	if !ok {
		return esp{}, false, nil
	}
	p = esp{src: netip.AddrPortFrom(ip.src, 0), dst: netip.AddrPortFrom(ip.dst, 0), body: ip.payload, whole: ip.whole}
	switch ip.proto {
	case protoESP:
	case protoUDP:
		if !p.udp() {
			return esp{}, false, nil
		}
	default:
		return esp{}, false, nil
	}
	if len(p.body) < ivEnd {
		if p.whole {
			return esp{}, false, nil // a keepalive; nothing that has an IV
		}
		return esp{}, false, fmt.Errorf("ESP from %v is cut off before the end of its IV", ip.src)
	}
	p.spi, p.seq = binary.BigEndian.Uint32(p.body), binary.BigEndian.Uint32(p.body[4:])
	p.iv = [8]byte(p.body[8:])
	return p, true, nil
}

// udp takes the UDP header off; false if what is behind it is not ESP.
func (p *esp) udp() bool {
	const header = 8
	if len(p.body) < header {
		return false
	}
	src, dst := binary.BigEndian.Uint16(p.body), binary.BigEndian.Uint16(p.body[2:])
	if src != portNATT && dst != portNATT {
		return false
	}
	p.src, p.dst = netip.AddrPortFrom(p.src.Addr(), src), netip.AddrPortFrom(p.dst.Addr(), dst)
	p.limit(int(binary.BigEndian.Uint16(p.body[4:])))
	if len(p.body) < header {
		return false
	}
	p.body = p.body[header:]
	return !bytes.HasPrefix(p.body, []byte{0, 0, 0, 0}) // IKE
}

// limit cuts body to the length that a header names.
func (p *esp) limit(n int) {
	if n > len(p.body) {
		p.whole = false
		return
	}
	p.body = p.body[:n]
}

// ipPacket begins with payload = all from the IP header on.
type ipPacket struct {
	src, dst netip.Addr
	proto    byte
	payload  []byte
	whole    bool
}

// cut makes payload what lies behind a header, within the length that it names.
func (p *ipPacket) cut(header, total int) bool {
	if total > len(p.payload) {
		p.whole, total = false, len(p.payload)
	}
	if header > total {
		return false
	}
	p.payload = p.payload[header:total]
	return true
}

// v4 is false for what is no IPv4 and for all fragments but the first.
func (p *ipPacket) v4() bool {
	b := p.payload
	if len(b) < 20 || b[0]>>4 != 4 || b[0]&15 < 5 {
		return false
	}
	fragment := binary.BigEndian.Uint16(b[6:])
	if fragment&0x1fff != 0 {
		return false
	}
	p.whole = p.whole && fragment&0x2000 == 0
	p.src, p.dst, p.proto = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9]
	return p.cut(int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:])))
}

// v6 is the same for IPv6, behind its extension headers.
func (p *ipPacket) v6() bool {
	b := p.payload
	if len(b) < 40 || b[0]>>4 != 6 {
		return false
	}
	p.src, p.dst, p.proto = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6]
	if !p.cut(40, 40+int(binary.BigEndian.Uint16(b[4:]))) {
		return false
	}
	for {
		const hopByHop, routing, fragment, destination = 0, 43, 44, 60
		b, size := p.payload, 8
		switch p.proto {
		case hopByHop, routing, destination:
			if len(b) < 8 {
				return false
			}
			size += 8 * int(b[1])
		case fragment:
			if len(b) < 8 || binary.BigEndian.Uint16(b[2:])&0xfff8 != 0 {
				return false
			}
			p.whole = p.whole && b[3]&1 == 0
		default:
			return true
		}
		if size > len(b) {
			return false
		}
		p.proto, p.payload = b[0], b[size:]
	}
}
