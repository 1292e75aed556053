package xfrm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests of this file run against a real kernel with ESP: testenv/sad.sh
// builds them and runs them there, with QIPSEC_ESP=1, as part of make test.

// namespace puts the test's thread in a network namespace of its own and gives
// a Conn in it. The thread is not reused: its goroutine ends locked.
func namespace(t *testing.T) (*Conn, context.Context) {
	t.Helper()
	if os.Getenv("QIPSEC_ESP") != "1" {
		t.Skip("needs a kernel with ESP: run testenv/run testenv/sad.sh")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	command(t, "ip", "link", "set", "lo", "up")
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return c, ctx
}

// command runs a program in the namespace of the calling thread.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func ends(a, b string) (src, dst netip.AddrPort) {
	return netip.AddrPortFrom(netip.MustParseAddr(a), 0), netip.AddrPortFrom(netip.MustParseAddr(b), 0)
}

func testKeys(t *testing.T, s Suite) (enc, integ []byte) {
	t.Helper()
	e, i, err := s.KeySizes()
	if err != nil {
		t.Fatal(err)
	}
	enc, integ = make([]byte, e), make([]byte, i)
	for n := range enc {
		enc[n] = byte(n + 1)
	}
	for n := range integ {
		integ[n] = byte(0x80 + n)
	}
	return enc, integ
}

type kernelCase struct {
	name string
	sa   SA
	want []string // in the output of `ip -s -d xfrm state`
	not  []string
}

func kernelCases() []kernelCase {
	v4s, v4d := ends("192.0.2.1", "192.0.2.2")
	v6s, v6d := ends("2001:db8::1", "2001:db8::2")
	base := SA{ID: ID{Src: v4s, Dst: v4d, SPI: 0xc0000001, Protocol: ProtoESP}, ReqID: 7, Mode: Tunnel, Inbound: true, Window: 32, CopyDF: true, CopyECN: true}
	with := func(change func(*SA)) SA { sa := base; change(&sa); return sa }
	gcm := Suite{Encr: EncrAESGCM16, EncrBits: 256}
	var all []kernelCase
	for _, s := range Suites() {
		e, _ := s.encr()
		want := []string{e.name, "replay-window 32", "flag af-unspec", "reqid 7", "mode tunnel", "spi 0xc0000001"}
		if !s.aead() {
			i, _ := s.integ()
			want = append(want, "auth-trunc "+i.name, fmt.Sprintf(" %d\n", i.icv))
		}
		all = append(all, kernelCase{s.String(), with(func(sa *SA) { sa.Suite = s }), want, []string{"encap", "mark"}})
	}
	return append(all,
		kernelCase{"outbound", with(func(sa *SA) { sa.Suite = gcm; sa.Inbound = false }), []string{"replay-window 0"}, nil},
		kernelCase{"ESN inbound 64", with(func(sa *SA) { sa.Suite = gcm; sa.ESN = true; sa.Window = 64 }), []string{"esn", "replay_window 64", "bitmap-length 2"}, nil},
		kernelCase{"ESN outbound", with(func(sa *SA) { sa.Suite = gcm; sa.ESN = true; sa.Inbound = false }), []string{"esn", "replay_window 1,"}, nil},
		kernelCase{"window 64", with(func(sa *SA) { sa.Suite = gcm; sa.Window = 64 }), []string{"replay_window 64"}, []string{"flag esn"}},
		kernelCase{"window 4096", with(func(sa *SA) { sa.Suite = gcm; sa.Window = 4096 }), []string{"replay_window 4096", "bitmap-length 128"}, nil},
		kernelCase{"IPv6", with(func(sa *SA) { sa.Suite = gcm; sa.Src, sa.Dst = v6s, v6d }), []string{"src 2001:db8::1 dst 2001:db8::2", "flag af-unspec"}, nil},
		kernelCase{"transport", with(func(sa *SA) {
			sa.Suite, sa.Mode = gcm, Transport
			sa.SrcTS, sa.DstTS = netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.2/32")
		}), []string{"mode transport", "sel src 192.0.2.1/32 dst 192.0.2.2/32"}, []string{"af-unspec"}},
		kernelCase{"encap", with(func(sa *SA) {
			sa.Suite, sa.Encap = gcm, true
			sa.Src = netip.AddrPortFrom(sa.Src.Addr(), 4500)
			sa.Dst = netip.AddrPortFrom(sa.Dst.Addr(), 20000)
		}), []string{"encap type espinudp sport 4500 dport 20000"}, nil},
		kernelCase{"no copies", with(func(sa *SA) { sa.Suite = gcm; sa.CopyDF, sa.CopyECN = false, false; sa.CopyDSCP = DSCPYes }), []string{"noecn", "nopmtudisc", "decap-dscp"}, nil},
		kernelCase{"DSCP outbound", with(func(sa *SA) { sa.Suite = gcm; sa.Inbound = false; sa.CopyDSCP = DSCPNo }), []string{"extra_flag dont-encap-dscp"}, []string{"decap-dscp"}},
		kernelCase{"marks", with(func(sa *SA) {
			sa.Suite, sa.Mark, sa.SetMark, sa.TFC = gcm, Mark{0x10, 0xff}, Mark{0x20, 0xffff}, 1400
		}), []string{"mark 0x10/0xff", "output-mark 0x20/0xffff", "tfcpad 1400"}, nil},
		kernelCase{"if_id", with(func(sa *SA) { sa.Suite, sa.IfID = gcm, 42 }), []string{"if_id 0x2a"}, nil},
		kernelCase{"lifetimes", with(func(sa *SA) {
			sa.Suite = gcm
			sa.Lifetime = Lifetime{TimeLife: 3960, TimeRekey: 3300, BytesLife: 1 << 40, BytesRekey: 1 << 39, PacketsLife: 1 << 30, PacketsRekey: 1 << 29}
		}), []string{
			"expire add: soft 3300(sec), hard 3960(sec)", "limit: soft 549755813888(bytes), hard 1099511627776(bytes)",
			"limit: soft 536870912(packets), hard 1073741824(packets)", "expire use: soft 0(sec), hard 0(sec)",
		}, nil},
	)
}

