package operator

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// ErrNotFound is what the interfaces below return, wrapped, for a key,
// connection or pool that is not there; the API answers 404.
var ErrNotFound = errors.New("not found")

// ErrStandby is what Keys returns, wrapped, on a member of a site that does not have
// the inventory; the API answers 503.
var ErrStandby = errors.New("this member stands by and has no inventory: ask the one that leads (qipsec status)")

// Status is the node at a glance.
type Status struct {
	Node    string    `json:"node"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Roles   []string  `json:"roles"`          // kms, ipsec
	Site    *Site     `json:"site,omitempty"` // if the inventory can be shared
	Pools   []Pool    `json:"pools,omitempty"`
	Tunnels []Tunnel  `json:"tunnels,omitempty"`
	Alarms  []Event   `json:"alarms,omitempty"` // the latest alarms, newest first
}

// Site is this process among the members of its site, of which one leads.
type Site struct {
	State       SiteState  `json:"state"`
	Since       time.Time  `json:"since"`
	Leader      string     `json:"leader,omitempty"` // Type-1 address of the member that leads, if it is another one and answers
	LeaderSince *time.Time `json:"leader_since,omitempty"`
}

// SiteState is what a member does.
type SiteState string

// The states.
const (
	SiteLeader    SiteState = "leader"
	SiteStandby   SiteState = "standby"
	SiteUncertain SiteState = "uncertain" // it led and cannot make sure that it still does: it supplies nothing
)

// Pool is the master keys shared with one peer over one QKD pair. Counts are
// keys of both owners unless said otherwise.
type Pool struct {
	ID        uuid.UUID `json:"id"`
	Peer      string    `json:"peer"`
	Role      string    `json:"role"`
	Class     string    `json:"class"`
	Received  int       `json:"received"`   // waiting for M102
	Active    int       `json:"active"`     // agreed, on disk
	OwnActive int       `json:"own_active"` // of them, ours to lease
	Leased    int       `json:"leased"`     // ours, in memory, ready to supply
	Synced    bool      `json:"synced"`     // the peer has confirmed where both stand
	NewestSeq uint64    `json:"newest_seq"` // of the newest QKD-Key file
	OldestS   int64     `json:"oldest_s"`   // age of the oldest key on disk, in seconds
	Mark      string    `json:"mark"`       // seq/index up to which our keys are leased
	PeerMark  string    `json:"peer_mark"`  // likewise the peer's keys
	Device    *Device   `json:"device,omitempty"`
}

// Device is what the pool's QKD device says of itself, over its control.
type Device struct {
	State  string   `json:"state"` // running, stopped, initialising, aborted, link down, unreachable
	QBER   float64  `json:"qber"`  // 0 to 1
	Rate   float64  `json:"rate"`  // secret key, bit/s
	Alarms []string `json:"alarms,omitempty"`
}

// Key is where one key is in its life.
type Key struct {
	ID       key.ID    `json:"id"`
	Pool     uuid.UUID `json:"pool"`
	Position string    `json:"position"` // seq/index
	Class    string    `json:"class"`
	State    string    `json:"state"`
	Owner    string    `json:"owner"` // own, peer
}

// HistoryQuery selects usage history; zero fields select all.
type HistoryQuery struct {
	Pool  uuid.UUID
	Key   key.ID
	Limit int // at most MaxList entries, newest first; 0: 100
}

// Usage is one line of the usage history: what became of one key or of several.
type Usage struct {
	Time     time.Time `json:"time"`
	Pool     uuid.UUID `json:"pool"`
	Key      *key.ID   `json:"key,omitempty"`
	Position string    `json:"position,omitempty"`
	State    string    `json:"state"`
	Count    int       `json:"count"`
	Text     string    `json:"text,omitempty"`
}

// Event is something an operator may have to know.
type Event struct {
	Time       time.Time `json:"time"`
	Severity   string    `json:"severity"` // alarm, fault, run
	Code       string    `json:"code"`
	Source     string    `json:"source"` // kma, ksa, ike, node
	Connection string    `json:"connection,omitempty"`
	Peer       string    `json:"peer,omitempty"`
	Text       string    `json:"text"`
	Action     string    `json:"action,omitempty"` // what is done about it
}

// Tunnel is one connection as it is and as it shall be.
type Tunnel struct {
	Connection string  `json:"connection"`
	Policy     string  `json:"policy"`
	Mix        string  `json:"mix"`
	KME        string  `json:"kme"`
	LocalSAE   string  `json:"local_sae"`
	PeerSAE    string  `json:"peer_sae"`
	State      string  `json:"state"` // up, down, waiting, off
	Why        string  `json:"why,omitempty"`
	Supply     *Supply `json:"supply,omitempty"` // absent: not known, or no keys are taken
	Children   []Child `json:"children"`
}

// Supply is what is known of the keys that a tunnel's rekeyings take.
type Supply struct {
	Pool      string `json:"pool"` // tunnels with the same share these keys
	Level     int    `json:"level"`
	Reserve   int    `json:"reserve"`              // of them, not for rekeyings that can wait
	IntervalS int64  `json:"interval_s,omitempty"` // affordable between two rekeyings of a child; absent: whatever its policy is
	Waits     bool   `json:"waits,omitempty"`      // rekeyings wait for keys
	Rates     *Rates `json:"rates,omitempty"`      // absent: measured for too short a time
}

// Rates are of keys per second.
type Rates struct {
	Supply float64 `json:"supply"`             // less what other SAEs take
	Use    float64 `json:"use"`                // by IPsec of this node
	DryInS *int64  `json:"dry_in_s,omitempty"` // absent: never at these rates
}

// Child is one CHILD_SA of a tunnel.
type Child struct {
	Name  string `json:"name"`
	State string `json:"state"`
	SPIIn string `json:"spi_in,omitempty"`
	// SPIOut and the key follow once the child is up.
	SPIOut   string `json:"spi_out,omitempty"`
	KeyID    string `json:"key_id,omitempty"`
	KeyClass string `json:"key_class,omitempty"`
	AgeS     int64  `json:"age_s,omitempty"`
	// RekeyInS is below zero while a rekeying is overdue.
	RekeyInS *int64 `json:"rekey_in_s,omitempty"`
	BytesIn  uint64 `json:"bytes_in,omitempty"`
	BytesOut uint64 `json:"bytes_out,omitempty"`
}

// SA is one entry of the kernel's SAD that this node installed.
type SA struct {
	Connection  string `json:"connection"`
	Child       string `json:"child,omitempty"`
	Direction   string `json:"direction"` // in, out
	Src         string `json:"src"`
	Dst         string `json:"dst"`
	SPI         string `json:"spi"`
	Algorithm   string `json:"algorithm"`
	KeyID       string `json:"key_id"`
	Fingerprint string `json:"fingerprint"` // of the SA's key; equal on both ends
	Committed   bool   `json:"committed"`
	Bytes       uint64 `json:"bytes"`
	Packets     uint64 `json:"packets"`
}

// Explanation answers why a connection is up or not: the checks in the order in
// which a tunnel depends on them.
type Explanation struct {
	Connection string  `json:"connection"`
	Up         bool    `json:"up"`
	Checks     []Check `json:"checks"`
	Events     []Event `json:"events,omitempty"` // the connection's latest, newest first
}

// Check is one thing a tunnel needs.
type Check struct {
	What   string `json:"what"`
	OK     bool   `json:"ok"`
	Text   string `json:"text"`
	Advice string `json:"advice,omitempty"` // what to do; empty if OK
}

// Action is what may be done to a tunnel.
type Action string

// The actions.
const (
	Initiate  Action = "initiate"
	Rekey     Action = "rekey"
	Terminate Action = "terminate"
)

// Node is what every node can tell.
type Node interface {
	Status(ctx context.Context) (Status, error)
	// Events gives at most limit events, newest first, of one connection if
	// it is not empty.
	Events(ctx context.Context, connection string, limit int) ([]Event, error)
}

// Keys is the [kms] role. Find wraps ErrNotFound.
type Keys interface {
	Pools(ctx context.Context) ([]Pool, error)
	Find(ctx context.Context, id key.ID) (Key, error)
	History(ctx context.Context, q HistoryQuery) ([]Usage, error)
}

// Tunnels is the [ipsec] role. Explain and Do wrap ErrNotFound.
type Tunnels interface {
	Tunnels(ctx context.Context) ([]Tunnel, error)
	SAs(ctx context.Context) ([]SA, error)
	Explain(ctx context.Context, connection string) (Explanation, error)
	Do(ctx context.Context, connection string, a Action) error
}
