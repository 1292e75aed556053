package ike

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/ike/vici"
	"github.com/q-ipsec/q-ipsec/sad"
)

// reconciler is what the Manager needs of *sad.SAD.
type reconciler interface {
	Reconcile(ctx context.Context, list func(context.Context) ([]sad.ID, error)) (missing []sad.ID, err error)
	State(ctx context.Context) ([]sad.State, error)
	Steered(ctx context.Context) (map[uint32]bool, error)
}

// ManagerOptions build a Manager. Connections are those of the Broker.
type ManagerOptions struct {
	Connections []Connection
	Broker      *Broker
	SAD         reconciler
	Guard       guard  // nil: there is none, and none is wanted
	VICI        string // path of charon's VICI socket
	Events      eventSink
	Log         *slog.Logger
	Reconcile   time.Duration // between comparisons with charon; 30 s when zero
	StopTimeout time.Duration // of an orderly stop; 10 s when zero
	// Leave is asked when Run shall end: true leaves connections and SAs in charon
	// for the next start (docs/decisions/0006-restart-leaves-tunnels.md). Nil: false.
	Leave func() bool
	// Levels tell how many keys a KME has, by its name. The keys of one that is not
	// among them are paced by policy alone.
	Levels       map[string]Levels
	RekeyReserve int // keys of a pool that only rekeyings which cannot wait may take; 32 when zero
}

// timing is every other wait of the Manager.
type timing struct {
	helloGrace time.Duration // for the plugin to say hello before its connections are blocked
	redialMin  time.Duration
	redialMax  time.Duration
	retryMin   time.Duration // of an initiation
	retryMax   time.Duration
	debounce   time.Duration // from an event to the listing that it causes
	tick       time.Duration
	measure    time.Duration // between two questions for the level of keys
	call       time.Duration // for charon to answer one VICI command
	follow     time.Duration // for the end that leads to rekey what was moved, before the other one asks
	stall      time.Duration // for charon to set the policy of a CHILD_SA that it lists
	halfway    time.Duration // for the peer to delete what it has rekeyed; above charon's 165 s of retransmits
}

var defaultTiming = timing{
	helloGrace: 10 * time.Second,
	redialMin:  500 * time.Millisecond, redialMax: 10 * time.Second,
	retryMin: 2 * time.Second, retryMax: 15 * time.Second, // the Broker's back-off spares the keys
	debounce: 50 * time.Millisecond, tick: time.Second, measure: 10 * time.Second, call: 10 * time.Second, follow: 5 * time.Second,
	stall: time.Second, halfway: 3 * time.Minute,
}

// Manager keeps charon's connections as the configuration says. Run owns the
// work; the other methods may be called at any time from anywhere.
type Manager struct {
	o    ManagerOptions
	t    timing
	log  *slog.Logger
	kick chan struct{} // capacity 1: the wanted state has changed
	met  chan struct{} // capacity 1: a charon is there

	pacer *pacer

	mu    sync.Mutex
	link  *link             // to the running charon; nil without one
	cause string            // why there is none
	gone  bool              // and that was reported
	held  map[string]bool   // taken down by the operator: not initiated again
	out   map[string]string // why a connection is not in charon, as reported
	view  map[string]*connView
	at    time.Time     // of the view
	seen  chan struct{} // closed when the view is replaced

	stalled map[childName]*stall
	guarded guardNote
}

// link is one VICI connection with what was done over it.
type link struct {
	client  *vici.Client
	version string
	plugins []string
	blocked error             // why required connections are not loaded; nil: verified
	grace   time.Time         // until when a missing hello is no fault
	loaded  map[string]bool   // connections
	faults  map[string]string // why a connection is not loaded
	keys    map[string]string // ids of private keys by path
	next    map[childName]retry
	begun   attempts
	busy    map[string]time.Time // since when charon sets up children of a connection by itself
	moved   []movedSA            // to be rekeyed from here if the peer does not
}

// movedSA is an SA at new addresses, and when it is rekeyed if it is still there.
type movedSA struct {
	id sad.ID
	at time.Time
}

// connView is what charon and the SAD showed of a connection at the last look.
type connView struct {
	ikes     []vici.IKESA
	children []childView
	up       bool
	since    time.Time
}

type childView struct {
	vici.ChildSA
	in, out sad.State // zero where the SAD has no SA of ours
}

