package ike

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/plugin"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad"
)

// Time limits of the broker's state.
const (
	keyLife      = 5 * time.Minute  // of a key whose KME does not say
	spentTTL     = 3 * time.Minute  // a sent key whose exchange has no end; above charon's 165 s of retransmits
	tokenTTL     = 3 * time.Second  // from BIND to both add_sa, which follow in the same thread
	usedTTL      = 15 * time.Minute // for which a Key-ID is remembered as used
	maxUsed      = 1 << 16          // Key-IDs of one connection's peer so remembered: far more than its rekeyings ask for, so that a peer gone wild ends somewhere
	maxReserved  = 16               // keys held for one connection
	sweepEvery   = time.Second
	backOffAfter = 2 // failed set-ups in a row that cost no wait (INVALID_KE is one)
	backOffBase  = 5 * time.Second
	backOffMax   = time.Minute
	ignoredQuiet = time.Minute // between two reports of ignored answers of one connection
)

// keySource supplies session keys: the KSA in the same process or an ETSI GS
// QKD 014 KME. Both methods return by ctx's end.
type keySource interface {
	// GetKey gives a fresh key of local for peer; local is the master SAE.
	GetKey(ctx context.Context, local, peer string) (key.SupplyKey, error)
	// GetKeyWithID gives, once, the key that peer (the master SAE) got as id.
	GetKeyWithID(ctx context.Context, local, peer string, id key.ID) (key.SupplyKey, error)
}

// installer is what the Broker needs of *sad.SAD.
type installer interface {
	Install(ctx context.Context, sa sad.SA, keys sad.Keys, owner sad.Owner) error
	Commit(ctx context.Context, id sad.ID) error
	Rollback(ctx context.Context, id sad.ID) error
	Remove(ctx context.Context, id sad.ID) error
	Query(ctx context.Context, id sad.ID) (sad.Counters, error)
	Update(ctx context.Context, c sad.Change) (moved bool, err error)
}

// KME is a key source with the address that logs show for it.
type KME struct {
	Address string
	Source  keySource
	// Class is that of keys whose source does not say (ETSI GS QKD 014 has no
	// field for it); both ends must hold it alike. Zero: relayed, because a KME
	// that does not say may have relayed them.
	Class key.Class
	// KeyLife is how long after GetKey the peer can fetch a key (the KSA's notice
	// TTL). A key that was not sent by four fifths of it is dropped. Zero: 5
	// minutes.
	KeyLife time.Duration
}

// reserve is how long a key may wait to be sent.
func (k KME) reserve() time.Duration {
	life := k.KeyLife
	if life == 0 {
		life = keyLife
	}
	return life / 5 * 4
}

// classOf is the class that the policy and the key schedule take for k.
func (k KME) classOf(s key.SupplyKey) key.Class {
	switch {
	case s.Class != 0:
		return s.Class
	case k.Class != 0:
		return k.Class
	}
	return key.Relayed
}

// Options build a Broker. Log, SAD, Now and the KME of every connection that is
// not Off are needed; Events may be nil.
type Options struct {
	Connections []Connection
	KMEs        map[string]KME
	SAD         installer
	Events      eventSink
	Log         *slog.Logger
	Now         func() time.Time // with a monotonic reading
}

// Broker implements plugin.Handler: it decides over every Key-ID and every
// CHILD_SA. Its state lives in memory only; keys it holds are wiped when they
// are used, expire, or Close is called.
type Broker struct {
	log    *slog.Logger
	events eventSink
	sad    installer
	kmes   map[string]KME
	now    func() time.Time

	changed chan struct{} // capacity 1: a charon came or went
	rekeys  chan sad.ID   // SAs that were moved and want a rekeying

	mu        sync.Mutex
	closed    bool
	conns     map[string]*connState // fixed after New
	hello     *plugin.Hello         // of the charon that is served
	blocked   error                 // why that charon is not served all the same
	verified  *plugin.Hello         // the last one that was served
	retired   map[plugin.Instance]time.Time
	pending   map[key.ID]*pending
	bySA      map[plugin.SA]*pending
	used      map[key.ID]use
	tokens    map[[32]byte]tokenRef
	bounds    map[*bound]struct{} // with a token still to be used
	installed map[saKey]*installed
}

var _ plugin.Handler = (*Broker)(nil)

// use is what is remembered of a Key-ID that was used on this side, in either role.
type use struct {
	until time.Time
	by    *connState // whose peer named it; nil: it was ours
}

