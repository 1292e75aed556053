package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
)

// What the target of rekey-loss asks for.
const (
	fullRate     = 950.0  // packets/s each way of 1,000, the rest being a sender's delays
	fullInterval = 1500.0 // ms between rekeys, which are to come every second
)

// series are the values of one row of a samples file, by name: "ours" and "stock",
// in rounds; what else the row needs.
type series map[string]sample

// espRows adds the rows that testenv/esp-bench.sh has measured, if there are any.
func espRows(o options, t *table) error {
	if o.samples == "" {
		return nil
	}
	text, err := os.ReadFile(o.samples)
	if err != nil {
		return err
	}
	rows, err := parseSamples(string(text))
	if err == nil {
		err = errors.Join(lossRow(rows["rekey-loss"], o, t), throughputRow(rows["esp-throughput"], o, t))
	}
	if err != nil {
		return fmt.Errorf("%s: %w; run testenv/esp-bench.sh again", o.samples, err)
	}
	return nil
}

// parseSamples reads lines "ROW SERIES VALUE".
func parseSamples(text string) (map[string]series, error) {
	rows := map[string]series{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 3 {
			return nil, fmt.Errorf("%q is not ROW SERIES VALUE", line)
		}
		v, err := strconv.ParseFloat(f[2], 64)
		if err != nil || math.IsNaN(v) || math.IsInf(v, 0) || v < 0 {
			return nil, fmt.Errorf("%q: not a value", line)
		}
		if rows[f[0]] == nil {
			rows[f[0]] = series{}
		}
		rows[f[0]][f[1]] = append(rows[f[0]][f[1]], v)
	}
	return rows, nil
}

// pairs is an error unless each round of ours has one of stock.
func (s series) pairs(row string) error {
	if n, m := len(s["ours"]), len(s["stock"]); n == 0 || n != m {
		return fmt.Errorf("%s: %d rounds of ours, %d of stock", row, n, m)
	}
	return nil
}

// lossRow counts all rounds together, as a median would hide a round's loss. A
// machine that is too slow for the target's load can miss it but not meet it.
func lossRow(s series, o options, t *table) error {
	if err := s.pairs("rekey-loss"); err != nil {
		return err
	}
	if len(s["rate"]) != len(s["ours"]) || len(s["interval"]) != len(s["ours"]) {
		return errors.New("rekey-loss: a round without its rate or interval")
	}
	rate, interval := s["rate"].median(), s["interval"].median()
	name := fmt.Sprintf("rekey-loss: numbered UDP packets lost, %.0f/s each way, a rekey every %.1f s", rate, interval/1000)
	if !o.only.MatchString(name) {
		return nil
	}
	lost := s["ours"].sum()
	g := goal{none: true}
	if lost == 0 && (rate < fullRate || interval >= fullInterval) {
		g = goal{}
		t.note("rekey-loss: not gated, as this machine did not carry 1000 packets/s each way and a rekey each second")
	}
	t.add(name, "packets", sample{lost}, sample{s["stock"].sum()}, "stock tunnel", g)
	return nil
}

func throughputRow(s series, o options, t *table) error {
	const name = "esp-throughput: TCP one way through the tunnel, AES-GCM-256"
	if err := s.pairs("esp-throughput"); err != nil {
		return err
	}
	if !o.only.MatchString(name) {
		return nil
	}
	ref := s["stock"]
	t.add(name, "Mbit/s", s["ours"], ref, "stock tunnel", goal{least: 0.98, inSpread: true})
	if width := (ref.quantile(0.75) - ref.quantile(0.25)) / ref.median(); width > 0.1 {
		t.note("esp-throughput: the stock tunnel's quartiles are %.0f %% apart: a quieter machine would tell more", 100*width)
	}
	return nil
}
