package plugin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// material is n bytes that start at v; wiped with the test.
func material(t testing.TB, n int, v byte) *key.Material {
	t.Helper()
	b := make([]byte, n)
	for i := range b {
		b[i] = v + byte(i)
	}
	m, err := key.Take(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Wipe)
	return m
}

var (
	testHello = Hello{Instance: Instance{1, 2, 3}, ABI: ABI, Version: "5.9.8", Mediation: true}
	testSA    = SA{Instance: testHello.Instance, UID: 7}
	testID    = key.ID{0xaa, 15: 0xbb}
)

func testSAID() SAID {
	return SAID{
		Src: netip.MustParseAddrPort("192.0.2.1:4500"), Dst: netip.MustParseAddrPort("[2001:db8::2]:500"),
		SPI: 0xc1020304, Protocol: 50, Mark: Mark{Value: 1, Mask: 0xffffffff}, IfID: 9,
	}
}

func testBind(t testing.TB) Bind {
	return Bind{
		SA: testSA, Connection: "link", Responder: true, KeyID: testID,
		Ni: bytes.Repeat([]byte{1}, 56), Nr: bytes.Repeat([]byte{2}, 32),
		SPIi: [8]byte{1}, SPIr: [8]byte{2},
		Initiator: Identity{2, []byte("gw-a")}, Replier: Identity{9, []byte{0x30, 0}}, FirstIDi: Identity{2, []byte("first")},
		Exchange: CreateChildSA, Transforms: Transforms{Protocol: 3, Encr: 12, EncrBits: 256, Integ: 12, ESN: true},
		Keymat:  Chunks{material(t, 32, 1), material(t, 32, 2), material(t, 32, 3), material(t, 32, 4)},
		Token:   Chunks{material(t, 32, 5), material(t, 32, 6), material(t, 32, 7), material(t, 32, 8)},
		Confirm: bytes.Repeat([]byte{3}, 32), PeerSpeaks: true,
	}
}

func testAddSA(t testing.TB) AddSA {
	id := testSAID()
	return AddSA{
		SA: testSA, Connection: "link", Src: id.Src, Dst: id.Dst, SPI: id.SPI, Protocol: id.Protocol, Mark: id.Mark, IfID: id.IfID,
		ReqID: 3, Mode: 2,
		SrcTS:    []Selector{{From: netip.MustParseAddr("10.1.0.0"), To: netip.MustParseAddr("10.1.0.255"), ToPort: 65535}},
		DstTS:    []Selector{{From: netip.MustParseAddr("fd00::"), To: netip.MustParseAddr("fd00::ff"), Protocol: 6, FromPort: 80, ToPort: 80}, {From: netip.MustParseAddr("10.2.0.0"), To: netip.MustParseAddr("10.2.0.0")}},
		Lifetime: Lifetime{1, 2, 3, 4, 5, 6}, EncrAlg: 20, IntegAlg: 12, Token: material(t, 68, 9), EncrLen: 36,
		Window: 64, TFC: 1, IPComp: 2, Encap: true, Offload: 1, SetMark: Mark{5, 6}, Label: true, ESN: true,
		CopyDF: true, CopyECN: true, CopyDSCP: 2, Initiator: true, Inbound: true, Update: true,
	}
}

// requests holds one of each request, with every optional field set.
func requests(t testing.TB) []any {
	return []any{
		testHello,
		GetKey{SA: testSA, Connection: "link", Peer: netip.MustParseAddr("2001:db8::1")},
		Sent{SA: testSA, Connection: "link", KeyID: testID, SPIi: [8]byte{1}, SPIr: [8]byte{2}, Ni: bytes.Repeat([]byte{7}, 56), Initiator: Identity{1, []byte{192, 0, 2, 1}}, Exchange: IKEAuth},
		testBind(t), testAddSA(t),
		Query{ID: testSAID()},
		UpdateSA{ID: testSAID(), NewSrc: netip.MustParseAddrPort("192.0.2.9:1"), NewDst: netip.MustParseAddrPort("192.0.2.8:2"), Encap: true},
		End{SA: testSA},
		Ignored{SA: testSA, Connection: "link", Peer: netip.MustParseAddr("2001:db8::2")},
	}
}

