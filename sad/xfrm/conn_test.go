package xfrm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// scriptSocket answers each request by a script.
type scriptSocket struct {
	t        *testing.T
	answers  []func(request []byte) [][]byte // per request
	requests []uint16                        // types, in order
	queue    [][]byte
	sendErr  error
}

func (s *scriptSocket) pid() uint32  { return testPid }
func (s *scriptSocket) close() error { return nil }

func (s *scriptSocket) send(b []byte) error {
	if s.sendErr != nil {
		return s.sendErr
	}
	if native.Uint32(b) != uint32(len(b)) || native.Uint32(b[12:]) != testPid {
		s.t.Errorf("header %x", b[:16])
	}
	s.requests = append(s.requests, native.Uint16(b[4:]))

	if len(s.answers) == 0 {
		s.t.Error("a request too many")
		return errors.New("script at its end")
	}
	s.queue = append(s.queue, s.answers[0](bytes.Clone(b))...)
	s.answers = s.answers[1:]
	return nil
}

func (s *scriptSocket) recv(b []byte, _ time.Duration) (int, bool, error) {
	if len(s.queue) == 0 {
		return 0, false, syscall.EAGAIN
	}
	n := copy(b, s.queue[0])
	truncated := n < len(s.queue[0])
	s.queue = s.queue[1:]
	return n, truncated, nil
}

// reply is a netlink message in answer to request.
func reply(request []byte, typ uint16, flags uint16, body []byte) []byte {
	b := make([]byte, 16, 16+len(body))
	native.PutUint32(b, uint32(16+len(body)))
	native.PutUint16(b[4:], typ)
	native.PutUint16(b[6:], flags)
	copy(b[8:16], request[8:16])
	return append(b, body...)
}

// ack answers with errno (0: done) and the kernel's words.
func ack(errno syscall.Errno, text string) func([]byte) [][]byte {
	return func(request []byte) [][]byte {
		body := append(native.AppendUint32(nil, uint32(-int32(errno))), request[:16]...)
		flags := uint16(unix.NLM_F_CAPPED)
		if text != "" {
			flags |= unix.NLM_F_ACK_TLVS
			m := &message{b: make([]byte, 300)}
			m.attr(unix.NLMSGERR_ATTR_MSG, []byte(text+"\x00"))
			body = append(body, m.b[:m.n]...)
		}
		return [][]byte{reply(request, unix.NLMSG_ERROR, flags, body)}
	}
}

// answer gives one message, then done.
func answer(typ uint16, body []byte) func([]byte) [][]byte {
	return func(request []byte) [][]byte {
		return append([][]byte{reply(request, typ, 0, body)}, ack(0, "")(request)...)
	}
}

func scripted(t *testing.T, answers ...func([]byte) [][]byte) (*Conn, *scriptSocket) {
	t.Helper()
	s := &scriptSocket{t: t, answers: answers}
	c, err := newConn(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c, s
}

// wiped checks that neither buffer holds anything after a request.
func wiped(t *testing.T, c *Conn) {
	t.Helper()
	for name, b := range map[string][]byte{"request": c.tx.Bytes(), "answer": c.rx.Bytes()} {
		if slices.ContainsFunc(b, func(x byte) bool { return x != 0 }) {
			t.Errorf("the %s buffer is not wiped", name)
		}
	}
}

func requests(t *testing.T, s *scriptSocket, want ...nl.XfrmMsgType) {
	t.Helper()
	var types []uint16
	for _, w := range want {
		types = append(types, uint16(w))
	}
	if !slices.Equal(s.requests, types) {
		t.Errorf("requests %x, want %x", s.requests, types)
	}
}

func gcm(t *testing.T) (SA, []byte) {
	t.Helper()
	sas, _ := messageVectors(t)
	return sas[0].SA.sa(), sas[0].Enc
}

// newsa is the body of XFRM_MSG_NEWSA as a dump would have it.
func newsa(t *testing.T, sa SA, enc []byte) []byte {
	t.Helper()
	m := newMessage()
	if err := sa.encode(m, nl.XFRM_MSG_NEWSA, enc, nil); err != nil {
		t.Fatal(err)
	}
	m.attr(nl.XFRMA_LASTUSED, make([]byte, 8))
	return bytes.Clone(finished(t, m)[16:])
}

func larval(t *testing.T, sa SA) []byte {
	t.Helper()
	return sa.info().Serialize()
}

func TestAddAnswers(t *testing.T) {
	for _, tc := range []struct {
		name  string
		errno syscall.Errno
		text  string
		want  error
		says  string
	}{
		{"ok", 0, "", nil, ""},
		{"exists", syscall.EEXIST, "", ErrExists, "0xc1020304"},
		{"no AEAD", syscall.ENOSYS, "Requested AEAD algorithm not found", ErrNoESP, "Requested AEAD algorithm not found"},
		{"no ESP", syscall.EPROTONOSUPPORT, "Requested type not found", ErrNoESP, "Requested type not found"},
		{"not permitted", syscall.EPERM, "", syscall.EPERM, "CAP_NET_ADMIN"},
		{"invalid", syscall.EINVAL, "Invalid key length", syscall.EINVAL, "Invalid key length"},
	} {
		c, _ := scripted(t, ack(tc.errno, tc.text))
		sa, enc := gcm(t)
		err := c.Add(t.Context(), &sa, enc, nil)
		if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err != nil && !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %q does not say %q", tc.name, err, tc.says)
		}
		if errors.Is(err, ErrUnknown) {
			t.Errorf("%s: the kernel's answer counts as not seen", tc.name)
		}
		wiped(t, c)
	}
}

