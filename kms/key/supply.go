package key

import (
	"errors"
	"fmt"
	"time"
)

// SupplyKey is one session key as an SAE gets it (GetKey, GetKeyWithID),
// whether from this node's KSA or from another maker's KME.
type SupplyKey struct {
	ID       ID
	Class    Class     // zero if the KME does not say
	Material *Material // the session key; the caller owns and wipes it
}

// WipeAll wipes every Material of keys, which may hold nil ones.
func WipeAll(keys []SupplyKey) {
	for i := range keys {
		keys[i].Material.Wipe()
	}
}

// SupplyStatus is what a KME says of the keys one SAE may have for a peer SAE
// (ETSI GS QKD 014 V1.1.1, "Status" data format). Sizes are in bits.
type SupplyStatus struct {
	SourceKME        string `json:"source_KME_ID"`
	TargetKME        string `json:"target_KME_ID"`
	MasterSAE        string `json:"master_SAE_ID"`
	SlaveSAE         string `json:"slave_SAE_ID"`
	KeySize          int    `json:"key_size"` // default size
	StoredKeyCount   int    `json:"stored_key_count"`
	MaxKeyCount      int    `json:"max_key_count"`
	MaxKeyPerRequest int    `json:"max_key_per_request"`
	MaxKeySize       int    `json:"max_key_size"`
	MinKeySize       int    `json:"min_key_size"`
	MaxSAEIDCount    int    `json:"max_SAE_ID_count"` // additional slaves of one request; 0: no multicast
}

// Usage says what an SAE did with a key (the paper's function F205).
type Usage string

// The usages an SAE may report.
const (
	Used    Usage = "used"    // protects traffic
	Unused  Usage = "unused"  // fetched and thrown away
	Failed  Usage = "failed"  // did not match the peer's, or could not be put to use
	Retired Usage = "retired" // was used, is not any more
)

// Valid reports whether u is one of the usages above.
func (u Usage) Valid() bool { return u == Used || u == Unused || u == Failed || u == Retired }

// UsageReport is one line of an SAE's report.
type UsageReport struct {
	ID    ID
	Usage Usage
	Bytes uint64 // payload protected with the key so far
}

// ErrUnauthorised refuses a supply because the SAE is not known, may not speak
// for that pair, or is not among the SAEs the key was made for. It says no more
// than that, so that nobody learns from it which SAEs or keys exist.
var ErrUnauthorised = errors.New("key supply: SAE is not authorised")

// BadRequest refuses a supply because the request cannot be met as it stands;
// asking again in the same words is no use. Nothing was consumed.
type BadRequest struct {
	Message  string   // for the SAE; the standard's own words where it has some
	Details  []Detail // may be empty
	NotFound bool     // the reason is that a Key-ID names no key to be had
}

// Detail is one further fact of a BadRequest.
type Detail struct{ Name, Value string }

// Error gives the message.
func (e *BadRequest) Error() string { return "key supply: request refused: " + e.Message }

// Unavailable refuses a supply for now: no key left, a quota or reserve
// reached, the peer or the KME not there.
type Unavailable struct {
	RetryAfter time.Duration // when it may be worth asking again; 0: not known
	Err        error         // why; not shown to the SAE
}

// Error gives the cause.
func (e *Unavailable) Error() string { return fmt.Sprintf("key supply: unavailable: %v", e.Err) }

// Unwrap gives the cause.
func (e *Unavailable) Unwrap() error { return e.Err }
