package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func frame(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(text, "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// parsed takes a frame apart and looks at its lengths and checksums on the way.
func parsed(t *testing.T, f []byte) (datagram, *message) {
	t.Helper()
	d, ok := parseDatagram(f)
	if !ok {
		t.Fatalf("no datagram of IKE: %x", f)
	}
	ip := f[etherLen:]
	if n := int(binary.BigEndian.Uint16(ip[2:])); n != len(ip) {
		t.Errorf("IP length %d of %d", n, len(ip))
	}
	if n := int(binary.BigEndian.Uint16(d.udp()[4:])); n != udpLen+len(d.payload) {
		t.Errorf("UDP length %d of %d", n, udpLen+len(d.payload))
	}
	if checksum(ip[:ipLen]) != 0 { // over a header with its right checksum (RFC 1071)
		t.Error("IP checksum is wrong")
	}
	if checksum(ip[12:20], []byte{0, protoUDP}, d.udp()[4:6], d.udp(), d.payload) != 0 {
		t.Error("UDP checksum is wrong")
	}
	ike, ok := d.ike()
	if !ok {
		t.Fatal("no IKE message")
	}
	m, err := parseMessage(ike)
	if err != nil {
		t.Fatal(err)
	}
	return d, m
}

// story collects the lines of an attack.
type story struct {
	mu    sync.Mutex
	lines []string
}

func (s *story) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

func (s *story) has(t *testing.T, want ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.lines) != len(want) {
		t.Fatalf("lines %q, want %d", s.lines, len(want))
	}
	for i, w := range want {
		if !strings.HasPrefix(s.lines[i], w) {
			t.Errorf("line %q, want %q...", s.lines[i], w)
		}
	}
}

func begin(t testing.TB, mode, from string) (*attack, *story) {
	t.Helper()
	s := &story{}
	a, err := newAttack(mode, from, s.say)
	if err != nil {
		t.Fatal(err)
	}
	return a, s
}

// A rebuilt frame is the captured one but for the checksum that it lacked.
func TestRebuild(t *testing.T) {
	for text, sum := range wholeSums {
		f := frame(t, text)
		d, ok := parseDatagram(f)
		ike, _ := d.ike()
		m, err := parseMessage(ike)
		if !ok || err != nil {
			t.Fatalf("%v %v", ok, err)
		}
		if !bytes.Equal(m.encode(), ike) {
			t.Error("encode does not give what was parsed")
		}
		got, want := d.with(m.encode()), bytes.Clone(f)
		binary.BigEndian.PutUint16(want[etherLen+ipLen+6:], sum)
		if !bytes.Equal(got, want) {
			t.Errorf("rebuilt\n%x, want\n%x", got, want)
		}
		parsed(t, got)
	}
}

func TestStrip(t *testing.T) {
	a, s := begin(t, "strip", "")
	for _, text := range []string{requestFrame, answerFrame} {
		f := frame(t, text)
		before := bytes.Clone(f)
		out := a.meet("a", f)
		if out.instead == nil || out.back != nil || out.swallow || out.again {
			t.Fatalf("%+v", out)
		}
		if !bytes.Equal(f, before) {
			t.Error("the frame that came was changed")
		}
		if len(out.instead) != len(f)-17 { // header 4, notify 4, data 9
			t.Errorf("%d bytes, were %d", len(out.instead), len(f))
		}
		_, was := parsed(t, mended(t, f))
		_, m := parsed(t, out.instead)
		if len(m.payloads) != len(was.payloads)-1 || m.inner != 0 {
			t.Errorf("%d payloads, were %d", len(m.payloads), len(was.payloads))
		}
		for i, p := range m.payloads {
			if w := was.payloads[i]; p.kind != w.kind || !bytes.Equal(p.body, w.body) {
				t.Errorf("payload %d is %d, was %d", i, p.kind, w.kind)
			}
		}
		if out := a.meet("a", out.instead); out.instead != nil {
			t.Error("stripped twice")
		}
	}
	s.has(t, "stripped from a: notify 40990 of the IKE_SA_INIT request of SPI 1d3463b3c0bd9124",
		"stripped from a: notify 40990 of the IKE_SA_INIT answer")
}

// mended is a frame with its checksum set.
func mended(t *testing.T, f []byte) []byte {
	t.Helper()
	d, _ := parseDatagram(f)
	ike, _ := d.ike()
	return d.with(ike)
}

// Wherever the notify stands, the chain stays whole.
func TestStripAnywhere(t *testing.T) {
	_, m := parsed(t, mended(t, frame(t, requestFrame)))
	n := m.payloads[len(m.payloads)-1]
	rest := m.payloads[:len(m.payloads)-1]
	for at := range len(rest) + 1 {
		moved := &message{header: m.header}
		moved.payloads = append(append(append(moved.payloads, rest[:at]...), n, n), rest[at:]...)
		got, err := parseMessage(moved.encode())
		if err != nil {
			t.Fatal(err)
		}
		if k := got.strip(support); k != 2 {
			t.Fatalf("%d stripped", k)
		}
		want := (&message{header: m.header, payloads: rest}).encode()
		if !bytes.Equal(got.encode(), want) {
			t.Errorf("notify at %d:\n%x, want\n%x", at, got.encode(), want)
		}
	}
}

func TestDirection(t *testing.T) {
	a, s := begin(t, "strip", "b")
	if out := a.meet("a", frame(t, requestFrame)); out.instead != nil {
		t.Error("stripped what came from a")
	}
	if out := a.meet("b", frame(t, answerFrame)); out.instead == nil {
		t.Error("not stripped what came from b")
	}
	s.has(t, "stripped from b")
	for _, bad := range [][2]string{{"strip", "c"}, {"none", ""}} {
		if _, err := newAttack(bad[0], bad[1], s.say); err == nil {
			t.Errorf("%q taken", bad)
		}
	}
}

// backwards looks at a forged answer to requestFrame: it goes to its sender, as if
// from its receiver.
func backwards(t *testing.T, out outcome) *message {
	t.Helper()
	if out.back == nil || out.instead != nil || out.swallow {
		t.Fatalf("%+v", out)
	}
	f, real := out.back, frame(t, answerFrame)
	d, m := parsed(t, f)
	if !bytes.Equal(f[:etherLen], real[:etherLen]) || !bytes.Equal(f[etherLen+12:etherLen+20], real[etherLen+12:etherLen+20]) ||
		!bytes.Equal(d.udp()[:2], []byte{1, 0xf4}) {
		t.Errorf("addressed %x", f[:etherLen+ipLen+udpLen])
	}
	if m.exchange() != exchangeInit || m.request() || m.header[19]&flagInitiator != 0 || m.spi() != [8]byte{0x1d, 0x34, 0x63, 0xb3, 0xc0, 0xbd, 0x91, 0x24} {
		t.Errorf("header %x", m.header)
	}
	return m
}

func TestForge(t *testing.T) {
	a, s := begin(t, "forge", "")
	request := frame(t, requestFrame)
	copy(request[etherLen+ipLen:], []byte{0x30, 0x39}) // as from behind a NAT
	out := a.meet("a", request)
	if ports := out.back[etherLen+ipLen:][:4]; !bytes.Equal(ports, []byte{1, 0xf4, 0x30, 0x39}) {
		t.Errorf("from and to ports %x", ports)
	}
	m := backwards(t, out)
	if len(m.payloads) != 1 || m.payloads[0].notifyType() != noProposalChosen || len(m.payloads[0].body) != 4 {
		t.Errorf("payloads %v", m.payloads)
	}
	if out := a.meet("b", frame(t, answerFrame)); out.back != nil || out.swallow {
		t.Errorf("an answer was answered: %+v", out)
	}
	s.has(t, "forged to a: NO_PROPOSAL_CHOSEN")
}

func TestForgeCookie(t *testing.T) {
	a, s := begin(t, "forge-cookie", "")
	for range 3 {
		m := backwards(t, a.meet("a", frame(t, requestFrame)))
		if len(m.payloads) != 1 || m.payloads[0].notifyType() != cookie || len(m.payloads[0].body) != 4+32 {
			t.Errorf("payloads %v", m.payloads)
		}
		if [8]byte(m.header[8:16]) != [8]byte{} {
			t.Error("a COOKIE answer has no responder's SPI (RFC 7296, 2.6)")
		}
	}
	if out := a.meet("a", frame(t, requestFrame)); out.back != nil {
		t.Error("a fourth COOKIE")
	}
	other := frame(t, requestFrame)
	other[etherLen+ipLen+udpLen] ^= 1
	if out := a.meet("a", other); out.back == nil {
		t.Error("none for another SPI")
	}
	s.has(t, "forged to a: COOKIE 1", "forged to a: COOKIE 2", "forged to a: COOKIE 3", "forged to a: COOKIE 1")
}

func TestCookieAlone(t *testing.T) {
	a, s := begin(t, "cookie-alone", "")
	for range 3 {
		out := a.meet("a", frame(t, requestFrame))
		if m := backwards(t, outcome{back: out.back}); m.payloads[0].notifyType() != cookie || !out.swallow {
			t.Errorf("payloads %v, swallowed: %v", m.payloads, out.swallow)
		}
	}
	if out := a.meet("a", frame(t, requestFrame)); out.back != nil || out.swallow {
		t.Errorf("the fourth: %+v", out)
	}
	s.has(t, "forged to a: COOKIE 1", "forged to a: COOKIE 2", "forged to a: COOKIE 3")
}

func TestForgeKE(t *testing.T) {
	a, s := begin(t, "forge-ke", "")
	out := a.meet("a", frame(t, requestFrame))
	if !out.swallow {
		t.Error("the request passed")
	}
	m := backwards(t, outcome{back: out.back})
	if len(m.payloads) != 1 || m.payloads[0].notifyType() != invalidKE || !bytes.Equal(m.payloads[0].body[4:], []byte{0, 20}) {
		t.Errorf("payloads %v", m.payloads)
	}
	if out := a.meet("a", frame(t, requestFrame)); out.back != nil || out.swallow {
		t.Error("a second INVALID_KE_PAYLOAD")
	}
	if out := a.meet("b", frame(t, answerFrame)); out.back != nil || out.swallow {
		t.Errorf("an answer was answered: %+v", out)
	}
	s.has(t, "forged to a: INVALID_KE_PAYLOAD")
}

func TestSilence(t *testing.T) {
	a, s := begin(t, "silence", "a")
	if out := a.meet("a", frame(t, requestFrame)); !out.swallow {
		t.Error("a request passed")
	}
	if out := a.meet("b", frame(t, answerFrame)); out.swallow {
		t.Error("an answer of the side that is not attacked was lost")
	}
	s.has(t, "lost from a: the request")
}

func TestForgeComplete(t *testing.T) {
	a, s := begin(t, "forge-complete", "a")
	if out := a.meet("b", frame(t, answerFrame)); out.swallow {
		t.Error("an answer to what was not forged is swallowed")
	}
	m := backwards(t, a.meet("a", frame(t, requestFrame)))
	_, real := parsed(t, mended(t, frame(t, answerFrame)))
	if !bytes.Equal(m.first(payloadSA), real.first(payloadSA)) {
		t.Errorf("SA %x, the real responder chose %x", m.first(payloadSA), real.first(payloadSA))
	}
	ke := m.first(payloadKE)
	if len(ke) != 36 || ke[1] != 31 || bytes.Equal(ke, real.first(payloadKE)) {
		t.Errorf("KE %x", ke)
	}
	if n := m.first(payloadNonce); len(n) != 32 {
		t.Errorf("nonce %x", n)
	}
	var kinds []uint16
	for _, p := range m.payloads[3:] {
		kinds = append(kinds, p.notifyType())
	}
	if fmt.Sprint(kinds) != "[16430 16431 40990]" || !bytes.Equal(m.payloads[5].body[4:], supportData) {
		t.Errorf("notifies %v, data %q", kinds, m.payloads[5].body)
	}
	if [8]byte(m.header[8:16]) == [8]byte{} {
		t.Error("no responder's SPI")
	}
	if out := a.meet("b", frame(t, answerFrame)); !out.swallow {
		t.Error("the real answer passed")
	}
	if out := a.meet("a", frame(t, requestFrame)); out.swallow || out.back == nil {
		t.Error("a request that comes again is not answered again")
	}
	s.has(t, "forged to a: a complete answer", "swallowed from b: the real answer", "forged to a")
}

func TestComplete(t *testing.T) {
	_, m := parsed(t, mended(t, frame(t, requestFrame)))
	for group, size := range map[uint16]int{14: 256, 19: 64, 20: 96, 21: 132, 31: 32} {
		if b, err := publicKey(group, size); err != nil || len(b) != size {
			t.Errorf("group %d: %d bytes, want %d, %v", group, len(b), size, err)
		}
	}
	m.first(payloadKE)[1] = 20 // of the second proposal
	answer, err := m.complete()
	if err != nil {
		t.Fatal(err)
	}
	if sa := answer.first(payloadSA); len(sa) != 36 || sa[0] != 0 || sa[4] != 2 || sa[35] != 20 {
		t.Errorf("SA %x", sa)
	}
	m.first(payloadKE)[1] = 14 // of none
	if _, err := m.complete(); err == nil {
		t.Error("answered a request whose group no proposal has")
	}
}

// On port 4500 the marker stays, and without it the packet is ESP.
func TestPort4500(t *testing.T) {
	d, _ := parseDatagram(frame(t, requestFrame))
	d.headers = bytes.Clone(d.headers)
	copy(d.udp(), []byte{0x11, 0x94, 0x11, 0x94})
	marked := d.with(d.payload)
	a, _ := begin(t, "strip", "")
	out := a.meet("a", marked)
	if len(out.instead) != len(marked)-17 || !bytes.Equal(out.instead[len(d.headers):len(d.headers)+4], nonESP) {
		t.Fatalf("%x", out.instead)
	}
	parsed(t, out.instead)
	bare := datagram{headers: marked[:len(d.headers)], payload: d.payload}
	if !bare.esp() {
		t.Error("a packet without the marker is no ESP")
	}
	if bare.payload = []byte{0xff}; bare.esp() {
		t.Error("a keepalive is ESP")
	}
}

func TestReplay(t *testing.T) {
	a, s := begin(t, "replay", "")
	for _, text := range []string{requestFrame, answerFrame, espFrame, espFrame} {
		if out := a.meet("a", frame(t, text)); !out.again || out.instead != nil {
			t.Errorf("%+v", out)
		}
	}
	for exchange, want := range map[byte]bool{exchangeAuth: true, exchangeCreate: true, 37: false} {
		f := frame(t, requestFrame)
		f[etherLen+ipLen+udpLen+18] = exchange
		if out := a.meet("b", f); out.again != want {
			t.Errorf("exchange %d: %+v", exchange, out)
		}
	}
	a.sum()
	if last := s.lines[len(s.lines)-1]; last != "replayed from a: 2 ESP packets" {
		t.Errorf("at the end: %q", last)
	}
}

// What is cut off, and what is no IKE, passes unchanged in every mode.
func TestOthersPass(t *testing.T) {
	request := frame(t, requestFrame)
	var others [][]byte
	for n := range request {
		others = append(others, request[:n])
	}
	for at, b := range map[int]byte{
		12: 0x86, 14: 0x65, 14 + 6: 0x20, 14 + 9: 6, // no IPv4, its version, a fragment, TCP
		14 + 20: 9, 14 + 20 + 4: 0xff, 14 + 20 + 8 + 17: 0x10, 14 + 20 + 8 + 27: 7, // port, UDP's length, IKEv1, IKE's length
		14 + 20 + 8 + 28 + 3: 0xff, 14 + 20 + 8 + 28 + 2: 0xff, // of the first payload
	} {
		f := bytes.Clone(request)
		if f[at] = b; at == 14+20 {
			f[at+2] = 9
		}
		others = append(others, f)
	}
	for mode := range modes {
		for _, f := range others {
			a, _ := begin(t, mode, "")
			if out := a.meet("a", f); out.back != nil || out.instead != nil || out.swallow || out.again {
				t.Errorf("%s: %x: %+v", mode, f, out)
			}
		}
	}
}

// pair is an interface that a scenario would have: what is written to one end is
// read from the other, frame by frame.
func pair(t *testing.T) (inside, outside *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	inside, outside = os.NewFile(uintptr(fds[0]), "inside"), os.NewFile(uintptr(fds[1]), "outside")
	t.Cleanup(func() { _, _ = inside.Close(), outside.Close() })
	if err := outside.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return inside, outside
}

// The frames of a side reach the other with the kernel's header, unless they are
// rebuilt; answers go back first; what is replayed comes later.
func TestBetween(t *testing.T) {
	recv := func(f *os.File) []byte {
		t.Helper()
		buf := make([]byte, 4096)
		n, err := f.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return buf[:n]
	}
	left := append([]byte{1, 0, 0, 0, 0, 0, 34, 0, 6, 0}, frame(t, requestFrame)...)
	for mode, look := range map[string]func(a, b *os.File){
		"pass": func(_, b *os.File) {
			if got := recv(b); !bytes.Equal(got, left) {
				t.Errorf("passed on as %x", got)
			}
		},
		"strip": func(_, b *os.File) {
			if got := recv(b); len(got) != len(left)-17 || !bytes.Equal(got[:vnetLen], make([]byte, vnetLen)) {
				t.Errorf("passed on as %x", got)
			}
		},
		"forge": func(a, b *os.File) {
			parsed(t, recv(a)[vnetLen:])
			if got := recv(b); !bytes.Equal(got, left) {
				t.Errorf("passed on as %x", got)
			}
		},
		"replay": func(_, b *os.File) {
			first, at := recv(b), time.Now()
			if again := recv(b); !bytes.Equal(first, left) || !bytes.Equal(again, left) || time.Since(at) < replayDelay/2 {
				t.Errorf("again after %v: %x", time.Since(at), again)
			}
		},
		"forge-complete": func(a, b *os.File) {
			recv(a)
			recv(b)
			for _, text := range []string{answerFrame, espFrame} { // the first is swallowed
				if _, err := b.Write(whole(frame(t, text))); err != nil {
					t.Fatal(err)
				}
			}
			if got := recv(a); !bytes.Equal(got, whole(frame(t, espFrame))) {
				t.Errorf("passed back %x", got)
			}
		},
	} {
		insideA, a := pair(t)
		insideB, b := pair(t)
		ctx, cancel := context.WithCancel(t.Context())
		att, _ := begin(t, mode, "")
		done := make(chan error, 1)
		go func() { done <- between(ctx, att, insideA, insideB) }()
		if _, err := a.Write(left); err != nil {
			t.Fatal(err)
		}
		look(a, b)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", mode, err)
		}
	}
}

// The walker never panics, and gives back what it took.
func FuzzMessage(f *testing.F) {
	for _, text := range []string{requestFrame, answerFrame} {
		f.Add(frame(f, text)[etherLen+ipLen+udpLen:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMessage(b)
		if err != nil {
			return
		}
		if got := m.encode(); !bytes.Equal(got, b) {
			t.Fatalf("%x became %x", b, got)
		}
		if a, err := m.complete(); err == nil {
			if _, err := parseMessage(a.encode()); err != nil {
				t.Fatalf("the forged answer: %v", err)
			}
		}
		m.strip(support)
		if left, err := parseMessage(m.encode()); err != nil || left.strip(support) != 0 {
			t.Fatalf("stripped: %v", err)
		}
	})
}
