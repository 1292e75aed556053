package conf

import (
	"net/netip"
	"net/url"
	"slices"
	"strconv"
)

const protoTCP = 6

// Channel is traffic of our own that the guard lets pass in clear, because it
// has its own protection.
type Channel struct {
	Local                 netip.Addr // our end, if that is fixed: then no tunnel ever carries it
	Remote                netip.Prefix
	Protocol              uint8
	LocalPort, RemotePort uint16 // 0: any
}

// Guarded says what the guard protects: every remote_ts of a connection with
// policy required, but those of Routed; and of our own channels to KMAs, KMEs and
// QKDEs, SFTP from these too, those that lie in either, without which no key would come and so no tunnel
// (those named by address: of host names the guard knows nothing). IKE needs no
// rule: charon's sockets carry a bypass policy of their own.
func (n *Node) Guarded() (remotes []netip.Prefix, allow []Channel) {
	if n.IPsec == nil {
		return nil, nil
	}
	remotes = n.required(false)
	all := append(n.required(true), remotes...)
	tcp := func(local netip.Addr, to netip.AddrPort, localPort uint16) {
		a := to.Addr().Unmap()
		c := Channel{Local: local, Remote: netip.PrefixFrom(a, a.BitLen()), Protocol: protoTCP, LocalPort: localPort, RemotePort: to.Port()}
		if slices.ContainsFunc(all, func(r netip.Prefix) bool { return r.Contains(a) }) && !slices.Contains(allow, c) {
			allow = append(allow, c)
		}
	}
	for _, k := range n.IPsec.KMEs {
		if to, ok := addressOf(k.URL); ok {
			tcp(netip.Addr{}, to, 0)
		}
	}
	if n.KMS == nil {
		return remotes, allow
	}
	for _, to := range n.KMS.others() {
		own := n.KMS.Type1Local(to)
		tcp(own, to, 0)
		tcp(own, netip.AddrPortFrom(to.Addr(), 0), n.KMS.Type1Listen.Port())
	}
	for _, p := range n.KMS.Pairs {
		if to, ok := addressOf(p.Control); ok {
			tcp(netip.Addr{}, to, 0)
		}
		if p.FeederAddr.IsValid() && p.FeederListen.IsValid() {
			tcp(p.FeederListen.Addr().Unmap(), netip.AddrPortFrom(p.FeederAddr, 0), p.FeederListen.Port())
		}
	}
	return remotes, allow
}

// others gives every address that Type-1 connections go to: the peers' and those of
// our own node's other machines.
func (k *KMS) others() []netip.AddrPort {
	list := slices.Clone(k.Members)
	for _, p := range k.Peers {
		list = append(list, p.Addresses()...)
	}
	return list
}

// Type1Local gives our end of the channel to another machine, the zero Addr if the
// kernel is to choose it.
func (k *KMS) Type1Local(to netip.AddrPort) netip.Addr {
	own := k.Type1Listen.Addr().Unmap()
	if own.IsUnspecified() || own.IsLoopback() || own.Is4() != to.Addr().Unmap().Is4() {
		return netip.Addr{}
	}
	return own
}

// Routed gives every remote_ts of a connection with policy required that is
// reached through an XFRM interface.
func (n *Node) Routed() []netip.Prefix {
	if n.IPsec == nil {
		return nil
	}
	return n.required(true)
}

// required gives every remote_ts under policy required, of children with an
// outbound interface id or of those without.
func (n *Node) required(withIfID bool) (remotes []netip.Prefix) {
	for _, c := range n.IPsec.Connection {
		if c.Policy != Required {
			continue
		}
		for _, ch := range c.Children {
			for _, p := range ch.RemoteTS {
				if (ch.IfIDOut != 0) == withIfID && !slices.Contains(remotes, p) {
					remotes = append(remotes, p)
				}
			}
		}
	}
	return remotes
}

// addressOf gives the end of an https URL; ok is false if it names no address.
func addressOf(text string) (to netip.AddrPort, ok bool) {
	u, err := url.Parse(text)
	if err != nil {
		return to, false
	}
	a, err := netip.ParseAddr(u.Hostname())
	if err != nil {
		return to, false
	}
	port := uint64(443)
	if u.Port() != "" {
		if port, err = strconv.ParseUint(u.Port(), 10, 16); err != nil {
			return to, false
		}
	}
	return netip.AddrPortFrom(a, uint16(port)), true
}
