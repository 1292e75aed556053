package ike

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// Policy says whether a connection may run without a quantum key. The zero
// value fails closed.
type Policy uint8

// The policies of a connection.
const (
	Required Policy = iota // no CHILD_SA without a quantum key
	Optional               // falls back to IKE's own keys, with an alarm
	Off                    // the plugin leaves it alone (charon.plugins.qipsec.off names it too)
)

// String is the configuration's word.
func (p Policy) String() string {
	switch p {
	case Required:
		return "required"
	case Optional:
		return "optional"
	case Off:
		return "off"
	}
	return fmt.Sprintf("policy(%d)", uint8(p))
}

// Mix says what an SA's key is made of.
type Mix uint8

// Hybrid is secure if either the quantum key or IKE is; QKDOnly is the paper's.
const (
	Hybrid Mix = iota
	QKDOnly
)

// String is the configuration's word.
func (m Mix) String() string {
	if m == QKDOnly {
		return "qkd"
	}
	return "hybrid"
}

// StartAction says what brings a child up.
type StartAction uint8

// The start actions. StartNone leaves it to the peer or the operator.
const (
	StartNone StartAction = iota
	StartNow              // initiated when loaded and again whenever it is down
	StartTrap             // initiated by traffic
)

// Connection is one tunnel as it shall be: live types, checked by Validate.
// Times of zero take the default named beside them.
type Connection struct {
	Name                    string // [A-Za-z0-9._-]{1,32}
	LocalAddrs, RemoteAddrs []netip.Addr
	LocalID, RemoteID       string // as ParseIdentity reads them
	LocalCert, LocalKey     string // paths: certificate and its private key (PEM or DER), read at every load
	RemoteCA                string // path: only certificates under this CA are taken
	RemoteCert              string // path: only this certificate is taken; one of the two is needed
	Proposals               []string
	Unique                  string        // no (default), never, keep, replace
	IKERekeyTime            time.Duration // 4 h
	ReauthTime              time.Duration // of the IKE_SA; zero: never
	DPDDelay                time.Duration // of silence before the peer is asked; zero: never
	Encap, MOBIKE           bool
	Children                []Child

	LocalSAE, PeerSAE string // bound to LocalID and RemoteID
	KME               string // name of the key source
	Policy            Policy
	Mix               Mix
	MinClass          key.Class // derived when zero
	AllowRelayedOnly  bool      // lets Mix QKDOnly use keys that are not direct
	// Hard limits of each SA; zero: charon's only.
	MaxKeyAge                  time.Duration
	MaxKeyBytes, MaxKeyPackets uint64
}

// Child is one CHILD_SA of a Connection.
type Child struct {
	Name              string
	LocalTS, RemoteTS []netip.Prefix // empty: the tunnel's own address
	Proposals         []string
	Transport         bool
	Start             StartAction
	RekeyTime         time.Duration // 1 h; MaxKeyAge lowers it
	RekeyBytes        uint64
	RekeyPackets      uint64
	ReplayWindow      uint32 // packets, at most 4096; zero: charon's
	// Of the packets that the policies take (and, outbound, of the SA): zero is any.
	MarkIn, MarkOut sad.Mark
	// Put on each packet after decryption and after encryption; zero: none.
	SetMarkIn, SetMarkOut sad.Mark
	IfIDIn, IfIDOut       uint32 // of an XFRM interface; zero: none
	// Fields of the inner and outer header in tunnel mode.
	NoCopyDF, NoCopyECN bool
	CopyDSCP            string // out (default), in, yes, no
}

// Defaults of a Connection.
var (
	defaultIKEProposals = []string{"aes256gcm16-prfsha384-x25519", "aes256gcm16-prfsha384-ecp384"}
	defaultESPProposals = []string{"aes256gcm16-x25519", "aes256gcm16-ecp384"}
)

const (
	defaultIKERekey = 4 * time.Hour
	defaultRekey    = time.Hour
	minKeyAge       = 10 * time.Second

	maxReplayWindow = 4096       // the kernel's XFRMA_REPLAY_ESN_MAX
	charonUnique    = 0xfffffffe // charon takes marks and interface ids from here up for its %unique words
)

