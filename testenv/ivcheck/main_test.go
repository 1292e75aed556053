package main

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// capFile is a capture in the making.
type capFile struct {
	order binary.AppendByteOrder
	bytes []byte
}

func newFile(order binary.AppendByteOrder, magic, link uint32) *capFile {
	c := &capFile{order: order}
	c.bytes = order.AppendUint32(nil, magic)
	c.bytes = append(c.bytes, make([]byte, 16)...)
	c.bytes = order.AppendUint32(c.bytes, link)
	return c
}

// add appends a frame, of which the capture kept at most keep bytes.
func (c *capFile) add(frame []byte, keep int) *capFile {
	kept := frame[:min(keep, len(frame))]
	c.bytes = append(c.bytes, make([]byte, 8)...)
	c.bytes = c.order.AppendUint32(c.bytes, uint32(len(kept)))
	c.bytes = c.order.AppendUint32(c.bytes, uint32(len(frame)))
	c.bytes = append(c.bytes, kept...)
	return c
}

var be = binary.BigEndian

const all = 1 << 20

func espBytes(spi, seq uint32, iv uint64, text string) []byte {
	b := be.AppendUint32(nil, spi)
	b = be.AppendUint32(b, seq)
	return append(be.AppendUint64(b, iv), text...)
}

func udpBytes(src, dst uint16, payload []byte) []byte {
	b := be.AppendUint16(nil, src)
	b = be.AppendUint16(b, dst)
	b = be.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

// ether adds a header, and a trailer as a padded frame has one.
func ether(typ uint16, packet []byte) []byte {
	b := be.AppendUint16(make([]byte, 12), typ)
	return append(append(b, packet...), 0, 0, 0)
}

func ip4(src, dst string, proto byte, flags uint16, payload []byte) []byte {
	b := append([]byte{0x46, 0}, be.AppendUint16(nil, uint16(24+len(payload)))...) // 4 bytes of options
	b = append(b, 0, 0)
	b = append(be.AppendUint16(b, flags), 64, proto, 0, 0)
	b = append(b, netip.MustParseAddr(src).AsSlice()...)
	b = append(b, netip.MustParseAddr(dst).AsSlice()...)
	return ether(etherIPv4, append(append(b, 1, 1, 1, 1), payload...))
}

func ip6(src, dst string, next byte, payload []byte) []byte {
	b := append([]byte{0x60, 0, 0, 0}, be.AppendUint16(nil, uint16(len(payload)))...)
	b = append(b, next, 64)
	b = append(b, netip.MustParseAddr(src).AsSlice()...)
	b = append(b, netip.MustParseAddr(dst).AsSlice()...)
	return ether(etherIPv6, append(b, payload...))
}

// traffic is 8 ESP packets of 3 SAs without a repeat, among others. One SA moves.
func traffic(c *capFile) *capFile {
	const a, b = "192.0.2.1", "192.0.2.2"
	ike := append([]byte{0, 0, 0, 0}, espBytes(1, 1, 1, "a message of IKE")...)
	extended := append([]byte{44, 1}, make([]byte, 14)...)      // 16 bytes of options, then
	extended = append(extended, protoESP, 0, 0, 0, 0, 0, 0, 7)  // a fragment header
	extended = append(extended, espBytes(0xc3, 2, 32, "v6")...) // of a packet in one piece
	for _, f := range [][]byte{
		ether(0x0806, make([]byte, 28)),
		ip4(a, b, protoUDP, 0, udpBytes(500, 500, ike)),
		ip4(a, b, protoUDP, 0, udpBytes(4500, 4500, ike)),
		ip4(a, b, protoUDP, 0, udpBytes(4500, 4500, []byte{0xff})),
		ip4(a, b, protoUDP, 0, udpBytes(53, 53, espBytes(9, 9, 9, "DNS"))),
		ip4(a, b, protoESP, 0, espBytes(0xc1, 1, 11, "one")),
		ip4(a, b, protoESP, 0, espBytes(0xc1, 2, 12, "one")),
		ip4("192.0.2.3", b, protoESP, 0, espBytes(0xc1, 1048579, 13, "moved")),
		ip4("192.0.2.3", b, protoESP, 0, espBytes(0xc1, 1048580, 14, "moved")),
		ip4(b, a, protoUDP, 0, udpBytes(4500, 20001, espBytes(0xc2, 5, 11, "the IV of another SA"))),
		ip4(b, a, protoUDP, 0, udpBytes(4500, 30001, espBytes(0xc2, 6, 22, "port"))),
		ip4(b, a, protoESP, 100, []byte("a later fragment, which has no header")),
		ip6("2001:db8::1", "2001:db8::2", protoESP, espBytes(0xc3, 1, 31, "v6")),
		ip6("2001:db8::1", "2001:db8::2", 60, extended),
	} {
		c.add(f, all)
	}
	return c
}

func little() *capFile { return newFile(binary.LittleEndian, 0xa1b2c3d4, 1) }

// check runs ivcheck on captures.
func check(t *testing.T, captures ...*capFile) (status int, out, complaint string) {
	t.Helper()
	var files []string
	for i, c := range captures {
		f := filepath.Join(t.TempDir(), string(rune('a'+i))+".pcap")
		if err := os.WriteFile(f, c.bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	var o, e bytes.Buffer
	status = run(files, &o, &e)
	return status, o.String(), e.String()
}

func TestTraffic(t *testing.T) {
	const want = `000000c1: 4 packets, 4 IVs, 0 repeats, 0 copies, seq 1-1048580: 192.0.2.1 > 192.0.2.2 2 packets seq 1-2, 192.0.2.3 > 192.0.2.2 2 packets seq 1048579-1048580
000000c2: 2 packets, 2 IVs, 0 repeats, 0 copies, seq 5-6: 192.0.2.2:4500 > 192.0.2.1:20001 1 packets seq 5-5, 192.0.2.2:4500 > 192.0.2.1:30001 1 packets seq 6-6
000000c3: 2 packets, 2 IVs, 0 repeats, 0 copies, seq 1-2: 2001:db8::1 > 2001:db8::2 2 packets seq 1-2
ivcheck: 8 packets, 3 SPIs, 0 repeats
`
	for name, c := range map[string]*capFile{
		"little-endian":            little(),
		"big-endian":               newFile(binary.BigEndian, 0xa1b2c3d4, 1),
		"little-endian, ns":        newFile(binary.LittleEndian, 0xa1b23c4d, 1),
		"big-endian, ns, FCS bits": newFile(binary.BigEndian, 0xa1b23c4d, 1|4<<26),
	} {
		if status, out, complaint := check(t, traffic(c)); status != 0 || out != want || complaint != "" {
			t.Errorf("%s: status %d, %q\n%s", name, status, complaint, out)
		}
	}
}

func TestRepeats(t *testing.T) {
	const a, b = "192.0.2.1", "192.0.2.2"
	planted := func(frame []byte) *capFile { return traffic(little()).add(frame, all) }
	one := espBytes(0xc1, 1, 11, "one")
	for name, c := range map[string]struct {
		captures        []*capFile
		repeats, copies string
	}{
		"same IV, other text":         {[]*capFile{planted(ip4(a, b, protoESP, 0, espBytes(0xc1, 1, 11, "two")))}, "1 repeats", "0 copies"},
		"same IV, other sequence":     {[]*capFile{planted(ip4(a, b, protoESP, 0, espBytes(0xc1, 3, 11, "one")))}, "1 repeats", "0 copies"},
		"same IV from new addresses":  {[]*capFile{planted(ip4("192.0.2.9", b, protoUDP, 0, udpBytes(4500, 4500, espBytes(0xc1, 9, 11, "x"))))}, "1 repeats", "0 copies"},
		"in IPv6":                     {[]*capFile{planted(ip6("2001:db8::1", "2001:db8::2", protoESP, espBytes(0xc1, 4, 11, "six")))}, "1 repeats", "0 copies"},
		"in another capture":          {[]*capFile{traffic(little()), little().add(ip4(a, b, protoESP, 0, espBytes(0xc1, 1, 11, "two")), all)}, "1 repeats", "0 copies"},
		"same packet":                 {[]*capFile{planted(ip4(a, b, protoESP, 0, one))}, "0 repeats", "1 copies"},
		"same packet behind a NAT":    {[]*capFile{planted(ip4("198.51.100.7", b, protoUDP, 0, udpBytes(20001, 4500, one)))}, "0 repeats", "1 copies"},
		"same, but a fragment":        {[]*capFile{planted(ip4(a, b, protoESP, 0x2000, one))}, "1 repeats", "0 copies"},
		"same, but cut off":           {[]*capFile{traffic(little()).add(ip4(a, b, protoESP, 0, append(one, "two"...)), 14+24+19)}, "1 repeats", "0 copies"},
		"same, but UDP names more":    {[]*capFile{planted(ip4(a, b, protoUDP, 0, longer(udpBytes(4500, 4500, one))))}, "1 repeats", "0 copies"},
		"same, but IP names more":     {[]*capFile{planted(short(ip4(a, b, protoESP, 0, one)))}, "1 repeats", "0 copies"},
		"once as copy, once repeated": {[]*capFile{planted(ip4(a, b, protoESP, 0, one)).add(ip4(a, b, protoESP, 0, espBytes(0xc1, 1, 11, "two")), all)}, "1 repeats", "1 copies"},
	} {
		status, out, _ := check(t, c.captures...)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		last := lines[len(lines)-1]
		wantStatus := 0
		if c.repeats != "0 repeats" {
			wantStatus = 1
		}
		if status != wantStatus || !strings.Contains(lines[0], c.repeats+", "+c.copies) || !strings.HasSuffix(last, "3 SPIs, "+c.repeats) {
			t.Errorf("%s: status %d, want %s and %s\n%s", name, status, c.repeats, c.copies, out)
		}
		if told := slices.ContainsFunc(lines, func(l string) bool {
			return strings.HasPrefix(l, "repeat: SPI 000000c1, IV 000000000000000b: seq 1 in ")
		}); told != (wantStatus == 1) {
			t.Errorf("%s: repeat told: %t\n%s", name, told, out)
		}
	}
}

// longer lets a UDP header name 4 bytes that are not there.
func longer(udp []byte) []byte {
	udp[5] += 4
	return udp
}

// short takes the frame's trailer and lets the IPv4 header name a byte that is not there.
func short(frame []byte) []byte {
	frame[etherHeader+3]++
	return frame[:len(frame)-3]
}

func TestBadCaptures(t *testing.T) {
	whole := traffic(little())
	cut := func(n int) *capFile { return &capFile{bytes: whole.bytes[:n]} }
	huge := little().add(nil, 0)
	binary.LittleEndian.PutUint32(huge.bytes[fileHeader+8:], maxRecord+1)
	esp := ip4("192.0.2.1", "192.0.2.2", protoESP, 0, espBytes(0xc1, 1, 11, "one"))
	for name, c := range map[string]struct {
		capture *capFile
		want    string
	}{
		"empty":                    {cut(0), "no pcap file"},
		"pcapng":                   {newFile(binary.LittleEndian, 0x0a0d0d0a, 1), "classic format"},
		"not Ethernet":             {newFile(binary.LittleEndian, 0xa1b2c3d4, 113), "link type 113"},
		"ends in a record":         {cut(len(whole.bytes) - 1), "not complete"},
		"ends in a record header":  {cut(fileHeader + 3), "packet 1 cannot be read"},
		"a record too large":       {huge, "a record of 262145 bytes"},
		"no ESP":                   {little().add(ether(0x0806, make([]byte, 28)), all), "no ESP packet"},
		"ESP cut off in its IV":    {little().add(esp, 14+24+15), "cut off before the end of its IV"},
		"an empty capture is none": {little(), "no ESP packet"},
	} {
		if status, out, complaint := check(t, c.capture); status != 2 || out != "" || !strings.Contains(complaint, c.want) {
			t.Errorf("%s: status %d, %q, want %q", name, status, complaint, c.want)
		}
	}
	if status := run([]string{filepath.Join(t.TempDir(), "none.pcap")}, new(bytes.Buffer), new(bytes.Buffer)); status != 2 {
		t.Errorf("a file that is not there: status %d", status)
	}
}

// FuzzCapture: nothing in a file makes ivcheck fail otherwise than by its errors,
// and its numbers agree.
func FuzzCapture(f *testing.F) {
	f.Add(traffic(little()).bytes)
	f.Add(traffic(newFile(binary.BigEndian, 0xa1b23c4d, 1)).bytes)
	f.Add(little().add(ip6("::1", "::2", 0, make([]byte, 8)), 60).bytes)
	f.Fuzz(func(t *testing.T, file []byte) {
		tally := newTally()
		_ = tally.capture("fuzz", bytes.NewReader(file))
		packets, repeats := 0, 0
		for _, s := range tally.order {
			packets += s.packets
			repeats += s.repeats
			flows := 0
			for _, f := range s.flows {
				flows += f.packets
			}
			if s.packets != len(s.first)+s.repeats+s.copies || s.packets != flows || s.seq.low > s.seq.high {
				t.Errorf("SPI %08x: %d packets, %d IVs, %d repeats, %d copies, %d in flows", s.spi, s.packets, len(s.first), s.repeats, s.copies, flows)
			}
		}
		if packets != tally.packets || repeats != tally.repeats {
			t.Errorf("%d packets of %d, %d repeats of %d", packets, tally.packets, repeats, tally.repeats)
		}
	})
}