func TestAddLarval(t *testing.T) {
	sa, enc := gcm(t)
	sa.Larval = true
	t.Run("replaced", func(t *testing.T) {
		c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, larval(t, sa)), ack(0, ""))
		if err := c.Add(t.Context(), &sa, enc, nil); err != nil {
			t.Error(err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_UPDSA)
		wiped(t, c)
	})
	t.Run("expired before", func(t *testing.T) {
		c, s := scripted(t, ack(syscall.ESRCH, ""), ack(0, ""))
		if err := c.Add(t.Context(), &sa, enc, nil); err != nil {
			t.Error(err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_NEWSA)
	})
	t.Run("expired between", func(t *testing.T) {
		c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, larval(t, sa)), ack(syscall.ESRCH, ""), ack(0, ""))
		if err := c.Add(t.Context(), &sa, enc, nil); err != nil {
			t.Error(err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_UPDSA, nl.XFRM_MSG_NEWSA)
	})
	t.Run("complete", func(t *testing.T) {
		c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, newsa(t, sa, enc)))
		if err := c.Add(t.Context(), &sa, enc, nil); !errors.Is(err, ErrExists) {
			t.Errorf("%v, want ErrExists: the kernel would keep the old key", err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA)
		wiped(t, c)
	})
}

// TestUnknown: once a request has left, whatever keeps its result from being
// seen is ErrUnknown; before, nothing is.
func TestUnknown(t *testing.T) {
	sa, enc := gcm(t)
	for name, a := range map[string]func([]byte) [][]byte{
		"no answer":        func([]byte) [][]byte { return nil },
		"another's answer": func(r []byte) [][]byte { r[8]++; return ack(0, "")(r) },
		"malformed":        func(r []byte) [][]byte { b := ack(0, "")(r)[0]; b[0] = 0xff; return [][]byte{b} },
		"too large":        func(r []byte) [][]byte { return [][]byte{make([]byte, rxSize+1)} },
	} {
		c, _ := scripted(t, a)
		if err := c.Add(t.Context(), &sa, enc, nil); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v, want ErrUnknown", name, err)
		}
		wiped(t, c)
	}
	c, s := scripted(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Add(ctx, &sa, enc, nil); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnknown) {
		t.Errorf("context ended before: %v", err)
	}
	s.sendErr = syscall.ENOBUFS
	if err := c.Add(t.Context(), &sa, enc, nil); !errors.Is(err, syscall.ENOBUFS) || errors.Is(err, ErrUnknown) {
		t.Errorf("not sent: %v", err)
	}
	wiped(t, c)

	// The request is built, with the key in it, when ctx turns out to have ended.
	c, s = scripted(t)
	if err := c.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.put(ctx, nl.XFRM_MSG_NEWSA, "add", &sa, enc, nil); !errors.Is(err, context.Canceled) || len(s.requests) != 0 {
		t.Errorf("built, not sent: %v", err)
	}
	c.release()
	wiped(t, c)
}

// TestLateAnswer: the answer to a request that was given up does not count as
// that of the next one.
func TestLateAnswer(t *testing.T) {
	sa, enc := gcm(t)
	var late []byte
	c, s := scripted(t,
		func(r []byte) [][]byte { late = ack(syscall.EEXIST, "")(r)[0]; return nil },
		func(r []byte) [][]byte { return append([][]byte{late}, ack(0, "")(r)...) })
	if err := c.Add(t.Context(), &sa, enc, nil); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v", err)
	}
	if err := c.Delete(t.Context(), sa.ID); err != nil {
		t.Errorf("the late answer was taken for this one: %v", err)
	}
	requests(t, s, nl.XFRM_MSG_NEWSA, nl.XFRM_MSG_DELSA)
}

