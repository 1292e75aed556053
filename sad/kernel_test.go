package sad

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// The tests of this file run against a real kernel with ESP: testenv/sad.sh
// builds them and runs them there, with QIPSEC_ESP=1, as part of make test.

// host is a network namespace with a thread of its own.
type host struct {
	t    *testing.T
	tid  int
	work chan func()
	conn *xfrm.Conn
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Getenv("QIPSEC_ESP") != "1" {
		t.Skip("needs a kernel with ESP: run testenv/run testenv/sad.sh")
	}
	h := &host{t: t, work: make(chan func())}
	ended := make(chan struct{})
	started := make(chan error)
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		h.tid = unix.Gettid()
		if err == nil {
			h.conn, err = xfrm.Open()
		}
		started <- err
		for f := range h.work {
			f()
		}
	}()
	t.Cleanup(func() {
		close(h.work)
		<-ended
		if h.conn != nil {
			if err := h.conn.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	h.run("ip link set lo up")
	return h
}

// try runs a command in the namespace.
func (h *host) try(line string) (string, error) {
	var out []byte
	var err error
	done := make(chan struct{})
	h.work <- func() {
		defer close(done)
		words := strings.Fields(line)
		out, err = exec.Command(words[0], words[1:]...).CombinedOutput()
	}
	<-done
	return string(out), err
}

func (h *host) run(line string) string {
	h.t.Helper()
	out, err := h.try(line)
	if err != nil {
		h.t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

// file reads a file of the namespace below /proc.
func (h *host) file(name string) string {
	h.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", h.tid, name))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// pair gives two gateways with a link between them and a network behind each:
// 10.1.0.0/24 and 2001:db8:1::/64 behind a, 10.2.0.0/24 and 2001:db8:2::/64
// behind b.
func pair(t *testing.T) (a, b *host) {
	t.Helper()
	a, b = newHost(t), newHost(t)
	a.run(fmt.Sprintf("ip link add wan type veth peer name wan netns %d", b.tid))
	for i, h := range []*host{a, b} {
		own, other := i+1, 2-i
		for _, line := range []string{
			"ip link set wan up",
			"ip link add lan type dummy", "ip link set lan up",
			fmt.Sprintf("ip addr add 192.0.2.%d/24 dev wan", own),
			fmt.Sprintf("ip addr add 2001:db8::%d/64 dev wan nodad", own),
			fmt.Sprintf("ip addr add 10.%d.0.1/24 dev lan", own),
			fmt.Sprintf("ip addr add 2001:db8:%d::1/64 dev lan nodad", own),
			fmt.Sprintf("ip route add 10.%d.0.0/24 via 192.0.2.%d src 10.%d.0.1", other, other, own),
			fmt.Sprintf("ip route add 2001:db8:%d::/64 via 2001:db8::%d src 2001:db8:%d::1", other, other, own),
			"sysctl -q -w net.ipv4.ip_forward=1",
		} {
			h.run(line)
		}
	}
	return a, b
}

func (h *host) pings(target string) bool {
	_, err := h.try("ping -n -q -c 3 -i 0.2 -W 1 " + target)
	return err == nil
}

// eventually waits until ok, at most 20 s.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// stat is a counter of the namespace's xfrm_stat.
func (h *host) stat(name string) int {
	h.t.Helper()
	m := regexp.MustCompile(name + `\s+(\d+)`).FindStringSubmatch(h.file("net/xfrm_stat"))
	if m == nil {
		h.t.Fatalf("no %s in xfrm_stat", name)
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}

// sentBy is how many packets the interface sent.
func (h *host) sentBy(dev string) int {
	h.t.Helper()
	for line := range strings.Lines(h.file("net/dev")) {
		f := strings.Fields(line)
		if len(f) > 10 && f[0] == dev+":" {
			n, err := strconv.Atoi(f[10])
			if err != nil {
				h.t.Fatal(err)
			}
			return n
		}
	}
	h.t.Fatalf("no interface %s", dev)
	return 0
}

// forwarded is how many IPv4 packets were forwarded.
func (h *host) forwarded() int {
	h.t.Helper()
	m := regexp.MustCompile(`(?m)^Ip: \d+ \d+ \d+ \d+ \d+ (\d+) `).FindStringSubmatch(h.file("net/snmp"))
	if m == nil {
		h.t.Fatal("no ForwDatagrams in net/snmp")
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}

// tunnel installs both SAs of a CHILD_SA on both gateways: each end derives its
// keys on its own. Policies are as charon makes them.
func tunnel(t *testing.T, ctx context.Context, a, b *host, sads [2]*SAD, suite Suite, spis [2]uint32) {
	t.Helper()
	v := hybrid(t)
	c := v.context(t)
	c.Suite = suite
	enc, integ, err := suite.KeySizes()
	if err != nil {
		t.Fatal(err)
	}
	ends := [2]netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:0"), netip.MustParseAddrPort("192.0.2.2:0")}
	for i, s := range sads {
		var keymat []*key.Material
		for n, size := range []int{enc, integ, enc, integ} {
			keymat = append(keymat, material(t, bytes.Repeat([]byte{byte(n + 1)}, size)))
		}
		session, err := NewSession(material(t, v.K), keymat, c)
		if err != nil {
			t.Fatal(err)
		}
		defer session.Wipe()
		for _, dir := range []Direction{ItoR, RtoI} {
			from, to := ends[0], ends[1]
			if dir == RtoI {
				from, to = to, from
			}
			keys, err := session.SAKey(dir, spis[dir], Tunnel)
			if err != nil {
				t.Fatal(err)
			}
			sa := SA{
				ID:    ID{Src: from, Dst: to, SPI: spis[dir], Protocol: ProtoESP},
				ReqID: 1, Mode: Tunnel, Suite: suite, Inbound: int(dir) != i, Window: 32, CopyDF: true, CopyECN: true,
			}
			err = s.Install(ctx, sa, keys, Owner{Connection: "net", KeyID: c.KeyID, Mix: c.Mix})
			keys.Wipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Commit(ctx, sa.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func newSAD(t *testing.T, h *host) *SAD {
	t.Helper()
	s, err := Open(h.conn, filepath.Join(t.TempDir(), "journal"), slog.New(slog.NewTextHandler(&bytes.Buffer{}, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func charonPolicies(h *host, own int) {
	other := 3 - own
	for _, p := range []string{
		fmt.Sprintf("src 10.%d.0.0/24 dst 10.%d.0.0/24 dir out priority 375423 tmpl src 192.0.2.%d dst 192.0.2.%d", own, other, own, other),
		fmt.Sprintf("src 10.%d.0.0/24 dst 10.%d.0.0/24 dir in priority 375423 tmpl src 192.0.2.%d dst 192.0.2.%d", other, own, other, own),
		fmt.Sprintf("src 10.%d.0.0/24 dst 10.%d.0.0/24 dir fwd priority 375423 tmpl src 192.0.2.%d dst 192.0.2.%d", other, own, other, own),
	} {
		h.run("ip xfrm policy add " + p + " proto esp reqid 1 mode tunnel")
	}
}

// TestKernelTunnel: keys derived on both ends carry traffic, with the guard in
// place; State, Query and Reconcile tell of it; without the SAs nothing passes.
func TestKernelTunnel(t *testing.T) {
	a, b := pair(t)
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	sads := [2]*SAD{newSAD(t, a), newSAD(t, b)}
	if err := sads[0].Warmup(ctx, xfrm.Suites(), true); err != nil {
		t.Fatal(err)
	}
	if out := a.run("ip xfrm state"); strings.TrimSpace(out) != "" {
		t.Errorf("Warmup left SAs:\n%s", out)
	}
	eventually(t, "the link carries packets", func() bool { return a.pings("10.2.0.1") })
	guard := GuardConfig{Remotes: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/24")}}
	if err := NewGuard(a.conn, filepath.Join(t.TempDir(), "removed")).Install(ctx, guard); err != nil {
		t.Fatal(err)
	}
	charonPolicies(a, 1)
	charonPolicies(b, 2)
	for n, suite := range []Suite{{Encr: xfrm.EncrAESGCM16, EncrBits: 256}, {Encr: xfrm.EncrChaCha20}, {Encr: xfrm.EncrAESCBC, EncrBits: 256, Integ: xfrm.IntegSHA256128}} {
		spis := [2]uint32{0xc0000100 + uint32(n), 0xc0000200 + uint32(n)}
		tunnel(t, ctx, a, b, sads, suite, spis)
		if !a.pings("10.2.0.1") || !b.pings("10.1.0.1") {
			t.Fatalf("%v: no ping through the tunnel\n%s%s%s", suite, a.run("ip -s xfrm state"), a.file("net/xfrm_stat"), b.file("net/xfrm_stat"))
		}
		states := [2][]State{}
		for i, s := range sads {
			var err error
			if states[i], err = s.State(ctx); err != nil || len(states[i]) != 2 {
				t.Fatalf("%v: State: %v, %v", suite, states[i], err)
			}
		}
		if x, y := states[0][0], states[1][1]; x.SPI != y.SPI || x.Fingerprint != y.Fingerprint || x.Fingerprint == "" || x.Algorithm != suite.String() || !x.Inbound || y.Inbound || x.Packets < 6 {
			t.Errorf("%v: %+v and %+v", suite, x, y)
		}
		counters, err := sads[0].Query(ctx, states[0][0].ID)
		if err != nil || counters.Packets < 6 || counters.LastUse == 0 {
			t.Errorf("%v: Query: %+v, %v", suite, counters, err)
		}
		for i, s := range sads {
			missing, err := s.Reconcile(ctx, func(context.Context) ([]ID, error) {
				return []ID{states[i][0].ID, states[i][1].ID, testSA(0x7777).ID}, nil
			})
			if err != nil || len(missing) != 1 || missing[0].SPI != 0x7777 {
				t.Errorf("%v: Reconcile: %v, %v", suite, missing, err)
			}
			if _, err := s.Reconcile(ctx, func(context.Context) ([]ID, error) { return nil, nil }); err != nil {
				t.Error(err)
			}
		}
		if out := a.run("ip xfrm state") + b.run("ip xfrm state"); strings.Contains(out, "c0000") {
			t.Errorf("%v: SAs left:\n%s", suite, out)
		}
		if a.pings("10.2.0.1") {
			t.Errorf("%v: ping without an SA", suite)
		}
		a.run("ip xfrm state flush")
		b.run("ip xfrm state flush")
	}
}

// TestKernelGuard: no packet passes in the clear in any direction; our own
// channels do; charon's policies fit beside the guard's, even for "any".
func TestKernelGuard(t *testing.T) {
	a, b := pair(t)
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	eventually(t, "the link carries packets", func() bool {
		return a.pings("10.2.0.1") && a.pings("2001:db8:2::1") && b.pings("10.1.0.1")
	})
	config := GuardConfig{
		Remotes: []netip.Prefix{
			netip.MustParsePrefix("10.2.0.0/24"), netip.MustParsePrefix("192.0.2.0/24"), // the peer itself too
			netip.MustParsePrefix("2001:db8:2::/64"), netip.MustParsePrefix("2001:db8::/64"),
		},
		Allow: []Channel{{Remote: netip.MustParsePrefix("192.0.2.2/32"), Protocol: 6, LocalPort: 7001}},
	}
	guard := NewGuard(a.conn, filepath.Join(t.TempDir(), "removed"))
	for range 2 { // again: nothing changes
		if err := guard.Install(ctx, config); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := guard.Installed(ctx, config); err != nil || !ok {
		t.Errorf("Installed: %v, %v", ok, err)
	}
	before := a.sentBy("wan")
	blocked := a.stat("XfrmOutPolBlock")
	for _, target := range []string{"10.2.0.1", "192.0.2.2", "2001:db8:2::1", "2001:db8::2"} {
		if a.pings(target) {
			t.Errorf("ping to %s passes the guard", target)
		}
	}
	if got := a.stat("XfrmOutPolBlock") - blocked; got < 4 {
		t.Errorf("XfrmOutPolBlock counts %d packets, want 4 (ping ends at its first error)", got)
	}
	if got := a.sentBy("wan") - before; got > 3 {
		t.Errorf("%d packets left during 4 blocked pings (neighbour discovery may send a few)\n%s", got, a.run("ip -s link show wan"))
	}
	in := a.stat("XfrmInPolBlock")
	forwarded := a.forwarded() // lan may send packets of its own, of IPv6, at any time
	if b.pings("10.1.0.1") {
		t.Error("ping from the protected network answered")
	}
	b.pings("10.1.0.77") // to be forwarded into a's network
	if got := a.stat("XfrmInPolBlock") - in; got < 6 {
		t.Errorf("XfrmInPolBlock counts %d packets, want 6", got)
	}
	if got := a.forwarded() - forwarded; got != 0 {
		t.Errorf("%d packets from the protected network were forwarded", got)
	}
	testChannel(t, a, b)

	// A channel of which both ends are known passes beside a policy of charon that
	// has lost its SA.
	config.Allow[0].Local = netip.MustParseAddr("192.0.2.1")
	if err := guard.Install(ctx, config); err != nil {
		t.Fatal(err)
	}
	a.run("ip xfrm policy add src 192.0.2.1/32 dst 192.0.2.2/32 dir out priority 367231 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 9 mode tunnel")
	a.run("ip xfrm policy add src 192.0.2.2/32 dst 192.0.2.1/32 dir in priority 367231 tmpl src 192.0.2.2 dst 192.0.2.1 proto esp reqid 9 mode tunnel")
	testChannel(t, a, b)
	a.run("ip xfrm policy delete src 192.0.2.1/32 dst 192.0.2.2/32 dir out")
	a.run("ip xfrm policy delete src 192.0.2.2/32 dst 192.0.2.1/32 dir in")

	// charon's policies with local_ts any and remote_ts R itself.
	a.run("ip xfrm policy add src 0.0.0.0/0 dst 10.2.0.0/24 dir out priority 387711 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel")
	a.run("ip xfrm policy delete src 0.0.0.0/0 dst 10.2.0.0/24 dir out")
	if ok, err := guard.Installed(ctx, config); err != nil || !ok {
		t.Errorf("after charon removed its policy: %v, %v", ok, err)
	}
	a.run("ip xfrm policy add src 10.9.0.0/24 dst 10.8.0.0/24 dir out priority 375423 action block")
	if err := guard.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	if out := a.run("ip xfrm policy"); strings.Count(out, "dir ") != 1 || !strings.Contains(out, "10.9.0.0/24") {
		t.Errorf("after Remove:\n%s", out)
	}
	if !a.pings("10.2.0.1") || !a.pings("2001:db8:2::1") {
		t.Error("no ping after Remove")
	}
	forwarded = a.forwarded()
	b.pings("10.1.0.77")
	if a.forwarded() == forwarded {
		t.Error("after Remove a forwards nothing: the count above was of no worth")
	}
}

// testChannel: TCP from b to a's port 7001 passes, to 7002 not.
func testChannel(t *testing.T, a, b *host) {
	t.Helper()
	for port, want := range map[int]bool{7001: true, 7002: false} {
		listen := make(chan error, 1)
		ready := make(chan int, 1)
		a.work <- func() { fd, err := listenTCP(port); ready <- fd; listen <- err }
		fd := <-ready
		if err := <-listen; err != nil {
			t.Fatal(err)
		}
		out, err := b.try(fmt.Sprintf("timeout 5 bash -c exec<>/dev/tcp/192.0.2.1/%d", port))
		if got := err == nil; got != want {
			t.Errorf("TCP to port %d: connected is %v, want %v %s", port, got, want, out)
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	}
}

func listenTCP(port int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port}); err != nil {
		return fd, err
	}
	return fd, unix.Listen(fd, 4)
}
