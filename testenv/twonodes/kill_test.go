package twonodes

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/operator"
)

const killsPerRound = 25 // between two looks at what both nodes hold

// lost is what a log says when a block was given up or a store contradicts
// itself: a crash is no reason for either.
var lost = []string{"severity=alarm", "SYNC_DESTROYED", "LEASE_MISSING", "M102_", "KEYFILE_REFUSED", "damaged"}

// kill -9 at random moments under load, in every phase from the start of a
// daemon to its last lease: no Key-ID is supplied twice or with other bytes, and
// whenever nobody takes keys for a moment both nodes agree about every key.
func TestKill9(t *testing.T) {
	t.Parallel()
	// Small leases: more of them, and more kills that meet one.
	s := newSite(t, 1, "intake_interval = \"50ms\"\nlease = 64\nratchet_keys = 2000\n")
	s.nodes[0].never, s.nodes[1].never = lost, lost
	s.up()
	sd := drawSeed(t)
	rng := rand.New(rand.NewPCG(sd, 1))
	stop := s.feeding(1_000, 2_000)
	s.supplying()
	d := startLoad(s, newLedger(), false, sd)
	began, underLoad := time.Now(), 0
	for i := range *kills {
		// Every other kill meets a load that is nearly all at one node.
		d.idle[0].Store(i%4 == 1)
		d.idle[1].Store(i%4 == 3)
		s.scarce.Store(i%2 == 1)
		if d.strike(rng) {
			underLoad++
		}
		if (i+1)%killsPerRound != 0 && i+1 != *kills || broken(d.l) {
			continue
		}
		resume := d.pause()
		stop()
		s.agree()
		s.pairsEqual(d.l)
		if i+1 != *kills {
			stop = s.feeding(1_000, 2_000)
		}
		resume()
		_, fetched, stranded := d.l.count()
		t.Logf("%d kills in %.0f s: %d pairs equal, %d keys stranded; both nodes agree", i+1, time.Since(began).Seconds(), fetched, stranded)
	}
	d.end()
	d.report(t)
	t.Logf("%d kills in %v, %d of them while both nodes supplied", *kills, time.Since(began).Round(time.Second), underLoad)
	if underLoad == 0 && !t.Failed() {
		t.Error("no kill met a node that supplied keys")
	}
}

func broken(l *ledger) bool {
	select {
	case <-l.broken:
		return true
	default:
		return false
	}
}

// strike kills one node, or both, at a random moment and starts it again at
// once. It reports whether both supplied before.
func (d *load) strike(rng *rand.Rand) (supplied bool) {
	d.s.t.Helper()
	before := [2]int64{d.calls[0].Load(), d.calls[1].Load()}
	if rng.IntN(3) > 0 { // else: perhaps before it has come up
		await(d.s.t, "both nodes supply again", func() error {
			if d.calls[0].Load() > before[0] && d.calls[1].Load() > before[1] || broken(d.l) {
				return nil
			}
			return errors.New("nothing supplied")
		})
	}
	// The random moment.
	time.Sleep(time.Duration(rng.Int64N(int64([]time.Duration{20, 200, 800}[rng.IntN(3)] * time.Millisecond))))
	supplied = d.calls[0].Load() > before[0] && d.calls[1].Load() > before[1]
	victims := [][]int{{0}, {1}, {0}, {1}, {0}, {1}, {0, 1}}[rng.IntN(7)]
	for _, v := range victims {
		if err := d.s.nodes[v].kill(); err != nil {
			d.l.wrong("%v", err)
			return supplied
		}
	}
	for _, v := range victims {
		d.s.nodes[v].start()
	}
	return supplied
}

// pairsEqual takes keys at either node, all of which the other one must have.
func (s *site) pairsEqual(l *ledger) {
	s.t.Helper()
	for node := range 2 {
		m, sl := s.te(node), s.te(1-node)
		for range 3 {
			s.pairEqual(l, node, 40, m, sl)
		}
		m.Close()
		sl.Close()
	}
}

