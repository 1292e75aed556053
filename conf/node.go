package conf

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// Node is the configuration of qipsecd. At least one of KMS and IPsec is there.
type Node struct {
	File     string // the config itself, absolute; empty if it was parsed from text
	Name     string // [node] name
	StateDir string // inventory; 0700
	RootFile string // secret that opens the inventory; in no backup of it
	// RootCredential is what RootFile is sealed by: the name of a systemd credential,
	// or the absolute path of a file; empty: it is not sealed. See CredentialPath.
	RootCredential string
	// Inventory is the URL of the database: sqlite:/path, in StateDir by default, or
	// postgres://...; then several machines may share it (decision 0011).
	Inventory         string
	InventoryPassword string // file with PostgreSQL's password; empty: none
	KMS               *KMS   // nil: no [kms]; keys come from KMEs of others
	IPsec             *IPsec // nil: no [ipsec]; only a key management node
	Operator          Operator
	Log               Log
}

// Operator says where the operator API listens.
type Operator struct {
	Socket string // unix socket, 0600, for root and the daemon's own user
}

// Log says how to log, on standard error.
type Log struct {
	JSON  bool
	Level slog.Level
}

// KMS is the role of a key management system: KMA and KSA.
type KMS struct {
	Type1Listen netip.AddrPort // KM channel
	Type1       pki.Files      // of the km CA
	Type2Listen netip.AddrPort // ETSI GS QKD 014 for SAEs; zero: SAEs of this process only
	Type2       pki.Files      // of the sae CA; set if Type2Listen is

	IntakeInterval  time.Duration // how often intake directories are looked at
	Lease           int           // keys of one lease
	NoticeTTL       time.Duration // how long the slave SAE has to fetch a supplied key
	RatchetInterval time.Duration // at most this long a destroyed key's data key lives
	RatchetKeys     int           // nor for more than so many leased keys
	MaxKeyAge       time.Duration // keys on disk for longer expire unused; 0: never
	MaxKeys         int           // most keys of a pool on disk: the oldest expire; 0: any number
	RetryWindow     time.Duration // an identical dec_keys is answered again for so long; 0 is the standard
	Reserve         int           // keys per peer node that only IPsec SAEs may have, and that are not given to it

	// Members are the Type-1 addresses of the other machines of this node, which
	// share its name and its inventory.
	Members []netip.AddrPort

	Peers []Peer
	Pairs []Pair
	SAEs  []SAE
}

// Peer is another node this one shares keys with.
type Peer struct {
	Name    string
	Address netip.AddrPort // its KM channel
	// More are those of its other machines, if several share its inventory.
	More []netip.AddrPort
}

// Addresses gives Address and More.
func (p Peer) Addresses() []netip.AddrPort { return append([]netip.AddrPort{p.Address}, p.More...) }

// Algorithm is how M102 compares the two ends' keys.
type Algorithm string

// The algorithms. Keys agreed with a hash never become one-time pads, because
// the hash is on record.
const (
	Poly1305 Algorithm = "poly1305"
	SHA256   Algorithm = "sha-256"
	SHA3256  Algorithm = "sha3-256"
)

// Pair is a QKD pair: two QKDEs on one link, this node feeding from one end.
type Pair struct {
	ID               uuid.UUID // also the id of the pool
	Role             key.Role
	Peer             string // node at the other end
	QKDID, PeerQKDID uuid.UUID
	Intake           string // directory of QKD-Key files
	Feeder           string // user whose files are taken: a name or a number; empty: our own
	// FeederAddr is where the QKDE's SFTP comes from and FeederListen what it calls:
	// the guard lets that pass. Zero, or a loopback address: nothing comes over the network.
	FeederAddr   netip.Addr
	FeederListen netip.AddrPort
	Algorithm    Algorithm // M102
	Control      string    // https URL of the QKDE's control interface; empty: none
}

// SAE is a consumer of keys that this node's KSA knows, local or at a peer.
type SAE struct {
	ID          string
	Node        string   // this node, or a peer
	IPsec       bool     // [ipsec] of its node: served in process there, may use the reserve
	Peers       []string // of a local SAE: those it may share keys with
	Rate        int      // keys a second, 0: no limit
	Burst       int      // keys at once; 0: one second's
	NotFound404 bool     // it needs 404, not the standard's 400, for a key that is not there
}

