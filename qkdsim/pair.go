package qkdsim

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
)

// End is one device of the pair and the way to its node.
type End struct {
	QKD      uuid.UUID // device id
	Delivery Delivery  // closed by Run
}

// Options describe a pair.
type Options struct {
	Pair          uuid.UUID
	Master, Slave End
	Link          Link
	Weather       Weather
	BlockBits     int           // sifted bits per post-processing block; 0 = 1,000,000
	KeysPerFile   int           // master keys in a file; 0 = 1,000
	Hash          string        // keyfile.SHA256 (default) or keyfile.SHA3_256
	Seed          uint64        // 0: key bytes and chances from the kernel; else both repeat with the seed (tests only)
	Speed         float64       // simulated seconds per second; 0 = 1
	FirstKeys     int           // keys delivered at once at the very first start, as a pool filled earlier
	OnDemand      bool          // generate only what Generate asked for
	StateFile     string        // keeps seq over restarts; "" = start at seq 1 each time
	Tick          time.Duration // 0 = 100 ms
	Backlog       int           // files kept for an end that cannot be reached, 0 = 64; the oldest is lost beyond it
	Log           *slog.Logger
	Now           func() time.Time // for the files' created field
}

// Pair runs a QKDE pair in real time. Its methods may be called from any
// goroutine.
type Pair struct {
	opt    Options
	chance *mrand.Rand // for lost and damaged files; used by Run only
	queue  [2]chan parcel

	mu      sync.Mutex
	sim     *Sim
	seq     uint64 // of the last file
	bits    int    // secret bits not in a file yet
	wanted  int    // bits that Generate asked for and that are not made yet
	made    uint64 // files
	dropped [2]uint64
}

// parcel is an encoded file on its way; whoever has it wipes text.
type parcel struct {
	name string
	text *key.Material
}

// NewPair checks the options and reads the state file.
func NewPair(opt Options) (*Pair, error) {
	for n, def := range map[*int]int{&opt.BlockBits: 1_000_000, &opt.KeysPerFile: 1000, &opt.Backlog: 64} {
		if *n == 0 {
			*n = def
		}
	}
	if opt.Hash == "" {
		opt.Hash = keyfile.SHA256
	}
	if opt.Speed == 0 {
		opt.Speed = 1
	}
	if opt.Tick == 0 {
		opt.Tick = 100 * time.Millisecond
	}
	if opt.KeysPerFile < 1 || opt.KeysPerFile > int(key.MaxIndex)+1 || opt.Speed < 0 {
		return nil, fmt.Errorf("qkdsim: %d keys per file, speed %v: keys must be between 1 and %d, speed above 0", opt.KeysPerFile, opt.Speed, key.MaxIndex+1)
	}
	if opt.Master.Delivery == nil || opt.Slave.Delivery == nil {
		return nil, errors.New("qkdsim: an end has no delivery")
	}
	seed := opt.Seed
	if seed == 0 {
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return nil, fmt.Errorf("qkdsim: seed: %w", err)
		}
		seed = binary.LittleEndian.Uint64(b[:])
	}
	sim, err := NewSim(opt.Link, opt.Weather, opt.BlockBits, seed)
	if err != nil {
		return nil, err
	}
	seq, err := readSeq(opt.StateFile)
	if err != nil {
		return nil, err
	}
	return &Pair{
		opt: opt, sim: sim, seq: seq,
		chance: mrand.New(mrand.NewPCG(seed, 0x66696c6573)),
		queue:  [2]chan parcel{make(chan parcel, opt.Backlog), make(chan parcel, opt.Backlog)},
	}, nil
}

// Run generates and delivers until ctx ends; it returns nil then, and an error
// only if it cannot go on. It closes both deliveries.
func (p *Pair) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, end := range []End{p.opt.Master, p.opt.Slave} {
		g.Go(func() error { return p.deliver(ctx, key.Role(i+1), end.Delivery, p.queue[i]) })
	}
	g.Go(func() error { return p.generate(ctx) })
	err := g.Wait()
	for _, q := range p.queue {
		for len(q) > 0 {
			(<-q).text.Wipe()
		}
	}
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (p *Pair) generate(ctx context.Context) error {
	t := time.NewTicker(p.opt.Tick)
	defer t.Stop()
	if n := p.opt.FirstKeys; n > 0 && p.seq == 0 {
		p.mu.Lock()
		p.bits += n * key.MasterSize * 8
		p.mu.Unlock()
		for n > 0 {
			k := min(n, p.opt.KeysPerFile)
			if err := p.emit(ctx, k); err != nil {
				return err
			}
			n -= k
		}
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		p.step(time.Duration(float64(p.opt.Tick) * p.opt.Speed))
		for p.ready() {
			if err := p.emit(ctx, p.opt.KeysPerFile); err != nil {
				return err
			}
		}
	}
}

// step lets simulated time pass and books what came of it.
func (p *Pair) step(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.sim.State()
	for _, b := range p.sim.Step(d) {
		got := b.SecretBits
		if p.opt.OnDemand {
			got = min(got, p.wanted)
			p.wanted -= got
		}
		p.bits += got
	}
	if s := p.sim.State(); s != before {
		p.opt.Log.Warn("link changed", "pair", p.opt.Pair, "state", s, "qber", p.sim.QBER())
	}
}

