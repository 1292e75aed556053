package main

import (
	"bytes"
	"encoding/binary"
)

// Ports of IKE, and what stands before IKE where ESP shares its port.
const (
	portIKE  = 500
	portNATT = 4500
)

var nonESP = []byte{0, 0, 0, 0}

const (
	etherLen = 14
	ipLen    = 20 // without options
	udpLen   = 8

	protoUDP = 17
	protoESP = 50
)

// ipv4 gives where the payload of an unfragmented IPv4 packet begins and ends in
// an Ethernet frame, and its protocol.
func ipv4(frame []byte) (begin, end int, proto byte, ok bool) {
	if len(frame) < etherLen+ipLen || binary.BigEndian.Uint16(frame[12:]) != 0x0800 || frame[etherLen]>>4 != 4 {
		return 0, 0, 0, false
	}
	ip := frame[etherLen:]
	header, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	fragment := binary.BigEndian.Uint16(ip[6:])&0x3fff != 0
	if header < ipLen || header > total || total > len(ip) || fragment {
		return 0, 0, 0, false
	}
	return etherLen + header, etherLen + total, ip[9], true
}

// datagram is an Ethernet frame with a UDP datagram on a port of IKE.
type datagram struct {
	headers []byte // of Ethernet, IP and UDP
	payload []byte
}

func parseDatagram(frame []byte) (datagram, bool) {
	begin, end, proto, ok := ipv4(frame)
	if !ok || proto != protoUDP || end-begin < udpLen {
		return datagram{}, false
	}
	udp := frame[begin:end]
	n := int(binary.BigEndian.Uint16(udp[4:]))
	if n < udpLen || n > len(udp) {
		return datagram{}, false
	}
	d := datagram{headers: frame[:begin+udpLen], payload: udp[udpLen:n]}
	return d, d.on(portIKE) || d.on(portNATT)
}

func (d datagram) udp() []byte { return d.headers[len(d.headers)-udpLen:] }

// on tells whether either end has that port.
func (d datagram) on(port uint16) bool {
	return binary.BigEndian.Uint16(d.udp()) == port || binary.BigEndian.Uint16(d.udp()[2:]) == port
}

// ike gives the IKE message without the marker, if it is one.
func (d datagram) ike() ([]byte, bool) {
	if !d.on(portNATT) {
		return d.payload, true
	}
	return bytes.CutPrefix(d.payload, nonESP)
}

// esp tells an ESP packet in UDP from IKE and from a keepalive of one byte.
func (d datagram) esp() bool {
	return d.on(portNATT) && len(d.payload) > len(nonESP) && !bytes.HasPrefix(d.payload, nonESP)
}

// with gives the frame with another IKE message, lengths and checksums set.
func (d datagram) with(ike []byte) []byte {
	frame := bytes.Clone(d.headers)
	if d.on(portNATT) {
		frame = append(frame, nonESP...)
	}
	frame = append(frame, ike...)
	ip, begin := frame[etherLen:], len(d.headers)-udpLen
	udp := frame[begin:]
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	binary.BigEndian.PutUint16(ip[10:], 0)
	binary.BigEndian.PutUint16(ip[10:], checksum(frame[etherLen:begin]))
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], 0)
	binary.BigEndian.PutUint16(udp[6:], udpChecksum(ip, udp))
	return frame
}

// answer gives a frame with ike for the sender of d, as if d's receiver sent it.
func (d datagram) answer(ike []byte) []byte {
	h := bytes.Clone(d.headers)
	swap(h[0:6], h[6:12])
	swap(h[etherLen+12:etherLen+16], h[etherLen+16:etherLen+20])
	udp := datagram{headers: h}.udp()
	swap(udp[0:2], udp[2:4])
	return datagram{headers: h}.with(ike)
}

func swap(a, b []byte) {
	for i := range a {
		a[i], b[i] = b[i], a[i]
	}
}

// udpChecksum is that of a datagram whose own checksum field is zero (RFC 768).
func udpChecksum(ip, udp []byte) uint16 {
	pseudo := append(bytes.Clone(ip[12:20]), 0, protoUDP, byte(len(udp)>>8), byte(len(udp)))
	if c := checksum(pseudo, udp); c != 0 {
		return c
	}
	return 0xffff // zero means "none"
}

// checksum is the Internet checksum (RFC 1071); only the last part may be odd.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		for ; len(p) > 1; p = p[2:] {
			sum += uint32(binary.BigEndian.Uint16(p))
		}
		if len(p) == 1 {
			sum += uint32(p[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
