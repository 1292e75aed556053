package type1

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// The paths of the interface; the method is POST.
const (
	PathValidateKey  = "/type1/v1/validateKey" // M102 postValidateKey
	PathLease        = "/type1/v1/lease"
	PathBurn         = "/type1/v1/burn"
	PathSync         = "/type1/v1/sync"
	PathWant         = "/type1/v1/want"
	PathSupplyNotice = "/type1/v1/supplyNotice"
	PathPullNotice   = "/type1/v1/pullNotice"
	PathPullSettled  = "/type1/v1/pullSettled"
)

// Limits of one message. A receiver refuses more, a sender splits.
const (
	MaxValidate = 256     // seqs in one M102
	MaxLease    = 1 << 16 // blocks that one lease covers
	MaxRanges   = 1 << 16 // ranges in a block list of sync
	MaxNotices  = 1024    // notices, or Key-IDs of a pull
	MaxSettled  = 1 << 13 // Key-IDs in one pullSettled, and of each kind in its answer
	MaxKeep     = 1 << 17 // Key-IDs kept of a burned lease
	MaxCount    = 1 << 40 // of keys, where a message tells how many there are
	maxTag      = 32      // bytes

	// MaxGeneration leaves a store that was pushed there by a peer as many starts
	// again: SQL's integers are signed.
	MaxGeneration = 1 << 62
)

// Position is key.Position with the text form "seq/index", both decimal.
type Position key.Position

// MarshalText gives "seq/index".
func (p Position) MarshalText() ([]byte, error) { return []byte(key.Position(p).String()), nil }

// UnmarshalText is strict: the one spelling MarshalText has.
func (p *Position) UnmarshalText(b []byte) error {
	s, i, _ := strings.Cut(string(b), "/")
	seq, err1 := strconv.ParseUint(s, 10, 64)
	index, err2 := strconv.ParseUint(i, 10, 32)
	if err1 != nil || err2 != nil || seq > key.MaxSeq || index > uint64(key.MaxIndex) {
		return fmt.Errorf("type1: a position is seq/index, at most %d/%d", key.MaxSeq, key.MaxIndex)
	}
	v := key.At(seq, uint32(index))
	if v.String() != string(b) {
		return fmt.Errorf("type1: a position has no sign and no leading zeros")
	}
	*p = Position(v)
	return nil
}

// Link says which instance speaks to which.
type Link struct {
	From uuid.UUID `json:"from"` // the sender's instance
	To   uuid.UUID `json:"to"`   // the receiver's, as the sender knows it from sync
}

// ValidateRequest is M102: the master's proof of what it holds for some seqs.
// Items are all that the master holds unvalidated up to the last item, in order
// of seq: what the slave holds unvalidated between them can never be agreed.
type ValidateRequest struct {
	Pool uuid.UUID `json:"pool"`
	Link
	Algorithm string         `json:"algorithm"` // "poly1305", "sha-256" or "sha3-256"; both ends are configured alike
	Items     []ValidateItem `json:"items"`
	Destroyed []uint64       `json:"destroyed,omitempty"` // the master refused the slave's proof for these: destroy them too
}

// ValidateItem is the proof for one seq.
type ValidateItem struct {
	Seq uint64 `json:"seq"`
	Tag []byte `json:"tag"` // of the master; 16 or 32 bytes, by the algorithm
}

// Verdict is what the slave says of one seq.
type Verdict string

// The verdicts.
const (
	Agreed   Verdict = "agreed"   // equal; active here from now on; Tag proves it
	Mismatch Verdict = "mismatch" // not equal; destroyed here
	Missing  Verdict = "missing"  // not here yet, may still come: ask again
	Never    Verdict = "never"    // not here and cannot come any more: destroy
)

// ValidateResponse answers a prefix of the request's items, in their order.
type ValidateResponse struct {
	Results []ValidateResult `json:"results"`
}

// ValidateResult is the slave's answer for one seq.
type ValidateResult struct {
	Seq     uint64  `json:"seq"`
	Verdict Verdict `json:"verdict"`
	Tag     []byte  `json:"tag,omitempty"` // of the slave, with Agreed only
}

// LeaseRequest leases the sender's own keys in (After, Mark]. The sender has
// Mark on disk already. The receiver answers once it has, too, and holds the
// keys in memory. With PurposeTransfer the keys are the receiver's to hand out
// from then on, and the sender holds them.
type LeaseRequest struct {
	Pool uuid.UUID `json:"pool"`
	Link
	Generation uint64   `json:"generation"` // of the sender's store
	Purpose    string   `json:"purpose"`    // one of those below
	After      Position `json:"after"`
	Mark       Position `json:"mark"`
	Floor      Position `json:"floor"` // every own key up to here has been taken or burned
	Seqs       []uint64 `json:"seqs"`  // the blocks that hold the lease's keys, rising
}

// The purposes of a lease.
const (
	PurposeSupply   = "supply"   // the sender supplies the keys to its SAEs
	PurposeTransfer = "transfer" // the sender gives them up: the receiver does
	PurposeRaw      = "raw"      // their own bytes become the sender's pads and MAC keys
	PurposeExpired  = "expired"  // the keys are nobody's any more: neither side reads them, Seqs is empty
)

// LeaseResponse acknowledges a lease.
type LeaseResponse struct {
	Mark    Position `json:"mark"`
	Missing []uint64 `json:"missing,omitempty"` // of Seqs: blocks the receiver does not have; their keys must not be used
}

