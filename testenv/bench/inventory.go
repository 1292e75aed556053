package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
)

const (
	fewKeys      = 10_000  // of the inventory that the large one is held against
	fewCalls     = 2_000   // of one turn, as an inventory of fewKeys is to last
	fewTurns     = 4       // of one round
	bytesPerKey  = 220     // on disk, of both nodes together, with QKD-Key files under way
	stagedBytes  = 1 << 30 // room that is not ours to take
	restartTimes = 3
)

// inventoryRows measures two nodes with o.inventory keys between them: GetKey beside
// two nodes with fewKeys, from start to the first key, and resident memory. The keys
// come in as QKD-Key files, like any others, and are validated with the peer.
func inventoryRows(ctx context.Context, o options, t *table) (err error) {
	name := fmt.Sprintf("inventory of %d keys", o.inventory)
	if !o.only.MatchString(name) {
		return nil
	}
	if free, err := room(filepath.Dir(o.out)); err != nil || free < o.inventory*bytesPerKey+stagedBytes {
		t.note("%s: left out, %d MB are free beside %s, it needs %d (%v)", name, free/1e6, o.out, (o.inventory*bytesPerKey+stagedBytes)/1e6, err)
		return nil
	}
	var labs [2]*supply
	for i := range labs {
		l, err := newLab(ctx, o, 2+i, polledOften, func(int) []string { return nil })
		if err != nil {
			return err
		}
		labs[i] = &supply{lab: l}
		defer func() { err = errors.Join(err, l.close()) }()
	}
	large, few := labs[0], labs[1]
	if err := few.topUp(ctx, fewKeys/2, fewKeys); err != nil {
		return err
	}
	if err := large.topUp(ctx, 1, 50_000); err != nil { // synced, leases full
		return err
	}
	var took time.Duration
	for have := 0; have < o.inventory; have += intakeFiles * o.fileKeys {
		d, err := large.takeIn(ctx, o.fileKeys)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		took += d
	}
	t.note("%s: taken in from QKD-Key files of %d keys in %.0f s, and the files written beforehand", name, o.fileKeys, took.Seconds())
	if err := startRow(ctx, o, large, name, t); err != nil {
		return fmt.Errorf("%s: start: %w", name, err)
	}
	if err := latencyRows(ctx, o, large, few, name, t); err != nil {
		return fmt.Errorf("%s: GetKey: %w", name, err)
	}
	var peak sample
	for _, p := range large.procs[:2] {
		mb, err := residentPeak(p.cmd.Process.Pid)
		if err != nil {
			return err
		}
		peak = append(peak, mb)
	}
	t.add(name+": resident, peak of each node", "MB", peak, nil, "", goal{most: 500})
	return nil
}

// room is how many bytes are free at path.
func room(path string) (int, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, err
	}
	return int(s.Bavail) * int(s.Bsize), nil
}

// residentPeak is the most memory that a process had resident since it began, in MB.
func residentPeak(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
			return float64(kib) * 1024 / 1e6, err
		}
	}
	return 0, fmt.Errorf("process %d: no VmHWM in its status", pid)
}

// startRow starts node a again and again: from the start of the process to the
// first key that it supplies, for which it has agreed with its peer where to go on.
func startRow(ctx context.Context, o options, s *supply, name string, t *table) error {
	var took sample
	for range min(o.rounds, restartTimes) {
		if err := s.end(0); err != nil {
			return err
		}
		cs, err := s.callers(1, keepAlive)
		if err != nil {
			return err
		}
		begin := time.Now()
		if err := s.begin(0); err != nil {
			return err
		}
		err = await(ctx, "a key after the start", func() error { return s.getKeys(cs[0]) })
		took = append(took, time.Since(begin).Seconds())
		closeAll(cs)
		if err != nil {
			return err
		}
	}
	t.add(name+": start to the first key supplied", "s", took, nil, "", goal{most: 5})
	return nil
}

// latencyRows lets both inventories take turns, of fewCalls each.
func latencyRows(ctx context.Context, o options, large, few *supply, name string, t *table) error {
	labs := [2]*supply{large, few}
	var cs [2][]*caller
	var slaves [2]*etsi014.Client
	for i, s := range labs {
		var err error
		if cs[i], err = s.callers(o.clients, keepAlive); err != nil {
			return err
		}
		defer closeAll(cs[i])
		if slaves[i], err = s.slave(); err != nil {
			return err
		}
		defer slaves[i].Close()
	}
	var turns [2][]turn
	for round := -1; round < fewTurns*o.rounds; round++ { // the first one warms up
		if err := few.topUp(ctx, fewKeys/2, fewKeys/5); err != nil {
			return err
		}
		for i := range labs {
			which := (i + round + 2) % 2
			got, err := labs[which].drive(ctx, cs[which], o.upTo(fewCalls, labs[which].getKeys), o.slice)
			if err != nil {
				return err
			}
			if err := drain(ctx, slaves[which], cs[which]); err != nil {
				return err
			}
			if round >= 0 {
				turns[which] = append(turns[which], got)
			}
		}
	}
	against := fmt.Sprintf("%d keys", fewKeys)
	p50, p99 := func(t turn) float64 { return t.p50 }, func(t turn) float64 { return t.p99 }
	t.add(name+": GetKey, median", "µs", column(turns[0], p50), column(turns[1], p50), against, goal{most: 1.2})
	t.add(name+": GetKey, p99", "µs", column(turns[0], p99), column(turns[1], p99), against, goal{})
	return nil
}
