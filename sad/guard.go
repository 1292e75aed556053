package sad

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// The priorities of guard policies, by which they are known as such; the lowest
// number wins. All of charon's lie between 100,000 and 400,000. Of ours those for
// channels with both ends known win over them, the others do not.
const (
	GuardOwn   uint32 = 0x5149
	GuardAllow uint32 = 0x51495052
	GuardBlock uint32 = 0x51495053
)

const (
	protoICMPv6 = 58
	ndFirst     = 133 // router solicitation (RFC 4861)
	ndLast      = 137 // redirect
)

// spd is what Guard needs of sad/xfrm.
type spd interface {
	AddPolicy(ctx context.Context, p xfrm.Policy) error
	DeletePolicy(ctx context.Context, p xfrm.Policy) error
	Policies(ctx context.Context) ([]xfrm.Policy, error)
	AddBlackhole(ctx context.Context, to netip.Prefix) error
	DeleteBlackhole(ctx context.Context, to netip.Prefix) error
	Blackholes(ctx context.Context) ([]netip.Prefix, error)
}

// Channel is traffic of our own that must pass although it goes to a protected
// network in the clear: IKE, the channel between two KMAs, SFTP of a QKDE that
// lies there. It has its own protection.
//
// Local is our end. Where it is known, the channel never enters a tunnel: one that
// brings the keys must not wait for the tunnel that they are for, as it would
// with a policy of a charon that was killed, or a trap. The peer must do likewise.
type Channel struct {
	Local                 netip.Addr // zero: any, and a tunnel may carry it
	Remote                netip.Prefix
	Protocol              uint8  // 6 TCP, 17 UDP
	LocalPort, RemotePort uint16 // 0: any
}

// GuardConfig says what the guard protects.
type GuardConfig struct {
	Remotes []netip.Prefix // remote_ts of every connection with policy required
	Routed  []netip.Prefix // those that are reached through an XFRM interface; none of them overlaps one of Remotes
	Allow   []Channel
}

// Guard keeps traffic to and from protected networks from passing in the clear
// while there is no IPsec policy of charon for it: before charon runs, after it
// crashed, while nothing is up. It is policies of lowest precedence in the SPD:
// out to R, and in and fwd from R, dropped.
//
// A packet to a network behind an XFRM interface asks policies twice: where it is
// routed those without an if_id, in the interface those of its if_id, and without
// one of these it is dropped. A block in out would therefore stop the tunnel
// itself. What there is to guard against is that the route into the interface is
// not there: the network has a blackhole route instead, of the highest metric.
//
// Not covered: packets of sockets with a policy of their own (charon's IKE
// sockets, on purpose), loopback.
type Guard struct {
	spd    spd
	marker string
}

// NewGuard makes a Guard. The SPD, *xfrm.Conn outside tests, is borrowed. marker is
// the file that tells a Remove from a loss, GuardMarker() outside tests.
func NewGuard(s spd, marker string) *Guard { return &Guard{spd: s, marker: marker} }

// halves splits "any" of R's family. The guard's selectors hold them instead of
// 0.0.0.0/0 or ::/0, because charon's policy for a local_ts of "any" has that
// selector: the kernel would refuse the second one, and a removal of ours by
// selector would remove charon's. A local_ts that is itself one of the halves
// must not be configured.
func halves(r netip.Prefix) [2]netip.Prefix {
	if r.Addr().Is4() {
		return [2]netip.Prefix{netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("128.0.0.0/1")}
	}
	return [2]netip.Prefix{netip.MustParsePrefix("::/1"), netip.MustParsePrefix("8000::/1")}
}

