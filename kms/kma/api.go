package kma

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// What Take and Claim say so that the KSA can tell it apart.
var (
	ErrEmpty     = errors.New("kma: no key is left in the lease")
	ErrNotSynced = errors.New("kma: the peer has not agreed where to go on")
	ErrGone      = errors.New("kma: key is gone: claimed before, burned, or never leased here")
	ErrNoPool    = errors.New("kma: no pool is shared with that node")
)

// Key is one master key of a lease of ours.
type Key struct {
	Pool     uuid.UUID
	Position key.Position
	ID       key.ID
	Class    key.Class
	Material *key.Material // key.MasterSize bytes; whoever has the Key owns it
}

// Level is how many keys this node may still hand out for one peer.
type Level struct {
	Active int // on disk, agreed, ours to lease
	Leased int // in memory, ready
	Synced bool
}

// Pool configures one pool of keys shared with a peer.
type Pool struct {
	ID    uuid.UUID // of a direct pool: the QKD pair's
	Peer  string    // node name
	Role  key.Role
	Class key.Class

	// The rest is for pools fed by a QKD pair.

	Intake    string    // directory of QKD-Key files; "": none
	QKD       uuid.UUID // this end's device
	PeerQKD   uuid.UUID // the other end's
	FeederUID int       // user besides our own that may write there; 0 or less: none but root
	Algorithm string    // of M102; default Poly1305
	Device    QKDE      // its control; may be nil
}

// The algorithms of M102.
const (
	Poly1305 = "poly1305"
	SHA256   = keyfile.SHA256
	SHA3     = keyfile.SHA3_256
)

// Options configure an Agent. Pools, Store, Peers and Log are needed.
type Options struct {
	Pools []Pool
	Store Store
	Peers map[string]Peer // by node name
	Log   *slog.Logger
	// Events gets what an operator should know; it must not block. May be nil.
	Events Events

	IntakeInterval  time.Duration // between looks into the intake directory; default 1 s
	MaxFileSize     int           // of a QKD-Key file, in bytes; default keyfile.DefaultMaxSize
	MaxRefused      int           // records of refused files kept per pool; default 1000
	LeaseSize       int           // keys of a lease; grows up to 8 times under load, not above MaxHeld; default 1024
	TakeWait        time.Duration // how long Take waits for a lease that is due; default 300 ms; negative: not at all
	RetryMin        time.Duration // first pause after a failed call; default 100 ms
	RetryMax        time.Duration // longest pause; default 5 s
	SilentAfter     time.Duration // failures in a row for that long are reported; default 5 s
	ValidateEvery   time.Duration // how often the master asks again for what the slave lacks; default 1 s
	NoticeLife      time.Duration // longer than any supply notice lives; default 2 h
	MaxKeyAge       time.Duration // keys that are on disk for longer expire unused; default 0, never
	MaxKeys         int           // most keys of a pool on disk, of which half are either node's: the oldest expire; default 0, any number
	ExpireEvery     time.Duration // how often the ages are looked at; default 1 min
	RatchetInterval time.Duration // default 10 min
	RatchetKeys     int           // ratchet after that many leased keys, too; default 100,000
	Reserve         int           // keys of each peer's pools that this node does not give away, and asks for if it has fewer; default none
	MaxHeld         int           // keys of one peer's leases in memory: no lease beyond it, no larger one; the same at both ends; default 100,000
}

// Events is how the agent reports what an operator should know.
type Events interface {
	// Event: code is stable, severity is "alarm", "fault" or "run" (paper, F302).
	Event(code, severity, text string, attrs ...slog.Attr)
}

// Peer is the other node's KMA (type1.Client).
type Peer interface {
	Validate(ctx context.Context, r type1.ValidateRequest) (type1.ValidateResponse, error)
	Lease(ctx context.Context, r type1.LeaseRequest) (type1.LeaseResponse, error)
	Burn(ctx context.Context, r type1.BurnRequest) (type1.BurnResponse, error)
	Sync(ctx context.Context, r type1.SyncRequest) (type1.SyncResponse, error)
	Want(ctx context.Context, r type1.WantRequest) (type1.WantResponse, error)
}