func TestListInterrupted(t *testing.T) {
	sa, enc := gcm(t)
	dump := func(flags uint16) func([]byte) [][]byte {
		return func(r []byte) [][]byte {
			one := reply(r, nl.XFRM_MSG_NEWSA, unix.NLM_F_MULTI|flags, newsa(t, sa, enc))
			return [][]byte{append(one, one...), reply(r, unix.NLMSG_DONE, unix.NLM_F_MULTI, make([]byte, 4))}
		}
	}
	c, s := scripted(t, dump(unix.NLM_F_DUMP_INTR), dump(0))
	all, err := c.List(t.Context())
	if err != nil || len(all) != 2 || len(s.requests) != 2 {
		t.Errorf("%d SAs after %d dumps, %v", len(all), len(s.requests), err)
	}
	wiped(t, c)
	if strings.Contains(fmt.Sprintf("%+v", all), fmt.Sprintf("%x", enc[:8])) {
		t.Error("the list holds key bytes")
	}
	always := slices.Repeat([]func([]byte) [][]byte{dump(unix.NLM_F_DUMP_INTR)}, maxDumps)
	c, _ = scripted(t, always...)
	if _, err := c.List(t.Context()); err == nil {
		t.Error("an inconsistent list was given")
	}
}

func newae(oseq uint32) []byte {
	m := newMessage()
	m.n = 0
	m.add(make([]byte, sizeofAeventID))
	m.attr(nl.XFRMA_REPLAY_VAL, append(native.AppendUint32(nil, oseq), make([]byte, 8)...))
	m.attr(nl.XFRMA_LTIME_VAL, append(native.AppendUint64(native.AppendUint64(nil, 1000), 10), make([]byte, 16)...))
	return bytes.Clone(m.b[:m.n])
}

func TestCounters(t *testing.T) {
	sa, _ := gcm(t)
	c, _ := scripted(t, answer(nl.XFRM_MSG_NEWAE, newae(1)), ack(syscall.ESRCH, ""), ack(0, ""))
	if got, err := c.Counters(t.Context(), sa.ID); err != nil || got != (Counters{Bytes: 1000, Packets: 10}) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := c.Counters(t.Context(), sa.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	if _, err := c.Counters(t.Context(), sa.ID); err == nil {
		t.Error("an empty answer was taken")
	}
}

// TestSetPortsSendsNoKey: the request has the SA's attributes, the new ports
// and zeros for a key.
func TestSetPortsSendsNoKey(t *testing.T) {
	sa, enc := gcm(t)
	sa.Encap = true
	var request []byte
	c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, newsa(t, sa, enc)), func(r []byte) [][]byte { request = r; return ack(0, "")(r) })
	if err := c.SetPorts(t.Context(), sa.ID, 4500, 30000); err != nil {
		t.Fatal(err)
	}
	requests(t, s, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_UPDSA)
	if bytes.Contains(request, enc[:8]) {
		t.Error("the request holds the key")
	}
	info, err := parseInfo(request[16:])
	if err != nil || info.Src.Port() != 4500 || info.Dst.Port() != 30000 || info.Suite != sa.Suite {
		t.Errorf("%+v, %v", info, err)
	}
	wiped(t, c)
}

