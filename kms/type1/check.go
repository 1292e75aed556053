package type1

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// request is what every request can say of itself.
type request interface {
	pools() []uuid.UUID // those that it is about
	check() error       // what JSON alone does not exclude
}

// decode reads exactly one JSON value into v; unknown fields are refused.
func decode(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("type1: more than one JSON value")
	}
	return nil
}

func (l Link) check() error {
	if l.From == uuid.Nil || l.To == uuid.Nil {
		return errors.New("type1: from and to name no instance")
	}
	return nil
}

func (r *ValidateRequest) pools() []uuid.UUID { return []uuid.UUID{r.Pool} }

func (r *ValidateRequest) check() error {
	if len(r.Items) > MaxValidate || len(r.Destroyed) > MaxValidate {
		return fmt.Errorf("type1: more than %d seqs in one M102", MaxValidate)
	}
	last := uint64(0)
	for _, i := range r.Items {
		if i.Seq <= last || i.Seq > key.MaxSeq {
			return errors.New("type1: seqs of M102 do not rise or are out of range")
		}
		if n := len(i.Tag); n != 16 && n != maxTag {
			return fmt.Errorf("type1: tag of seq %d has %d bytes", i.Seq, n)
		}
		last = i.Seq
	}
	return errors.Join(rising(r.Destroyed), r.Link.check())
}

func (r *ValidateResponse) check() error {
	if len(r.Results) > MaxValidate {
		return fmt.Errorf("type1: more than %d results of one M102", MaxValidate)
	}
	for _, v := range r.Results {
		switch v.Verdict {
		case Agreed, Mismatch, Missing, Never:
		default:
			return fmt.Errorf("type1: unknown verdict on seq %d", v.Seq)
		}
	}
	return nil
}

func rising(seqs []uint64) error {
	last := uint64(0)
	for _, s := range seqs {
		if s <= last || s > key.MaxSeq {
			return errors.New("type1: seqs do not rise or are out of range")
		}
		last = s
	}
	return nil
}

func (r *LeaseRequest) pools() []uuid.UUID { return []uuid.UUID{r.Pool} }

func (r *LeaseRequest) check() error {
	switch {
	case r.Mark <= r.After:
		return errors.New("type1: lease is empty: mark is not above after")
	case r.Floor > r.Mark:
		return errors.New("type1: floor is above mark")
	case r.Purpose != PurposeSupply && r.Purpose != PurposeTransfer && r.Purpose != PurposeExpired && r.Purpose != PurposeRaw:
		return errors.New("type1: unknown purpose of a lease")
	case r.Purpose == PurposeExpired && len(r.Seqs) > 0:
		return errors.New("type1: expired keys are in no block any more")
	case len(r.Seqs) > MaxLease:
		return fmt.Errorf("type1: a lease of more than %d blocks", MaxLease)
	}
	for _, s := range r.Seqs {
		if s < key.Position(r.After).Seq() || s > key.Position(r.Mark).Seq() {
			return fmt.Errorf("type1: seq %d is outside of the lease", s)
		}
	}
	return errors.Join(rising(r.Seqs), r.Link.check())
}

func (r *LeaseResponse) check() error { return rising(r.Missing) }

func (r *BurnRequest) pools() []uuid.UUID { return []uuid.UUID{r.Pool} }
func (r *BurnRequest) check() error       { return r.Link.check() }

func (r *BurnResponse) check() error {
	if len(r.Keep) > MaxKeep {
		return fmt.Errorf("type1: more than %d keys kept", MaxKeep)
	}
	return nil
}

func (r *WantRequest) pools() []uuid.UUID { return []uuid.UUID{r.Pool} }

func (r *WantRequest) check() error {
	if r.Keys < 1 {
		return errors.New("type1: no keys are wanted")
	}
	return errors.Join(counts(r.Keys, r.Left, r.Used), r.Link.check())
}

func (r *WantResponse) check() error { return counts(r.Giving) }

func counts(list ...int) error {
	for _, n := range list {
		if n < 0 || n > MaxCount {
			return fmt.Errorf("type1: %d is no number of keys", n)
		}
	}
	return nil
}

func (r *SyncRequest) pools() []uuid.UUID { return []uuid.UUID{r.Pool} }

func (s *SyncState) check() error {
	if s.Instance == uuid.Nil {
		return errors.New("type1: sync names no instance")
	}
	if s.NewestSeq > key.MaxSeq || s.Generation > MaxGeneration || s.PeerGeneration > MaxGeneration {
		return errors.New("type1: newest_seq, generation or peer_generation is out of range")
	}
	for _, rs := range [][]Range{s.Received, s.Active} {
		if len(rs) > MaxRanges {
			return fmt.Errorf("type1: more than %d ranges of blocks", MaxRanges)
		}
		last := uint64(0)
		for _, r := range rs {
			if r.First <= last {
				return errors.New("type1: ranges of blocks do not rise")
			}
			last = r.Last
		}
	}
	return nil
}

func (r *NoticeRequest) pools() []uuid.UUID { return poolsOf(r.Notices) }
func (r *NoticeRequest) check() error       { return checkNotices(r.Notices) }
func (r *NoticeResponse) check() error      { return nil }

func poolsOf(ns []Notice) []uuid.UUID {
	var out []uuid.UUID
	for i := range ns { // mostly one pool: compare with the last one only
		if p := ns[i].Pool; len(out) == 0 || out[len(out)-1] != p {
			out = append(out, p)
		}
	}
	return out
}

func checkNotices(ns []Notice) error {
	if len(ns) > MaxNotices {
		return fmt.Errorf("type1: more than %d notices", MaxNotices)
	}
	for i := range ns {
		n := &ns[i]
		if n.KeyID.IsZero() || n.Position == 0 || n.SizeBits < 1 || n.TTLSeconds < 1 || n.MasterSAE == "" || len(n.MasterSAE) > 64 {
			return fmt.Errorf("type1: notice %d is incomplete or out of range", i)
		}
		if len(n.SlaveSAEs) < 1 || len(n.SlaveSAEs) > 64 {
			return fmt.Errorf("type1: notice %d names %d slave SAEs", i, len(n.SlaveSAEs))
		}
		for _, s := range n.SlaveSAEs {
			if s == "" || len(s) > 64 {
				return fmt.Errorf("type1: notice %d names an SAE of %d characters", i, len(s))
			}
		}
	}
	return nil
}

// A pull names no pool: the KSA answers only with notices meant for the asker.
func (r *PullRequest) pools() []uuid.UUID { return nil }

func (r *PullRequest) check() error { return atMost(MaxNotices, r.KeyIDs) }

func (r *PullResponse) check() error { return checkNotices(r.Notices) }

// Nor does this one: each node is told of its own keys.
func (r *SettledRequest) pools() []uuid.UUID { return nil }
func (r *SettledRequest) check() error       { return atMost(MaxSettled, r.Due) }

func (r *SettledResponse) check() error {
	if r.More && len(r.KeyIDs) == 0 {
		return errors.New("type1: more is said to come after nothing")
	}
	return errors.Join(atMost(MaxSettled, r.KeyIDs), atMost(MaxSettled, r.Held))
}

func atMost(n int, ids []key.ID) error {
	if len(ids) > n {
		return fmt.Errorf("type1: more than %d Key-IDs", n)
	}
	return nil
}
