package store

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// raw is what a process knows of one side's leases and of the keys of them that
// it read for raw use. It is lost with the process, and with it the keys.
type raw struct {
	due   []due  // leases that were not read to their end, rising
	spans []span // what LoadRaw gave, rising
}

// due is a lease (from, to] that was not read yet.
type due struct {
	from, to key.Position
	raw      bool
}

// span is a range that LoadRaw gave.
type span struct {
	key.Range
	state spanState
}

type spanState uint8

const (
	free  spanState = iota // may be bound
	taken                  // is bound, or was
	unfit                  // must not be used raw
)

// leased notes side's lease up to mark, before which the mark was old.
func (r *raw) leased(old, mark key.Position, purpose string) {
	r.due = append(r.due, due{old, mark, purpose == PurposeRaw})
}

// repeated is leased for a mark that was raised already: by a call whose outcome
// was unknown, if nothing is noted.
func (r *raw) repeated(spent, mark key.Position, purpose string) error {
	if spent >= mark {
		return nil
	}
	from := spent
	if n := len(r.due); n > 0 {
		last := r.due[n-1]
		if last.to >= mark {
			if last.raw != (purpose == PurposeRaw) {
				return ErrPurpose
			}
			return nil
		}
		from = max(from, last.to)
	}
	r.leased(from, mark, purpose)
	return nil
}

// allows says whether (from, to] may be read by LoadRaw, or else by Load.
func (r *raw) allows(from, to key.Position, wantRaw bool) error {
	at := from
	for _, d := range r.due {
		if d.raw && !wantRaw && d.from < to && from < d.to {
			return fmt.Errorf("%w: (%s, %s] is for raw use", ErrPurpose, d.from, d.to)
		}
		if d.raw && d.from <= at {
			at = max(at, d.to)
		}
	}
	if wantRaw && at < to {
		return fmt.Errorf("%w: above %s it is not for raw use", ErrPurpose, at)
	}
	return nil
}

// read forgets the leases up to to, which were read or given up.
func (r *raw) read(to key.Position) {
	r.due = slices.DeleteFunc(r.due, func(d due) bool { return d.to <= to })
}

// gave notes the keys that LoadRaw gave, which rise.
func (r *raw) gave(keys []LeasedKey) {
	for _, k := range keys {
		st := free
		if k.NoPad || k.Class != key.Direct {
			st = unfit
		}
		if n := len(r.spans); n > 0 && r.spans[n-1].joins(st, k.Position) {
			r.spans[n-1].Last = k.Position
		} else {
			r.spans = append(r.spans, span{key.Range{First: k.Position, Last: k.Position}, st})
		}
	}
	r.spans = trim(r.spans)
}

// joins reports whether the key at p goes on where sp ends.
func (sp *span) joins(st spanState, p key.Position) bool {
	return sp.state == st && sp.Last+2 == p && sp.Last.Seq() == p.Seq()
}

// trim bounds what is remembered: without it a range is refused all the same.
func trim(spans []span) []span {
	if over := len(spans) - maxSpans; over > 0 {
		return slices.Delete(spans, 0, over)
	}
	return spans
}

// abandoned makes what was not bound up to mark unusable.
func (r *raw) abandoned(mark key.Position) {
	r.read(mark)
	r.spans = slices.DeleteFunc(r.spans, func(sp span) bool { return sp.state == free && sp.Last <= mark })
	for i := range r.spans {
		if sp := &r.spans[i]; sp.state == free && sp.First <= mark {
			sp.First += 2 * ((mark-sp.First)/2 + 1)
		}
	}
}

// claim takes g, all of which must be free, out of spans, which it may change.
func (p *pool) claim(side Side, spans []span, g key.Range) ([]span, error) {
	if g.First <= p.floor[side.at()] {
		return nil, fmt.Errorf("%w: it was leased by a former process", ErrSpent)
	}
	i, _ := slices.BinarySearchFunc(spans, g.First, func(sp span, first key.Position) int {
		if sp.Last < first {
			return -1
		}
		return 1
	})
	// All spans that g meets; one that is not free says why.
	for j := i; j < len(spans) && spans[j].First <= g.Last; j++ {
		switch spans[j].state {
		case taken:
			return nil, fmt.Errorf("%w: %s", ErrBound, spans[j].Range)
		case unfit:
			return nil, fmt.Errorf("%w: %s is not of class direct, or was agreed on with a hash", ErrUnfit, spans[j].Range)
		}
	}
	if i == len(spans) || spans[i].First > g.First || spans[i].Last < g.Last {
		return nil, ErrNotLeased
	}
	was := spans[i]
	var parts []span
	if was.First < g.First {
		parts = append(parts, span{key.Range{First: was.First, Last: g.First - 2}, free})
	}
	parts = append(parts, span{g, taken})
	if g.Last < was.Last {
		parts = append(parts, span{key.Range{First: g.Last + 2, Last: was.Last}, free})
	}
	return trim(merge(slices.Replace(spans, i, i+1, parts...))), nil
}

// merge joins neighbours of one state.
func merge(spans []span) []span {
	out := spans[:0]
	for _, sp := range spans {
		if n := len(out); n > 0 && out[n-1].joins(sp.state, sp.First) {
			out[n-1].Last = sp.Last
		} else {
			out = append(out, sp)
		}
	}
	return out
}

// carry takes over what memory knew of old, after p was read anew: entries of
// this process whose Bind was of unknown outcome are bound.
func (p *pool) carry(old *pool, firstSerial int64) {
	p.spent, p.floor, p.raw = old.spent, old.floor, old.raw
	for _, e := range p.entries {
		if e.serial < firstSerial {
			continue
		}
		r := &p.raw[e.side.at()]
		if spans, err := p.claim(e.side, slices.Clone(r.spans), e.Range); err == nil {
			r.spans = spans
		}
	}
}

// LoadRaw is Load for leases of PurposeRaw. Not a byte of what it gives may be
// used before Bind; keys that are not fit for it come, too, and are the caller's
// to wipe. Load does not give them, nor LoadRaw those of other leases
// (ErrPurpose).
func (s *Store) LoadRaw(ctx context.Context, pool uuid.UUID, side Side, from, to key.Position) ([]LeasedKey, error) {
	return s.load(ctx, pool, side, from, to, true)
}