var (
	connName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,32}$`)
	saeID    = regexp.MustCompile(`^[A-Za-z0-9._~-]{1,64}$`)
)

// minClass is the least class that the connection's policy takes.
func (c Connection) minClass() key.Class {
	if c.Mix == QKDOnly && !c.AllowRelayedOnly {
		return key.Direct
	}
	return max(c.MinClass, key.Derived)
}

// Validate reports every fault of c.
func (c Connection) Validate() error {
	var errs []error
	bad := func(format string, a ...any) {
		errs = append(errs, fmt.Errorf("connection %s: "+format, append([]any{c.Name}, a...)...))
	}
	if !connName.MatchString(c.Name) {
		bad("name is not [A-Za-z0-9._-]{1,32}")
	}
	if _, err := ParseIdentity(c.LocalID); err != nil {
		bad("local id: %w", err)
	}
	if _, err := ParseIdentity(c.RemoteID); err != nil {
		bad("remote id: %w", err)
	}
	if c.LocalCert == "" || c.LocalKey == "" {
		bad("local certificate or its key is not named")
	}
	if c.RemoteCA == "" && c.RemoteCert == "" {
		bad("neither a CA nor a certificate of the peer is named")
	}
	switch c.Unique {
	case "", "no", "never", "keep", "replace":
	default:
		bad("unique %q is none of no, never, keep, replace", c.Unique)
	}
	if c.Policy > Off || c.Mix > QKDOnly || c.MinClass > key.Direct {
		bad("policy, mix or minimum class is unknown")
	}
	if c.Policy != Off {
		for what, id := range map[string]string{"local_sae": c.LocalSAE, "peer_sae": c.PeerSAE} {
			if !saeID.MatchString(id) {
				bad("%s %q is not an SAE id", what, id)
			}
		}
		if c.LocalSAE == c.PeerSAE {
			bad("local_sae and peer_sae are the same")
		}
	}
	if c.ReauthTime < 0 || c.DPDDelay < 0 {
		bad("reauthentication time %s or DPD delay %s is negative", c.ReauthTime, c.DPDDelay)
	}
	if c.MaxKeyAge < 0 || c.MaxKeyAge > 0 && c.MaxKeyAge < minKeyAge {
		bad("max_key_age %s is below %s", c.MaxKeyAge, minKeyAge)
	}
	if len(c.Children) == 0 {
		bad("has no child")
	}
	seen := map[string]bool{}
	for _, ch := range c.Children {
		if !connName.MatchString(ch.Name) || seen[ch.Name] {
			bad("child name %q is not [A-Za-z0-9._-]{1,32} or is used twice", ch.Name)
		}
		seen[ch.Name] = true
		for _, fault := range ch.faults(c) {
			bad("child %s: %w", ch.Name, fault)
		}
	}
	return errors.Join(errs...)
}

// faults is all that is wrong with one child of c but its name.
func (ch Child) faults(c Connection) (errs []error) {
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if ch.RekeyTime < 0 || ch.Start > StartTrap {
		bad("rekey time or start action is out of range")
	}
	if ch.ReplayWindow > maxReplayWindow {
		bad("replay window %d is above the kernel's %d packets", ch.ReplayWindow, maxReplayWindow)
	}
	for _, m := range []struct {
		name string
		mark sad.Mark
	}{{"mark_in", ch.MarkIn}, {"mark_out", ch.MarkOut}, {"set_mark_in", ch.SetMarkIn}, {"set_mark_out", ch.SetMarkOut}} {
		if m.mark.Value&^m.mark.Mask != 0 || m.mark.Value >= charonUnique {
			bad("%s %s: the value has bits outside its mask, or is one that charon replaces", m.name, markText(m.mark))
		}
	}
	if ch.IfIDIn >= charonUnique || ch.IfIDOut >= charonUnique {
		bad("interface ids %#x and up are replaced by charon", uint32(charonUnique))
	}
	switch ch.CopyDSCP {
	case "", "out", "in", "yes", "no":
	default:
		bad("copy_dscp %q is none of out, in, yes, no", ch.CopyDSCP)
	}
	if ch.Transport && !(hostsOf(ch.LocalTS, c.LocalAddrs) && hostsOf(ch.RemoteTS, c.RemoteAddrs)) {
		bad("transport mode with selectors that are not the two ends' own addresses: charon would take tunnel mode without a word")
	}
	return errs
}

// hostsOf tells whether each selector is one of the addresses.
func hostsOf(ts []netip.Prefix, addrs []netip.Addr) bool {
	return !slices.ContainsFunc(ts, func(p netip.Prefix) bool { return !p.IsSingleIP() || !slices.Contains(addrs, p.Addr()) })
}

// wirePolicy is the policy in the plugin's terms.
func (c Connection) wirePolicy() plugin.Policy {
	if c.Policy == Optional {
		return plugin.Optional
	}
	return plugin.Required
}