// TestKernelAdd installs each kind of SA and compares what `ip xfrm` and List
// tell with what was asked for.
func TestKernelAdd(t *testing.T) {
	c, ctx := namespace(t)
	for _, tc := range kernelCases() {
		enc, integ := testKeys(t, tc.sa.Suite)
		if err := c.Add(ctx, &tc.sa, enc, integ); err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		text := command(t, "ip", "-s", "-d", "xfrm", "state")
		tc.compare(t, text, enc, integ)
		infos, err := c.List(ctx)
		if err != nil || len(infos) != 1 {
			t.Fatalf("%s: List gave %d SAs, %v", tc.name, len(infos), err)
		}
		i := infos[0]
		sa := tc.sa
		if i.Key() != sa.Key() || i.Src != sa.Src || i.Dst != sa.Dst || i.IfID != sa.IfID || i.ReqID != sa.ReqID || i.Mode != sa.Mode ||
			i.Suite != sa.Suite || i.Algorithm != sa.Suite.String() || i.ESN != sa.ESN || i.Encap != sa.Encap || i.Window != sa.window() || i.Lifetime != sa.Lifetime ||
			i.Larval || i.Added.IsZero() {
			t.Errorf("%s: List says\n%+v\nasked for\n%+v", tc.name, i, sa)
		}
		if err := c.Add(ctx, &tc.sa, enc, integ); !errors.Is(err, ErrExists) {
			t.Errorf("%s: second Add: %v, want ErrExists", tc.name, err)
		}
		if err := c.Delete(ctx, tc.sa.ID); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		if err := c.Delete(ctx, tc.sa.ID); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: second Delete: %v, want ErrNotFound", tc.name, err)
		}
	}
}

func (tc kernelCase) compare(t *testing.T, text string, enc, integ []byte) {
	t.Helper()
	flat := strings.Join(strings.Fields(text), " ")
	for _, w := range append(tc.want, fmt.Sprintf("0x%x", enc)) {
		if !strings.Contains(flat, strings.Join(strings.Fields(w), " ")) {
			t.Errorf("%s: `ip xfrm state` does not say %q:\n%s", tc.name, w, text)
		}
	}
	if len(integ) > 0 && !strings.Contains(flat, fmt.Sprintf("0x%x", integ)) {
		t.Errorf("%s: integrity key differs:\n%s", tc.name, text)
	}
	for _, w := range tc.not {
		if strings.Contains(flat, w) {
			t.Errorf("%s: `ip xfrm state` says %q:\n%s", tc.name, w, text)
		}
	}
}