func (s *site) pairEqual(l *ledger, node, number int, m, sl *etsi014.Client) {
	s.t.Helper()
	var ks []key.SupplyKey
	await(s.t, "enc_keys of "+names[node], func() (err error) {
		ks, err = m.GetKey(s.t.Context(), teOf(1-node), number, 256)
		return err
	})
	l.issue(node, ks)
	ids := make([]key.ID, len(ks))
	for i, k := range ks {
		ids[i] = k.ID
	}
	key.WipeAll(ks)
	// A 503 consumes nothing: on a busy machine the notice may take longer than
	// dec_keys waits for it.
	await(s.t, "dec_keys of "+names[1-node], func() (err error) {
		ks, err = sl.GetKeyWithID(s.t.Context(), teOf(node), ids, 256)
		var busy *key.Unavailable
		if err != nil && !errors.As(err, &busy) {
			s.t.Fatalf("dec_keys of %s: %v", names[1-node], err)
		}
		return err
	})
	l.fetch(1-node, ks)
	key.WipeAll(ks)
}

// kill -9 while files are taken in and agreed on, and while the store ratchets
// after every few keys: no file is lost, none is taken in twice, and of the keys
// only those of open leases are missing afterwards.
func TestKill9DuringIntakeAndRatchet(t *testing.T) {
	t.Parallel()
	const (
		lease   = 8
		growth  = 8 // of a lease under load, at most
		files   = 60
		perFile = 1500
	)
	s := newSite(t, 4, fmt.Sprintf("intake_interval = \"10ms\"\nlease = %d\nratchet_keys = %d\n", lease, 2*lease))
	s.nodes[0].never, s.nodes[1].never = lost, lost
	s.up()
	sd := drawSeed(t)
	rng := rand.New(rand.NewPCG(sd, 2))
	d := startLoad(s, newLedger(), false, sd)
	strikes, amid := max(1, *kills/2), 0
	for i := range strikes {
		for range files / min(files, strikes) {
			if err := s.feed(perFile); err != nil {
				t.Fatal(err)
			}
		}
		// The random moment: by time, or as soon as so many files are still there.
		if i%4 < 2 {
			time.Sleep(time.Duration(rng.Int64N(int64(150 * time.Millisecond))))
		} else {
			left := 1 + rng.IntN(2*files/min(files, strikes))
			for end := time.Now().Add(bound); s.waiting(0)+s.waiting(1) > left && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
		}
		if s.waiting(0)+s.waiting(1) > 0 {
			amid++
		}
		v := i % 2
		if err := s.nodes[v].kill(); err != nil {
			t.Fatal(err)
		}
		s.nodes[v].start()
		if rng.IntN(2) == 0 {
			s.supplying()
		}
	}
	resume := d.pause()
	p := s.agree()
	s.pairsEqual(d.l)
	resume()
	d.end()
	d.report(t)
	issued, _, _ := d.l.count()
	fed := int(s.seq) * perFile
	// Each kill ends two sessions' leases: the one in use and the next one, of
	// both owners.
	burned, most := fed-p.Active-issued[0]-issued[1], (strikes+1)*2*2*growth*lease
	t.Logf("%d kills, %d of them with files to take in; of %d keys in %d files %d are active at both nodes, %d were issued, %d burned (at most %d may be)",
		strikes, amid, fed, s.seq, p.Active, issued[0]+issued[1], burned, most)
	if strikes >= 4 && amid == 0 {
		t.Error("no kill came while files were taken in")
	}
	if p.NewestSeq != s.seq {
		t.Errorf("newest seq is %d, %d was delivered", p.NewestSeq, s.seq)
	}
	if burned > most {
		t.Errorf("%d keys are missing", burned)
	}
}