// Policies gives the policies that the guard of c consists of.
func (c GuardConfig) Policies() ([]xfrm.Policy, error) {
	var all []xfrm.Policy
	seen := map[xfrm.Policy]bool{}
	add := func(p xfrm.Policy) {
		if s := p.Selector(); !seen[s] {
			seen[s] = true
			all = append(all, p)
		}
	}
	for _, r := range slices.Concat(c.Remotes, c.Routed) {
		if !r.IsValid() || r != r.Masked() || r.Addr().Is4In6() {
			return nil, fmt.Errorf("sad: guard: %v is not a network prefix", r)
		}
		routed := slices.Contains(c.Routed, r)
		if routed && r.Bits() == 0 {
			return nil, fmt.Errorf("sad: guard: a blackhole route to %v would lose against the default route", r)
		}
		for _, p := range blocks(r) {
			if !routed || p.Dir != xfrm.Out || !p.Block {
				add(p)
			}
		}
	}
	for _, ch := range c.Allow {
		if !ch.Remote.IsValid() || ch.Remote != ch.Remote.Masked() || ch.Remote.Addr().Is4In6() {
			return nil, fmt.Errorf("sad: guard: channel to %v: not a network prefix", ch.Remote)
		}
		if ch.Local.IsValid() && (ch.Local.Is4In6() || ch.Local.Is4() != ch.Remote.Addr().Is4()) {
			return nil, fmt.Errorf("sad: guard: channel to %v: our end %v is of the other address family", ch.Remote, ch.Local)
		}
		if ch.Protocol == 0 {
			return nil, fmt.Errorf("sad: guard: channel to %v names no protocol", ch.Remote)
		}
		for _, p := range ch.policies() {
			add(p)
		}
	}
	return all, nil
}

// blocks are the guard's policies for one protected network.
func blocks(r netip.Prefix) []xfrm.Policy {
	var all []xfrm.Policy
	for _, half := range halves(r) {
		all = append(all,
			xfrm.Policy{Dir: xfrm.Out, Src: half, Dst: r, Block: true, Priority: GuardBlock},
			xfrm.Policy{Dir: xfrm.In, Src: r, Dst: half, Block: true, Priority: GuardBlock},
			xfrm.Policy{Dir: xfrm.Fwd, Src: r, Dst: half, Block: true, Priority: GuardBlock})
		if r.Addr().Is4() {
			continue
		}
		// Without neighbour discovery the peer's own address could not be
		// reached if it lies in r and on our link.
		for typ := uint16(ndFirst); typ <= ndLast; typ++ {
			all = append(all, ownOnly(half, r, protoICMPv6, typ, 0, GuardAllow)...)
		}
	}
	return all
}

// policies are those for one channel.
func (ch Channel) policies() []xfrm.Policy {
	if ch.Local.IsValid() {
		own := netip.PrefixFrom(ch.Local, ch.Local.BitLen())
		return ownOnly(own, ch.Remote, ch.Protocol, ch.LocalPort, ch.RemotePort, GuardOwn)
	}
	var all []xfrm.Policy
	for _, half := range halves(ch.Remote) {
		all = append(all, ownOnly(half, ch.Remote, ch.Protocol, ch.LocalPort, ch.RemotePort, GuardAllow)...)
	}
	return all
}

// ownOnly lets this machine's own packets of one kind pass, both ways, and no
// others. A forwarded packet asks fwd first and then out: the allow rule of out
// alone would let every host behind this gateway send past the guard, so what it
// names is dropped in fwd. ICMPv6 has its type as local port, the same both ways.
func ownOnly(own, r netip.Prefix, protocol uint8, local, remote uint16, priority uint32) []xfrm.Policy {
	out := xfrm.Policy{Dir: xfrm.Out, Src: own, Dst: r, Protocol: protocol, SrcPort: local, DstPort: remote, Priority: priority}
	in := xfrm.Policy{Dir: xfrm.In, Src: r, Dst: own, Protocol: protocol, SrcPort: remote, DstPort: local, Priority: priority}
	if protocol == protoICMPv6 {
		in.SrcPort, in.DstPort = local, 0
	}
	fwd := out
	fwd.Dir, fwd.Block, fwd.Priority = xfrm.Fwd, true, GuardBlock
	return []xfrm.Policy{out, in, fwd}
}

func ofGuard(p xfrm.Policy) bool {
	return !p.Templates && p.Mark == (Mark{}) && p.IfID == 0 && (p.Block && p.Priority == GuardBlock || !p.Block && (p.Priority == GuardAllow || p.Priority == GuardOwn))
}

