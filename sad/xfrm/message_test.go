package xfrm

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
)

// The sequence number and pid in testdata/messages.json.
const (
	testSeq = 0x01020304
	testPid = 0x0a0b0c0d
)

type hexBytes []byte

func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

// messageVector is one SA of testdata/messages.json, made by messages.py.
type messageVector struct {
	Name                            string
	SA                              vectorSA
	Enc, Integ                      hexBytes
	Add, Update, Delete, Get, GetAE hexBytes
}

type vectorSA struct {
	Src, Dst            netip.Addr
	SrcPort, DstPort    uint16
	SPI, ReqID, Window  uint32
	IfID, TFC           uint32
	Mode                Mode
	Suite               Suite
	Inbound, ESN, Encap bool
	CopyDF, CopyECN     bool
	CopyDSCP            CopyDSCP
	Mark, SetMark       [2]uint32
	SrcTS, DstTS        netip.Prefix
	Lifetime            Lifetime
}

func (v vectorSA) sa() SA {
	return SA{
		ID: ID{
			Src: netip.AddrPortFrom(v.Src, v.SrcPort), Dst: netip.AddrPortFrom(v.Dst, v.DstPort), SPI: v.SPI,
			Protocol: ProtoESP, Mark: Mark{v.Mark[0], v.Mark[1]}, IfID: v.IfID,
		},
		ReqID: v.ReqID, Mode: v.Mode, SrcTS: v.SrcTS, DstTS: v.DstTS, Suite: v.Suite, ESN: v.ESN, Window: v.Window, Inbound: v.Inbound,
		Encap: v.Encap, CopyDF: v.CopyDF, CopyECN: v.CopyECN, CopyDSCP: v.CopyDSCP, TFC: v.TFC, SetMark: Mark{v.SetMark[0], v.SetMark[1]},
		Lifetime: v.Lifetime,
	}
}

type policyVector struct {
	Policy Policy
	Add    hexBytes
}

func messageVectors(t testing.TB) (sas []messageVector, policies []policyVector) {
	t.Helper()
	if native.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the vectors are those of a little-endian machine")
	}
	b, err := os.ReadFile("testdata/messages.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		SAs      []messageVector
		Policies []policyVector
	}
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	return file.SAs, file.Policies
}

func newMessage() *message { return &message{b: make([]byte, txSize)} }