// TestKernelLarval: charon's order, an SPI allocated first, then replaced.
func TestKernelLarval(t *testing.T) {
	c, ctx := namespace(t)
	src, dst := ends("192.0.2.1", "192.0.2.2")
	suite := Suite{Encr: EncrAESGCM16, EncrBits: 256}
	enc, _ := testKeys(t, suite)
	larval, err := netlink.XfrmStateAllocSpi(&netlink.XfrmState{
		Src: net.IP(src.Addr().AsSlice()), Dst: net.IP(dst.Addr().AsSlice()),
		Proto: netlink.XFRM_PROTO_ESP, Mode: netlink.XFRM_MODE_TUNNEL,
	})
	if err != nil {
		t.Fatal(err)
	}
	sa := SA{ID: ID{Src: src, Dst: dst, SPI: uint32(larval.Spi), Protocol: ProtoESP}, ReqID: 9, Mode: Tunnel, Suite: suite, Inbound: true, Larval: true, Window: 32, Lifetime: Lifetime{TimeLife: 100}}
	infos, err := c.List(ctx)
	if err != nil || len(infos) != 1 || !infos[0].Larval {
		t.Fatalf("after ALLOCSPI: %+v, %v", infos, err)
	}
	fresh := sa
	fresh.Larval = false
	if err := c.Add(ctx, &fresh, enc, nil); !errors.Is(err, ErrExists) {
		t.Errorf("NEWSA over a larval SA: %v, want ErrExists", err)
	}
	if err := c.Add(ctx, &sa, enc, nil); err != nil {
		t.Fatal(err)
	}
	text := command(t, "ip", "-s", "xfrm", "state")
	for _, w := range []string{"reqid 9", fmt.Sprintf("0x%x", enc), "hard 100(sec)"} {
		if !strings.Contains(text, w) {
			t.Errorf("after replacement `ip xfrm state` does not say %q:\n%s", w, text)
		}
	}
	// The kernel answers 0 to an UPDSA of a complete SA and keeps the old key.
	other := bytes.Repeat([]byte{0xee}, len(enc))
	if err := c.Add(ctx, &sa, other, nil); !errors.Is(err, ErrExists) {
		t.Errorf("replacing a complete SA: %v, want ErrExists", err)
	}
	// SPI gone (expired): added anew, as kernel-netlink does.
	if err := c.Delete(ctx, sa.ID); err != nil {
		t.Fatal(err)
	}
	if err := c.Add(ctx, &sa, other, nil); err != nil {
		t.Fatalf("larval SA gone: %v", err)
	}
	if text := command(t, "ip", "xfrm", "state"); !strings.Contains(text, fmt.Sprintf("0x%x", other)) {
		t.Errorf("key not installed:\n%s", text)
	}
}