// connState is what the Broker remembers of one connection; b.mu guards it.
type connState struct {
	Connection
	localID, peerID plugin.Identity

	free      []*pending // given back, not sent
	held      int        // reserved or free
	taken     int        // ever got from the key source by GetKey
	used      int        // Key-IDs of the peer's that are remembered as used
	failures  int        // set-ups that failed in a row after their key was spent
	notBefore time.Time

	noKey    string // why the last GetKey gave none
	cause    string // last refusal
	causeAt  time.Time
	next     string    // the step that follows from cause, if it is a special one
	fallback string    // why the newest CHILD_SA has no quantum key; empty if it has
	fell     time.Time // since when it runs without one, as reported; zero: it does not
	mute     bool      // and its peer does not announce Q-IPsec: no rekeying gives it one

	quietUntil time.Time // no report of an ignored answer before
}

// NewBroker checks o and gives a Broker that serves once it is given to a
// plugin.Server. Run must run beside it.
func NewBroker(o Options) (*Broker, error) {
	if o.Log == nil || o.SAD == nil || o.Now == nil {
		return nil, errors.New("ike: broker: Log, SAD and Now are needed")
	}
	b := &Broker{
		log: o.Log, events: o.Events, sad: o.SAD, kmes: o.KMEs, now: o.Now,
		changed: make(chan struct{}, 1), rekeys: make(chan sad.ID, 256),
		conns:   map[string]*connState{},
		retired: map[plugin.Instance]time.Time{},
		pending: map[key.ID]*pending{}, bySA: map[plugin.SA]*pending{}, used: map[key.ID]use{},
		tokens: map[[32]byte]tokenRef{}, bounds: map[*bound]struct{}{}, installed: map[saKey]*installed{},
	}
	var errs []error
	for _, c := range o.Connections {
		if err := c.Validate(); err != nil {
			errs = append(errs, err)
			continue
		}
		if _, twice := b.conns[c.Name]; twice {
			errs = append(errs, fmt.Errorf("connection %s: the name is used twice", c.Name))
		}
		if kme, ok := o.KMEs[c.KME]; c.Policy != Off && (!ok || kme.Source == nil) {
			errs = append(errs, fmt.Errorf("connection %s: kme %q is not configured", c.Name, c.KME))
		}
		cs := &connState{Connection: c}
		cs.localID, _ = ParseIdentity(c.LocalID) // Validate has read both
		cs.peerID, _ = ParseIdentity(c.RemoteID)
		b.conns[c.Name] = cs
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("ike: %w", errors.Join(errs...))
	}
	return b, nil
}

// Run wipes what expires until ctx ends, then everything, and refuses from
// then on. It returns nil.
func (b *Broker) Run(ctx context.Context) error {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			b.Close()
			return nil
		case <-t.C:
			b.sweep()
		}
	}
}

// Close wipes every key that the Broker holds; later requests are refused.
func (b *Broker) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, p := range b.pending {
		b.drop(p)
	}
	for e := range b.bounds {
		b.kill(e)
	}
}

// sweep drops what is past its time.
func (b *Broker) sweep() {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	for _, p := range b.pending {
		if now.Before(p.expires) {
			continue
		}
		if p.sent {
			b.failed(p.conn, fmt.Sprintf("no answer to the exchange with Key-ID %s", p.id))
		} else {
			b.log.Info("reserved key dropped: not used in time", "connection", p.conn.Name, "key_id", p.id)
		}
		b.drop(p)
	}
	for e := range b.bounds {
		if !now.Before(e.expires) {
			b.kill(e)
		}
	}
	for id, u := range b.used {
		if now.Before(u.until) {
			continue
		}
		delete(b.used, id)
		if u.by != nil {
			u.by.used--
		}
	}
	for i, at := range b.retired {
		if now.Sub(at) > time.Hour {
			delete(b.retired, i)
		}
	}
}

// errUnverified is why a charon is not served between its hello and Verify.
var errUnverified = errors.New("qipsecd has not yet compared the plugin's version with charon's, for which it needs VICI")

// Hello takes the charon that speaks as the one that is served, once Verify has
// found it right. Another instance takes the place of the old one, whose unsent keys
// become free.
func (b *Broker) Hello(_ context.Context, h plugin.Hello) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return errShutdown
	}
	if h.ABI != plugin.ABI {
		return fmt.Errorf("plugin speaks protocol version %d, qipsecd %d: build both from one release", h.ABI, plugin.ABI)
	}
	if _, ok := b.retired[h.Instance]; ok {
		return errors.New("another charon has taken this one's place")
	}
	if b.hello != nil && b.hello.Instance != h.Instance {
		b.retired[b.hello.Instance] = b.now()
		b.forget(b.hello.Instance)
	}
	b.hello, b.blocked = &h, nil
	if v := b.verified; v == nil || v.Instance != h.Instance || v.Version != h.Version {
		b.blocked = errUnverified
	}
	b.log.Info("charon's plugin connected", "strongswan", h.Version, "pid", h.PID)
	b.notify()
	return nil
}