func encode(t testing.TB, m any) []byte {
	t.Helper()
	f, err := AppendRequest(make([]byte, 0, MaxFrame), testHello, 5*time.Second, m)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// plain makes two messages comparable: keys become their bytes.
func plain(m any) (any, [][]byte) {
	var keys [][]byte
	take := func(m *key.Material) *key.Material { keys = append(keys, bytes.Clone(m.Bytes())); return nil }
	chunks := func(c Chunks) Chunks {
		return Chunks{take(c.EncrI), take(c.IntegI), take(c.EncrR), take(c.IntegR)}
	}
	switch v := m.(type) {
	case Bind:
		v.Keymat, v.Token = chunks(v.Keymat), chunks(v.Token)
		return v, keys
	case AddSA:
		v.Token = take(v.Token)
		return v, keys
	}
	return m, keys
}

func TestRequestsRoundTrip(t *testing.T) {
	for _, m := range requests(t) {
		t.Run(reflect.TypeOf(m).Name(), func(t *testing.T) {
			f := encode(t, m)
			q, err := parseRequest(f)
			if err != nil {
				t.Fatal(err)
			}
			defer wipe(q.message)
			if q.hello != testHello || q.deadline != 5*time.Second {
				t.Errorf("hello %+v, deadline %v", q.hello, q.deadline)
			}
			want, wantKeys := plain(m)
			got, gotKeys := plain(q.message)
			if !reflect.DeepEqual(got, want) || !reflect.DeepEqual(gotKeys, wantKeys) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			for _, k := range wantKeys {
				if len(k) > 0 && bytes.Contains(f, k) {
					t.Error("a key is still in the frame after it was parsed")
				}
			}
		})
	}
}

func TestOptionalFieldsMayBeAbsent(t *testing.T) {
	b := testBind(t)
	b.KeyID, b.Confirm = key.ID{}, nil
	b.Keymat.IntegI, b.Keymat.IntegR, b.Token.IntegI, b.Token.IntegR = nil, nil, nil, nil
	q, err := parseRequest(encode(t, b))
	if err != nil {
		t.Fatal(err)
	}
	defer wipe(q.message)
	got := q.message.(Bind)
	if !got.KeyID.IsZero() || got.Confirm != nil || got.Keymat.IntegI != nil || got.Keymat.EncrI.Len() != 32 {
		t.Errorf("got %+v", got)
	}
}

func TestAnswersRoundTrip(t *testing.T) {
	encr, integ := material(t, 36, 1), material(t, 32, 2)
	for _, tt := range []struct{ answer, got any }{
		{GetKeyAnswer{KeyID: testID, Policy: Required}, &GetKeyAnswer{}},
		{GetKeyAnswer{Policy: Optional}, &GetKeyAnswer{}},
		{SentAnswer{ConfirmI: [32]byte{1, 31: 2}}, &SentAnswer{}},
		{BindAnswer{ConfirmR: bytes.Repeat([]byte{8}, 32)}, &BindAnswer{}},
		{BindAnswer{}, &BindAnswer{}},
		{AddSAAnswer{Verdict: Installed}, &AddSAAnswer{}},
		{Counters{Bytes: 1 << 40, Packets: 3, LastUse: time.Minute}, &Counters{}},
	} {
		f, err := appendAnswer(make([]byte, 0, MaxFrame), tt.answer)
		if err != nil {
			t.Fatal(err)
		}
		if err := ParseAnswer(f, tt.got); err != nil {
			t.Errorf("%T: %v", tt.answer, err)
		} else if got := reflect.ValueOf(tt.got).Elem().Interface(); !reflect.DeepEqual(got, tt.answer) {
			t.Errorf("got %+v, want %+v", got, tt.answer)
		}
	}
	f, err := appendAnswer(make([]byte, 0, MaxFrame), AddSAAnswer{Verdict: UseKey, Encr: encr, Integ: integ})
	if err != nil {
		t.Fatal(err)
	}
	var a AddSAAnswer
	if err := ParseAnswer(f, &a); err != nil || !a.Encr.Equal(encr) || !a.Integ.Equal(integ) || a.Verdict != UseKey {
		t.Errorf("USE_KEY: %v %+v", err, a)
	}
	wipe(a)
	f, err = appendAnswer(make([]byte, 0, MaxFrame), errors.New("line\nwith\x7f "+strings.Repeat("ä", 400)))
	if err != nil {
		t.Fatal(err)
	}
	var refusal *Refusal
	if err := ParseAnswer(f, &a); !errors.As(err, &refusal) || !strings.HasPrefix(refusal.Text, "line with  ä") || len(refusal.Text) > maxText {
		t.Errorf("REFUSE: %v", err)
	}
}

// tlv cuts a frame and puts it together again as change wants it.
func tlv(f []byte, change func(t tag, v []byte) [][]byte) []byte {
	out := bytes.Clone(f[:headerSize])
	for b := f[headerSize:]; len(b) > 0; {
		n := 4 + int(binary.BigEndian.Uint16(b[2:]))
		for _, v := range change(tag(binary.BigEndian.Uint16(b)), b[4:n]) {
			out = append(out, b[0], b[1], byte(len(v)>>8), byte(len(v)))
			out = append(out, v...)
		}
		b = b[n:]
	}
	return out
}

// TestEveryTLVIsChecked removes, doubles, empties and lengthens each TLV of each
// request. Nothing may be taken but what the protocol calls optional.
func TestEveryTLVIsChecked(t *testing.T) {
	optional := map[tag]bool{tagConfirm: true, tagKeyID: true, tagSrcTS: true, tagDstTS: true}
	repeat := map[tag]bool{tagSrcTS: true, tagDstTS: true}
	for _, m := range requests(t) {
		f := encode(t, m)
		var tags []tag
		tlv(f, func(x tag, _ []byte) [][]byte { tags = append(tags, x); return nil })
		for _, x := range tags {
			for name, c := range map[string]struct {
				change func(v []byte) [][]byte
				may    bool
			}{
				"missing": {func([]byte) [][]byte { return nil }, optional[x] && !(x == tagKeyID && reflect.TypeOf(m) == reflect.TypeFor[Sent]())},
				"twice":   {func(v []byte) [][]byte { return [][]byte{v, v} }, repeat[x]},
				"empty":   {func([]byte) [][]byte { return [][]byte{{}} }, false},
				"huge":    {func(v []byte) [][]byte { return [][]byte{append(bytes.Clone(v), make([]byte, 2000)...)} }, false},
			} {
				g := tlv(f, func(y tag, v []byte) [][]byte {
					if y != x {
						return [][]byte{v}
					}
					return c.change(v)
				})
				q, err := parseRequest(g)
				wipe(q.message)
				if (err == nil) != c.may {
					t.Errorf("%T: TLV %d %s: error %v", m, x, name, err)
				}
			}
		}
		g := append(bytes.Clone(f), 0, byte(tagText), 0, 1, 'x')
		if _, err := parseRequest(g); err == nil {
			t.Errorf("%T: a TLV that does not belong there was taken", m)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := encode(t, testHello)
	edit := func(i int, v byte) []byte { b := bytes.Clone(good); b[i] = v; return b }
	for name, f := range map[string][]byte{
		"empty":         {},
		"short header":  good[:7],
		"wrong magic":   edit(0, 'X'),
		"reserved byte": edit(7, 1),
		"unknown kind":  edit(6, 99),
		"an answer":     edit(6, byte(kindOK)),
		"cut in a TLV":  good[:len(good)-1],
		"cut in a head": good[:headerSize+3],
		"tag 0":         append(bytes.Clone(good), 0, 0, 0, 0),
		"unknown tag":   append(bytes.Clone(good), 0xff, 0xff, 0, 0),
		"too many TLVs": append(bytes.Clone(good), bytes.Repeat([]byte{0, byte(tagSrcTS), 0, 0}, maxTLVs)...),
		"too large":     append(bytes.Clone(good), make([]byte, MaxFrame)...),
	} {
		if q, err := parseRequest(f); err == nil {
			t.Errorf("%s: taken as %+v", name, q.message)
		}
	}
	var abi wrongABI
	if _, err := parseRequest(edit(5, 9)); !errors.As(err, &abi) || abi != 9 {
		t.Errorf("other ABI: %v", err)
	}
}

func TestParseRefusesBadFields(t *testing.T) {
	bind, add := testBind(t), testAddSA(t)
	wrong := func(f func(*Bind)) Bind { b := bind; f(&b); return b }
	wrongAdd := func(f func(*AddSA)) AddSA { a := add; f(&a); return a }
	for name, m := range map[string]any{
		"exchange":            wrong(func(b *Bind) { b.Exchange = 37 }),
		"token length":        wrong(func(b *Bind) { b.Token.EncrI = material(t, 31, 0) }),
		"token missing":       wrong(func(b *Bind) { b.Token.IntegR = nil }),
		"short nonce":         wrong(func(b *Bind) { b.Ni = b.Ni[:15] }),
		"control character":   wrong(func(b *Bind) { b.Connection = "a\nb" }),
		"not UTF-8":           wrong(func(b *Bind) { b.Connection = "a\xff" }),
		"encryption length":   wrongAdd(func(a *AddSA) { a.EncrLen = 69 }),
		"no token":            wrongAdd(func(a *AddSA) { a.Token, a.EncrLen = nil, 0 }),
		"selector backwards":  wrongAdd(func(a *AddSA) { s := a.SrcTS[0]; s.From, s.To = s.To, s.From; a.SrcTS = []Selector{s} }),
		"too many selectors":  wrongAdd(func(a *AddSA) { a.SrcTS = make129(a.SrcTS[0]) }),
		"peer without length": GetKey{SA: testSA, Connection: "x"},
		"ignored by nobody":   Ignored{SA: testSA, Connection: "x"},
	} {
		q, err := parseRequest(encode(t, m))
		if err == nil {
			t.Errorf("%s: taken", name)
		}
		if q.message != nil {
			t.Errorf("%s: a message is left", name)
		}
	}
}

func make129(s Selector) []Selector {
	out := make([]Selector, maxTS+1)
	for i := range out {
		out[i] = s
	}
	return out
}

func TestWriterKeepsItsBounds(t *testing.T) {
	b := testBind(t)
	b.Initiator.Data = make([]byte, MaxFrame)
	if _, err := AppendRequest(make([]byte, 0, MaxFrame), testHello, 0, b); err == nil {
		t.Error("a frame larger than MaxFrame was made")
	}
	if _, err := AppendRequest(make([]byte, 0, 64), testHello, 0, testBind(t)); err == nil {
		t.Error("a frame was made that outgrows the caller's buffer")
	}
}

func TestSelectorPrefix(t *testing.T) {
	for _, tt := range []struct{ from, to, want string }{
		{"10.1.0.0", "10.1.0.255", "10.1.0.0/24"},
		{"10.1.0.5", "10.1.0.5", "10.1.0.5/32"},
		{"0.0.0.0", "255.255.255.255", "0.0.0.0/0"},
		{"10.1.0.1", "10.1.0.6", "10.1.0.0/29"},
		{"fd00::", "fd00::ffff", "fd00::/112"},
	} {
		s := Selector{From: netip.MustParseAddr(tt.from), To: netip.MustParseAddr(tt.to)}
		if got := s.Prefix().String(); got != tt.want {
			t.Errorf("%s-%s: %s, want %s", tt.from, tt.to, got, tt.want)
		}
	}
}

// The setting `off` travels in HELLO and nowhere else.
func TestHelloNamesBypassedConnections(t *testing.T) {
	h := testHello
	h.Off = "mgmt, legacy"
	q, err := parseRequest(encode(t, h))
	if err != nil || q.hello != h {
		t.Errorf("%+v, %v", q.hello, err)
	}
	h.Off = "new\nline"
	if _, err := parseRequest(encode(t, h)); err == nil {
		t.Error("a control character was taken")
	}
	f := append(encode(t, End{SA: testSA}), 0, byte(tagOff), 0, 1, 'x')
	if _, err := parseRequest(f); err == nil {
		t.Error("taken in END")
	}
}

// TestHeaderOfCPlugin holds the numbers of the C plugin against ours.
func TestHeaderOfCPlugin(t *testing.T) {
	c, err := os.ReadFile("../charon/qipsec_protocol.h")
	if err != nil {
		t.Fatal(err)
	}
	src, err := os.ReadFile("frame.go")
	if err != nil {
		t.Fatal(err)
	}
	norm := strings.NewReplacer("_", "")
	there := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^\s*QI_(\w+) = (\d+),`).FindAllSubmatch(c, -1) {
		n, _ := strconv.Atoi(string(m[2]))
		there[strings.ToLower(norm.Replace(string(m[1])))] = n
	}
	here := map[string]int{"tcount": int(tagEnd), "required": int(Required), "optional": int(Optional)}
	for _, m := range regexp.MustCompile(`(?m)^\t(kind|tag)([A-Z]\w*)\s+(?:kind|tag) = (\d+)`).FindAllSubmatch(src, -1) {
		n, _ := strconv.Atoi(string(m[3]))
		name := strings.ToLower(string(m[2]))
		if string(m[1]) == "tag" {
			name = "t" + name
		}
		if name != "tend" {
			here[name] = n
		}
	}
	if len(here) < 80 || !reflect.DeepEqual(here, there) {
		for k := range here {
			if there[k] != here[k] {
				t.Errorf("%s: %d here, %d in C", k, here[k], there[k])
			}
		}
		t.Errorf("%d numbers here, %d in qipsec_protocol.h", len(here), len(there))
	}
	for text, n := range map[string]int{"QI_MAX_FRAME": MaxFrame, "QI_HEADER": headerSize, "QI_MAGIC": magic, "QI_ABI": int(ABI)} {
		m := regexp.MustCompile(`(?m)^#define ` + text + ` (\S+)$`).FindSubmatch(c)
		if m == nil {
			t.Errorf("%s is not in qipsec_protocol.h", text)
		} else if v, err := strconv.ParseInt(string(m[1]), 0, 64); err != nil || int(v) != n {
			t.Errorf("%s is %s there, %d here", text, m[1], n)
		}
	}
}

// FuzzParseRequest: no frame makes the decoder fail otherwise than by an error,
// and what it takes comes out the same when encoded again.
func FuzzParseRequest(f *testing.F) {
	for _, m := range requests(f) {
		f.Add(encode(f, m))
	}
	f.Add([]byte("QIPS\x00\x01\x01\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseRequest(b)
		if err != nil {
			if q.message != nil {
				t.Fatal("an error and a message")
			}
			return
		}
		defer wipe(q.message)
		g, err := AppendRequest(make([]byte, 0, MaxFrame), q.hello, q.deadline, q.message)
		if err != nil {
			t.Fatal(err)
		}
		q2, err := parseRequest(g)
		if err != nil {
			t.Fatal(err)
		}
		defer wipe(q2.message)
		a, ak := plain(q.message)
		c, ck := plain(q2.message)
		if q.hello != q2.hello || q.deadline != q2.deadline || !reflect.DeepEqual(a, c) || !reflect.DeepEqual(ak, ck) {
			t.Fatalf("%+v\n%+v", a, c)
		}
	})
}

// FuzzParseAnswer does it for the answers.
func FuzzParseAnswer(f *testing.F) {
	for _, m := range []any{GetKeyAnswer{KeyID: testID, Policy: 1}, SentAnswer{}, BindAnswer{ConfirmR: make([]byte, 32)}, AddSAAnswer{Verdict: Installed}, Counters{}, kindOK, errors.New("no")} {
		b, err := appendAnswer(make([]byte, 0, MaxFrame), m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, want := range []any{nil, &GetKeyAnswer{}, &SentAnswer{}, &BindAnswer{}, &AddSAAnswer{}, &Counters{}} {
			_ = ParseAnswer(bytes.Clone(b), want)
			if a, ok := want.(*AddSAAnswer); ok {
				wipe(*a)
			}
		}
	})
}
