package store

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

var padUse = key.RawUse{Purpose: key.Pad, Batch: uuid.UUID{1}, Attempt: 1, Hop: 2, Direction: key.Forward}

func bindingOf(seq uint64, first, last uint32, u key.RawUse) key.Binding {
	return key.Binding{Range: key.Range{First: key.At(seq, first), Last: key.At(seq, last)}, RawUse: u}
}

// ledgered gives the directory of a closed store with three bound ranges.
func ledgered(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "s")
	s, ctx := filled(t, testOptions(dir), 100), testContext(t)
	must(t, s.Advance(ctx, testPool, Own, key.At(1, 40), PurposeRaw, 1))
	keys, err := s.LoadRaw(ctx, testPool, Own, 0, key.At(1, 40))
	must(t, err)
	wipeAll(keys)
	mac := padUse
	mac.Purpose = key.MAC
	must(t, s.Bind(ctx, testPool, Own, bindingOf(1, 0, 8, padUse), bindingOf(1, 10, 10, mac)))
	must(t, s.Bind(ctx, testPool, Own, bindingOf(1, 12, 12, key.RawUse{Purpose: key.Pad, Batch: uuid.UUID{2}, Attempt: 1, Hop: 1, Direction: key.Backward})))
	must(t, s.Close())
	return dir
}

// Entries changed, added or removed by somebody who can write the database but
// not read the root.
func TestChangedLedger(t *testing.T) {
	if r := checked(t, ledgered(t)); r.Verdict() != Sound {
		t.Fatalf("%+v", r)
	}
	for name, stmt := range map[string]string{
		"one removed": `DELETE FROM ledger WHERE serial = 1`, "all removed": `DELETE FROM ledger`,
		"all removed, digest too": `DELETE FROM ledger; UPDATE pool SET ledger = ''`, "digest": `UPDATE pool SET ledger = 'x'`,
		"range": `UPDATE ledger SET last_pos = last_pos + 2 WHERE serial = 0`, "first": `UPDATE ledger SET first_pos = first_pos + 2 WHERE serial = 0`,
		"side": `UPDATE ledger SET side = 2`, "purpose": `UPDATE ledger SET purpose = 3 - purpose`, "attempt": `UPDATE ledger SET attempt = 9`,
		"hop": `UPDATE ledger SET hop = 9`, "direction": `UPDATE ledger SET direction = 3 - direction`, "batch": `UPDATE ledger SET batch = x'07'`,
		"serial": `UPDATE ledger SET serial = serial + 10`, "of no type": `UPDATE ledger SET hop = 'x'`,
		"added": `INSERT INTO ledger SELECT pool, serial + 10, side, first_pos, last_pos, purpose, batch, attempt, hop, direction FROM ledger`,
	} {
		t.Run(name, func(t *testing.T) {
			dir := ledgered(t)
			sqlExec(t, dir, strings.Split(stmt, "; ")...)
			if s, err := Open(testContext(t), testOptions(dir)); !errors.Is(err, ErrDamaged) {
				t.Errorf("error %v", err)
				_ = s.Close()
			}
			if r := checked(t, dir); r.Verdict() != Damaged {
				t.Errorf("Check: %+v", r)
			}
		})
	}
}

// The proof of a pool row without a ledger is that of before there was one.
func TestLedgerLeavesOldProofs(t *testing.T) {
	p := PoolInfo{ID: testPool, Peer: "bob", Role: key.Master, Class: key.Direct}
	old := p.rowAAD(uuid.UUID{1}, 7, "")
	if with := p.rowAAD(uuid.UUID{1}, 7, "00ff"); string(with) != string(old)+"00ff" {
		t.Error("the ledger is not what is added")
	}
	if digest(nil) != "" || len(digest([]entry{{}})) != 64 {
		t.Error("digests")
	}
}

// What a process forgets of spans that lie far back is refused all the same.
func TestSpansAreBounded(t *testing.T) {
	var r raw
	for seq := range uint64(maxSpans + 100) {
		r.gave([]LeasedKey{{Position: key.At(seq+1, 0), Class: key.Direct}, {Position: key.At(seq+1, 2), Class: key.Direct}})
	}
	if len(r.spans) != maxSpans {
		t.Errorf("%d spans", len(r.spans))
	}
	p := &pool{}
	if _, err := p.claim(Own, r.spans, key.Range{First: key.At(5, 0), Last: key.At(5, 2)}); !errors.Is(err, ErrNotLeased) {
		t.Errorf("forgotten: %v", err)
	}
	spans, err := p.claim(Own, r.spans, key.Range{First: key.At(200, 0), Last: key.At(200, 2)})
	must(t, err)
	if _, err := p.claim(Own, spans, key.Range{First: key.At(200, 2), Last: key.At(200, 2)}); !errors.Is(err, ErrBound) {
		t.Errorf("taken: %v", err)
	}
}
