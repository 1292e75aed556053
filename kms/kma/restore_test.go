package kma

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// storeOptions are those that start opens n's store with.
func (n *node) storeOptions() store.Options {
	return store.Options{URL: "sqlite:" + filepath.Join(n.dir, "db", "inventory.db"), RootFile: filepath.Join(n.dir, "root"), Log: n.log}
}

// TestRestoredFromBackup: a node loses its disk and begins anew with what
// `qipsec store backup` saved of it some time ago. It knows no mark of its own;
// SYNC tells it those of the peer before anything is supplied, the blocks that
// only the peer has left are destroyed, and nothing is supplied twice.
func TestRestoredFromBackup(t *testing.T) {
	for _, who := range []string{"a", "b"} {
		t.Run(who, func(t *testing.T) {
			w := newWorld(t, nil)
			l := newLedger(w)
			w.both(l.keep)
			n := w.a
			if who == "b" {
				n = w.b
			}
			takeSome := func() {
				for _, x := range []*node{w.a, w.b} {
					for got := 0; got < 20; {
						w.want("a key", func() bool {
							k, err := l.take(t.Context(), x)
							if err == nil {
								l.claim(w.other(x), k)
								k.Material.Wipe()
								got++
							}
							return err == nil
						})
					}
				}
			}
			w.feed(1, 600, nil)
			w.want("agreement", w.agreed)
			takeSome()
			var backup bytes.Buffer
			if _, err := store.Backup(t.Context(), n.storeOptions(), &backup); err != nil { // beside the running node
				t.Fatal(err)
			}
			takeSome()
			w.feed(2, 600, nil)
			w.want("agreement on seq 2", func() bool { return w.info(w.b).NewestSeq == 2 && w.agreed() })
			takeSome()
			mark, peerMark := w.info(w.other(n)).PeerMark, w.info(w.other(n)).Mark
			w.kill(n)
			if err := os.RemoveAll(filepath.Join(n.dir, "db")); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(n.dir, "root")); err != nil {
				t.Fatal(err)
			}
			if _, err := store.Restore(t.Context(), n.storeOptions(), bytes.NewReader(backup.Bytes())); err != nil {
				t.Fatal(err)
			}
			w.start(n, l.keep)
			w.want("agreement", w.agreed)
			if got := w.info(n); got.Mark < mark || got.PeerMark < peerMark || got.Active != 0 || got.Received != 0 {
				t.Errorf("after SYNC %+v, the peer had marks %s and %s", got, mark, peerMark)
			}
			if n.events.count("STORE_RESTORED") == 0 {
				t.Errorf("no alarm: %v", n.events.codes)
			}
			if left := w.info(w.other(n)); left.Active != 0 {
				t.Errorf("the peer keeps what it has alone: %+v", left)
			}
			w.feed(3, 600, nil)
			w.want("agreement on seq 3", func() bool { return w.info(w.b).NewestSeq == 3 && w.agreed() })
			takeSome()
			if rows, err := n.cur.Load().inv.Store.History(t.Context(), store.HistoryQuery{Pool: pairID, At: key.At(1, 0), Limit: 1000}); err != nil || len(rows) == 0 {
				t.Errorf("the history of before: %d rows, %v", len(rows), err)
			}
		})
	}
}
