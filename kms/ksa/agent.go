package ksa

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Limits of one supply; sizes in bits. They are what Status says.
const (
	DefaultSize   = 256
	MinSize       = 64
	MaxSize       = 4096
	MaxPerRequest = 128
)

// What the agent can tell apart.
var (
	ErrGone    = errors.New("ksa: key is gone")                 // Keys.Claim: burned, expired or claimed before
	ErrRefused = errors.New("ksa: peer refuses a notice")       // Peers.SendNotices
	errFull    = errors.New("ksa: too many supply notices")     // our own limit, MaxNotices
	errReserve = errors.New("ksa: what is left is the reserve") // for IPsec
)

// MasterKey is one master key of our lease with a peer.
type MasterKey struct {
	Pool     uuid.UUID
	Position key.Position
	ID       key.ID
	Class    key.Class
	Material *key.Material // 32 bytes; whoever holds the MasterKey owns it
}

// Level is how many keys this node may still hand out for one peer.
type Level struct {
	Active, Leased int
	Synced         bool // false: the peer has not agreed yet where to go on
}

// Keys is the KMA as the KSA needs it. All four work on memory; only Take may
// wait, for a lease on its way and within ctx.
type Keys interface {
	// Take gives the next key of our lease with the node peer; any error
	// means that there is none for now.
	Take(ctx context.Context, peer string) (MasterKey, error)
	// PutBack returns a key that was taken and not supplied to the head of
	// its lease, or wipes it if that lease has been burned meanwhile. It
	// owns the Material from then on.
	PutBack(MasterKey)
	// Claim takes the key that peer owns at pos out of memory, once, for
	// the caller to own; ErrGone if id is not there (any more).
	Claim(peer string, pool uuid.UUID, pos key.Position, id key.ID) (*key.Material, key.Class, error)
	// Level counts what Take can still give for peer.
	Level(peer string) (Level, error)
}

// Peers is the way to the KSAs of other nodes (Type-1).
type Peers interface {
	// SendNotices delivers notices; nil only if peer acknowledged them.
	// They may be sent again and in any order. ErrRefused if peer took none of
	// them because of one that it will never take.
	SendNotices(ctx context.Context, peer string, n []Notice) error
	// PullNotices asks peer for the notices of ids, and gives those that peer
	// has. An error means that peer did not answer.
	PullNotices(ctx context.Context, peer string, ids []key.ID) ([]Notice, error)
	// PullSettled asks peer's Settled.
	PullSettled(ctx context.Context, peer string, upTo uint64, due []key.ID) (Settled, error)
}

// EventKind says what an Event is about.
type EventKind string

// The events of the KSA.
const (
	Supplied  EventKind = "supplied"  // GetKey gave a key to the master SAE
	Fetched   EventKind = "fetched"   // GetKeyWithID gave it to the slave SAE
	Stranded  EventKind = "stranded"  // supplied on one side, never fetched on the other; gone on both
	Uncounted EventKind = "uncounted" // perhaps stranded: the peer did not say, and there is no room to wait any longer; once for many keys
	Refused   EventKind = "refused"   // an SAE or a node asked for what is not its own
)

// Event is one line of the usage history or one refusal. It holds no key bytes.
type Event struct {
	Kind                      EventKind
	Peer, MasterSAE, SlaveSAE string
	Pool                      uuid.UUID
	Position                  key.Position
	Own                       bool // the key is of our lease
	KeyID                     key.ID
	Class                     key.Class
	Why                       string
}

// Options configure an Agent. Node, SAEs, Keys, Peers and Log are needed.
type Options struct {
	Node  string // this node's name; also its KME id
	SAEs  []SAE
	Keys  Keys
	Peers Peers
	Log   *slog.Logger

	Reserve     int           // keys of each peer's pool kept for IPsec SAEs
	TTL         time.Duration // how long a key waits for its slave SAE; default 5 minutes, at most an hour
	PullTimeout time.Duration // bound on asking the peer for missing notices; default 500 ms
	MaxNotices  int           // notices of one peer held at once, of ours to one peer four times as many; default 110,000
	MaxKeyCount int           // what Status calls max_key_count; default 10,000,000
	RetryAfter  time.Duration // hint with "no key left"; default 1 s

	Events func(Event)                                                                  // must not block; may be nil
	Usage  func(ctx context.Context, sae, peer string, reports []key.UsageReport) error // keeps reports (F205); nil: refused
	Now    func() time.Time                                                             // default time.Now
}

