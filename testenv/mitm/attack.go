package main

import (
	"fmt"
	"slices"
	"sync"
)

// outcome is what becomes of a frame. Its zero value passes the frame on.
type outcome struct {
	back    []byte // to the side it came from, before it is passed on
	instead []byte // passed on in its place
	swallow bool
	again   bool // passed on once more, later
}

// attack decides on each frame. Its methods may be called at the same time.
type attack struct {
	mode string
	from string // only what comes from that side is attacked; "": from both
	say  func(format string, args ...any)

	mu       sync.Mutex
	cookies  map[[8]byte]int  // forged, by the initiator's SPI
	refused  map[[8]byte]bool // asked for another group
	answered map[[8]byte]bool // forged completely: the real answer is swallowed
	replayed map[string]int   // ESP packets, by side
}

// modes are the attacks on an IKE message by a name of the flag -mode.
var modes = map[string]func(*attack, string, datagram, *message) outcome{
	"pass":           func(*attack, string, datagram, *message) outcome { return outcome{} },
	"strip":          (*attack).strip,
	"forge":          (*attack).forge,
	"forge-cookie":   (*attack).forgeCookie,
	"cookie-alone":   (*attack).cookieAlone,
	"forge-ke":       (*attack).forgeKE,
	"forge-complete": (*attack).forgeComplete,
	"silence":        (*attack).silence,
	"replay":         (*attack).replay,
}

func newAttack(mode, from string, say func(string, ...any)) (*attack, error) {
	if modes[mode] == nil {
		return nil, fmt.Errorf("-mode %q is none of pass, strip, forge, forge-cookie, cookie-alone, forge-ke, forge-complete, silence, replay", mode)
	}
	if !slices.Contains([]string{"", "a", "b"}, from) {
		return nil, fmt.Errorf("-direction %q is neither a nor b", from)
	}
	return &attack{
		mode: mode, from: from, say: say,
		cookies: map[[8]byte]int{}, refused: map[[8]byte]bool{}, answered: map[[8]byte]bool{}, replayed: map[string]int{},
	}, nil
}

// meet takes a frame that came from a side, a or b.
func (a *attack) meet(side string, frame []byte) outcome {
	d, ok := parseDatagram(frame)
	if !ok || d.esp() {
		return a.meetOther(side, frame, ok)
	}
	ike, ok := d.ike()
	if !ok {
		return outcome{}
	}
	m, err := parseHeader(ike)
	if err != nil {
		return outcome{}
	}
	if m.exchange() == exchangeInit {
		if m, err = parseMessage(ike); err != nil {
			a.say("passed from %s: an IKE_SA_INIT message that is malformed: %v", side, err)
			return outcome{}
		}
	}
	if a.real(m) {
		a.say("swallowed from %s: the real answer to SPI %x", side, m.spi())
		return outcome{swallow: true}
	}
	if a.from != "" && a.from != side {
		return outcome{}
	}
	return modes[a.mode](a, side, d, m)
}

// meetOther takes what is no IKE: ESP, in UDP or not, is replayed.
func (a *attack) meetOther(side string, frame []byte, inUDP bool) outcome {
	_, _, proto, ok := ipv4(frame)
	if a.mode != "replay" || a.from != "" && a.from != side || !inUDP && !(ok && proto == protoESP) {
		return outcome{}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.replayed[side]++
	return outcome{again: true}
}

// sum says what was too much for a line each.
func (a *attack) sum() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for side, n := range a.replayed {
		a.say("replayed from %s: %d ESP packets", side, n)
	}
}

// real tells the true answer to a request that was answered by us.
func (a *attack) real(m *message) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return m.exchange() == exchangeInit && !m.request() && a.answered[m.spi()]
}

func opening(m *message) bool { return m.exchange() == exchangeInit && m.request() }

// kind names the direction of an exchange for the printed lines.
func kind(m *message) string {
	if m.request() {
		return "request"
	}
	return "answer"
}

func (a *attack) strip(side string, d datagram, m *message) outcome {
	if m.exchange() != exchangeInit || m.strip(support) == 0 {
		return outcome{}
	}
	a.say("stripped from %s: notify %d of the IKE_SA_INIT %s of SPI %x", side, support, kind(m), m.spi())
	return outcome{instead: d.with(m.encode())}
}

// forge refuses with an SPI, as charon does, which binds the initiator to it.
func (a *attack) forge(side string, d datagram, m *message) outcome {
	if !opening(m) {
		return outcome{}
	}
	a.say("forged to %s: NO_PROPOSAL_CHOSEN for SPI %x", side, m.spi())
	no := m.answer([8]byte(random(8)), notify(noProposalChosen, nil))
	return outcome{back: d.answer(no.encode())}
}

func (a *attack) forgeCookie(side string, d datagram, m *message) outcome {
	if !opening(m) {
		return outcome{}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cookies[m.spi()] == 3 {
		return outcome{}
	}
	a.cookies[m.spi()]++
	a.say("forged to %s: COOKIE %d for SPI %x", side, a.cookies[m.spi()], m.spi())
	return outcome{back: d.answer(m.answer([8]byte{}, notify(cookie, random(32))).encode())}
}

// cookieAlone lets the peer see the request that has all COOKIEs, and no other. The
// ones before it make answers that the initiator cannot tell from that one's.
func (a *attack) cookieAlone(side string, d datagram, m *message) outcome {
	out := a.forgeCookie(side, d, m)
	out.swallow = out.back != nil
	return out
}

func (a *attack) forgeKE(side string, d datagram, m *message) outcome {
	if !opening(m) {
		return outcome{}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refused[m.spi()] {
		return outcome{}
	}
	a.refused[m.spi()] = true
	a.say("forged to %s: INVALID_KE_PAYLOAD for SPI %x", side, m.spi())
	no := m.answer([8]byte{}, notify(invalidKE, []byte{0, ecp384}))
	return outcome{back: d.answer(no.encode()), swallow: true}
}

func (a *attack) silence(side string, _ datagram, m *message) outcome {
	if m.exchange() != exchangeInit && m.exchange() != exchangeAuth {
		return outcome{}
	}
	a.say("lost from %s: the %s of SPI %x", side, kind(m), m.spi())
	return outcome{swallow: true}
}

func (a *attack) forgeComplete(side string, d datagram, m *message) outcome {
	if !opening(m) {
		return outcome{}
	}
	answer, err := m.complete()
	if err != nil {
		a.say("not forged to %s: SPI %x: %v", side, m.spi(), err)
		return outcome{}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answered[m.spi()] = true
	a.say("forged to %s: a complete answer for SPI %x", side, m.spi())
	return outcome{back: d.answer(answer.encode())}
}

func (a *attack) replay(side string, _ datagram, m *message) outcome {
	name := map[byte]string{exchangeInit: "IKE_SA_INIT", exchangeAuth: "IKE_AUTH", exchangeCreate: "CREATE_CHILD_SA"}[m.exchange()]
	if name == "" {
		return outcome{}
	}
	a.say("replayed from %s: the %s %s of SPI %x", side, name, kind(m), m.spi())
	return outcome{again: true}
}
