// Package plugin is qipsecd's end of the socket on which charon's qipsec
// plugin (ike/charon, C) asks what to do: the messages, their codec and the
// server. It holds no policy; a Handler decides.
package plugin

import (
	"context"
	"net/netip"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Instance names one run of one charon: 16 random bytes that the plugin draws
// when charon loads it. IKE_SA ids start anew with each Instance.
type Instance [16]byte

// Hello is what the plugin says of itself: Instance and ABI on every
// connection, the rest too. Handler.Hello sees it once per standing connection.
type Hello struct {
	Instance  Instance
	ABI       uint16 // version of this protocol; a different one is refused
	Version   string // strongSwan version the plugin was compiled against
	Mediation bool   // compiled with -DME; the plugin has compared it with charon's build
	PID       int    // charon's, from the socket's peer credentials
	UID       int    // likewise; only root and qipsecd's own user are served
	Off       string // charon.plugins.qipsec.off as it is: connections that never reach the socket
}

// SA is a reference to one IKE_SA of one charon.
type SA struct {
	Instance Instance
	UID      uint32 // charon's unique id of the IKE_SA
}

// Exchange is the IKEv2 exchange type in which a CHILD_SA is made.
type Exchange uint8

// The two exchanges that make CHILD_SAs (RFC 7296 section 3.1). The key of a
// first CHILD_SA is asked for in IKE_SA_INIT and used in IKE_AUTH.
const (
	IKEAuth       Exchange = 35
	CreateChildSA Exchange = 36
)

// Identity is an IKE identity as in an ID payload: type byte, then its data
// (RFC 7296 section 3.5).
type Identity struct {
	Type uint8
	Data []byte
}

// GetKey asks, as initiator of an exchange, for a Key-ID to carry in Ni.
type GetKey struct {
	SA         SA
	Connection string
	Peer       netip.Addr
}

// Policy is what the plugin must know of a connection's policy.
type Policy uint8

// The policies. Off never reaches the socket (charon.plugins.qipsec.off).
const (
	Required Policy = 1
	Optional Policy = 2
)

// GetKeyAnswer carries the reserved Key-ID. A zero KeyID under Optional means:
// no key now, use a stock nonce and fall back with an alarm.
type GetKeyAnswer struct {
	KeyID  key.ID
	Policy Policy
}

// Sent says that Ni with KeyID is about to leave in a message that sets up a
// CHILD_SA. From its answer on the key is spent.
type Sent struct {
	SA         SA
	Connection string
	KeyID      key.ID
	SPIi, SPIr [8]byte  // of the IKE_SA the exchange runs in, in its order
	Ni         []byte   // whole nonce, 56 bytes
	Initiator  Identity // of the exchange initiator: in IKE_AUTH the IDi payload of the first message
	Exchange   Exchange
}

// SentAnswer carries C_i, which the plugin adds to the message.
type SentAnswer struct{ ConfirmI [32]byte }

// Chunks are the four keys charon derived (KEYMAT), or the four tokens that
// the plugin puts in their place, or the final keys. In KEYMAT order: encr
// i->r, integ i->r, encr r->i, integ r->i; i is the exchange initiator.
type Chunks struct{ EncrI, IntegI, EncrR, IntegR *key.Material } // nil where the algorithm has none

// Wipe wipes all four.
func (c Chunks) Wipe() {
	for _, m := range c.list() {
		m.Wipe()
	}
}

func (c Chunks) list() [4]*key.Material {
	return [4]*key.Material{c.EncrI, c.IntegI, c.EncrR, c.IntegR}
}

// Transforms are the ESP transforms charon negotiated (IANA IKEv2 numbers).
type Transforms struct {
	Protocol uint8 // 3 ESP, 2 AH
	Encr     uint16
	EncrBits uint16 // key length in bits, 0 if fixed
	Integ    uint16 // 0 for AEAD
	ESN      bool
}

// Bind asks, after derive_child_keys, whether a CHILD_SA may be made, and
// hands over everything its keys depend on.
type Bind struct {
	SA         SA
	Connection string
	Responder  bool   // we answer the exchange: fetch the key by its ID
	KeyID      key.ID // zero: Ni carries none
	Ni, Nr     []byte
	SPIi, SPIr [8]byte
	Initiator  Identity // of the exchange initiator, authenticated
	Replier    Identity // of the exchange responder, authenticated
	FirstIDi   Identity // IDi payload of the first IKE_AUTH message; equals Initiator in CREATE_CHILD_SA
	Exchange   Exchange
	Transforms Transforms
	Keymat     Chunks // the handler owns and wipes them
	Token      Chunks // likewise; add_sa shows the same bytes again
	Confirm    []byte // C_i (responder) or C_r (initiator), 32 bytes; nil if missing
	PeerSpeaks bool   // the support notify was seen in IKE_SA_INIT
}

// BindAnswer lets the CHILD_SA go on. At the responder ConfirmR is what the
// plugin adds to its answer; nil where there is none (optional, no key).
type BindAnswer struct{ ConfirmR []byte }

// AddSA is charon's kernel-interface add_sa, with the token for its keys.
type AddSA struct {
	SA         SA // of the IKE_SA that derived the token
	Connection string
	Src, Dst   netip.AddrPort // ports are those of UDP encapsulation
	SPI        uint32         // host order
	Protocol   uint8          // IP protocol: 50 ESP, 51 AH
	Mark       Mark
	IfID       uint32
	ReqID      uint32
	Mode       uint8 // charon's: 1 transport, 2 tunnel, 3 beet
	SrcTS      []Selector
	DstTS      []Selector
	Lifetime   Lifetime
	EncrAlg    uint16 // IANA
	IntegAlg   uint16
	Token      *key.Material // enc_key | int_key as charon gave them; the handler owns and wipes it
	EncrLen    int           // bytes of Token that are enc_key
	Window     uint32        // replay window in packets
	TFC        uint32
	IPComp     uint16 // non-zero: refused
	Encap      bool
	Offload    uint8 // non-zero: refused
	SetMark    Mark
	Label      bool // a security label is set: refused
	ESN        bool
	CopyDF     bool
	CopyECN    bool
	CopyDSCP   uint8 // charon's enum: 0 out_only, 1 in_only, 2 yes, 3 no
	Initiator  bool  // charon's flag: we initiated the exchange
	Inbound    bool
	Update     bool // replaces a larval SA
}

// Selector is one traffic selector (RFC 7296 section 3.13.1): an address range,
// a protocol (0 any) and a port range (0 to 65535 any; for ICMP type and code).
type Selector struct {
	From, To         netip.Addr
	Protocol         uint8
	FromPort, ToPort uint16
}

// Prefix is the smallest prefix that holds the whole range, as charon gives it
// to the kernel.
func (s Selector) Prefix() netip.Prefix {
	bits := s.From.BitLen()
	for bits > 0 {
		if p := netip.PrefixFrom(s.From, bits); p.Contains(s.To) {
			return p.Masked()
		}
		bits--
	}
	return netip.PrefixFrom(s.From, bits).Masked()
}

// Mark is an XFRM mark with its mask.
type Mark struct{ Value, Mask uint32 }

// Lifetime limits an SA; zero is no limit. Rekey is soft, Life is hard.
type Lifetime struct {
	TimeLife, TimeRekey       uint64 // seconds
	BytesLife, BytesRekey     uint64
	PacketsLife, PacketsRekey uint64
}

// AddSAVerdict is the answer to AddSA.
type AddSAVerdict uint8

// The verdicts. After Installed the plugin acknowledges; only then does the
// server call Commit, and charon sees SUCCESS only after that.
const (
	Installed AddSAVerdict = 1
	UseKey    AddSAVerdict = 2 // charon installs it itself with Keys
)

// AddSAAnswer is the verdict, with the final keys for UseKey (the server wipes
// them once sent).
type AddSAAnswer struct {
	Verdict AddSAVerdict
	Encr    *key.Material
	Integ   *key.Material
}

// SAID names an SA in the kernel's SAD.
type SAID struct {
	Src, Dst netip.AddrPort
	SPI      uint32
	Protocol uint8
	Mark     Mark
	IfID     uint32
}

// Counters are what query_sa tells charon.
type Counters struct {
	Bytes, Packets uint64
	LastUse        time.Duration // since boot (CLOCK_MONOTONIC), 0 if never used
}

// UpdateSA moves an SA to new addresses or ports (MOBIKE, NAT mapping change).
type UpdateSA struct {
	ID              SAID
	NewSrc, NewDst  netip.AddrPort
	Encap, NewEncap bool
}

// Ignored says that the plugin ignored an IKE_SA_INIT answer, because it does
// not announce Q-IPsec under Required. Nothing of that answer is authenticated:
// anyone who sees our request can forge it.
type Ignored struct {
	SA         SA
	Connection string
	Peer       netip.Addr // the answer's source
}

// Handler decides what the plugin asks. Every method must return by ctx's end,
// which is the plugin's deadline; an error is sent as REFUSE with its text,
// which therefore names no secret. Methods are called at the same time from
// many connections. Every SA that they name is of an Instance whose Hello was
// accepted and whose Gone has not been called.
type Handler interface {
	// Hello greets a charon, at its start and after each restart of qipsecd.
	Hello(ctx context.Context, h Hello) error
	GetKey(ctx context.Context, m GetKey) (GetKeyAnswer, error)
	Sent(ctx context.Context, m Sent) (SentAnswer, error)
	Bind(ctx context.Context, m Bind) (BindAnswer, error)
	// AddSA puts the SA in the SAD. The server then waits for the plugin's ACK
	// and calls Commit, or Rollback if it does not come in time.
	AddSA(ctx context.Context, m AddSA) (AddSAAnswer, error)
	Commit(ctx context.Context, id SAID) error
	Rollback(ctx context.Context, id SAID)
	QuerySA(ctx context.Context, id SAID) (Counters, error)
	UpdateSA(ctx context.Context, m UpdateSA) error
	End(ctx context.Context, sa SA)         // the IKE_SA is gone; what was not Sent is free again
	Ignored(ctx context.Context, m Ignored) // at most one per IKE_SA_INIT request
	Gone(i Instance)                        // the plugin's standing connection broke
}
