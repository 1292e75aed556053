package conf

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/identity"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// Names of connections and children go into VICI messages and log lines.
var vpnName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$`)

func checkVPNName(s string) error {
	if !vpnName.MatchString(s) {
		return fmt.Errorf("want 1 to 32 letters, digits, '_' or '-', a letter or digit first")
	}
	return nil
}

func (r *reader) ipsec(raw *rawIPsec, n *Node) *IPsec {
	v := &IPsec{
		VICI:   r.socket("ipsec.vici", raw.VICI, defaultVICI),
		Plugin: r.socket("ipsec.plugin", raw.Plugin, defaultPlugin),
		Files:  r.files("ipsec", rawFiles{raw.CA, raw.Cert, raw.Key}),
		Guard:  raw.Guard == nil || *raw.Guard,

		Reserve: int(r.number("ipsec.rekey_reserve", raw.Reserve, 32, 1, 1_000_000)),
	}
	sockets := map[string]string{n.Operator.Socket: "operator.socket"}
	r.unique("ipsec.vici", v.VICI, sockets)
	r.unique("ipsec.plugin", v.Plugin, sockets)
	kmes := map[string]string{}
	if n.KMS != nil {
		kmes[Local] = "[kms]"
	}
	for i, k := range raw.KME {
		at := fmt.Sprintf("ipsec.kme[%d].", i)
		kme := KME{
			Name:      need(r, at+"name", k.Name, checked(checkVPNName)),
			URL:       need(r, at+"url", k.URL, parseHTTPS),
			Files:     r.files(strings.TrimSuffix(at, "."), k.rawFiles),
			TLS12:     k.TLS12,
			UseGET:    k.UseGET,
			StringIDs: k.StringIDs,
			Class:     parse(r, at+"class", k.Class, key.Relayed, key.ParseClass),
		}
		if kme.Name == Local {
			r.fault(at+"name", "%q is this node's own KSA", Local)
		}
		r.unique(at+"name", kme.Name, kmes)
		v.KMEs = append(v.KMEs, kme)
	}
	if len(raw.Connection) == 0 {
		r.fault("ipsec.connection", "is missing: [ipsec] without a connection does nothing")
	}
	names, children, callers := map[string]string{}, map[string]string{}, map[string]string{}
	for i := range raw.Connection {
		at := fmt.Sprintf("ipsec.connection[%d].", i)
		c := r.connection(at, &raw.Connection[i], children)
		r.unique(at+"name", c.Name, names)
		if sae, ok := callers[c.KME]; !ok {
			callers[c.KME] = c.LocalSAE
		} else if sae != c.LocalSAE && c.KME != Local {
			r.fault(at+"local_sae", "%q: at KME %q the certificate is that of one SAE, and another connection says it is %q", c.LocalSAE, c.KME, sae)
		}
		if _, ok := kmes[c.KME]; !ok {
			r.fault(at+"kme", "%q is no [[ipsec.kme]]%s", c.KME, map[bool]string{true: ", and there is no [kms]"}[c.KME == Local && n.KMS == nil])
		} else if c.KME == Local && c.Policy != Off && n.Name != "" {
			r.localSAEs(at, c, n)
		}
		v.Connection = append(v.Connection, c)
	}
	r.equalEnds(v.Connection)
	r.sharedTraffic(v.Connection)
	if v.Guard {
		r.routedTraffic(&Node{IPsec: v})
		r.type1Beside(&Node{KMS: n.KMS, IPsec: v})
		r.feederBeside(&Node{KMS: n.KMS, IPsec: v})
	}
	return v
}

// type1Beside refuses a type1_listen without an address where a peer lies in a
// protected network: the guard lets Type-1 pass before charon's policies only if
// it knows both ends, and a tunnel that carried it at one end alone would cut it.
func (r *reader) type1Beside(n *Node) {
	if n.KMS == nil || !n.KMS.Type1Listen.Addr().IsUnspecified() {
		return
	}
	protected := append(n.required(true), n.required(false)...)
	for _, to := range n.KMS.others() {
		if a := to.Addr().Unmap(); slices.ContainsFunc(protected, func(r netip.Prefix) bool { return r.Contains(a) }) {
			r.fault("kms.type1_listen", "%v: %v, which Type-1 goes to, lies in a remote_ts: name the address that this node has towards it", n.KMS.Type1Listen, a)
		}
	}
}

// feederBeside refuses a pair whose QKDE has a user here, and so delivers over SFTP,
// but no address where everything is protected: the keys for the tunnel could only
// come through the tunnel.
func (r *reader) feederBeside(n *Node) {
	if n.KMS == nil || !slices.ContainsFunc(n.required(false), func(p netip.Prefix) bool { return p.Bits() == 0 }) {
		return
	}
	for i, p := range n.KMS.Pairs {
		if p.Feeder != "" && !p.FeederAddr.IsValid() {
			r.fault(fmt.Sprintf("kms.pair[%d].feeder_addr", i), "is missing: a remote_ts is everything, so the guard would keep the files of %q out unless it knows where they come from; 127.0.0.1 is this machine", p.Feeder)
		}
	}
}

// routedTraffic refuses what the guard cannot hold for an XFRM interface: a
// network that is everything (its blackhole route would lose against the default
// route), and one whose packets the guard's rules for another child would drop
// before they are in the interface.
func (r *reader) routedTraffic(n *Node) {
	plain := n.required(false)
	for i, c := range n.IPsec.Connection {
		for k, ch := range c.Children {
			if c.Policy != Required || ch.IfIDOut == 0 {
				continue
			}
			at := fmt.Sprintf("ipsec.connection[%d].child[%d].if_id_out", i, k)
			for _, p := range ch.RemoteTS {
				if p.Bits() == 0 {
					r.fault(at, "the guard cannot tell remote_ts %v behind an XFRM interface from the default route: name the networks, or set guard = false", p)
				} else if j := slices.IndexFunc(plain, p.Overlaps); j >= 0 {
					r.fault(at, "the guard drops what goes to %v, remote_ts of a child without if_id_out, and so what goes to %v before it reaches the XFRM interface", plain[j], p)
				}
			}
		}
	}
}

// equalEnds refuses what charon as responder cannot tell apart. It takes the first
// connection that has the addresses and identities of both ends, whatever the
// children, and in it the child whose selectors fit best, whatever its mode and marks.
// One that is never taken would be keyed under another one's policy and name.
func (r *reader) equalEnds(list []Connection) {
	type ends struct {
		local, remote     netip.Addr
		localID, remoteID string
	}
	seen := map[ends]string{}
	for i, c := range list {
		if e := (ends{c.LocalAddr, c.RemoteAddr, identityKey(c.LocalID), identityKey(c.RemoteID)}); e.local.IsValid() && e.remote.IsValid() && e.localID != "" && e.remoteID != "" {
			if first, ok := seen[e]; ok {
				r.fault(fmt.Sprintf("ipsec.connection[%d].remote_id", i), "addresses and identities of both ends are those of connection %q: charon would take that one for what the peer begins; make the children those of one connection, or give one of the ends an identity for each", first)
			} else {
				seen[e] = c.Name
			}
		}
		for k, ch := range c.Children {
			j := slices.IndexFunc(c.Children[:k], func(o Child) bool {
				return samePrefixes(o.LocalTS, ch.LocalTS) && samePrefixes(o.RemoteTS, ch.RemoteTS)
			})
			if j >= 0 && len(ch.LocalTS) > 0 && len(ch.RemoteTS) > 0 {
				r.fault(fmt.Sprintf("ipsec.connection[%d].child[%d].remote_ts", i, k), "local_ts and remote_ts are those of child %q, and charon tells children by nothing else when the peer begins", c.Children[j].Name)
			}
		}
	}
}

// samePrefixes compares without regard to the order.
func samePrefixes(a, b []netip.Prefix) bool {
	missing := func(from []netip.Prefix) func(netip.Prefix) bool {
		return func(p netip.Prefix) bool { return !slices.Contains(from, p) }
	}
	return !slices.ContainsFunc(a, missing(b)) && !slices.ContainsFunc(b, missing(a))
}

// sharedTraffic refuses a connection that may run without a quantum key and
// covers traffic of one with policy required: while that one is down, or if both
// have the same selectors at any time, the kernel would take the other's SAs, and
// the guard, whose rules rank below every connection's, would not see it.
func (r *reader) sharedTraffic(list []Connection) {
	for i, c := range list {
		if c.Policy == Required {
			continue
		}
		for k, ch := range c.Children {
			for _, other := range list {
				if other.Policy == Required && slices.ContainsFunc(other.Children, func(o Child) bool {
					return overlap(ch.LocalTS, o.LocalTS) && overlap(ch.RemoteTS, o.RemoteTS)
				}) {
					r.fault(fmt.Sprintf("ipsec.connection[%d].child[%d].remote_ts", i, k),
						"shares traffic with connection %q, whose policy is %q: it would pass here without a quantum key", other.Name, Required)
				}
			}
		}
	}
}

func overlap(a, b []netip.Prefix) bool {
	return slices.ContainsFunc(a, func(p netip.Prefix) bool { return slices.ContainsFunc(b, p.Overlaps) })
}

// localSAEs checks that our own KSA knows both SAEs of a connection.
func (r *reader) localSAEs(at string, c Connection, n *Node) {
	find := func(field, id string, local bool) {
		if id == "" {
			return
		}
		for _, s := range n.KMS.SAEs {
			if s.ID != id {
				continue
			}
			if (s.Node == n.Name) != local {
				r.fault(at+field, "SAE %q is at node %q", id, s.Node)
			}
			if local && c.PeerSAE != "" && !slices.Contains(s.Peers, c.PeerSAE) {
				r.fault(at+field, "SAE %q may share no keys with %q: add it to its peers", id, c.PeerSAE)
			}
			if !s.IPsec {
				r.fault(at+field, "SAE %q is not marked ipsec = true", id)
			}
			return
		}
		r.fault(at+field, "%q is no [[kms.sae]]", id)
	}
	find("local_sae", c.LocalSAE, true)
	find("peer_sae", c.PeerSAE, false)
}

func (r *reader) connection(at string, raw *rawConnection, children map[string]string) Connection {
	c := Connection{
		Name:             need(r, at+"name", raw.Name, checked(checkVPNName)),
		LocalSAE:         need(r, at+"local_sae", raw.LocalSAE, checked(pki.CheckSAE)),
		PeerSAE:          need(r, at+"peer_sae", raw.PeerSAE, checked(pki.CheckSAE)),
		KME:              parse(r, at+"kme", raw.KME, Local, func(s string) (string, error) { return s, nil }),
		Policy:           parse(r, at+"policy", raw.Policy, Required, oneOf(Required, Optional, Off)),
		Mix:              parse(r, at+"mix", raw.Mix, Hybrid, oneOf(Hybrid, QKD)),
		AllowRelayedOnly: raw.AllowRelayedOnly,
		MaxKeyAge:        parse(r, at+"max_key_age", raw.MaxKeyAge, defaultMaxKeyAge, seconds(10*time.Second, 24*time.Hour)),
		MaxKeyBytes:      uint64(r.number(at+"max_key_bytes", raw.MaxKeyBytes, 0, 0, 1<<62)),
		MaxKeyPackets:    uint64(r.number(at+"max_key_packets", raw.MaxKeyPackets, 0, 0, 1<<62)),
		LocalAddr:        need(r, at+"local_addr", raw.LocalAddr, address),
		RemoteAddr:       need(r, at+"remote_addr", raw.RemoteAddr, address),
		LocalID:          need(r, at+"local_id", raw.LocalID, checked(checkIdentity)),
		RemoteID:         need(r, at+"remote_id", raw.RemoteID, checked(checkIdentity)),
		Proposals:        r.words(at+"proposals", raw.Proposals),
		RekeyTime:        parse(r, at+"rekey_time", raw.RekeyTime, defaultIKERekey, seconds(10*time.Second, 7*24*time.Hour)),
		ReauthTime:       parse(r, at+"reauth_time", raw.ReauthTime, 0, seconds(0, 7*24*time.Hour)),
		DPDDelay:         parse(r, at+"dpd_delay", raw.DPDDelay, defaultDPD, seconds(0, time.Hour)),
		MOBIKE:           raw.MOBIKE, Encap: raw.Encap,
	}
	least := key.Relayed
	if c.Mix == QKD {
		least = key.Direct
		if c.AllowRelayedOnly {
			least = key.Relayed
		}
	}
	c.MinClass = parse(r, at+"min_class", raw.MinClass, least, key.ParseClass)
	if c.Mix == QKD && c.MinClass != 0 && c.MinClass < least {
		r.fault(at+"min_class", "mix = %q needs class %v; allow_relayed_only = true lets it use relayed keys", QKD, least)
	}
	if c.AllowRelayedOnly && c.Mix != QKD {
		r.fault(at+"allow_relayed_only", "means nothing unless mix = %q", QKD)
	}
	if c.LocalSAE != "" && c.LocalSAE == c.PeerSAE {
		r.fault(at+"peer_sae", "is local_sae itself")
	}
	if id := identityKey(c.RemoteID); id != "" && id == identityKey(c.LocalID) {
		r.fault(at+"remote_id", "is local_id itself")
	}
	if c.LocalAddr.IsValid() && c.RemoteAddr.IsValid() && c.LocalAddr.Is4() != c.RemoteAddr.Is4() {
		r.fault(at+"remote_addr", "%v and %v are of different families", c.LocalAddr, c.RemoteAddr)
	}
	if c.ReauthTime > 0 && c.ReauthTime < minReauth {
		r.fault(at+"reauth_time", "%v: want at least %v, because each takes the tunnel down for a moment; 0s is never", c.ReauthTime, minReauth)
	}
	if len(raw.Child) == 0 {
		r.fault(at+"child", "is missing: a connection protects nothing without one")
	}
	for i := range raw.Child {
		at := fmt.Sprintf("%schild[%d].", at, i)
		ch := r.child(at, &raw.Child[i], &c)
		r.unique(at+"name", ch.Name, children)
		c.Children = append(c.Children, ch)
	}
	return c
}

func (r *reader) child(at string, raw *rawChild, c *Connection) Child {
	ch := Child{
		Name:         need(r, at+"name", raw.Name, checked(checkVPNName)),
		LocalTS:      r.prefixes(at+"local_ts", raw.LocalTS),
		RemoteTS:     r.prefixes(at+"remote_ts", raw.RemoteTS),
		ESPProposals: r.words(at+"esp_proposals", raw.ESPProposals),
		Transport:    parse(r, at+"mode", raw.Mode, "tunnel", oneOf("tunnel", "transport")) == "transport",
		RekeyTime:    parse(r, at+"rekey_time", raw.RekeyTime, min(defaultChildRekey, (c.MaxKeyAge/2).Truncate(time.Second)), seconds(time.Second, 24*time.Hour)),
		RekeyBytes:   uint64(r.number(at+"rekey_bytes", raw.RekeyBytes, 0, 0, 1<<62)),
		RekeyPackets: uint64(r.number(at+"rekey_packets", raw.RekeyPackets, 0, 0, 1<<62)),
		Start:        parse(r, at+"start", raw.Start, StartNone, oneOf(StartNone, StartNow, StartTrap)),
		MarkIn:       parse(r, at+"mark_in", raw.MarkIn, Mark{}, parseMark),
		MarkOut:      parse(r, at+"mark_out", raw.MarkOut, Mark{}, parseMark),
		SetMarkIn:    parse(r, at+"set_mark_in", raw.SetMarkIn, Mark{}, parseMark),
		SetMarkOut:   parse(r, at+"set_mark_out", raw.SetMarkOut, Mark{}, parseMark),
		IfIDIn:       uint32(r.number(at+"if_id_in", raw.IfIDIn, 0, 0, maxForCharon)),
		IfIDOut:      uint32(r.number(at+"if_id_out", raw.IfIDOut, 0, 0, maxForCharon)),
		ReplayWindow: defaultReplayWindow,
		CopyDF:       raw.CopyDF == nil || *raw.CopyDF,
		CopyECN:      raw.CopyECN == nil || *raw.CopyECN,
		CopyDSCP:     parse(r, at+"copy_dscp", raw.CopyDSCP, DSCPOut, oneOf(DSCPOut, DSCPIn, DSCPBoth, DSCPNo)),
	}
	if w := raw.ReplayWindow; w != nil && *w > maxReplayWindow {
		r.fault(at+"replay_window", "%d: the kernel keeps at most %d packets in view", *w, maxReplayWindow)
	} else if w != nil && *w < 1 {
		r.fault(at+"replay_window", "%d: without a window packets could be replayed; want 1 to %d", *w, maxReplayWindow)
	} else if w != nil {
		ch.ReplayWindow = int(*w)
	}
	if ch.RekeyTime >= c.MaxKeyAge && c.MaxKeyAge > 0 {
		r.fault(at+"rekey_time", "%v is not below max_key_age, %v: the tunnel would stop before it is rekeyed", ch.RekeyTime, c.MaxKeyAge)
	}
	if c.MaxKeyBytes > 0 && ch.RekeyBytes >= c.MaxKeyBytes {
		r.fault(at+"rekey_bytes", "%d is not below max_key_bytes, %d", ch.RekeyBytes, c.MaxKeyBytes)
	}
	if c.MaxKeyPackets > 0 && ch.RekeyPackets >= c.MaxKeyPackets {
		r.fault(at+"rekey_packets", "%d is not below max_key_packets, %d", ch.RekeyPackets, c.MaxKeyPackets)
	}
	if ch.Transport {
		r.transport(at, raw, ch, c)
	}
	if len(ch.LocalTS) > 0 && len(ch.RemoteTS) > 0 && !sameFamilies(ch.LocalTS, ch.RemoteTS) {
		r.fault(at+"remote_ts", "has an address family that local_ts has not, or the other way round")
	}
	return ch
}

// transport refuses what transport mode does not have. charon would fall back
// to tunnel mode without a word where a selector is more than the end itself.
func (r *reader) transport(at string, raw *rawChild, ch Child, c *Connection) {
	own := func(field string, ts []netip.Prefix, end netip.Addr) {
		if end.IsValid() && slices.ContainsFunc(ts, func(p netip.Prefix) bool { return p != netip.PrefixFrom(end, end.BitLen()) }) {
			r.fault(at+field, "transport mode joins the two gateways themselves: want %v/%d alone", end, end.BitLen())
		}
	}
	own("local_ts", ch.LocalTS, c.LocalAddr)
	own("remote_ts", ch.RemoteTS, c.RemoteAddr)
	for _, f := range []struct {
		name string
		set  bool
	}{{"copy_df", raw.CopyDF != nil}, {"copy_ecn", raw.CopyECN != nil}, {"copy_dscp", raw.CopyDSCP != ""}} {
		if f.set {
			r.fault(at+f.name, "means nothing in transport mode: there is one IP header")
		}
	}
}

const (
	maxReplayWindow = 4096 // the kernel's XFRMA_REPLAY_ESN_MAX
	minReauth       = time.Minute
	maxForCharon    = 0xfffffffd // charon takes the two marks and interface ids above for its %unique words
)

// parseMark reads VALUE or VALUE/MASK, each as C writes numbers. A mask that is
// left out is all bits.
func parseMark(s string) (Mark, error) {
	v, mask, given := strings.Cut(s, "/")
	if !given {
		mask = "0xffffffff"
	}
	value, err1 := strconv.ParseUint(v, 0, 32)
	bits, err2 := strconv.ParseUint(mask, 0, 32)
	switch {
	case err1 != nil || err2 != nil:
		return Mark{}, errors.New("want VALUE/MASK of 32 bits each, such as 0x10/0xff")
	case bits == 0:
		return Mark{}, errors.New("the mask has no bit; leave the key out where no mark is meant")
	case value&^bits != 0:
		return Mark{}, fmt.Errorf("the value has bits that the mask has not: %#x", value&^bits)
	case value > maxForCharon:
		return Mark{}, fmt.Errorf("charon would choose a mark of its own: want at most %#x", maxForCharon)
	}
	return Mark{Value: uint32(value), Mask: uint32(bits)}, nil
}

func (r *reader) prefixes(field string, text []string) []netip.Prefix {
	if len(text) == 0 {
		r.fault(field, "is missing")
	}
	var out []netip.Prefix
	for i, s := range text {
		at := fmt.Sprintf("%s[%d]", field, i)
		p, err := netip.ParsePrefix(s)
		if err != nil {
			r.fault(at, "%q: want a prefix such as 10.1.0.0/16", s)
			continue
		}
		if p.Addr().Is4In6() {
			r.fault(at, "%q: write it as the IPv4 prefix that it is", s)
		}
		if p.Bits() == 1 {
			r.fault(at, "%q: the guard's own policies have this selector; name 0.0.0.0/0 or ::/0, or smaller networks", s)
		}
		if p != p.Masked() {
			r.fault(at, "%q has bits set behind the prefix; %v is meant?", s, p.Masked())
		}
		out = append(out, p)
	}
	return out
}

func (r *reader) words(field string, text []string) []string {
	for i, s := range text {
		if s == "" || strings.ContainsAny(s, " \t,") {
			r.fault(fmt.Sprintf("%s[%d]", field, i), "%q: want one proposal, such as aes256gcm16-x25519", s)
		}
	}
	return text
}

func sameFamilies(a, b []netip.Prefix) bool {
	families := func(ps []netip.Prefix) (four, six bool) {
		for _, p := range ps {
			four, six = four || p.Addr().Is4(), six || !p.Addr().Is4()
		}
		return four, six
	}
	a4, a6 := families(a)
	b4, b6 := families(b)
	return a4 == b4 && a6 == b6
}

func address(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("want a unicast address")
	}
	return a.Unmap(), nil
}

// checkIdentity refuses what charon would take for a wildcard, because any peer of
// the CA could then speak for the SAE, and what is no one identity.
func checkIdentity(s string) error {
	_, err := identity.Parse(s)
	return err
}

// identityKey is equal for two ways of writing one identity; charon compares names
// whatever their case.
func identityKey(s string) string {
	id, err := identity.Parse(s)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%d %s", id.Type, strings.ToLower(string(id.Data)))
}

func parseHTTPS(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("want https://HOST[:PORT], and a path if the API is not at the standard's")
	}
	return strings.TrimSuffix(u.String(), "/"), nil
}
