package kma

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// age makes every block of n older, in the life it has now.
func (n *node) age(d time.Duration) { n.cur.Load().inv.aged.Store(int64(d)) }

// expired counts the keys that n's history says have expired, by side.
func (w *world) expired(n *node) map[store.Side]int {
	w.t.Helper()
	rows, err := n.cur.Load().inv.History(w.t.Context(), store.HistoryQuery{Pool: pairID, Limit: 10_000})
	if err != nil {
		w.t.Fatal(err)
	}
	count := map[store.Side]int{}
	for _, r := range rows {
		if r.State == key.Expired {
			count[r.Side] += r.Count
		}
	}
	return count
}

func expiring(o *Options) { o.MaxKeyAge, o.ExpireEvery = time.Hour, 5*time.Millisecond }

// TestExpireByAge: keys on disk that are too old go on both sides; what was leased
// before stays, on both sides.
func TestExpireByAge(t *testing.T) {
	w := newWorld(t, expiring)
	l := newLedger(w)
	w.both(l.keep)
	for seq := uint64(1); seq <= 4; seq++ {
		w.feed(seq, 60, nil)
	}
	var taken Key
	w.want("leases at both", func() (ok bool) {
		lb, _ := w.b.cur.Load().agent.Level("a")
		la, _ := w.a.cur.Load().agent.Level("b")
		return w.info(w.a).NewestSeq == 4 && w.agreed() && lb.Leased == 16 && la.Leased == 16
	})
	taken, err := l.take(t.Context(), w.a)
	if err != nil {
		t.Fatal(err)
	}
	on := w.info(w.a).Active
	w.a.age(50 * time.Minute)
	w.b.age(50 * time.Minute)
	time.Sleep(50 * time.Millisecond) // ten looks
	if w.info(w.a).Active != on {
		t.Errorf("keys expired before their time: %+v", w.info(w.a))
	}
	w.a.age(2 * time.Hour)
	w.b.age(2 * time.Hour)
	w.want("no key on either disk", func() bool { return w.info(w.a).Active+w.info(w.b).Active == 0 && w.agreed() })
	a, b := w.expired(w.a), w.expired(w.b)
	if a[store.Own] == 0 || a[store.Own] != b[store.Peer] || a[store.Peer] != b[store.Own] || a[store.Own]+a[store.Peer] != on {
		t.Errorf("of %d keys, a says %v expired, b %v", on, a, b)
	}
	for _, n := range []*node{w.a, w.b} {
		if n.events.count("KEYS_EXPIRED") == 0 {
			t.Errorf("events of %s: %v", n.name, n.events.codes)
		}
	}
	if !l.claim(w.b, taken) {
		t.Error("a key that was leased before it was too old is gone")
	}
	taken.Material.Wipe()
	if n := l.drain(w.a); n != 15 {
		t.Errorf("%d keys of a's lease were left, not 15", n)
	}
	w.a.age(0)
	w.b.age(0)
	w.feed(5, 60, nil)
	w.want("fresh keys", func() bool {
		k, err := l.take(t.Context(), w.a)
		return err == nil && l.claim(w.b, k) && k.Position.Seq() == 5
	})
}

// TestOwnerExpires: each node lets its own keys expire and no others.
func TestOwnerExpires(t *testing.T) {
	w := newWorld(t, nil)
	w.a.tune = expiring
	l := newLedger(w)
	w.both(l.keep)
	w.feed(1, 200, nil)
	w.want("agreement", w.agreed)
	w.a.age(2 * time.Hour)
	w.want("none of a's keys on disk", func() bool { return w.info(w.a).OwnActive == 0 && w.agreed() })
	if n := w.info(w.b).OwnActive; n == 0 || n != w.info(w.a).Active {
		t.Errorf("b has %d keys of its own, a knows of %d", n, w.info(w.a).Active)
	}
	if n := l.drain(w.b); n != 100 {
		t.Errorf("b could use %d of its 100 keys", n)
	}
}