// Agent is the KSA of one node. All its methods may be called at once.
type Agent struct {
	o     Options
	saes  map[string]*sae
	nodes map[string]bool // the other nodes of the table
	in    inbox
	out   map[string]*queue // by node; the map is fixed
	pulls chan struct{}     // semaphore: pulls under way
	wait  time.Duration     // noticeWait
}

// New checks the options, of which it reports every fault of the SAE table.
func New(o Options) (*Agent, error) {
	if o.Node == "" || o.Keys == nil || o.Peers == nil || o.Log == nil {
		return nil, errors.New("ksa: Node, Keys, Peers and Log are needed")
	}
	o.TTL = orDefault(o.TTL, 5*time.Minute)
	o.PullTimeout = orDefault(o.PullTimeout, 500*time.Millisecond)
	o.MaxNotices = orDefault(o.MaxNotices, 110_000)
	o.MaxKeyCount = orDefault(o.MaxKeyCount, 10_000_000)
	o.RetryAfter = orDefault(o.RetryAfter, time.Second)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.TTL < time.Second || o.TTL > maxTTL {
		return nil, fmt.Errorf("ksa: TTL %v is not between 1 s and %v", o.TTL, maxTTL)
	}
	t, err := table(o.SAEs, o.Node, o.Now())
	if err != nil {
		return nil, err
	}
	a := &Agent{o: o, saes: t, nodes: make(map[string]bool), out: make(map[string]*queue), pulls: make(chan struct{}, maxPulls), wait: noticeWait}
	for _, s := range t {
		if s.Node != o.Node {
			a.nodes[s.Node] = true
			a.out[s.Node] = newQueue(4 * o.MaxNotices)
		}
	}
	a.in.init(o.MaxNotices, a.nodes)
	return a, nil
}

func orDefault[T int | time.Duration](v, d T) T {
	if v == 0 {
		return d
	}
	return v
}

// Run sends supply notices, asks what became of their keys, and lets notices
// expire until ctx ends; then it tries once more, for a second, to send what is
// unsent and to let the peers know what was settled, and wipes what is held.
// GetKey and GetKeyWithID must not be called after that.
func (a *Agent) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for peer := range a.nodes {
		wg.Go(func() { a.send(ctx, peer) })
		wg.Go(func() { a.ask(ctx, peer) })
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			a.sweep(a.o.Now())
		}
	}
	a.tellSettled()
	wg.Wait()
	a.in.wipe()
	return nil
}

// GetKey gives number fresh session keys of sizeBits bits for the local SAE
// master to share with slave (ETSI GS QKD 014 "Get key"); sizeBits 0 means
// DefaultSize. All or nothing: if fewer keys are left, those taken go back to
// the head of their lease and the error is *key.Unavailable. Other errors:
// key.ErrUnauthorised, *key.BadRequest. The caller owns the Materials.
func (a *Agent) GetKey(ctx context.Context, master, slave string, number, sizeBits int) ([]key.SupplyKey, error) {
	m, s, err := a.pair(master, slave)
	if err != nil {
		return nil, err
	}
	if sizeBits == 0 {
		sizeBits = DefaultSize
	}
	if err := a.checkAmount(m, number, sizeBits); err != nil {
		return nil, err
	}
	if wait, ok := m.take(number, a.o.Now()); !ok {
		return nil, &key.Unavailable{RetryAfter: wait, Err: fmt.Errorf("ksa: SAE %q is above its quota", master)}
	}
	keys, err := a.supply(ctx, m, s, number, sizeBits)
	if err != nil {
		m.give(number)
		return nil, err
	}
	return keys, nil
}

func (a *Agent) checkAmount(m *sae, number, sizeBits int) error {
	switch {
	case sizeBits%8 != 0:
		return &key.BadRequest{Message: "size shall be a multiple of 8"}
	case sizeBits < MinSize || sizeBits > MaxSize:
		return &key.BadRequest{Message: fmt.Sprintf("size shall be between %d and %d", MinSize, MaxSize)}
	case number < 1 || number > MaxPerRequest:
		return &key.BadRequest{Message: fmt.Sprintf("number shall be between 1 and %d", MaxPerRequest)}
	case m.Rate > 0 && number > m.Burst:
		return &key.BadRequest{Message: fmt.Sprintf("number shall be at most %d, the quota of this SAE", m.Burst)}
	}
	return nil
}