// Install adds what is missing of the guard of c, allow rules first so that our
// own channels are never cut, and then removes allow rules that c does not have.
// Blocks and routes that c does not have stay until Remove: a network that was protected
// does not become clear by a change of configuration. It may be called again at
// any time. A policy of another owner with a selector of the guard's is an error
// that names it; the rest is installed nevertheless. That the operator has removed
// the guard counts no more.
func (g *Guard) Install(ctx context.Context, c GuardConfig) error {
	return errors.Join(g.install(ctx, c), g.forgetRemoval())
}

func (g *Guard) install(ctx context.Context, c GuardConfig) error {
	want, err := c.Policies()
	if err != nil {
		return err
	}
	have, err := g.spd.Policies(ctx)
	if err != nil {
		return err
	}
	present := map[xfrm.Policy]xfrm.Policy{}
	for _, p := range have {
		present[p.Selector()] = p
	}
	var errs []error
	wanted := map[xfrm.Policy]bool{}
	for _, block := range []bool{false, true} {
		for _, p := range want {
			if p.Block != block {
				continue
			}
			wanted[p.Selector()] = true
			if err := g.ensure(ctx, p, present); err != nil {
				errs = append(errs, err)
			}
		}
	}
	for _, r := range c.Routed {
		if err := g.spd.AddBlackhole(ctx, r); err != nil && !errors.Is(err, xfrm.ErrExists) {
			errs = append(errs, err)
		}
	}
	for _, p := range have {
		if ofGuard(p) && !p.Block && !wanted[p.Selector()] {
			if err := g.spd.DeletePolicy(ctx, p); err != nil && !errors.Is(err, xfrm.ErrNotFound) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (g *Guard) ensure(ctx context.Context, p xfrm.Policy, present map[xfrm.Policy]xfrm.Policy) error {
	if old, ok := present[p.Selector()]; ok {
		if ofGuard(old) && old.Block == p.Block {
			return nil
		}
		if !ofGuard(old) {
			return fmt.Errorf("sad: guard: %v: another policy (priority %d) has that selector: %w", p, old.Priority, xfrm.ErrExists)
		}
		if err := g.spd.DeletePolicy(ctx, old); err != nil && !errors.Is(err, xfrm.ErrNotFound) {
			return err
		}
	}
	return g.spd.AddPolicy(ctx, p)
}

// Remove removes all policies of any guard, known by their priorities, blocks
// last, and its routes. Only an operator asks for it; Keep leaves it so.
func (g *Guard) Remove(ctx context.Context) error {
	have, err := g.spd.Policies(ctx)
	if err != nil {
		return err
	}
	errs := []error{g.noteRemoval()} // first: a Keep that comes between must not put back what goes
	for _, block := range []bool{false, true} {
		for _, p := range have {
			if !ofGuard(p) || p.Block != block {
				continue
			}
			if err := g.spd.DeletePolicy(ctx, p); err != nil && !errors.Is(err, xfrm.ErrNotFound) {
				errs = append(errs, err)
			}
		}
	}
	routes, err := g.spd.Blackholes(ctx)
	errs = append(errs, err)
	for _, r := range routes {
		if err := g.spd.DeleteBlackhole(ctx, r); err != nil && !errors.Is(err, xfrm.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Installed tells whether all policies and routes of the guard of c are in place.
func (g *Guard) Installed(ctx context.Context, c GuardConfig) (bool, error) {
	want, err := c.Policies()
	if err != nil {
		return false, err
	}
	have, err := g.spd.Policies(ctx)
	if err != nil {
		return false, err
	}
	present := map[xfrm.Policy]bool{}
	for _, p := range have {
		if ofGuard(p) {
			present[p.Selector()] = true
		}
	}
	for _, p := range want {
		if !present[p.Selector()] {
			return false, nil
		}
	}
	routes, err := g.spd.Blackholes(ctx)
	if err != nil {
		return false, err
	}
	for _, r := range c.Routed {
		if !slices.Contains(routes, r) {
			return false, nil
		}
	}
	return true, nil
}
