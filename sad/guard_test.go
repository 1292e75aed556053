package sad

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// fakeSPD is an SPD in memory: one policy per selector.
type fakeSPD struct {
	all    []xfrm.Policy
	routes []netip.Prefix
	index  uint32
	order  []string // additions and deletions
	fail   error    // of AddPolicy and AddBlackhole
}

func (f *fakeSPD) AddBlackhole(_ context.Context, to netip.Prefix) error {
	if f.fail != nil {
		return f.fail
	}
	if slices.Contains(f.routes, to) {
		return xfrm.ErrExists
	}
	f.routes = append(f.routes, to)
	return nil
}

func (f *fakeSPD) DeleteBlackhole(_ context.Context, to netip.Prefix) error {
	i := slices.Index(f.routes, to)
	if i < 0 {
		return xfrm.ErrNotFound
	}
	f.routes = slices.Delete(f.routes, i, i+1)
	return nil
}

func (f *fakeSPD) Blackholes(context.Context) ([]netip.Prefix, error) {
	return slices.Clone(f.routes), nil
}

func (f *fakeSPD) AddPolicy(_ context.Context, p xfrm.Policy) error {
	if f.fail != nil {
		return f.fail
	}
	for _, q := range f.all {
		if q.Selector() == p.Selector() {
			return xfrm.ErrExists
		}
	}
	f.index++
	p.Index = f.index
	f.all = append(f.all, p)
	f.order = append(f.order, "+"+p.String())
	return nil
}

func (f *fakeSPD) DeletePolicy(_ context.Context, p xfrm.Policy) error {
	for i, q := range f.all {
		if q.Index == p.Index {
			f.all = slices.Delete(f.all, i, i+1)
			f.order = append(f.order, "-"+p.String())
			return nil
		}
	}
	return xfrm.ErrNotFound
}

func (f *fakeSPD) Policies(context.Context) ([]xfrm.Policy, error) { return slices.Clone(f.all), nil }

