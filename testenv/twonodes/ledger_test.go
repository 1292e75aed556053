package twonodes

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// ledger is every key that an SAE was given, by either side, and what was wrong.
type ledger struct {
	mu      sync.Mutex
	keys    map[key.ID]entry
	issued  [2]int // by the node that gave it out
	fetched [2]int // by the node where it was fetched
	faults  []string
	broken  chan struct{} // closed at the first fault
}

type entry struct {
	sum     uint64 // of the key's bytes
	by      int8   // node that issued it
	fetched bool
}

func newLedger() *ledger { return &ledger{keys: map[key.ID]entry{}, broken: make(chan struct{})} }

func sum(m *key.Material) uint64 {
	h := sha256.Sum256(m.Bytes())
	return binary.BigEndian.Uint64(h[:8])
}

// issue notes an answer of enc_keys.
func (l *ledger) issue(node int, ks []key.SupplyKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range ks {
		if e, ok := l.keys[k.ID]; ok {
			l.fault("enc_keys of %s gave Key-ID %s, which %s had given", names[node], k.ID, names[e.by])
			continue
		}
		l.keys[k.ID] = entry{sum: sum(k.Material), by: int8(node)}
		l.issued[node]++
	}
}

// fetch notes an answer of dec_keys.
func (l *ledger) fetch(node int, ks []key.SupplyKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range ks {
		e, ok := l.keys[k.ID]
		switch {
		case !ok:
			l.fault("dec_keys of %s gave Key-ID %s, which was never issued", names[node], k.ID)
		case int(e.by) == node:
			l.fault("dec_keys of %s gave Key-ID %s, which it had issued itself", names[node], k.ID)
		case e.fetched:
			l.fault("dec_keys of %s gave Key-ID %s twice", names[node], k.ID)
		case e.sum != sum(k.Material):
			l.fault("the bytes of Key-ID %s differ at the two nodes", k.ID)
		default:
			e.fetched = true
			l.keys[k.ID] = e
			l.fetched[node]++
		}
	}
}

// wrong notes any other fault.
func (l *ledger) wrong(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fault(format, args...)
}

func (l *ledger) fault(format string, args ...any) {
	if len(l.faults) == 0 {
		close(l.broken)
	}
	if len(l.faults) < 20 {
		l.faults = append(l.faults, time.Now().UTC().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
	}
}

// count gives the keys issued by each node, all fetched, and those that were
// supplied at one side only.
func (l *ledger) count() (issued [2]int, fetched, stranded int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fetched = l.fetched[0] + l.fetched[1]
	return l.issued, fetched, l.issued[0] + l.issued[1] - fetched
}

func (l *ledger) list() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.faults
}
