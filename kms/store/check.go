package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Verdict is how bad a finding of Check is.
type Verdict string

// The verdicts, of a finding and of a whole store.
const (
	Sound   Verdict = "sound"   // worth knowing, nothing is wrong
	Damaged Verdict = "damaged" // the store, or a part of it, cannot be used as it is
	Unknown Verdict = "unknown" // this could not be looked at
)

// Finding is one thing that Check has seen.
type Finding struct {
	Verdict Verdict
	What    string
	Do      string // what the operator may do about it
}

// Report is what Check has seen. Counts are of what could be read.
type Report struct {
	Store      uuid.UUID
	Generation uint64
	Epoch      uint64 // of the root file
	Running    bool   // a daemon has the store open
	Pools      int
	Blocks     int
	Keys       int // above the marks
	Parts      int // sealed boxes that were opened
	History    int // rows
	Events     int
	Findings   []Finding
}

// Verdict is that of the whole: Damaged if anything is, else Unknown if anything
// is.
func (r *Report) Verdict() Verdict {
	v := Sound
	for _, f := range r.Findings {
		if f.Verdict == Damaged {
			return Damaged
		}
		if f.Verdict == Unknown {
			v = Unknown
		}
	}
	return v
}

func (r *Report) add(v Verdict, do, format string, args ...any) {
	r.Findings = append(r.Findings, Finding{v, fmt.Sprintf(format, args...), do})
}

const startEmptyAnew = "put the newest one back, or move database and root file away to start with empty pools"

// fail adds an error, each joined one by itself. Most of them say after a
// semicolon what to do.
func (r *Report) fail(err error) {
	if j, ok := err.(interface{ Unwrap() []error }); ok && strings.Contains(err.Error(), "\n") {
		for _, e := range j.Unwrap() {
			r.fail(e)
		}
		return
	}
	what, do, _ := strings.Cut(strings.TrimPrefix(err.Error(), "store: "), "; ")
	v := Unknown
	for _, bad := range []error{ErrDamaged, ErrNoRoot, ErrWrongRoot, ErrOldRoot, ErrRestored, ErrAccess, ErrUnsealed, ErrWrongCredential} {
		if errors.Is(err, bad) {
			v = Damaged
		}
	}
	if do == "" && v == Damaged {
		do = startEmptyAnew
	}
	r.add(v, do, "%s", what)
}

// checkTries is how often Check looks again beside a daemon whose ratchets
// overtake it.
const checkTries = 5

// Check looks at all of a store without changing anything: files, schema, every
// row that states rest on, every sealed box, the order of the logs, and whether
// database and root file belong together. It works beside a running daemon. No
// daemon can start meanwhile where none runs. History and events are not
// sealed: of them only damage that breaks their order or form can be seen.
func Check(ctx context.Context, opt Options) *Report {
	var r *Report
	for range checkTries {
		r = checkOnce(ctx, opt)
		if !r.Running || r.Verdict() == Sound || ctx.Err() != nil {
			break
		}
	}
	return r
}

func checkOnce(ctx context.Context, opt Options) *Report {
	r := &Report{}
	s, l, rootErr, err := openLook(ctx, opt)
	if errors.Is(err, fs.ErrNotExist) {
		r.add(Unknown, "name the right one; qipsecd makes a new store when it starts", "there is no store: %v", err)
		return r
	}
	if err != nil {
		r.fail(err)
		return r
	}
	defer func() {
		if err := s.endLook(l); err != nil {
			r.fail(err)
		}
	}()
	r.Running = l.running
	for _, f := range l.leftovers {
		r.add(Sound, "nothing: the next start removes it", "%s is left over from a ratchet that was cut off", f)
	}
	if rootErr != nil {
		r.fail(rootErr)
	}
	isNew, err := s.eng.fresh(ctx, s.snap)
	if err != nil {
		r.fail(err)
		return r
	}
	if isNew {
		const do = "nothing: qipsecd makes its tables when it starts"
		if s.root == nil && rootErr == nil {
			r.add(Sound, do, "the database is empty")
		} else {
			r.add(Damaged, do+", with empty pools", "the database is empty, but there is a root file: what was in it is lost, or it was never finished")
		}
		return r
	}
	if l.verify != nil {
		list, err := l.verify(ctx, s.snap)
		if err != nil {
			r.fail(err)
		}
		for _, f := range list {
			r.add(Damaged, "move database and root file away to start with empty pools, and look at the disk", "the database's own check: %s", strings.TrimSpace(f))
		}
	}
	r.logs(ctx, s)
	if rootErr != nil {
		return r // without a root nothing else can be judged
	}
	if err := s.lookNode(ctx); err != nil {
		r.fail(err)
		return r
	}
	r.Store, r.Generation, r.Epoch = s.uuid, s.generation, s.root.epoch
	r.inventory(ctx, s)
	return r
}