// ready reports whether the bits for a whole file are there.
func (p *Pair) ready() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bits >= p.fileBits(p.opt.KeysPerFile)
}

func (p *Pair) fileBits(keys int) int { return (keys*key.MasterSize + keyfile.Trailer) * 8 }

// emit makes the next file of so many keys and queues it for both ends.
func (p *Pair) emit(ctx context.Context, keys int) error {
	p.mu.Lock()
	p.bits = max(0, p.bits-p.fileBits(keys))
	p.seq++
	p.made++
	seq, qber := p.seq, p.sim.QBER()
	p.mu.Unlock()
	if err := writeSeq(p.opt.StateFile, seq); err != nil {
		return err
	}
	data, err := KeyData(p.opt.Seed, p.opt.Pair, seq, p.fileBits(keys)/8)
	if err != nil {
		return err
	}
	defer data.Wipe()
	h := keyfile.Header{Pair: p.opt.Pair, Seq: seq, Created: p.opt.Now().UTC().Truncate(time.Second), QBER: qber, HashAlgorithm: p.opt.Hash}
	w := p.opt.Weather
	for _, e := range []struct {
		role                     key.Role
		qkd, peer                uuid.UUID
		lose, damage, truncation float64
	}{
		{key.Master, p.opt.Master.QKD, p.opt.Slave.QKD, w.LoseMaster, w.DamageMaster, w.TruncateMaster},
		{key.Slave, p.opt.Slave.QKD, p.opt.Master.QKD, w.LoseSlave, w.DamageSlave, w.TruncateSlave},
	} {
		h.Role, h.QKD, h.PeerQKD = e.role, e.qkd, e.peer
		f, err := p.pack(h, data, e.damage, e.truncation)
		if err != nil {
			return err
		}
		if p.chance.Float64() < e.lose {
			p.opt.Log.Warn("file lost", "seq", seq, "end", e.role)
			f.text.Wipe()
			continue
		}
		if err := p.enqueue(ctx, e.role, f); err != nil {
			return err
		}
	}
	p.opt.Log.Info("file made", "pair", p.opt.Pair, "seq", seq, "keys", keys, "qber", fmt.Sprintf("%.4f", qber))
	return nil
}

// pack encodes one end's file, damaged by chance.
func (p *Pair) pack(h keyfile.Header, data *key.Material, damage, truncation float64) (parcel, error) {
	own, err := data.Clone()
	if err != nil {
		return parcel{}, err
	}
	defer own.Wipe()
	if p.chance.Float64() < damage {
		i := p.chance.IntN(own.Len() - keyfile.Trailer)
		own.Bytes()[i] ^= 1 << p.chance.IntN(8)
		p.opt.Log.Warn("file damaged", "seq", h.Seq, "end", h.Role)
	}
	text, err := keyfile.Encode(&keyfile.File{Header: h, Data: own})
	if err != nil {
		return parcel{}, err
	}
	if p.chance.Float64() < truncation {
		half, err := key.New(text.Len() / 2)
		if err != nil {
			text.Wipe()
			return parcel{}, err
		}
		copy(half.Bytes(), text.Bytes())
		text.Wipe()
		text = half
		p.opt.Log.Warn("file truncated", "seq", h.Seq, "end", h.Role)
	}
	return parcel{keyfile.Name(h.Pair, h.Seq), text}, nil
}

// enqueue never waits: what does not fit pushes the oldest file out.
func (p *Pair) enqueue(ctx context.Context, end key.Role, f parcel) error {
	q := p.queue[end-1]
	for {
		select {
		case q <- f:
			return nil
		case <-ctx.Done():
			f.text.Wipe()
			return ctx.Err()
		default:
		}
		select {
		case old := <-q:
			old.text.Wipe()
			p.mu.Lock()
			p.dropped[end-1]++
			p.mu.Unlock()
			p.opt.Log.Error("backlog full: file dropped", "file", old.name, "end", end)
		default:
		}
	}
}

// deliver sends one end's files in order, each until it has arrived.
func (p *Pair) deliver(ctx context.Context, end key.Role, d Delivery, q <-chan parcel) error {
	defer d.Close()
	for {
		var f parcel
		select {
		case <-ctx.Done():
			return ctx.Err()
		case f = <-q:
		}
		for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
			err := d.Deliver(ctx, f.name, f.text.Bytes())
			if err == nil {
				p.opt.Log.Debug("file delivered", "file", f.name, "end", end)
				break
			}
			if ctx.Err() != nil {
				break
			}
			p.opt.Log.Warn("delivery failed, trying again", "end", end, "after", wait, "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
		f.text.Wipe()
	}
}

// KeyData gives the n bytes of key data of a file, which the caller owns: from
// the kernel, or, for a seed, the same for the same seed, pair, seq and n. So a
// test that knows the seed can look for these keys where none may be.
func KeyData(seed uint64, pair uuid.UUID, seq uint64, n int) (*key.Material, error) {
	if seed == 0 {
		return key.Random(rand.Reader, n)
	}
	in := append([]byte("qkdsim"), pair[:]...)
	in = binary.BigEndian.AppendUint64(in, seed)
	in = binary.BigEndian.AppendUint64(in, seq)
	return key.Random(mrand.NewChaCha8(sha256.Sum256(in)), n)
}