// Side says whose mark or keys are meant.
type Side uint8

// The two sides of a pool; the numbers are the store's.
const (
	Own   Side = 1
	Other Side = 2
)

// Store is the inventory as the agent needs it; docs/architecture.md has the
// contract of each method. Field for field these types are the store's.
type Store interface {
	Generation() uint64
	RaiseGeneration(ctx context.Context, above uint64) (uint64, error)
	EnsurePool(ctx context.Context, id uuid.UUID, peer string, role key.Role, class key.Class) error
	Pool(ctx context.Context, id uuid.UUID) (PoolInfo, error)
	PutBlock(ctx context.Context, b Block) error
	Blocks(ctx context.Context, pool uuid.UUID) ([]BlockInfo, error)
	Activate(ctx context.Context, pool uuid.UUID, seq uint64) error
	Destroy(ctx context.Context, pool uuid.UUID, seq uint64, end key.State, why string) error
	NextLease(ctx context.Context, pool uuid.UUID, most int) (mark key.Position, n int, err error)
	Advance(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, purpose string, generation uint64) error
	AdoptMark(ctx context.Context, pool uuid.UUID, side Side, mark key.Position) (int, error)
	Expire(ctx context.Context, pool uuid.UUID, side Side, mark key.Position, generation uint64) (int, error)
	Load(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position) ([]LeasedKey, error)
	LoadRaw(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position) ([]LeasedKey, error)
	Bind(ctx context.Context, pool uuid.UUID, side Side, list ...key.Binding) error
	Settle(ctx context.Context, pool uuid.UUID, side Side, use key.RawUse, end key.RawEnd, why string) error
	Record(ctx context.Context, e []History) error
	Ratchet(ctx context.Context) error
}

// PoolInfo is a pool's state on disk; counts are of keys above the marks.
type PoolInfo struct {
	ID                          uuid.UUID
	Peer                        string
	Role                        key.Role
	Class                       key.Class
	NewestSeq                   uint64
	Mark, PeerMark              key.Position
	PeerGeneration              uint64
	Received, Active, OwnActive int
}

// Block is one QKD-Key file's keys on their way into the store.
type Block struct {
	Pool       uuid.UUID
	Seq        uint64
	Class      key.Class
	NoPad      bool
	Keys       *key.Material
	IDs        []key.ID
	TagM, TagS [16]byte
	Digest     [32]byte
	Algorithm  string
	Bytes      int
}

// BlockInfo is what the store tells of a block.
type BlockInfo struct {
	Seq        uint64
	State      key.State
	Class      key.Class
	Count      int
	Left       int
	TagM, TagS [16]byte
	Digest     [32]byte
	Algorithm  string
	Bytes      int
	NoPad      bool
	Age        time.Duration // since it was taken in, by a clock that never goes back
}

// LeasedKey is one key that Load moved to memory.
type LeasedKey struct {
	ID       key.ID
	Position key.Position
	Class    key.Class
	NoPad    bool
	Material *key.Material
}

// History is one row of the usage history: what became of the keys from First
// to Last that belong to Side.
type History struct {
	Pool        uuid.UUID
	Side        Side
	First, Last key.Position
	State       key.State
	Count       int
	Detail      string
}

// QKDE controls a QKD device: the QKDE-KMA interface besides the key files.
type QKDE interface {
	Status(ctx context.Context) (DeviceStatus, error)
	// Generate asks for that many more bytes of key data.
	Generate(ctx context.Context, bytes int64) error
	Init(ctx context.Context) error // starts, or starts anew after an abort
	Stop(ctx context.Context) error
}

// DeviceState is what a QKD device does.
type DeviceState string

// The states of a device.
const (
	DeviceStopped DeviceState = "stopped"
	DeviceInit    DeviceState = "initialising"
	DeviceRunning DeviceState = "running"
	DeviceAborted DeviceState = "aborted" // QBER above the limit: eavesdropping or a fault
	DeviceDown    DeviceState = "link down"
)

// DeviceStatus is a QKD device's own report.
type DeviceStatus struct {
	State  DeviceState
	QBER   float64  // 0 to 1
	Rate   float64  // secret key rate, bit/s
	Alarms []string // those that stand
}