// NewManager checks o.
func NewManager(o ManagerOptions) (*Manager, error) {
	if o.Broker == nil || o.SAD == nil || o.Log == nil || o.VICI == "" {
		return nil, errors.New("ike: manager: Broker, SAD, VICI and Log are needed")
	}
	if o.Reconcile == 0 {
		o.Reconcile = 30 * time.Second
	}
	if o.StopTimeout == 0 {
		o.StopTimeout = 10 * time.Second
	}
	m := &Manager{
		o: o, t: defaultTiming, log: o.Log, kick: make(chan struct{}, 1), met: make(chan struct{}, 1),
		stalled: map[childName]*stall{},
		held:    map[string]bool{}, out: map[string]string{}, view: map[string]*connView{}, cause: "not connected yet", seen: make(chan struct{}),
		pacer: newPacer(o.RekeyReserve),
	}
	for _, c := range o.Connections {
		m.view[c.Name] = &connView{}
	}
	return m, nil
}

// Run keeps the connections until ctx ends; then it takes them out of charon
// with their SAs, unless Leave says otherwise, within StopTimeout, and returns nil. Neither the Broker nor
// the plugin's server is needed for that: charon deletes SAs itself.
func (m *Manager) Run(ctx context.Context) error {
	var beside sync.WaitGroup
	defer beside.Wait()
	for kme, source := range m.o.Levels {
		beside.Go(func() { m.measure(ctx, kme, source) })
	}
	if m.o.Guard != nil {
		beside.Go(func() { m.keepGuard(ctx) })
	}
	wait := m.t.redialMin
	for {
		began := time.Now()
		err := m.session(ctx)
		if ctx.Err() != nil {
			m.disconnected(errors.New("stopped"))
			return nil
		}
		if m.disconnected(err) {
			report(m.log, m.o.Events, Event{Severity: Fault, Code: EventCharon, Text: fmt.Sprintf("connections %s: no charon: %v", m.names(), err)})
		}
		if time.Since(began) > m.t.redialMax {
			wait = m.t.redialMin
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait/2 + rand.N(wait/2+1)):
		}
		wait = min(2*wait, m.t.redialMax)
	}
}

// names lists the connections, the first few of many.
func (m *Manager) names() string {
	const most = 8
	var list []string
	for _, c := range m.o.Connections {
		if len(list) == most {
			list = append(list, fmt.Sprintf("and %d more", len(m.o.Connections)-most))
			break
		}
		list = append(list, strconv.Quote(c.Name))
	}
	return strings.Join(list, ", ")
}

// disconnected notes that there is no charon, and tells whether that is new. What
// was up is remembered until charon says what it still has.
func (m *Manager) disconnected(err error) (fresh bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fresh = !m.gone
	m.gone, m.link, m.cause, m.at = true, nil, err.Error(), time.Time{}
	for name, v := range m.view {
		m.view[name] = &connView{up: v.up, since: v.since}
	}
	m.replaced()
	return fresh
}

