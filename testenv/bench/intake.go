package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// qkdRecord is the highest key rate of a QKD link that has been published, in
// Mbit/s (Li et al., Nature Photonics 17, 2023: 10 km of fibre).
const qkdRecord = 115.8

const intakeFiles = 4 // of one round

// intakeRow measures QKD-Key files from the rename into both intake directories
// until every key of them is active, or leased already, at both nodes. Each node
// has one core: its own where there are two.
func intakeRow(ctx context.Context, o options, t *table) (err error) {
	const name = "intake: QKD-Key file to active on both ends, one core per node"
	if !o.only.MatchString(name) {
		return nil
	}
	pin, lookErr := exec.LookPath("taskset")
	inside := func(node int) []string {
		words := []string{"env", "GOMAXPROCS=1"}
		if lookErr == nil {
			words = append(words, pin, "-c", strconv.Itoa(node%runtime.NumCPU()))
		}
		return words
	}
	l, err := newLab(ctx, o, 1, polledOften, inside)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := l.topUp(ctx, 1, 50_000); err != nil { // warms up: synced, leases full
		return err
	}
	var rate sample
	for range min(o.rounds, 5) {
		took, err := l.takeIn(ctx, o.fileKeys)
		if err != nil {
			return fmt.Errorf("intake: %w", err)
		}
		rate = append(rate, float64(intakeFiles*o.fileKeys*256)/1e6/took.Seconds())
	}
	t.add(name, "Mbit/s", rate, sample{qkdRecord}, "published QKD record", goal{least: 1})
	return nil
}

// polledOften is a node's config with a short intake interval: how often a node
// looks is not how fast it takes in.
func polledOften(config string) string {
	return strings.Replace(config, "[kms]\n", "[kms]\nintake_interval = \"10ms\"\n", 1)
}

// takeIn delivers files and waits until all of their keys are there.
func (l *lab) takeIn(ctx context.Context, keys int) (time.Duration, error) {
	deliver, err := l.stage(intakeFiles, keys)
	if err != nil {
		return 0, err
	}
	before, err := l.held(ctx)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := deliver(); err != nil {
		return 0, err
	}
	err = await(ctx, "keys active at both nodes", func() error {
		now, err := l.held(ctx)
		if err == nil && now < before+intakeFiles*keys {
			err = fmt.Errorf("%d of %d", now-before, intakeFiles*keys)
		}
		return err
	})
	return time.Since(start), err
}

// held is how many keys are active at both nodes. Leases are full and nobody
// takes from them, so that none leaves this state.
func (l *lab) held(ctx context.Context) (int, error) {
	a, err := l.pool(ctx, 0)
	if err != nil {
		return 0, err
	}
	b, err := l.pool(ctx, 1)
	return min(a.Active, b.Active), err
}