func prefixes(list ...string) (all []netip.Prefix) {
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

// decide is what the SPD does with a packet: the lowest priority wins.
func (f *fakeSPD) decide(dir xfrm.Dir, src, dst string, protocol uint8, sport, dport uint16) string {
	verdict, best := "none", uint32(0)
	for _, p := range f.all {
		if p.Dir != dir || !p.Src.Contains(netip.MustParseAddr(src)) || !p.Dst.Contains(netip.MustParseAddr(dst)) ||
			p.Protocol != 0 && p.Protocol != protocol || p.SrcPort != 0 && p.SrcPort != sport || p.DstPort != 0 && p.DstPort != dport {
			continue
		}
		if verdict == "none" || p.Priority < best {
			best, verdict = p.Priority, "allow"
			if p.Block {
				verdict = "block"
			}
		}
	}
	return verdict
}

func TestGuardDecides(t *testing.T) {
	f := &fakeSPD{}
	config := GuardConfig{
		Remotes: prefixes("10.2.0.0/16", "2001:db8:2::/48"),
		Allow:   []Channel{{Remote: netip.MustParsePrefix("10.2.0.1/32"), Protocol: 6, RemotePort: 7001}, {Remote: netip.MustParsePrefix("10.2.0.1/32"), Protocol: 6, LocalPort: 7001}},
	}
	if err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Install(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		dir          xfrm.Dir
		src, dst     string
		protocol     uint8
		sport, dport uint16
		want         string
	}{
		{xfrm.Out, "10.1.0.1", "10.2.3.4", 17, 1, 2, "block"},
		{xfrm.Out, "192.0.2.1", "10.2.3.4", 1, 0, 0, "block"},
		{xfrm.In, "10.2.3.4", "10.1.0.1", 17, 1, 2, "block"},
		{xfrm.Fwd, "10.2.3.4", "203.0.113.9", 6, 1, 2, "block"},
		{xfrm.Out, "10.1.0.1", "10.3.0.1", 17, 1, 2, "none"},
		{xfrm.In, "10.1.0.1", "10.2.3.4", 17, 1, 2, "none"},
		{xfrm.Out, "2001:db8:1::1", "2001:db8:2::9", 6, 1, 2, "block"},
		{xfrm.Out, "fe80::1", "2001:db8:2::9", 58, 135, 0, "allow"},
		{xfrm.In, "2001:db8:2::9", "2001:db8:1::1", 58, 136, 0, "allow"},
		{xfrm.Out, "2001:db8:1::1", "2001:db8:2::9", 58, 128, 0, "block"},
		{xfrm.Fwd, "2001:db8:2::9", "2001:db8:1::1", 58, 136, 0, "block"},
		{xfrm.Out, "192.0.2.1", "10.2.0.1", 6, 40000, 7001, "allow"},
		{xfrm.In, "10.2.0.1", "192.0.2.1", 6, 7001, 40000, "allow"},
		{xfrm.Out, "192.0.2.1", "10.2.0.1", 6, 7001, 40000, "allow"},
		{xfrm.In, "10.2.0.1", "192.0.2.1", 6, 40000, 7001, "allow"},
		{xfrm.Out, "192.0.2.1", "10.2.0.1", 17, 40000, 7001, "block"},
		{xfrm.Out, "192.0.2.1", "10.2.0.2", 6, 40000, 7001, "block"},
		{xfrm.Fwd, "10.2.0.1", "192.0.2.1", 6, 7001, 40000, "block"},
		// A host behind the gateway must not use the gateway's own ways out.
		{xfrm.Fwd, "10.1.0.5", "10.2.0.1", 6, 40000, 7001, "block"},
		{xfrm.Fwd, "10.1.0.5", "10.2.0.1", 6, 7001, 22, "block"},
		{xfrm.Fwd, "2001:db8:1::5", "2001:db8:2::9", 58, 135, 0, "block"},
		// What it sends otherwise must reach out's policies, the tunnel's among them.
		{xfrm.Fwd, "10.1.0.5", "10.2.0.1", 6, 40000, 22, "none"},
		{xfrm.Fwd, "2001:db8:1::5", "2001:db8:2::9", 58, 128, 0, "none"},
	} {
		if got := f.decide(tc.dir, tc.src, tc.dst, tc.protocol, tc.sport, tc.dport); got != tc.want {
			t.Errorf("%v %s -> %s protocol %d %d -> %d: %s, want %s", tc.dir, tc.src, tc.dst, tc.protocol, tc.sport, tc.dport, got, tc.want)
		}
	}
}

// TestGuardBesideCharon: charon's own selectors, of a local_ts of any too, never
// meet the guard's, and its priorities win.
func TestGuardBesideCharon(t *testing.T) {
	config := GuardConfig{Remotes: prefixes("10.2.0.0/16", "0.0.0.0/0", "::/0", "2001:db8:2::/48")}
	policies, err := config.Policies()
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeSPD{}
	for _, remote := range config.Remotes {
		for _, local := range prefixes("0.0.0.0/0", "10.1.0.0/16", "10.1.0.1/32", "::/0", "2001:db8:1::/48") {
			if local.Addr().Is4() != remote.Addr().Is4() {
				continue
			}
			for _, p := range []xfrm.Policy{{Dir: xfrm.Out, Src: local, Dst: remote}, {Dir: xfrm.In, Src: remote, Dst: local}, {Dir: xfrm.Fwd, Src: remote, Dst: local}} {
				p.Priority, p.Templates = 399999, true
				if err := f.AddPolicy(t.Context(), p); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	// Not ours although it has the number of ours.
	odd := xfrm.Policy{Dir: xfrm.Out, Src: netip.MustParsePrefix("10.9.0.0/16"), Dst: netip.MustParsePrefix("10.8.0.0/16"), Priority: GuardAllow, Templates: true}
	if err := f.AddPolicy(t.Context(), odd); err != nil {
		t.Fatal(err)
	}
	charon := slices.Clone(f.all)
	for _, p := range policies {
		if p.Priority <= 400000 {
			t.Errorf("%v would win over charon's", p)
		}
	}
	if err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Install(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	if got := f.decide(xfrm.Out, "10.1.0.1", "10.2.3.4", 6, 1, 2); got != "allow" {
		t.Errorf("the guard wins over charon: %s", got)
	}
	if err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(f.all, charon) {
		t.Errorf("after Remove charon's policies are not what they were: %v", f.all)
	}
}

// TestGuardChannelBesideTunnel: a channel whose ends are known passes whatever
// policy of charon covers it; here that is one without an SA, which drops.
func TestGuardChannelBesideTunnel(t *testing.T) {
	f := &fakeSPD{}
	config := GuardConfig{
		Remotes: prefixes("192.0.2.2/32"),
		Allow:   []Channel{{Local: netip.MustParseAddr("192.0.2.1"), Remote: netip.MustParsePrefix("192.0.2.2/32"), Protocol: 6, RemotePort: 7001}},
	}
	if err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Install(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	for dir, ends := range map[xfrm.Dir][]netip.Prefix{xfrm.Out: prefixes("192.0.2.0/25", "192.0.2.2/32"), xfrm.In: prefixes("192.0.2.2/32", "192.0.2.0/25")} {
		if err := f.AddPolicy(t.Context(), xfrm.Policy{Dir: dir, Src: ends[0], Dst: ends[1], Priority: 200000, Templates: true, Block: true}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		dir          xfrm.Dir
		src, dst     string
		sport, dport uint16
		want         string
	}{
		{xfrm.Out, "192.0.2.1", "192.0.2.2", 40000, 7001, "allow"},
		{xfrm.In, "192.0.2.2", "192.0.2.1", 7001, 40000, "allow"},
		{xfrm.Out, "192.0.2.1", "192.0.2.2", 40000, 22, "block"},
		{xfrm.Out, "192.0.2.3", "192.0.2.2", 40000, 7001, "block"},
		{xfrm.In, "192.0.2.2", "192.0.2.3", 7001, 40000, "block"},
		{xfrm.Fwd, "192.0.2.1", "192.0.2.2", 40000, 7001, "block"},
	} {
		if got := f.decide(tc.dir, tc.src, tc.dst, 6, tc.sport, tc.dport); got != tc.want {
			t.Errorf("%v %s %d -> %s %d: %s, want %s", tc.dir, tc.src, tc.sport, tc.dst, tc.dport, got, tc.want)
		}
	}
	if ok, err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Installed(t.Context(), config); err != nil || !ok {
		t.Errorf("Installed: %v, %v", ok, err)
	}
	if err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Remove(t.Context()); err != nil || len(f.all) != 2 {
		t.Errorf("after Remove: %v, %v", f.all, err)
	}
}

func TestGuardInstallAgain(t *testing.T) {
	f := &fakeSPD{}
	g := NewGuard(f, filepath.Join(t.TempDir(), "removed"))
	channel := Channel{Remote: netip.MustParsePrefix("10.2.0.1/32"), Protocol: 6, RemotePort: 7001}
	config := GuardConfig{Remotes: prefixes("10.2.0.0/16"), Allow: []Channel{channel}}
	if err := g.Install(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	firstBlock := slices.IndexFunc(f.order, func(s string) bool { return s[1:6] == "block" })
	if slices.ContainsFunc(f.order[firstBlock:], func(s string) bool { return s[1:6] == "allow" }) {
		t.Errorf("a block came before an allow rule: %v", f.order)
	}
	n := len(f.order)
	if err := g.Install(t.Context(), config); err != nil || len(f.order) != n {
		t.Errorf("again: %v, %v", f.order[n:], err)
	}
	// Another network, no channel: the old block stays, the old allow rules go.
	other := GuardConfig{Remotes: prefixes("10.3.0.0/16")}
	if err := g.Install(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if got := f.decide(xfrm.Out, "10.1.0.1", "10.2.0.1", 6, 1, 7001); got != "block" {
		t.Errorf("old network: %s", got)
	}
	if ok, err := g.Installed(t.Context(), config); err != nil || ok {
		t.Errorf("Installed without the allow rules: %v, %v", ok, err)
	}
	if err := g.Remove(t.Context()); err != nil || len(f.all) != 0 {
		t.Errorf("left %v, %v", f.all, err)
	}
}

// What is reached through an XFRM interface must reach it: no block in out, where
// a packet is routed, but a blackhole route. What comes from there in clear is
// dropped as ever.
func TestGuardOfXFRMInterface(t *testing.T) {
	f := &fakeSPD{}
	g := NewGuard(f, filepath.Join(t.TempDir(), "removed"))
	config := GuardConfig{Remotes: prefixes("10.3.0.0/16"), Routed: prefixes("10.2.0.0/16", "2001:db8:2::/48"), Allow: []Channel{{Remote: netip.MustParsePrefix("10.2.0.1/32"), Protocol: 6, RemotePort: 7001}}}
	for range 2 { // again: no error
		if err := g.Install(t.Context(), config); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		dir      xfrm.Dir
		src, dst string
		want     string
	}{
		{xfrm.Out, "10.1.0.1", "10.2.3.4", "none"},
		{xfrm.Out, "2001:db8:1::1", "2001:db8:2::9", "none"},
		{xfrm.Out, "10.1.0.1", "10.3.3.4", "block"},
		{xfrm.In, "10.2.3.4", "10.1.0.1", "block"},
		{xfrm.Fwd, "10.2.3.4", "10.1.0.1", "block"},
		{xfrm.Fwd, "2001:db8:2::9", "2001:db8:1::1", "block"},
	} {
		if got := f.decide(tc.dir, tc.src, tc.dst, 17, 1, 2); got != tc.want {
			t.Errorf("%v %s -> %s: %s, want %s", tc.dir, tc.src, tc.dst, got, tc.want)
		}
	}
	if got := f.decide(xfrm.Fwd, "10.1.0.5", "10.2.0.1", 6, 40000, 7001); got != "block" {
		t.Errorf("a host behind the gateway uses the gateway's own channel: %s", got)
	}
	if !slices.Equal(f.routes, config.Routed) {
		t.Errorf("blackhole routes: %v", f.routes)
	}
	// Another configuration takes no route away.
	if err := g.Install(t.Context(), GuardConfig{Remotes: prefixes("10.3.0.0/16")}); err != nil || len(f.routes) != 2 {
		t.Errorf("%v, %v", f.routes, err)
	}
	if err := g.Install(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	if ok, err := g.Installed(t.Context(), config); err != nil || !ok {
		t.Errorf("Installed: %v, %v", ok, err)
	}
	if err := f.DeleteBlackhole(t.Context(), config.Routed[1]); err != nil {
		t.Fatal(err)
	}
	if ok, err := g.Installed(t.Context(), config); err != nil || ok {
		t.Errorf("Installed without a route: %v, %v", ok, err)
	}
	if err := g.Remove(t.Context()); err != nil || len(f.all)+len(f.routes) != 0 {
		t.Errorf("left %v, %v, %v", f.all, f.routes, err)
	}
	f.fail = xfrm.ErrUnknown
	if err := g.Install(t.Context(), GuardConfig{Routed: config.Routed}); !errors.Is(err, xfrm.ErrUnknown) {
		t.Errorf("%v", err)
	}
	if _, err := (GuardConfig{Routed: prefixes("10.2.0.1/16")}).Policies(); err == nil {
		t.Error("host bits were taken")
	}
}

func TestGuardErrors(t *testing.T) {
	for name, c := range map[string]GuardConfig{
		"host bits":        {Remotes: prefixes("10.2.0.1/16")},
		"all routed":       {Routed: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}},
		"no prefix":        {Remotes: []netip.Prefix{{}}},
		"mapped":           {Remotes: []netip.Prefix{netip.MustParsePrefix("::ffff:10.2.0.0/112")}},
		"channel":          {Allow: []Channel{{Protocol: 6}}},
		"channel family":   {Allow: []Channel{{Local: netip.MustParseAddr("2001:db8::1"), Remote: netip.MustParsePrefix("10.2.0.1/32"), Protocol: 6}}},
		"channel protocol": {Allow: []Channel{{Remote: netip.MustParsePrefix("10.2.0.1/32")}}},
	} {
		if err := NewGuard(&fakeSPD{}, filepath.Join(t.TempDir(), "removed")).Install(t.Context(), c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// A policy of another tool has one selector: an error, and the rest stands.
	f := &fakeSPD{}
	foreign := xfrm.Policy{Dir: xfrm.Out, Src: netip.MustParsePrefix("0.0.0.0/1"), Dst: netip.MustParsePrefix("10.2.0.0/16"), Priority: 7}
	if err := f.AddPolicy(t.Context(), foreign); err != nil {
		t.Fatal(err)
	}
	err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Install(t.Context(), GuardConfig{Remotes: prefixes("10.2.0.0/16")})
	if !errors.Is(err, ErrExists) || len(f.all) != 6 {
		t.Errorf("%d policies, %v", len(f.all), err)
	}
	f = &fakeSPD{fail: xfrm.ErrUnknown}
	if err := NewGuard(f, filepath.Join(t.TempDir(), "removed")).Install(t.Context(), GuardConfig{Remotes: prefixes("10.2.0.0/16")}); !errors.Is(err, xfrm.ErrUnknown) {
		t.Errorf("%v", err)
	}
}

// A policy that differs in its mark or if_id alone can be there beside the guard's: it
// is neither in its way nor taken for it.
func TestGuardBesideMarkAndIfID(t *testing.T) {
	f := &fakeSPD{}
	g := NewGuard(f, filepath.Join(t.TempDir(), "removed"))
	config := GuardConfig{Remotes: prefixes("10.2.0.0/16")}
	mine, err := config.Policies()
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range mine {
		p.Priority = 7 // somebody else's
		if i%2 == 0 {
			p.Mark = xfrm.Mark{Value: 1, Mask: 0xff}
		} else {
			p.IfID = 5
			p.Priority = GuardBlock // even so
		}
		if err := f.AddPolicy(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	if whole, err := g.Installed(t.Context(), config); whole || err != nil {
		t.Errorf("theirs were taken for the guard: %v, %v", whole, err)
	}
	if err := g.Install(t.Context(), config); err != nil {
		t.Error(err)
	}
	if whole, err := g.Installed(t.Context(), config); !whole || err != nil {
		t.Errorf("not in place: %v, %v", whole, err)
	}
	if err := g.Remove(t.Context()); err != nil || len(f.all) != len(mine) {
		t.Errorf("left %d of their %d, %v", len(f.all), len(mine), err)
	}
}

// What is lost comes back, what the operator has removed does not, until Install.
func TestGuardKeep(t *testing.T) {
	f := &fakeSPD{}
	dir := filepath.Join(t.TempDir(), "run")
	g := NewGuard(f, filepath.Join(dir, "removed"))
	config := GuardConfig{Remotes: prefixes("10.3.0.0/16"), Routed: prefixes("10.2.0.0/16")}
	keep := func(want GuardState) {
		t.Helper()
		if got, err := g.Keep(t.Context(), config); err != nil || got != want {
			t.Errorf("Keep: %v, %v, want %v", got, err, want)
		}
	}
	if err := g.Install(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	keep(GuardWhole)
	f.all = f.all[:2]
	keep(GuardMended)
	keep(GuardWhole)
	f.routes = nil
	keep(GuardMended)
	keep(GuardWhole)

	// There is no directory for the marker: no qipsecd has run.
	if err := g.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	keep(GuardMended)

	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	keep(GuardRemoved)
	keep(GuardRemoved)
	if len(f.all)+len(f.routes) != 0 {
		t.Errorf("put back: %v, %v", f.all, f.routes)
	}
	if err := g.Install(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	f.all = nil
	keep(GuardMended)

	f.all = nil
	f.fail = errors.New("no")
	if _, err := g.Keep(t.Context(), config); !errors.Is(err, f.fail) {
		t.Errorf("Keep that cannot mend: %v", err)
	}
}

// Two namespaces have two markers.
func TestGuardMarker(t *testing.T) {
	name, err := GuardMarker()
	if err != nil || !regexp.MustCompile(`^/run/q-ipsec/guard-removed-[0-9]+$`).MatchString(name) {
		t.Errorf("%q, %v", name, err)
	}
}