// Keys that no slave SAE fetches are gone at both nodes when their time is over,
// and counted; so are those whose notice outlived a crash of the master's node.
func TestStrandedKeysEnd(t *testing.T) {
	t.Parallel()
	const n = 20
	s := newSite(t, 6, "intake_interval = \"50ms\"\nlease = 64\nnotice_ttl = \"8s\"\n")
	s.nodes[0].never, s.nodes[1].never = lost, lost
	s.up()
	if err := s.feed(2000); err != nil {
		t.Fatal(err)
	}
	s.supplying()
	l := newLedger()
	a, b := s.te(0), s.te(1)
	s.pairEqual(l, 0, n, a, b)
	ks, err := a.GetKey(t.Context(), teOf(1), n, 256)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]key.ID, n)
	for i, k := range ks {
		ids[i] = k.ID
	}
	key.WipeAll(ks)
	// b learns of them at the latest when it has to say that they have another
	// size, and keeps them when a is gone.
	for _, id := range ids {
		status, text, err := s.raw(1, s.path(1, "pki", "saes", "b-te"), teOf(0)+"/dec_keys", `{"key_IDs":[{"key_ID":"`+id.String()+`"}],"size":512}`)
		if err != nil || status != 400 || !strings.Contains(text, "size differs") {
			t.Fatalf("a key of another size: %d %s, %v", status, text, err)
		}
	}
	if err := s.nodes[0].kill(); err != nil {
		t.Fatal(err)
	}
	s.nodes[0].start()
	if ks, err = b.GetKeyWithID(t.Context(), teOf(0), ids[:n/2], 256); err != nil {
		t.Fatalf("keys with a notice, after a crash of the master's node: %v", err)
	}
	key.WipeAll(ks)
	s.stranded(ids[n/2:], 1)
	for _, id := range ids {
		if _, err := b.GetKeyWithID(t.Context(), teOf(0), []key.ID{id}, 0); !notFound(err) {
			t.Errorf("a stranded key: %v", err)
		}
	}
	s.agree()
	s.pairsEqual(l)
	for _, f := range l.list() {
		t.Error(f)
	}
}

// The keys that the slave's node lost in a crash before they were fetched are
// counted, each of them once and by the owner; those fetched before are not.
func TestCrashOfTheSlaveStrandsKeys(t *testing.T) {
	t.Parallel()
	const n = 20
	s := newSite(t, 7, "intake_interval = \"50ms\"\nlease = 64\nnotice_ttl = \"8s\"\n")
	s.nodes[0].never, s.nodes[1].never = lost, lost
	s.up()
	if err := s.feed(2000); err != nil {
		t.Fatal(err)
	}
	s.supplying()
	l := newLedger()
	a, b := s.te(0), s.te(1)
	ks, err := a.GetKey(t.Context(), teOf(1), n, 256)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]key.ID, n)
	for i, k := range ks {
		ids[i] = k.ID
	}
	key.WipeAll(ks)
	if ks, err = b.GetKeyWithID(t.Context(), teOf(0), ids[:n/2], 256); err != nil {
		t.Fatal(err)
	}
	key.WipeAll(ks)
	time.Sleep(2 * time.Second) // for a to learn of it: kms/ksa says what it cannot
	if err := s.nodes[1].kill(); err != nil {
		t.Fatal(err)
	}
	s.nodes[1].start()
	s.stranded(ids[n/2:], 0)
	for _, id := range ids {
		if _, err := b.GetKeyWithID(t.Context(), teOf(0), []key.ID{id}, 0); !notFound(err) {
			t.Errorf("a key that was fetched or lost: %v", err)
		}
	}
	s.agree()
	s.pairsEqual(l)
	for _, f := range l.list() {
		t.Error(f)
	}
}

// stranded waits until node counts just the keys ids as stranded, each of them
// once, and makes sure that none is counted later or by the other node.
func (s *site) stranded(ids []key.ID, by int) {
	s.t.Helper()
	count := func(i, want int) error {
		list, err := s.nodes[i].op.History(s.t.Context(), operator.HistoryQuery{Limit: 1000})
		if err != nil {
			return err
		}
		seen := map[key.ID]bool{}
		for _, u := range list {
			if u.State != "stranded" {
				continue
			}
			if u.Key == nil || !slices.Contains(ids, *u.Key) || seen[*u.Key] {
				return fmt.Errorf("%s counts what is not stranded, or twice: %+v", names[i], u)
			}
			seen[*u.Key] = true
		}
		if len(seen) != want {
			return fmt.Errorf("%d keys are counted by %s, not %d", len(seen), names[i], want)
		}
		return nil
	}
	await(s.t, "the keys that nobody fetched are stranded", func() error { return count(by, len(ids)) })
	time.Sleep(8 * time.Second) // more than an owner waits for the peer's word after its own expiry
	if err := errors.Join(count(by, len(ids)), count(1-by, 0)); err != nil {
		s.t.Error(err)
	}
}