// session serves one running charon; it returns when that is gone (an error)
// or ctx has ended (nil).
func (m *Manager) session(ctx context.Context) error {
	client, err := vici.Dial(ctx, vici.Options{Socket: m.o.VICI, Timeout: m.t.call, Log: m.log})
	if err != nil {
		return err
	}
	defer client.Close()
	l := &link{
		client: client, grace: time.Now().Add(m.t.helloGrace),
		loaded: map[string]bool{}, faults: map[string]string{}, keys: map[string]string{}, next: map[childName]retry{}, begun: attempts{}, busy: map[string]time.Time{},
	}
	if l.version, err = client.Version(ctx); err != nil {
		return err
	}
	if l.plugins, err = client.Plugins(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	m.link, m.cause, m.gone = l, "", false
	l.blocked = errors.New("waiting for the qipsec plugin to say hello")
	m.mu.Unlock()
	select {
	case m.met <- struct{}{}:
	default:
	}
	report(m.log, m.o.Events, Event{Severity: Run, Code: EventCharon, Text: fmt.Sprintf("charon of strongSwan %s answers", l.version)})
	err = m.serve(ctx, l)
	switch {
	case ctx.Err() == nil:
		return err
	case m.o.Leave != nil && m.o.Leave():
		m.log.Info("connections and SAs are left in charon for the next start", "count", len(m.o.Connections))
	default:
		m.stop(ctx, l)
	}
	return nil
}

// serve is the owner loop of one charon.
func (m *Manager) serve(ctx context.Context, l *link) error {
	if err := m.settle(ctx, l); err != nil {
		return err
	}
	if err := m.reconcile(ctx, l); err != nil {
		return err
	}
	m.takeOutOld(ctx, l)
	reconcile := time.NewTicker(m.o.Reconcile)
	defer reconcile.Stop()
	tick := time.NewTicker(m.t.tick)
	defer tick.Stop()
	look := time.NewTimer(m.t.debounce)
	defer look.Stop()
	soon := true // look will fire: later events must not put it off
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-l.client.Events():
			if !ok {
				return l.client.Err()
			}
			m.heard(e)
			if !soon {
				look.Reset(m.t.debounce)
				soon = true
			}
		case <-m.o.Broker.changed:
			m.mu.Lock()
			l.grace = time.Now().Add(m.t.helloGrace)
			clear(l.next)
			m.mu.Unlock()
			err = m.settle(ctx, l)
		case id := <-m.o.Broker.rekeys:
			err = m.rekeyMoved(ctx, l, id, false)
		case <-m.kick:
			look.Reset(0)
			soon = true
		case <-look.C:
			soon = false
			err = m.look(ctx, l)
		case <-tick.C:
			if err = m.settle(ctx, l); err == nil && (len(m.due(l, time.Now())) > 0 || m.stallDue(time.Now())) {
				// With a fresh view: charon tells nobody that it is connecting.
				err = m.look(ctx, l)
			}
			for err == nil && len(l.moved) > 0 && !time.Now().Before(l.moved[0].at) {
				id := l.moved[0].id
				l.moved = l.moved[1:]
				err = m.rekeyMoved(ctx, l, id, true)
			}
			if err == nil {
				m.pace(ctx, l, time.Now())
			}
		case <-reconcile.C:
			// Nothing else may be asked of a charon that is up for hours, and one
			// that hangs ends no session.
			if _, err = l.client.Version(ctx); err == nil {
				err = m.reconcile(ctx, l)
			}
			if err == nil {
				err = m.look(ctx, l)
			}
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// settle verifies the plugin and loads what may be loaded. Failures of one
// connection are noted and tried again; only those of VICI itself are errors.
func (m *Manager) settle(ctx context.Context, l *link) error {
	cause := m.verified(l)
	if cause == nil || !m.waiting(l) {
		m.setBlocked(ctx, l, cause)
	}
	for _, c := range m.o.Connections {
		if l.loaded[c.Name] || cause != nil && c.Policy == Required {
			continue
		}
		if err := m.o.Broker.bypassed(c.Name); err != nil && c.Policy == Required {
			if m.fault(l, c.Name, err) {
				m.takeOut(ctx, l, c.Name)
			}
			continue
		}
		if err := m.load(ctx, l, withBackstop(c)); err != nil {
			m.fault(l, c.Name, err)
			continue
		}
		m.mu.Lock()
		l.loaded[c.Name] = true
		delete(l.faults, c.Name)
		was := m.out[c.Name]
		delete(m.out, c.Name)
		m.mu.Unlock()
		m.log.Info("connection loaded", "connection", c.Name, "policy", c.Policy.String())
		if was != "" {
			report(m.log, m.o.Events, Event{Severity: Run, Code: EventLoaded, Connection: c.Name, Text: fmt.Sprintf("connection %q is loaded; over is: %s", c.Name, was)})
		}
	}
	return nil
}

// verified says why required connections may not be loaded, or nil.
func (m *Manager) verified(l *link) error {
	if !slices.Contains(l.plugins, "qipsec") {
		return fmt.Errorf("charon %s has not loaded the qipsec plugin: build it with scripts/charon-plugin.sh, set charon.plugins.qipsec.load = yes and restart charon", l.version)
	}
	return m.o.Broker.Verify(l.version)
}

// waiting reports whether the plugin is loaded and may still say hello: its
// hooks refuse meanwhile, so that nothing is lost by patience.
func (m *Manager) waiting(l *link) bool {
	_, said := m.o.Broker.charon()
	return !said && slices.Contains(l.plugins, "qipsec") && time.Now().Before(l.grace)
}

// setBlocked notes the verdict on the plugin. When required connections become
// blocked they are taken out of charon with their SAs.
func (m *Manager) setBlocked(ctx context.Context, l *link, cause error) {
	m.mu.Lock()
	was := l.blocked
	l.blocked = cause
	m.mu.Unlock()
	if cause == nil || was != nil && was.Error() == cause.Error() {
		return
	}
	for _, c := range m.o.Connections {
		if c.Policy != Required {
			continue
		}
		m.keptOut(EventPlugin, c.Name, "is blocked", cause)
		m.takeOut(ctx, l, c.Name)
	}
}

// keptOut raises the alarm that a connection is not in charon, once per cause.
func (m *Manager) keptOut(code, name, what string, cause error) {
	m.mu.Lock()
	same := m.out[name] == cause.Error()
	m.out[name] = cause.Error()
	m.mu.Unlock()
	if !same {
		report(m.log, m.o.Events, Event{
			Severity: Alarm, Code: code, Connection: name,
			Text: fmt.Sprintf("connection %q %s: %v", name, what, cause),
		})
	}
}

// takeOut unloads a connection and closes its SAs. Both may find nothing: charon
// may never have had them.
func (m *Manager) takeOut(ctx context.Context, l *link, name string) {
	_ = l.client.UnloadConn(ctx, name)
	_ = l.client.TerminateConn(ctx, name, 0)
	m.mu.Lock()
	delete(l.loaded, name)
	m.mu.Unlock()
}

// takeOutOld takes out the connections of an earlier start that are not configured
// any more: the journal names them as ours, and nobody would rekey them.
func (m *Manager) takeOutOld(ctx context.Context, l *link) {
	states, err := m.o.SAD.State(ctx)
	if err != nil {
		m.log.Warn("not known whose SAs an earlier start has left", "cause", err)
		return
	}
	done := map[string]bool{}
	for _, s := range states {
		if name := s.Connection; name != "" && m.config(name) == nil && !done[name] {
			done[name] = true
			m.log.Info("connection of an earlier start is not configured any more: taken out of charon", "connection", name)
			m.takeOut(ctx, l, name)
		}
	}
}

// fault notes why a connection is not loaded; fresh tells that it was not known of
// this charon.
func (m *Manager) fault(l *link, name string, err error) (fresh bool) {
	m.mu.Lock()
	fresh = l.faults[name] != err.Error()
	l.faults[name] = err.Error()
	m.mu.Unlock()
	m.keptOut(EventLoadFailed, name, "not loaded", err)
	return fresh
}

// heard logs what charon reported. What came up or went down the next look tells, a
// rekeying only this.
func (m *Manager) heard(e vici.Event) {
	if m.config(e.IKE.Conn) == nil {
		return
	}
	if e.Kind == vici.ChildRekeyed {
		in, _ := childIDs(e.IKE, e.Child)
		with := "without a quantum key of ours"
		if id := m.o.Broker.keyID(in); !id.IsZero() {
			with = "with Key-ID " + id.String()
		}
		report(m.log, m.o.Events, Event{
			Severity: Run, Code: EventRekeyed, Connection: e.IKE.Conn,
			Text: fmt.Sprintf("connection %q, child %s: rekeyed %s, SPIs %08x in, %08x out", e.IKE.Conn, e.Child.Name, with, e.Child.SPIIn, e.Child.SPIOut),
		})
		return
	}
	word := map[vici.Kind]string{
		vici.IKEUp: "IKE_SA established", vici.IKEDown: "IKE_SA closed",
		vici.ChildUp: "CHILD_SA established", vici.ChildDown: "CHILD_SA closed",
	}[e.Kind]
	m.log.Debug("charon: "+word, "connection", e.IKE.Conn, "child", e.Child.Name,
		"spi_in", fmt.Sprintf("%08x", e.Child.SPIIn), "spi_out", fmt.Sprintf("%08x", e.Child.SPIOut))
}

// config gives a connection's configuration, nil if it is not one of ours.
func (m *Manager) config(name string) *Connection {
	for i := range m.o.Connections {
		if m.o.Connections[i].Name == name {
			return &m.o.Connections[i]
		}
	}
	return nil
}

// stop takes our connections and their SAs out of charon.
func (m *Manager) stop(ctx context.Context, l *link) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.o.StopTimeout)
	defer cancel()
	wait := m.o.StopTimeout / 3 // for the peer's answer; then without it
	var all sync.WaitGroup
	slots := make(chan struct{}, 8)
	for _, c := range m.o.Connections {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			// First out, so that nobody makes a new SA of it. Both may find nothing.
			short, cancel := context.WithTimeout(ctx, wait)
			if err := l.client.UnloadConn(short, c.Name); err != nil {
				m.log.Debug("unload", "connection", c.Name, "cause", err)
			}
			cancel()
			if err := l.client.TerminateConn(ctx, c.Name, wait); err != nil {
				m.log.Debug("terminate", "connection", c.Name, "cause", err)
			}
		})
	}
	all.Wait()
	for path, id := range l.keys {
		if err := l.client.UnloadKey(ctx, id); err != nil {
			m.log.Warn("private key stays loaded in charon", "path", path, "cause", err)
		}
	}
	m.log.Info("connections taken out of charon", "count", len(m.o.Connections))
	for _, c := range m.o.Connections {
		if m.view[c.Name].up { // nobody else changes the view
			report(m.log, m.o.Events, Event{Severity: Run, Code: EventDown, Connection: c.Name, Text: fmt.Sprintf("connection %q is taken down: qipsecd stops", c.Name)})
		}
	}
}