// supply takes, derives and only then lets go of the master keys: until the
// last step fails no more, every one of them can be put back.
func (a *Agent) supply(ctx context.Context, m, s *sae, number, sizeBits int) (keys []key.SupplyKey, err error) {
	if err := a.checkReserve(m, s.Node, number); err != nil {
		return nil, a.unavailable(err)
	}
	taken := make([]MasterKey, 0, number)
	keys = make([]key.SupplyKey, 0, number)
	defer func() {
		if err != nil {
			key.WipeAll(keys)
			for i := len(taken) - 1; i >= 0; i-- { // the last taken first, so that the head is the head again
				a.o.Keys.PutBack(taken[i])
			}
			keys = nil
		}
	}()
	slaves := []string{s.ID}
	for range number {
		mk, err := a.o.Keys.Take(ctx, s.Node)
		if err != nil {
			return keys, a.unavailable(err)
		}
		taken = append(taken, mk)
		sk, err := Derive(mk.Material, mk.ID, m.ID, slaves, sizeBits)
		if err != nil {
			return keys, a.unavailable(err)
		}
		keys = append(keys, key.SupplyKey{ID: mk.ID, Class: mk.Class, Material: sk})
	}
	if err := ctx.Err(); err != nil {
		return keys, a.unavailable(err) // nobody is there to receive them
	}
	now := a.o.Now()
	given, err := a.out[s.Node].add(notices(taken, m.ID, slaves, sizeBits), now, now.Add(a.o.TTL))
	if given != nil {
		a.issueEvent(Uncounted, s.Node, given, "the peer does not say what became of keys that it did not fetch in time; while it does not, the oldest of them are not counted")
	}
	if err != nil {
		return keys, a.unavailable(err)
	}
	for _, mk := range taken {
		mk.Material.Wipe()
		a.event(Event{Kind: Supplied, Own: true, Peer: s.Node, MasterSAE: m.ID, SlaveSAE: s.ID, Pool: mk.Pool, Position: mk.Position, KeyID: mk.ID, Class: mk.Class})
	}
	return keys, nil
}

func (a *Agent) checkReserve(m *sae, peer string, number int) error {
	if m.IPsec || a.o.Reserve == 0 {
		return nil
	}
	l, err := a.o.Keys.Level(peer)
	if err != nil {
		return err
	}
	if l.Active+l.Leased-number < a.o.Reserve {
		return errReserve
	}
	return nil
}

// Status says what caller may have for peer, either of which may become the
// master (ETSI GS QKD 014 "Get status"). Errors: key.ErrUnauthorised,
// *key.BadRequest, *key.Unavailable.
func (a *Agent) Status(_ context.Context, caller, peer string) (key.SupplyStatus, error) {
	c, p, err := a.pair(caller, peer)
	if err != nil {
		return key.SupplyStatus{}, err
	}
	l, err := a.o.Keys.Level(p.Node)
	if err != nil {
		return key.SupplyStatus{}, a.unavailable(err)
	}
	stored := l.Active + l.Leased
	if !c.IPsec {
		stored = max(0, stored-a.o.Reserve)
	}
	if !l.Synced {
		stored = 0 // none that could be had
	}
	return key.SupplyStatus{
		SourceKME: a.o.Node, TargetKME: p.Node, MasterSAE: caller, SlaveSAE: peer,
		KeySize: DefaultSize, StoredKeyCount: stored, MaxKeyCount: a.o.MaxKeyCount,
		MaxKeyPerRequest: MaxPerRequest, MaxKeySize: MaxSize, MinKeySize: MinSize,
	}, nil
}

// Usage keeps what the SAE sae reports of keys it shares with peer (F205). It
// is that SAE's word: it is not held against the history, and it changes no
// key's state. Errors as for GetKey.
func (a *Agent) Usage(ctx context.Context, sae, peer string, reports []key.UsageReport) error {
	if _, _, err := a.pair(sae, peer); err != nil {
		return err
	}
	if len(reports) < 1 || len(reports) > MaxPerRequest {
		return &key.BadRequest{Message: fmt.Sprintf("a report shall name 1 to %d keys", MaxPerRequest)}
	}
	for _, r := range reports {
		if r.ID.IsZero() || !r.Usage.Valid() {
			return &key.BadRequest{Message: "a report needs a key_ID and one of used, unused, failed, retired"}
		}
	}
	if a.o.Usage == nil {
		return a.unavailable(errors.New("ksa: nobody keeps usage reports"))
	}
	if err := a.o.Usage(ctx, sae, peer, reports); err != nil {
		return a.unavailable(fmt.Errorf("ksa: keep the usage report of %q: %w", sae, err))
	}
	return nil
}

func (a *Agent) unavailable(err error) error {
	return &key.Unavailable{RetryAfter: a.o.RetryAfter, Err: err}
}

func (a *Agent) event(e Event) {
	if a.o.Events != nil {
		a.o.Events(e)
	}
}