func TestMove(t *testing.T) {
	sa, enc := gcm(t)
	to := Move{NewSrc: netip.MustParseAddrPort("[2001:db8::1]:4500"), NewDst: netip.MustParseAddrPort("[2001:db8::2]:4500"), NewEncap: true}
	t.Run("moved", func(t *testing.T) {
		var request []byte
		c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, newsa(t, sa, enc)), answer(nl.XFRM_MSG_NEWAE, newae(5)), ack(0, ""),
			func(r []byte) [][]byte { request = r; return ack(0, "")(r) })
		if err := c.Move(t.Context(), sa.ID, to); err != nil {
			t.Fatal(err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_GETAE, nl.XFRM_MSG_DELSA, nl.XFRM_MSG_NEWSA)
		info, err := parseInfo(request[16:])
		if err != nil || info.Src != to.NewSrc || info.Dst != to.NewDst || !info.Encap || info.SPI != sa.SPI || !bytes.Contains(request, enc) {
			t.Errorf("%+v, %v", info, err)
		}
		replay := append([]byte{16, 0, byte(nl.XFRMA_REPLAY_VAL), 0}, native.AppendUint32(nil, 5+1<<20)...)
		if !bytes.Contains(request, replay) {
			t.Error("sequence number not advanced by 2^20")
		}
		wiped(t, c)
	})
	t.Run("encapsulation ends", func(t *testing.T) {
		old := sa
		old.Encap = true
		old.Suite = Suite{Encr: EncrAESCBC, EncrBits: 128, Integ: IntegSHA256128}
		m := newMessage()
		if err := old.encode(m, nl.XFRM_MSG_NEWSA, enc[:16], make([]byte, 32)); err != nil {
			t.Fatal(err)
		}
		m.attr(nl.XFRMA_ALG_AUTH, make([]byte, nl.SizeofXfrmAlgo)) // as the kernel tells it twice
		var request []byte
		c, _ := scripted(t, answer(nl.XFRM_MSG_NEWSA, bytes.Clone(m.b[16:m.n])), answer(nl.XFRM_MSG_NEWAE, newae(5)), ack(0, ""),
			func(r []byte) [][]byte { request = r; return ack(0, "")(r) })
		if err := c.Move(t.Context(), old.ID, Move{NewSrc: to.NewSrc, NewDst: to.NewDst}); err != nil {
			t.Fatal(err)
		}
		count := map[uint16]int{}
		if err := attributes(request[16+nl.SizeofXfrmUsersaInfo:], func(typ uint16, _ []byte) error { count[typ]++; return nil }); err != nil {
			t.Fatal(err)
		}
		if count[nl.XFRMA_ENCAP] != 0 || count[nl.XFRMA_ALG_AUTH] != 0 || count[nl.XFRMA_ALG_AUTH_TRUNC] != 1 || count[nl.XFRMA_ALG_CRYPT] != 1 {
			t.Errorf("attributes of the request: %v", count)
		}
	})
	t.Run("sequence used up", func(t *testing.T) {
		c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, newsa(t, sa, enc)), answer(nl.XFRM_MSG_NEWAE, newae(1<<32-10)))
		if err := c.Move(t.Context(), sa.ID, to); !errors.Is(err, ErrSequence) {
			t.Errorf("%v", err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_GETAE) // not deleted
		wiped(t, c)
	})
	t.Run("context ends after the deletion", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, newsa(t, sa, enc)), answer(nl.XFRM_MSG_NEWAE, newae(5)),
			func(r []byte) [][]byte { cancel(); return ack(0, "")(r) }, ack(0, ""))
		if err := c.Move(ctx, sa.ID, to); err != nil {
			t.Errorf("%v", err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA, nl.XFRM_MSG_GETAE, nl.XFRM_MSG_DELSA, nl.XFRM_MSG_NEWSA)
	})
	t.Run("not put back", func(t *testing.T) {
		c, _ := scripted(t, answer(nl.XFRM_MSG_NEWSA, newsa(t, sa, enc)), answer(nl.XFRM_MSG_NEWAE, newae(5)), ack(0, ""), ack(syscall.ENOMEM, ""))
		if err := c.Move(t.Context(), sa.ID, to); !errors.Is(err, syscall.ENOMEM) || !strings.Contains(err.Error(), "taken out") {
			t.Errorf("%v", err)
		}
		wiped(t, c)
	})
	t.Run("offloaded", func(t *testing.T) {
		m := newMessage()
		m.n = 0
		m.add(newsa(t, sa, enc))
		m.attr(nl.XFRMA_OFFLOAD_DEV, make([]byte, 8))
		c, s := scripted(t, answer(nl.XFRM_MSG_NEWSA, bytes.Clone(m.b[:m.n])))
		if err := c.Move(t.Context(), sa.ID, to); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%v", err)
		}
		requests(t, s, nl.XFRM_MSG_GETSA)
	})
}

func TestPolicyAnswers(t *testing.T) {
	_, policies := messageVectors(t)
	p := policies[0].Policy
	c, _ := scripted(t, ack(syscall.EEXIST, ""), ack(syscall.ENOENT, ""))
	if err := c.AddPolicy(t.Context(), p); !errors.Is(err, ErrExists) {
		t.Errorf("%v", err)
	}
	if err := c.DeletePolicy(t.Context(), p); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("deleted without an index: %v", err)
	}
	p.Index = 9
	if err := c.DeletePolicy(t.Context(), p); !errors.Is(err, ErrNotFound) || errors.Is(err, ErrNoESP) {
		t.Errorf("%v", err)
	}
}

func TestWaitingForTheTurn(t *testing.T) {
	c, _ := scripted(t)
	if err := c.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.List(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	c.release()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.List(t.Context()); err == nil {
		t.Error("closed, yet used")
	}
}
