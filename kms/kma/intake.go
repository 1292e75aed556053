package kma

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
)

// Bounds of one scan; what is left is done in the next one, at once.
const (
	goodPerScan  = 64
	otherPerScan = 256
	logPerScan   = 10 // lines about refused files
)

// intake looks into the pool's directory until ctx ends. It closes scanned
// after the first look.
func (p *pool) intake(ctx context.Context, scanned chan<- struct{}) {
	if p.Intake == "" {
		close(scanned)
		return
	}
	in := &intake{p: p, odd: map[string]bool{}}
	if list, err := os.ReadDir(filepath.Join(p.Intake, refusedDir)); err == nil {
		in.slot = len(list)
	}
	tick := time.NewTicker(p.a.o.IntakeInterval)
	defer tick.Stop()
	for first := true; ctx.Err() == nil; first = false {
		more := in.scan(ctx)
		if first {
			close(scanned)
		}
		if more {
			continue
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// intake is the state of one directory's goroutine.
type intake struct {
	p      *pool
	down   bool            // nothing can be taken in, and an event has said so
	why    string          // what the log said of it last
	slot   int             // next number in refused/
	logged int             // lines in this scan
	odd    map[string]bool // entries that cannot be removed, and an event has said so
}

// scan does a bounded part of what is in the directory, files in the order of
// seq first, and reports whether there is more to do at once.
func (in *intake) scan(ctx context.Context) (more bool) {
	o := &in.p.a.o
	d, err := openIntake(in.p.Intake, in.p.FeederUID, o.MaxFileSize)
	if err != nil {
		in.trouble(err)
		return false
	}
	defer func() { _ = d.close() }()
	info, err := in.p.a.o.Store.Pool(ctx, in.p.ID)
	if err != nil {
		in.trouble(err)
		return false
	}
	good, other, err := d.names(in.p.ID, info.NewestSeq)
	if err != nil {
		in.trouble(err)
		return false
	}
	in.logged = 0
	good, other = in.skipOdd(good, other)
	now := append(slices.Clip(good[:min(len(good), goodPerScan)]), other[:min(len(other), otherPerScan)]...)
	for _, name := range now {
		if ctx.Err() != nil {
			return false
		}
		if err := in.take(ctx, d, name); err != nil {
			in.trouble(err) // the machine's fault: the file stays and is tried again
			return false
		}
	}
	in.works()
	return len(now) < len(good)+len(other)
}

// skipOdd leaves out what could not be removed, and forgets what somebody has
// removed since.
func (in *intake) skipOdd(good, other []string) (g, o []string) {
	if len(in.odd) == 0 {
		return good, other
	}
	still := map[string]bool{}
	odd := func(name string) bool {
		if in.odd[name] {
			still[name] = true
		}
		return in.odd[name]
	}
	g, o = slices.DeleteFunc(good, odd), slices.DeleteFunc(other, odd)
	in.odd = still
	return g, o
}

// trouble reports that nothing can be taken in: once as an event, and in the log
// whenever the reason is another one than at the try before.
func (in *intake) trouble(err error) {
	if in.why != err.Error() {
		in.why = err.Error()
		in.p.log.Error("intake of QKD-Key files does not work; it is tried again", "err", err)
	}
	if !in.down {
		in.down = true
		in.p.a.event("INTAKE_DOWN", "fault", "QKD-Key files cannot be taken in",
			slog.String("pool", in.p.ID.String()), slog.String("err", err.Error()))
	}
}

// works reports that what trouble said is over.
func (in *intake) works() {
	in.why = ""
	if in.down {
		in.down = false
		in.p.a.event("INTAKE_BACK", "run", "QKD-Key files are taken in again", slog.String("pool", in.p.ID.String()))
	}
}

// take takes one file in or refuses it. Its error is the machine's.
func (in *intake) take(ctx context.Context, d *intakeDir, name string) error {
	h, err := in.load(ctx, d, name)
	switch _, refused := keyfile.ReasonOf(err); {
	case errors.Is(err, fs.ErrNotExist):
		return nil // taken away since the directory was read
	case refused:
		in.refuse(d, name, h, err)
		return nil
	case err != nil:
		return fmt.Errorf("kma: take in %s: %w", name, err)
	}
	return d.destroy(name)
}

// load reads a file and stores its keys. Nil also means that they had been
// stored before, with the same bytes.
func (in *intake) load(ctx context.Context, d *intakeDir, name string) (keyfile.Header, error) {
	if _, _, err := keyfile.ParseName(name); err != nil {
		return keyfile.Header{}, err
	}
	text, err := d.read(name)
	if err != nil {
		return keyfile.Header{}, err
	}
	defer text.Wipe()
	if in.spent(ctx, name, text.Bytes()) {
		in.p.log.Info("removed what a crash had left of a QKD-Key file that was taken in before", "file", name)
		return keyfile.Header{}, nil
	}
	f, h, err := keyfile.Decode(text.Bytes(), d.maxSize)
	if err != nil {
		return h, err
	}
	defer f.Wipe()
	if err := in.fits(name, &f.Header); err != nil {
		return h, err
	}
	b, err := reformat(f, in.p.Class, in.p.Algorithm)
	if err != nil {
		return h, err
	}
	defer b.Keys.Wipe()
	return h, in.p.put(ctx, &b)
}

// spent tells a file of ours that destroy had begun to overwrite: its seq was
// taken in, and it begins with a zero byte, as no text does.
func (in *intake) spent(ctx context.Context, name string, text []byte) bool {
	pair, seq, err := keyfile.ParseName(name)
	if err != nil || pair != in.p.ID || text[0] != 0 {
		return false
	}
	info, err := in.p.a.o.Store.Pool(ctx, pair)
	return err == nil && seq <= info.NewestSeq
}

// fits checks that a good file is one of this pool's.
func (in *intake) fits(name string, h *keyfile.Header) error {
	p := in.p
	pair, seq, err := keyfile.ParseName(name)
	switch {
	case err != nil:
		return err
	case h.Pair != pair || h.Seq != seq:
		return refusal(keyfile.NameMismatch, "it holds %s", h)
	case h.Pair != p.ID:
		return refusal(WrongPair, "want %s", p.ID)
	case h.QKD != p.QKD || h.PeerQKD != p.PeerQKD:
		return refusal(WrongDevice, "want %s with peer %s", p.QKD, p.PeerQKD)
	case h.Role != p.Role:
		return refusal(WrongRole, "want %s", p.Role)
	}
	return nil
}

// put stores a block unless its seq was taken in before.
func (p *pool) put(ctx context.Context, b *Block) error {
	if err := p.acquire(ctx); err != nil {
		return err
	}
	defer p.release()
	info, err := p.a.o.Store.Pool(ctx, p.ID)
	if err != nil {
		return err
	}
	if b.Seq > info.NewestSeq {
		if err := p.a.o.Store.PutBlock(ctx, *b); err != nil {
			return err
		}
		p.log.Info("QKD-Key file taken in", "seq", b.Seq, "keys", len(b.IDs), "bytes", b.Bytes)
		p.refresh(ctx)
		kick(p.work)
		return nil
	}
	blocks, err := p.a.o.Store.Blocks(ctx, p.ID)
	if err != nil {
		return err
	}
	for i := range blocks {
		if blocks[i].Seq == b.Seq && sameBytes(b, &blocks[i]) {
			return nil // stored before a crash; only the file was left
		}
	}
	return refusal(OldSeq, "seq %d, the newest taken in is %d", b.Seq, info.NewestSeq)
}

// refuse moves a bad file aside without its key data: a record stays, the file
// is overwritten and removed.
func (in *intake) refuse(d *intakeDir, name string, h keyfile.Header, why error) {
	var e *keyfile.Error
	errors.As(why, &e) // every caller has asked
	in.log(name, why)
	in.p.a.event("KEYFILE_REFUSED", "fault", "a QKD-Key file was refused: "+string(e.Reason),
		slog.String("pool", in.p.ID.String()), slog.String("file", shown(name)), slog.String("reason", string(e.Reason)),
		slog.String("field", e.Field), slog.String("detail", e.Detail), slog.Uint64("seq", h.Seq))
	if err := d.setAside(in.slot%in.p.a.o.MaxRefused, newRecord(name, h, e)); err != nil {
		in.p.log.Error("no record of a refused QKD-Key file", "file", shown(name), "err", err)
	}
	in.slot++
	if err := d.destroy(name); err != nil {
		in.odd[name] = true
		in.p.log.Error("a refused QKD-Key file stays in the intake directory: remove it by hand", "file", shown(name), "err", err)
	}
}

// log bounds what a directory full of bad files can write.
func (in *intake) log(name string, why error) {
	in.logged++
	switch {
	case in.logged < logPerScan:
		in.p.log.Warn("QKD-Key file refused", "file", shown(name), "reason", why)
	case in.logged == logPerScan:
		in.p.log.Warn("QKD-Key file refused; further ones of this scan are in the events only", "file", shown(name), "reason", why)
	}
}

// shown makes a name from outside fit for logs.
func shown(name string) string {
	if len(name) > 100 {
		name = name[:100]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, name)
}

func newRecord(name string, h keyfile.Header, e *keyfile.Error) record {
	r := record{File: shown(name), Refused: time.Now().UTC().Truncate(time.Second), Reason: string(e.Reason), Detail: e.Detail, Seq: h.Seq, QBER: h.QBER, Length: h.KeyLength}
	if e.Field != "" {
		r.Detail = strings.TrimSuffix(e.Field+": "+e.Detail, ": ")
	}
	set := func(dst *string, id uuid.UUID) {
		if id != uuid.Nil {
			*dst = id.String()
		}
	}
	set(&r.Pair, h.Pair)
	set(&r.QKD, h.QKD)
	set(&r.PeerQKD, h.PeerQKD)
	if h.Role == key.Master || h.Role == key.Slave {
		r.Role = h.Role.String()
	}
	if !h.Created.IsZero() {
		r.Created = h.Created.Format(time.RFC3339)
	}
	return r
}