// Gone frees what the instance had not sent and wipes the rest.
func (b *Broker) Gone(i plugin.Instance) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forget(i)
	if b.hello != nil && b.hello.Instance == i {
		b.hello = nil
		b.log.Warn("charon's plugin is gone: its standing connection broke")
		b.notify()
	}
}

// forget ends everything that an instance had under way; b.mu is held.
func (b *Broker) forget(i plugin.Instance) {
	for sa, p := range b.bySA {
		if sa.Instance == i {
			b.release(p)
		}
	}
	for e := range b.bounds {
		if e.sa.Instance == i {
			b.kill(e)
		}
	}
}

func (b *Broker) notify() {
	select {
	case b.changed <- struct{}{}:
	default: // one is waiting already
	}
}

// charon gives what the served charon said of itself; ok is false without one.
func (b *Broker) charon() (h plugin.Hello, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.hello == nil {
		return plugin.Hello{}, false
	}
	return *b.hello, true
}

// Verify compares the version that charon gives over VICI with the one that
// its plugin was compiled against. Before it, and after a difference, every request
// is refused.
func (b *Broker) Verify(charonVersion string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.hello == nil {
		return errors.New("charon's qipsec plugin has not said hello: is it installed and loaded (charon.plugins.qipsec.load = yes)?")
	}
	b.blocked, b.verified = nil, b.hello
	if b.hello.Version != charonVersion {
		b.verified = nil
		b.blocked = fmt.Errorf("the qipsec plugin was built for strongSwan %s, charon is %s: rebuild the plugin", b.hello.Version, charonVersion)
	}
	return b.blocked
}

// bypassed says why the served charon would key the connection without asking:
// its own setting names it. charon splits that at commas and spaces.
func (b *Broker) bypassed(name string) error {
	h, _ := b.charon()
	names := strings.FieldsFunc(h.Off, func(c rune) bool { return c == ',' || c == ' ' })
	if !slices.Contains(names, name) {
		return nil
	}
	return errors.New("charon.plugins.qipsec.off names it, so charon would key it without a quantum key: take it off that list and restart charon")
}

// errShutdown is the cause of every refusal while qipsecd stops.
var errShutdown = errors.New("qipsecd is shutting down")

// admit finds the connection of a request and checks that its charon is the
// one that is served; b.mu is held.
func (b *Broker) admit(sa plugin.SA, name string) (*connState, error) {
	cs := b.conns[name]
	switch {
	case b.closed:
		return cs, errShutdown
	case b.hello == nil || b.hello.Instance != sa.Instance:
		return cs, errors.New("this charon has not said hello or was replaced")
	case b.blocked != nil:
		return cs, b.blocked
	case sa.UID == 0:
		return cs, errors.New("the request belongs to no IKE_SA (IKEv1 or a manual SA)")
	case cs == nil:
		return nil, errors.New("the connection is not configured in qipsecd (to leave it alone, name it in charon.plugins.qipsec.off)")
	case cs.Policy == Off:
		return cs, errors.New("the connection's policy is off: name it in charon.plugins.qipsec.off too")
	}
	return cs, nil
}

// blame sets the cause that the status shows, with the step that follows from
// it (empty: that of the connection's state); b.mu is held.
func (b *Broker) blame(cs *connState, cause, next string) {
	cs.cause, cs.causeAt, cs.next = cause, b.now(), next
}

// refusal is what a caller gets: one log line, the cause in the connection's
// status, and an event. b.mu is not held.
func (b *Broker) refusal(step, name string, cause error) error {
	text := strings.ReplaceAll(cause.Error(), "\n", "; ") // REFUSE carries one line
	b.mu.Lock()
	if cs := b.conns[name]; cs != nil {
		b.blame(cs, step+": "+text, "")
	}
	b.mu.Unlock()
	err := fmt.Errorf("connection %q: %s refused: %s", name, step, text)
	report(b.log, b.events, Event{Severity: Fault, Code: EventRefused, Connection: name, Text: err.Error()})
	return err
}