// traffic makes the SA pair of one direction work over loopback: packets from
// 10.9.1.1 to 10.9.2.1 leave by out and arrive by in.
func traffic(t *testing.T, c *Conn, ctx context.Context, out SA) (send func(n int)) {
	t.Helper()
	command(t, "ip", "link", "add", "dev", "dummy0", "type", "dummy")
	command(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "dummy0")
	command(t, "ip", "addr", "add", "10.9.1.1/24", "dev", "dummy0")
	command(t, "ip", "link", "set", "dummy0", "up")
	command(t, "ip", "neigh", "add", "192.0.2.2", "lladdr", "02:00:00:00:00:02", "dev", "dummy0")
	command(t, "ip", "neigh", "add", "192.0.2.3", "lladdr", "02:00:00:00:00:03", "dev", "dummy0")
	command(t, "ip", "route", "add", "10.9.2.0/24", "via", "192.0.2.2", "src", "10.9.1.1")
	command(t, "ip", "xfrm", "policy", "add", "src", "10.9.1.0/24", "dst", "10.9.2.0/24", "dir", "out",
		"tmpl", "src", out.Src.Addr().String(), "dst", out.Dst.Addr().String(), "proto", "esp", "reqid", fmt.Sprint(out.ReqID), "mode", "tunnel")
	conn, err := net.Dial("udp", "10.9.2.1:9")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return func(n int) {
		t.Helper()
		for range n {
			if _, err := conn.Write(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func counters(t *testing.T, c *Conn, ctx context.Context, id ID) Counters {
	t.Helper()
	got, err := c.Counters(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

var oseq = regexp.MustCompile(`oseq 0x([0-9a-f]+)`)

// TestKernelMove: counters by GETAE as `ip -s xfrm state` has them; an address
// change keeps key and counters and advances the sequence number; so again with
// ESN; a port change is done in place.
func TestKernelMove(t *testing.T) {
	for _, esn := range []bool{false, true} {
		t.Run(fmt.Sprintf("esn=%v", esn), func(t *testing.T) {
			c, ctx := namespace(t)
			testMove(t, c, ctx, esn)
		})
	}
}

func testMove(t *testing.T, c *Conn, ctx context.Context, esn bool) {
	src, dst := ends("192.0.2.1", "192.0.2.2")
	suite := Suite{Encr: EncrAESCBC, EncrBits: 256, Integ: IntegSHA256128}
	enc, integ := testKeys(t, suite)
	sa := SA{
		ID:    ID{Src: netip.AddrPortFrom(src.Addr(), 4500), Dst: netip.AddrPortFrom(dst.Addr(), 4500), SPI: 0xc0000002, Protocol: ProtoESP},
		ReqID: 3, Mode: Tunnel, Suite: suite, ESN: esn, Encap: true, Lifetime: Lifetime{TimeLife: 1000, BytesLife: 1 << 30},
	}
	if err := c.Add(ctx, &sa, enc, integ); err != nil {
		t.Fatal(err)
	}
	send := traffic(t, c, ctx, sa)
	if got := counters(t, c, ctx, sa.ID); got != (Counters{}) {
		t.Errorf("counters before use: %+v", got)
	}
	send(5)
	before := counters(t, c, ctx, sa.ID)
	text := command(t, "ip", "-s", "xfrm", "state")
	if before.Packets != 5 || !strings.Contains(text, fmt.Sprintf("%d(bytes), 5(packets)", before.Bytes)) {
		t.Errorf("GETAE says %+v, `ip -s xfrm state`:\n%s", before, text)
	}

	if err := c.SetPorts(ctx, sa.ID, 4500, 30000); err != nil {
		t.Fatal(err)
	}
	send(1)
	text = command(t, "ip", "-s", "xfrm", "state")
	for _, w := range []string{"sport 4500 dport 30000", fmt.Sprintf("0x%x", enc), fmt.Sprintf("0x%x", integ), "6(packets)", "hard 1000(sec)"} {
		if !strings.Contains(text, w) {
			t.Errorf("after the port change `ip xfrm state` does not say %q:\n%s", w, text)
		}
	}

	to := Move{NewSrc: sa.Src, NewDst: netip.MustParseAddrPort("192.0.2.3:4500")}
	if err := c.Move(ctx, sa.ID, to); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Counters(ctx, sa.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("old SA after the move: %v", err)
	}
	moved := sa.ID
	moved.Dst = to.NewDst
	if got := counters(t, c, ctx, moved); got.Packets != 6 {
		t.Errorf("counters after the move: %+v, want 6 packets", got)
	}
	text = command(t, "ip", "-s", "-d", "xfrm", "state")
	for _, w := range []string{"src 192.0.2.1 dst 192.0.2.3", fmt.Sprintf("0x%x", enc), fmt.Sprintf("0x%x", integ), "hard 1000(sec)", "reqid 3"} {
		if !strings.Contains(text, w) {
			t.Errorf("after the move `ip xfrm state` does not say %q:\n%s", w, text)
		}
	}
	if strings.Contains(text, "encap") {
		t.Errorf("encapsulation was to end:\n%s", text)
	}
	if want := fmt.Sprintf("%x", 6+advance); len(oseq.FindStringSubmatch(text)) != 2 || strings.TrimLeft(oseq.FindStringSubmatch(text)[1], "0") != want {
		t.Errorf("oseq is not 0x%s:\n%s", want, text)
	}
	if err := c.SetPorts(ctx, moved, 1, 2); err == nil {
		t.Error("SetPorts on an SA without encapsulation succeeded")
	}
}

// TestKernelPolicies adds, lists and deletes; and a foreign policy that took
// the selector is not deleted in its place.
func TestKernelPolicies(t *testing.T) {
	c, ctx := namespace(t)
	for _, p := range []Policy{
		{Dir: Out, Src: netip.MustParsePrefix("0.0.0.0/1"), Dst: netip.MustParsePrefix("10.2.0.0/16"), Block: true, Priority: 1 << 30},
		{Dir: Fwd, Src: netip.MustParsePrefix("2001:db8:2::/48"), Dst: netip.MustParsePrefix("8000::/1"), Block: true, Priority: 1<<32 - 1},
		{Dir: In, Src: netip.MustParsePrefix("10.2.0.1/32"), Dst: netip.MustParsePrefix("0.0.0.0/1"), Protocol: 6, SrcPort: 8443, Priority: 5},
		{Dir: Out, Src: netip.MustParsePrefix("::/1"), Dst: netip.MustParsePrefix("2001:db8:2::/48"), Protocol: 58, SrcPort: 135, DstPort: 0, Priority: 5},
	} {
		if err := c.AddPolicy(ctx, p); err != nil {
			t.Fatal(err)
		}
		if err := c.AddPolicy(ctx, p); !errors.Is(err, ErrExists) {
			t.Errorf("%v: second AddPolicy: %v", p, err)
		}
		list, err := c.Policies(ctx)
		if err != nil || len(list) != 1 {
			t.Fatalf("%v: Policies gave %v, %v", p, list, err)
		}
		got := list[0]
		index := got.Index
		got.Index = 0
		if got != p || index == 0 {
			t.Errorf("added %+v, listed %+v", p, list[0])
		}
		t.Log(strings.TrimSpace(command(t, "ip", "-d", "xfrm", "policy")))
		if err := c.DeletePolicy(ctx, list[0]); err != nil {
			t.Fatal(err)
		}
		if err := c.DeletePolicy(ctx, list[0]); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v: second DeletePolicy: %v", p, err)
		}
		if err := c.AddPolicy(ctx, p); err != nil {
			t.Fatal(err)
		}
		if err := c.DeletePolicy(ctx, list[0]); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v: the index of a deleted policy deleted another: %v", p, err)
		}
		command(t, "ip", "xfrm", "policy", "flush")
	}
}

// TestKernelPolicyBeside: a selector may be there again with a mark or an if_id, and
// Policies tells these apart; it gives the SPI of a template, and no other.
func TestKernelPolicyBeside(t *testing.T) {
	c, ctx := namespace(t)
	p := Policy{Dir: Out, Src: netip.MustParsePrefix("0.0.0.0/1"), Dst: netip.MustParsePrefix("10.2.0.0/16"), Block: true, Priority: 1 << 30}
	const selector = "src 0.0.0.0/1 dst 10.2.0.0/16 dir out "
	for _, beside := range []string{"mark 1 mask 0xff", "if_id 5"} {
		command(t, "ip", strings.Fields("xfrm policy add "+selector+beside+" action block priority 9")...)
	}
	if err := c.AddPolicy(ctx, p); err != nil {
		t.Fatalf("beside one with a mark and one with an if_id: %v", err)
	}
	command(t, "ip", strings.Fields("xfrm policy add src 10.1.0.0/24 dst 10.3.0.0/24 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto comp reqid 1 mode tunnel tmpl proto esp spi 0xc0000001 reqid 1 mode transport")...)
	list, err := c.Policies(ctx)
	if err != nil || len(list) != 4 {
		t.Fatalf("%v, %v", list, err)
	}
	selectors, spis := map[Policy]bool{}, 0
	for _, q := range list {
		selectors[q.Selector()] = true
		if q.SPI == 0xc0000001 && q.Templates {
			spis++
		} else if q.SPI != 0 || q.Templates {
			t.Errorf("%+v", q)
		}
		if q.Mark != (Mark{}) && q.Mark != (Mark{1, 0xff}) || q.IfID != 0 && q.IfID != 5 {
			t.Errorf("%+v", q)
		}
	}
	if len(selectors) != 4 || spis != 1 || !selectors[p.Selector()] {
		t.Errorf("%d selectors, %d with the SPI: %+v", len(selectors), spis, list)
	}
	if err := c.AddPolicy(ctx, Policy{Dir: Out, Src: p.Src, Dst: p.Dst, IfID: 6}); err == nil {
		t.Error("a policy with an if_id was added without it")
	}
}
