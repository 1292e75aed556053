package ike

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/q-ipsec/q-ipsec/ike/vici"
	"github.com/q-ipsec/q-ipsec/sad"
)

// maxCredential is the largest certificate or key file that is read, in bytes.
const maxCredential = 64 * 1024

// load gives charon one connection with its credentials.
func (m *Manager) load(ctx context.Context, l *link, c Connection) error {
	conn, err := viciConn(c)
	if err != nil {
		return err
	}
	conn.Unique = m.unique(c)
	if _, done := l.keys[c.LocalKey]; !done {
		data, err := readPrivate(c.LocalKey)
		if err != nil {
			return err
		}
		id, err := l.client.LoadKey(ctx, data)
		clear(data)
		if err != nil {
			return fmt.Errorf("private key %s: %w", c.LocalKey, err)
		}
		l.keys[c.LocalKey] = id
	}
	return l.client.LoadConn(ctx, conn)
}

// unique is charon's policy for several IKE_SAs between two identities. Unless told
// otherwise an IKE_SA says INITIAL_CONTACT if it is the first, and the peer then ends
// all others of the two identities, whichever connection they are of. When several
// connections start at once each of them is the first, so they must not say it; what
// a crash leaves at the peer is then for DPD to end.
func (m *Manager) unique(c Connection) string {
	ends := func(c Connection) string {
		local, _ := ParseIdentity(c.LocalID) // Validate has read them
		remote, _ := ParseIdentity(c.RemoteID)
		return identityText(local) + " " + identityText(remote)
	}
	if c.Unique == "" && slices.ContainsFunc(m.o.Connections, func(o Connection) bool { return o.Name != c.Name && ends(o) == ends(c) }) {
		return "never"
	}
	return c.Unique
}

// viciConn is the connection in charon's terms. start_action is never start:
// the Manager initiates, when the plugin is known to be there.
func viciConn(c Connection) (vici.Conn, error) {
	v := vici.Conn{
		Name: c.Name, LocalAddrs: texts(c.LocalAddrs), RemoteAddrs: texts(c.RemoteAddrs),
		Proposals: or(c.Proposals, defaultIKEProposals), Unique: c.Unique,
		RekeyTime: c.IKERekeyTime, ReauthTime: c.ReauthTime, DPDDelay: c.DPDDelay, Encap: c.Encap, MOBIKE: c.MOBIKE,
		Local: vici.Auth{ID: c.LocalID}, Remote: vici.Auth{ID: c.RemoteID},
	}
	if v.RekeyTime == 0 {
		v.RekeyTime = defaultIKERekey
	}
	for path, to := range map[string]*[][]byte{
		c.LocalCert: &v.Local.Certs, c.RemoteCert: &v.Remote.Certs, c.RemoteCA: &v.Remote.CACerts,
	} {
		if path == "" {
			continue
		}
		data, err := readBounded(path)
		if err != nil {
			return vici.Conn{}, fmt.Errorf("certificate %s: %w", path, err)
		}
		*to = append(*to, data)
	}
	for _, ch := range c.Children {
		v.Children = append(v.Children, viciChild(c, ch))
	}
	return v, nil
}

func viciChild(c Connection, ch Child) vici.Child {
	v := vici.Child{
		Name: ch.Name, LocalTS: texts(ch.LocalTS), RemoteTS: texts(ch.RemoteTS),
		Proposals: or(ch.Proposals, defaultESPProposals), Mode: "tunnel",
		RekeyTime: ch.RekeyTime, LifeBytes: c.MaxKeyBytes, LifePackets: c.MaxKeyPackets,
		RekeyBytes: softLimit(ch.RekeyBytes, c.MaxKeyBytes), RekeyPackets: softLimit(ch.RekeyPackets, c.MaxKeyPackets),
		Trap: ch.Start == StartTrap, ReplayWindow: ch.ReplayWindow,
		MarkIn: markText(ch.MarkIn), MarkOut: markText(ch.MarkOut), SetMarkIn: markText(ch.SetMarkIn), SetMarkOut: markText(ch.SetMarkOut),
		IfIDIn: ch.IfIDIn, IfIDOut: ch.IfIDOut,
		NoCopyDF: ch.NoCopyDF, NoCopyECN: ch.NoCopyECN, CopyDSCP: ch.CopyDSCP,
	}
	if ch.Transport {
		v.Mode = "transport"
	}
	if v.RekeyTime == 0 {
		v.RekeyTime = defaultRekey
	}
	if c.MaxKeyAge > 0 {
		// Rekeyed in time before the hard limit that add_sa enforces.
		v.LifeTime = c.MaxKeyAge
		v.RekeyTime = min(v.RekeyTime, c.MaxKeyAge-c.MaxKeyAge/5)
	}
	return v
}

// softLimit is the count at which an SA with a hard limit is rekeyed; 0 is none.
func softLimit(soft, hard uint64) uint64 {
	if hard > 0 && (soft == 0 || soft >= hard) {
		return hard - hard/5
	}
	return soft
}

// markText is a mark as charon reads it; "" for none.
func markText(m sad.Mark) string {
	if m == (sad.Mark{}) {
		return ""
	}
	return fmt.Sprintf("%#x/%#x", m.Value, m.Mask)
}

// readPrivate reads a private key, whose file must be closed to others; the
// caller clears it.
func readPrivate(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("private key %s is open to others (mode %04o): chmod 0600", path, fi.Mode().Perm())
	}
	data, err := readBounded(path)
	if err != nil {
		return nil, fmt.Errorf("private key %s: %w", path, err)
	}
	return data, nil
}

func readBounded(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxCredential {
		return nil, fmt.Errorf("not a regular file of at most %d bytes", maxCredential)
	}
	return os.ReadFile(path)
}

// texts gives addresses or prefixes as charon reads them; nil for none.
func texts[T interface{ String() string }](list []T) []string {
	var out []string
	for _, x := range list {
		out = append(out, x.String())
	}
	return out
}

func or(list, otherwise []string) []string {
	if len(list) > 0 {
		return list
	}
	return otherwise
}

func joinAddrs(a []netip.Addr) string { return strings.Join(texts(a), ",") }