func finished(t testing.TB, m *message) []byte {
	t.Helper()
	b, err := m.finish(testSeq, testPid)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func equal(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	n := 0
	for n < min(len(got), len(want)) && got[n] == want[n] {
		n++
	}
	t.Errorf("%s differs from byte %d on:\n got %x\nwant %x", what, n, got, want)
}

// TestMessages compares every request with the bytes packed by messages.py.
func TestMessages(t *testing.T) {
	sas, policies := messageVectors(t)
	for _, v := range sas {
		t.Run(v.Name, func(t *testing.T) {
			sa := v.SA.sa()
			for _, r := range []struct {
				what string
				make func(*message) error
				want []byte
			}{
				{"NEWSA", func(m *message) error { return sa.encode(m, nl.XFRM_MSG_NEWSA, v.Enc, v.Integ) }, v.Add},
				{"UPDSA", func(m *message) error { return sa.encode(m, nl.XFRM_MSG_UPDSA, v.Enc, v.Integ) }, v.Update},
				{"DELSA", func(m *message) error { m.named(nl.XFRM_MSG_DELSA, sa.ID); return nil }, v.Delete},
				{"GETSA", func(m *message) error { m.named(nl.XFRM_MSG_GETSA, sa.ID); return nil }, v.Get},
				{"GETAE", func(m *message) error { m.getAE(sa.ID); return nil }, v.GetAE},
			} {
				m := newMessage()
				if err := r.make(m); err != nil {
					t.Fatalf("%s: %v", r.what, err)
				}
				equal(t, r.what, finished(t, m), r.want)
			}
		})
	}
	for _, v := range policies {
		m := newMessage()
		if err := v.Policy.encode(m); err != nil {
			t.Fatal(err)
		}
		equal(t, v.Policy.String(), finished(t, m), v.Add)
	}
}

// TestRoundTrip: what is asked for is read back from the same attributes.
func TestRoundTrip(t *testing.T) {
	sas, policies := messageVectors(t)
	for _, v := range sas {
		sa := v.SA.sa()
		info, err := parseInfo(v.Add[16:])
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		if info.Key() != sa.Key() || info.Suite != sa.Suite || info.Mode != sa.Mode || info.ReqID != sa.ReqID || info.Window != sa.window() ||
			info.ESN != sa.ESN || info.Encap != sa.Encap || info.IfID != sa.IfID || info.Lifetime != sa.Lifetime || info.Larval {
			t.Errorf("%s: %+v from\n%+v", v.Name, info, sa)
		}
	}
	for _, v := range policies {
		got, ok, err := parsePolicy(v.Add[16:])
		if err != nil || !ok || got != v.Policy {
			t.Errorf("%+v from %+v, %v", got, v.Policy, err)
		}
	}
}

// TestPoliciesOfSockets: charon's bypass of its own sockets is listed in the
// dump with directions of its own, and is not a policy of the SPD.
func TestPoliciesOfSockets(t *testing.T) {
	_, policies := messageVectors(t)
	body := bytes.Clone(policies[0].Add[16:])
	const dirAt = nl.SizeofXfrmSelector + nl.SizeofXfrmLifetimeCfg + nl.SizeofXfrmLifetimeCur + 8
	if body[dirAt] != byte(Out) {
		t.Fatalf("direction is not at %d", dirAt)
	}
	body[dirAt] = 4
	if p, ok, err := parsePolicy(body); ok || err != nil {
		t.Errorf("%v, %v, %v", p, ok, err)
	}
}

func TestCheckRefuses(t *testing.T) {
	good := vectorSA{Src: netip.MustParseAddr("192.0.2.1"), Dst: netip.MustParseAddr("192.0.2.2"), SPI: 0x1000, Mode: Tunnel, Suite: Suite{Encr: EncrAESGCM16, EncrBits: 256}, Inbound: true}.sa()
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change      func(*SA)
		unsupported bool
	}{
		"AH":                   {func(sa *SA) { sa.Protocol = 51 }, true},
		"IPComp":               {func(sa *SA) { sa.IPComp = 2 }, true},
		"offload":              {func(sa *SA) { sa.Offload = 1 }, true},
		"label":                {func(sa *SA) { sa.Label = true }, true},
		"BEET":                 {func(sa *SA) { sa.Mode = Beet }, true},
		"no mode":              {func(sa *SA) { sa.Mode = 0 }, true},
		"AES-CTR":              {func(sa *SA) { sa.Suite = Suite{Encr: 13, EncrBits: 128, Integ: 12} }, true},
		"GCM with 100 bits":    {func(sa *SA) { sa.Suite.EncrBits = 100 }, true},
		"ChaCha with bits":     {func(sa *SA) { sa.Suite = Suite{Encr: 28, EncrBits: 256} }, true},
		"GCM with HMAC":        {func(sa *SA) { sa.Suite.Integ = 12 }, true},
		"CBC without HMAC":     {func(sa *SA) { sa.Suite = Suite{Encr: 12, EncrBits: 128} }, true},
		"CBC with HMAC-SHA1":   {func(sa *SA) { sa.Suite = Suite{Encr: 12, EncrBits: 128, Integ: 2} }, true},
		"reserved SPI":         {func(sa *SA) { sa.SPI = 255 }, false},
		"mixed families":       {func(sa *SA) { sa.Src = netip.MustParseAddrPort("[2001:db8::1]:0") }, false},
		"no address":           {func(sa *SA) { sa.Dst = netip.AddrPort{} }, false},
		"window 4097":          {func(sa *SA) { sa.Window = 4097 }, false},
		"ESN without window":   {func(sa *SA) { sa.ESN = true }, false},
		"transport without TS": {func(sa *SA) { sa.Mode = Transport }, false},
		"transport, families": {func(sa *SA) {
			sa.Mode, sa.SrcTS, sa.DstTS = Transport, netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("10.0.0.1/32")
		}, false},
	} {
		sa := good
		tc.change(&sa)
		err := sa.Check()
		if err == nil || errors.Is(err, ErrUnsupported) != tc.unsupported {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := newMessage()
	if err := good.encode(m, nl.XFRM_MSG_NEWSA, make([]byte, 32), nil); err == nil {
		t.Error("a key without its salt was accepted")
	}
}

func TestKeySizes(t *testing.T) {
	names := map[string]bool{}
	for _, s := range Suites() {
		names[s.String()] = true
		if strings.Contains(s.String(), "ESP(") {
			t.Errorf("%v has no name", s)
		}
		e, err := s.encr()
		if err != nil {
			t.Fatal(err)
		}
		i, err := s.integ()
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := suiteOf(e.name, uint32(e.bytes)*8, i.name); !ok || got != s {
			t.Errorf("%v read back as %v", s, got)
		}
	}
	if len(names) != 13 {
		t.Errorf("%d names of suites, want 13", len(names))
	}
}

// TestFull: a request that does not fit is an error, not a short request.
func TestFull(t *testing.T) {
	m := &message{b: make([]byte, 300)}
	sas, _ := messageVectors(t)
	sa := sas[0].SA.sa()
	if err := sa.encode(m, nl.XFRM_MSG_NEWSA, sas[0].Enc, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := m.finish(1, 1); err == nil {
		t.Error("accepted")
	}
}

func TestAdvanced(t *testing.T) {
	esn := func(low, high uint32) []byte {
		b := make([]byte, 24)
		native.PutUint32(b[4:], low)
		native.PutUint32(b[12:], high)
		return b
	}
	for _, tc := range []struct {
		name    string
		ae      aevent
		esnFlag bool
		want    []byte
	}{
		{"legacy", aevent{replay: binary.NativeEndian.AppendUint32(nil, 7)}, false, nil}, // too short
		{"legacy 7", aevent{replay: append(native.AppendUint32(nil, 7), make([]byte, 8)...)}, false, append(native.AppendUint32(nil, 7+1<<20), make([]byte, 8)...)},
		{"legacy at the end", aevent{replay: append(native.AppendUint32(nil, 1<<32-1-1<<20), make([]byte, 8)...)}, false, nil},
		{"window 64", aevent{replay: esn(7, 0), esn: true}, false, esn(7+1<<20, 0)},
		{"window 64 at the end", aevent{replay: esn(1<<32-1<<20, 0), esn: true}, false, nil},
		{"ESN carry", aevent{replay: esn(1<<32-1<<20, 5), esn: true}, true, esn(0, 6)},
		{"ESN at the end", aevent{replay: esn(1<<32-1<<20, 1<<32-1), esn: true}, true, nil},
		{"ESN too short", aevent{replay: esn(0, 0)[:20], esn: true}, true, nil},
	} {
		err := tc.ae.advanced(tc.esnFlag)
		if tc.want == nil {
			if err == nil {
				t.Errorf("%s: accepted", tc.name)
			}
			continue
		}
		if err != nil || !bytes.Equal(tc.ae.replay, tc.want) {
			t.Errorf("%s: %x, %v, want %x", tc.name, tc.ae.replay, err, tc.want)
		}
	}
}

// FuzzAnswers feeds arbitrary bytes as the kernel's answer to every reader.
func FuzzAnswers(f *testing.F) {
	sas, policies := messageVectors(f)
	f.Add([]byte(sas[0].Add))
	f.Add([]byte(sas[5].GetAE))
	f.Add([]byte(policies[0].Add))
	f.Add([]byte{36, 0, 0, 0, 2, 0, 0, 3, 4, 3, 2, 1, 0, 0, 0, 0, 0xea, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		readers := []func(body []byte){
			func(body []byte) { _, _ = parseInfo(body) },
			func(body []byte) { _, _ = parseAevent(body) },
			func(body []byte) { _, _, _ = parsePolicy(body) },
			func(body []byte) {
				if len(body) >= nl.SizeofXfrmUsersaInfo {
					_ = portsRequest(newMessage(), bytes.Clone(body), 1, 2)
					_ = moveRequest(newMessage(), body, aevent{}, ID{}, Move{NewSrc: netip.MustParseAddrPort("192.0.2.1:1"), NewDst: netip.MustParseAddrPort("192.0.2.2:1")})
				}
			},
		}
		for _, read := range readers {
			read(b)
			_, _, _ = answers(b, testSeq, func(_ uint16, body []byte) error { read(body); return nil })
		}
		_ = verdict(b, 0x300)
	})
}