// TestExpireByCount: the inventory stays within its bound under intake; the newest
// keys stay.
func TestExpireByCount(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.MaxKeys = 100 })
	l := newLedger(w)
	w.both(l.keep)
	const files, keys = 12, 60
	for seq := uint64(1); seq <= files; seq++ {
		w.feed(seq, keys, nil)
		w.want("the bound", func() bool {
			a, b := w.info(w.a), w.info(w.b)
			return a.NewestSeq == seq && b.NewestSeq == seq && a.OwnActive <= 50 && b.OwnActive <= 50 && a.Active <= 100 && w.agreed()
		})
	}
	if a, b := w.expired(w.a), w.expired(w.b); a[store.Own] == 0 || a[store.Own] != b[store.Peer] || a[store.Peer] != b[store.Own] {
		t.Errorf("a says %v expired, b %v", a, b)
	}
	w.want("the newest key", func() bool { // the last ones may still be on their way from one to the other
		l.drain(w.a)
		l.drain(w.b)
		for _, e := range l.m {
			if e.pos == key.At(files, keys-1) {
				return true
			}
		}
		return false
	})
}

// TestReceivedExpire: what is never validated does not pile up.
func TestReceivedExpire(t *testing.T) {
	for name, tune := range map[string]func(*Options){
		"age":   expiring,
		"count": func(o *Options) { o.MaxKeys, o.ExpireEvery = 30, 5*time.Millisecond },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSlaveWith(t, nil, tune)
			for seq := uint64(1); seq <= 3; seq++ {
				s.file(t, seq, 20)
			}
			s.b.age(2 * time.Hour)
			left := map[string]int{"age": 0, "count": 20}[name]
			s.want("expiry", func() bool { return s.info(s.b).Received == left })
			if got, want := s.expired(s.b)[0], 60-left; got != want || s.events.count("KEYS_EXPIRED") != want/20 {
				t.Errorf("%d keys expired, not %d; events %v", got, want, s.events.codes)
			}
		})
	}
}

// TestExpiredLease: what the peer says has expired goes from the disk, and nothing of
// it is held; the repeat is harmless.
func TestExpiredLease(t *testing.T) {
	s := newSlave(t, nil)
	one := s.file(t, 1, 40)
	if _, err := s.leaseFor(t, type1.PurposeExpired, 0, key.At(2, 0)); code(err) != type1.NotValidated {
		t.Errorf("beyond what was taken in: %v", err)
	}
	s.verdicts(t, one)
	for range 2 {
		if r, err := s.leaseFor(t, type1.PurposeExpired, 0, key.At(1, 10)); err != nil || r.Mark != type1.Position(key.At(1, 10)) {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	if i := s.info(s.b); i.PeerMark != key.At(1, 10) || i.Active != 40-6 {
		t.Errorf("%+v", i)
	}
	if _, _, err := s.ag.Claim("a", pairID, key.At(1, 2), one.IDs[2]); !errors.Is(err, ErrGone) {
		t.Errorf("an expired key was claimed: %v", err)
	}
	if _, err := s.lease(t, key.At(1, 8), key.At(1, 14), 1); code(err) != type1.Conflict {
		t.Errorf("a lease of expired keys: %v", err)
	}
	if _, err := s.lease(t, key.At(1, 10), key.At(1, 14), 1); err != nil {
		t.Error(err)
	}
	m, _, err := s.ag.Claim("a", pairID, key.At(1, 12), one.IDs[12])
	if err != nil {
		t.Fatal(err)
	}
	m.Wipe()
}

// TestExpiryCrash: either node dies at every step of an expiry: both agree on what
// is left.
func TestExpiryCrash(t *testing.T) {
	aging := func(w *world, l *ledger, hit <-chan struct{}) {
		w.b.age(2 * time.Hour)
		<-hit
	}
	for step, victims := range map[string][]string{
		"before its mark": {"b"}, "after its mark": {"b"}, "before the message": {"a", "b"}, "after the answer": {"b"},
		"before the owner's mark": {"a"}, "after the owner's mark": {"a"},
	} {
		t.Run(fmt.Sprint(step, " ", victims), func(t *testing.T) {
			t.Parallel()
			crashAt(t, type1.PurposeExpired, step, victims, aging)
		})
	}
}
