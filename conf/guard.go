package conf

import (
	"net/netip"
	"slices"
)

const protoTCP = 6

// Channel is traffic of our own that the guard lets pass in clear, because it
// has its own protection.
type Channel struct {
	Remote                netip.Prefix
	Protocol              uint8
	LocalPort, RemotePort uint16 // 0: any
}

// Guarded says what the guard protects: every remote_ts of a connection with
// policy required, and of the KM channel what falls inside. IKE needs no rule:
// charon's sockets carry a bypass policy of their own.
func (n *Node) Guarded() (remotes []netip.Prefix, allow []Channel) {
	if n.IPsec == nil {
		return nil, nil
	}
	for _, c := range n.IPsec.Connection {
		if c.Policy != Required {
			continue
		}
		for _, ch := range c.Children {
			for _, p := range ch.RemoteTS {
				if !slices.Contains(remotes, p) {
					remotes = append(remotes, p)
				}
			}
		}
	}
	if n.KMS == nil {
		return remotes, nil
	}
	for _, p := range n.KMS.Peers {
		a := p.Address.Addr().Unmap()
		if !slices.ContainsFunc(remotes, func(r netip.Prefix) bool { return r.Contains(a) }) {
			continue
		}
		host := netip.PrefixFrom(a, a.BitLen())
		allow = append(allow,
			Channel{Remote: host, Protocol: protoTCP, RemotePort: p.Address.Port()},
			Channel{Remote: host, Protocol: protoTCP, LocalPort: n.KMS.Type1Listen.Port()})
	}
	return remotes, allow
}