// inventory looks at pools, blocks and parts.
func (r *Report) inventory(ctx context.Context, s *Store) {
	node := s.epoch
	pools, err := s.readPools(ctx, s.snap)
	if err != nil {
		r.fail(err)
	}
	if err := s.readLedger(ctx, s.snap, pools); err != nil {
		r.fail(err)
	}
	found, err := s.readBlocks(ctx, s.snap, pools)
	if err != nil {
		r.fail(err)
	}
	if err == nil {
		bad, err := s.readParts(ctx, s.snap, pools)
		if err != nil {
			r.fail(err)
		}
		found = append(found, bad...)
	}
	given := map[*header]bool{}
	damaged := func(d *damage) {
		if !given[d.h] {
			given[d.h] = true
			r.add(Damaged, "the next start, or whoever reads it, gives the block up with an alarm", "%v", d)
		}
	}
	for _, d := range found {
		damaged(d)
	}
	for _, p := range pools {
		p.count()
		r.Pools++
		r.Blocks += len(p.blocks)
		r.Keys += p.info.Received + p.info.Active
		r.order(p)
		for _, h := range p.blocks {
			if given[h] {
				continue
			}
			var d *damage
			if err := r.open(ctx, s, p, h); errors.As(err, &d) {
				damaged(d)
			} else if err != nil {
				r.fail(err)
			}
		}
	}
	if max(node, s.epoch) > s.root.epoch && !r.Running {
		r.add(Sound, "nothing: the next start finishes it", "a ratchet to epoch %d was cut off: keys used since the last one can still be recovered", s.root.epoch+1)
	}
}

// order holds a pool's blocks against what PutBlock and Activate promise.
func (r *Report) order(p *pool) {
	for i, h := range p.blocks {
		if h.seq > p.info.NewestSeq {
			r.add(Damaged, startEmptyAnew, "%s is newer than the pool's newest seq, %d", where(h.pool, h.seq), p.info.NewestSeq)
		}
		if i > 0 && h.state == key.Active && p.blocks[i-1].state == key.Received {
			r.add(Damaged, startEmptyAnew, "%s is active before an older one", where(h.pool, h.seq))
		}
	}
}

// open opens every part of h; what was not cut out must be there.
func (r *Report) open(ctx context.Context, s *Store, p *pool, h *header) error {
	return s.openParts(ctx, s.snap, h, p.cutParts(h), h.parts()-1, func(part int, _, keys []byte) error {
		r.Parts++
		for at := range h.size(part) {
			pos := key.At(h.seq, uint32(part*partKeys+at))
			side := Peer
			if p.info.Role.Owns(pos) {
				side = Own
			}
			if pos > h.cut[side.at()] && isZero(keys[at*key.MasterSize:(at+1)*key.MasterSize]) {
				return &damage{h, fmt.Errorf("the key at index %d was cut out", pos.Index())}
			}
		}
		return nil
	})
}

// logs reads history and events.
func (r *Report) logs(ctx context.Context, s *Store) {
	const do = "the pools are not touched; export what can be read, then start with an empty store"
	bad := func(table string, serial int64, why string) { r.add(Damaged, do, "%s row %d: %s", table, serial, why) }
	last := int64(0)
	err := s.eachHistory(ctx, ExportQuery{}, func(e Event) error {
		r.History++
		switch {
		case e.Serial <= last:
			bad("history", e.Serial, "its serial does not rise")
		case e.Side > Peer, e.State < key.Received || e.State > key.Stranded, e.Count < 0, e.First > e.Last && e.Last != 0:
			bad("history", e.Serial, "its side, state, range or count is out of range")
		case e.Time.Year() < 1970 || e.Time.After(time.Now().AddDate(1, 0, 0)):
			bad("history", e.Serial, "its time is out of range")
		}
		last = e.Serial
		return nil
	})
	if err != nil {
		r.fail(fmt.Errorf("%w: %w; %s", err, ErrDamaged, do))
	}
	last = 0
	err = s.eachEvent(ctx, ExportQuery{}, func(e LogEvent) error {
		r.Events++
		switch {
		case e.Serial <= last:
			bad("event", e.Serial, "its serial does not rise")
		case !slices.Contains([]Severity{SeverityAlarm, SeverityFault, SeverityRun}, e.Severity):
			bad("event", e.Serial, "its severity is unknown")
		case e.Time.Year() < 1970 || e.Time.After(time.Now().AddDate(1, 0, 0)):
			bad("event", e.Serial, "its time is out of range")
		}
		last = e.Serial
		return nil
	})
	if err != nil {
		r.fail(fmt.Errorf("%w: %w; %s", err, ErrDamaged, do))
	}
}