// IPsec is the role of an SAE that keys tunnels through charon.
type IPsec struct {
	VICI       string    // charon's VICI socket
	Plugin     string    // socket for charon's qipsec plugin
	Files      pki.Files // IKE certificate; CA: who may authenticate
	Guard      bool      // block policies for every required connection
	Reserve    int       // keys of each pool kept for rekeyings that cannot wait
	KMEs       []KME
	Connection []Connection
}

// KME is a key supplier of another maker, spoken to over ETSI GS QKD 014.
type KME struct {
	Name   string
	URL    string // https://host[:port], and a path if its API is not at the standard's
	Files  pki.Files
	TLS12  bool // it cannot speak TLS 1.3
	UseGET bool // it does not take POST; every GET uses a fresh connection
	// Class of its keys, which the standard has no field for; both ends of a
	// tunnel must be told the same.
	Class key.Class
	// StringIDs: it takes {"key_IDs":["..."]} instead of the standard's objects.
	StringIDs bool
}

// Local is the KME name of this node's own KSA.
const Local = "local"

// Policy is what a connection does without quantum keys.
type Policy string

// The policies.
const (
	Required Policy = "required" // fails closed
	Optional Policy = "optional" // falls back to stock IKEv2, with an alarm
	Off      Policy = "off"      // left to charon alone
)

// Mix is what goes into the keys of an SA.
type Mix string

// The mixes.
const (
	Hybrid Mix = "hybrid" // the quantum key and charon's KEYMAT
	QKD    Mix = "qkd"    // the quantum key alone, as in the paper
)

// Connection is one IKEv2 peer and what is protected towards it.
type Connection struct {
	Name              string
	LocalSAE, PeerSAE string
	KME               string // Local, or the name of a KME
	Policy            Policy
	Mix               Mix
	MinClass          key.Class // keys of a lesser class are refused
	AllowRelayedOnly  bool      // lets Mix QKD use relayed keys
	// Hard limits of one SA; a count of 0: none.
	MaxKeyAge                  time.Duration
	MaxKeyBytes, MaxKeyPackets uint64

	LocalAddr, RemoteAddr netip.Addr
	LocalID, RemoteID     string // IKE identities; RemoteID is the one bound to PeerSAE
	Proposals             []string
	RekeyTime, ReauthTime time.Duration // of the IKE_SA; a ReauthTime of 0: never
	DPDDelay              time.Duration
	MOBIKE, Encap         bool
	Children              []Child
}

// Start says what brings a CHILD_SA up.
type Start string

// The starts.
const (
	StartNone Start = "none" // the peer or the operator
	StartNow  Start = "now"  // this end, and again whenever it is down
	StartTrap Start = "trap" // traffic
)

// Child is one CHILD_SA of a connection.
type Child struct {
	Name              string
	LocalTS, RemoteTS []netip.Prefix
	ESPProposals      []string
	Transport         bool // transport mode; else tunnel
	Start             Start
	RekeyTime         time.Duration // of the CHILD_SA: a fresh quantum key each time
	RekeyBytes        uint64        // likewise; 0: none
	RekeyPackets      uint64        // likewise
	ReplayWindow      int           // packets

	MarkIn, MarkOut       Mark   // of the packets that are protected; zero: any
	SetMarkIn, SetMarkOut Mark   // put on packets after decryption, after encryption; zero: none
	IfIDIn, IfIDOut       uint32 // of an XFRM interface; 0: none
	// What tunnel mode copies between the inner and the outer header.
	CopyDF, CopyECN bool
	CopyDSCP        CopyDSCP
}

// Mark is a netfilter mark: the bits of Mask have Value.
type Mark struct{ Value, Mask uint32 }

// CopyDSCP is in which directions tunnel mode copies the DSCP field.
type CopyDSCP string

// The directions.
const (
	DSCPOut  CopyDSCP = "out" // from the inner to the outer header
	DSCPIn   CopyDSCP = "in"  // from the outer to the inner header
	DSCPBoth CopyDSCP = "yes"
	DSCPNo   CopyDSCP = "no"
)