// BurnRequest says that the sender has lost its leased keys up to UpTo.
type BurnRequest struct {
	Pool uuid.UUID `json:"pool"`
	Link
	Generation uint64   `json:"generation"`
	UpTo       Position `json:"up_to"`
}

// BurnResponse names the burned keys that stay obtainable at the receiver
// because it has supply notices for them. All others are destroyed.
type BurnResponse struct {
	Keep []key.ID `json:"keep"`
}

// WantRequest says that the sender runs out of keys of its own and asks for some
// of the receiver's. It is a hint that changes nothing: what comes of it comes as
// a lease with PurposeTransfer.
type WantRequest struct {
	Pool uuid.UUID `json:"pool"`
	Link
	Keys  int      `json:"keys"`  // how many it could do with
	Left  int      `json:"left"`  // how many it can still hand out
	Used  int      `json:"used"`  // how many it has handed out lately, in about a minute
	Floor Position `json:"floor"` // every key up to here that was given to it has been taken or burned
}

// WantResponse says how many keys will be given; 0: none for now.
type WantResponse struct {
	Giving int `json:"giving"`
}

// SyncRequest opens a session. It and its answer say all that the two sides
// must agree on.
type SyncRequest struct {
	Pool uuid.UUID `json:"pool"`
	SyncState
}

// SyncState is one side of a sync. Only the process that PeerInstance names may
// meet the speaker by it: said to any other, it can be long out of date.
type SyncState struct {
	Instance       uuid.UUID `json:"instance"`        // of the speaker
	Generation     uint64    `json:"generation"`      // of the speaker's store
	PeerInstance   uuid.UUID `json:"peer_instance"`   // of the listener, as the speaker knew it when it read all this; nil: not known
	PeerGeneration uint64    `json:"peer_generation"` // the highest of the listener's store that the speaker knows, 0: none
	Mark           Position  `json:"mark"`            // of the speaker's own keys
	PeerMark       Position  `json:"peer_mark"`       // of the listener's keys, as the speaker has it on disk
	NewestSeq      uint64    `json:"newest_seq"`      // taken in by the speaker
	Received       []Range   `json:"received"`        // blocks of that state
	Active         []Range   `json:"active"`
}

// SyncResponse is the receiver's side.
type SyncResponse struct {
	SyncState
}

// Range is the seqs First to Last, both included, as [first,last].
type Range struct{ First, Last uint64 }

// MarshalJSON gives [first,last].
func (r Range) MarshalJSON() ([]byte, error) { return json.Marshal([2]uint64{r.First, r.Last}) }

// UnmarshalJSON takes [first,last] with 1 <= first <= last <= key.MaxSeq.
func (r *Range) UnmarshalJSON(b []byte) error {
	var v []uint64
	if err := json.Unmarshal(b, &v); err != nil || len(v) != 2 {
		return fmt.Errorf("type1: a range is [first,last]")
	}
	if v[0] < 1 || v[1] < v[0] || v[1] > key.MaxSeq {
		return fmt.Errorf("type1: range [%d,%d] is empty or beyond %d", v[0], v[1], key.MaxSeq)
	}
	*r = Range{v[0], v[1]}
	return nil
}

// Ranges packs rising seqs.
func Ranges(seqs []uint64) []Range {
	out := []Range{}
	for _, s := range seqs {
		if n := len(out); n > 0 && out[n-1].Last+1 == s {
			out[n-1].Last = s
		} else {
			out = append(out, Range{s, s})
		}
	}
	return out
}

// Contains reports whether seq is in the rising ranges rs.
func Contains(rs []Range, seq uint64) bool {
	lo, hi := 0, len(rs)
	for lo < hi {
		mid := (lo + hi) / 2
		if rs[mid].Last < seq {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo < len(rs) && rs[lo].First <= seq
}

// Notice is a supply notice: a key of the sender's was supplied to MasterSAE and
// may be fetched by SlaveSAEs.
type Notice struct {
	Pool       uuid.UUID `json:"pool"`
	Position   Position  `json:"position"`
	KeyID      key.ID    `json:"key_id"`
	MasterSAE  string    `json:"master_sae"`
	SlaveSAEs  []string  `json:"slave_saes"`
	SizeBits   int       `json:"size_bits"` // of the session key
	TTLSeconds int       `json:"ttl_s"`     // from receipt on
}

// NoticeRequest is a batch of supply notices.
type NoticeRequest struct {
	Notices []Notice `json:"notices"`
}

// NoticeResponse acknowledges the whole batch.
type NoticeResponse struct{}

// PullRequest asks for the notices of some keys of the receiver's.
type PullRequest struct {
	KeyIDs []key.ID `json:"key_ids"`
}

// PullResponse holds those that there are, for the asker.
type PullResponse struct {
	Notices []Notice `json:"notices"`
}

// SettledRequest asks which of the sender's keys were settled at the receiver:
// fetched, or expired and counted there. It confirms that all before UpTo came.
type SettledRequest struct {
	UpTo uint64   `json:"up_to"`         // of the last answer; 0: none
	Due  []key.ID `json:"due,omitempty"` // which of these are still held there?
}

// SettledResponse holds what was settled since.
type SettledResponse struct {
	KeyIDs []key.ID `json:"key_ids"`
	UpTo   uint64   `json:"up_to"`
	More   bool     `json:"more"`           // there is more to ask for at once
	Held   []key.ID `json:"held,omitempty"` // of Due: not settled yet
}
