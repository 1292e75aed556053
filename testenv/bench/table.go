package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// sample is one number of several rounds.
type sample []float64

// quantile gives the value below which the share q of the rounds lies, between
// the two nearest ones; NaN without rounds.
func (s sample) quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(s))
	at := q * float64(len(v)-1)
	low := int(at)
	if low+1 == len(v) {
		return v[low]
	}
	return v[low] + (at-float64(low))*(v[low+1]-v[low])
}

func (s sample) median() float64 { return s.quantile(0.5) }

func (s sample) sum() (sum float64) {
	for _, v := range s {
		sum += v
	}
	return sum
}

// row is one line of the table and of the JSON file.
type row struct {
	Name      string   `json:"name"`
	Unit      string   `json:"unit"`
	Value     float64  `json:"value"`
	Reference *float64 `json:"reference"` // null: there is none
	Ratio     *float64 `json:"ratio"`     // null: there is none, as the reference is none or zero
	Target    *float64 `json:"target"`    // of the ratio; of the value without one
	Met       *bool    `json:"met"`       // null: not gated

	against, goal   string
	spread, refRead string
}

// goal is what a row is held against; the zero value is none.
type goal struct {
	least, most float64 // of the ratio, or of the value without one
	none        bool    // a value of zero
	// or, where least is missed, the medians are no further apart than the
	// quartiles of the reference
	inSpread bool
}

// table collects the rows, and what has to be said of them.
type table struct {
	rows  []row
	notes []string
}

func (t *table) note(format string, args ...any) {
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}

// add takes the rounds of a row and of its reference, in pairs: the ratio is the
// median of the pairs' ratios, so that what the machine does meanwhile, which
// both members of a pair see, counts little. reference may have one value only,
// a published one, or none.
func (t *table) add(name, unit string, value, reference sample, against string, g goal) {
	r := row{Name: name, Unit: unit, Value: value.median(), against: against, spread: spread(value)}
	held := r.Value
	if len(reference) > 0 {
		ref := reference.median()
		r.Reference, r.refRead = &ref, spread(reference)
		if slices.Min(reference) > 0 {
			ratio := ratios(value, reference).median()
			r.Ratio, held = &ratio, ratio
		}
	}
	switch {
	case g.none:
		met := r.Value == 0
		r.Target, r.Met, r.goal = new(float64), &met, "0"
	case g.least > 0:
		met := held >= g.least
		r.goal = fmt.Sprintf(">= %.4g", g.least)
		if g.inSpread {
			r.goal += " or inside the spread"
			met = met || reference.median()-r.Value <= reference.quantile(0.75)-reference.quantile(0.25)
		}
		r.Target, r.Met = &g.least, &met
	case g.most > 0:
		met := held <= g.most
		r.Target, r.Met, r.goal = &g.most, &met, fmt.Sprintf("<= %.4g", g.most)
	}
	t.rows = append(t.rows, r)
}

// ratios gives one for each value, to its pair in reference, or the only one there.
func ratios(value, reference sample) sample {
	all := make(sample, len(value))
	for i := range value {
		all[i] = value[i] / reference[min(i, len(reference)-1)]
	}
	return all
}

// spread shows median and quartiles.
func spread(s sample) string {
	if len(s) == 1 {
		return fmt.Sprintf("%.4g", s[0])
	}
	return fmt.Sprintf("%.4g (%.4g-%.4g)", s.median(), s.quantile(0.25), s.quantile(0.75))
}

func (t *table) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "what\tunit\tmedian (quartiles)\treference\tratio\ttarget\t")
	for _, r := range t.rows {
		ref, ratio := "-", "-"
		if r.Reference != nil {
			ref = r.refRead + " " + r.against
		}
		if r.Ratio != nil {
			ratio = fmt.Sprintf("%.2f", *r.Ratio)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t\n", r.Name, r.Unit, r.spread, ref, ratio, r.verdict())
	}
	_ = tw.Flush() // w is a terminal or a buffer
	for _, n := range t.notes {
		fmt.Fprintln(w, n)
	}
}

// write puts the rows into a JSON file.
func (t *table) write(name string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(t.rows); err != nil {
		return fmt.Errorf("rows as JSON: %w", err)
	}
	return os.WriteFile(name, b.Bytes(), 0o644)
}

// markdown writes the rows that have a target, and those that are no detail of
// another, as the README's section.
func (t *table) markdown(name, of string) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "## Measurements\n\n`make bench`, %s. Medians; each row beside its reference, which ran in turns with it.\n\n", of)
	b.WriteString("| what | median | reference | ratio | target |\n|---|---|---|---|---|\n")
	for _, r := range t.rows {
		if r.Met == nil && (strings.Contains(r.Name, ": ") || strings.HasPrefix(r.Name, " ")) {
			continue
		}
		ref, ratio := "-", "-"
		if r.Reference != nil {
			ref = plain(*r.Reference) + ", " + r.against
		}
		if r.Ratio != nil {
			ratio = fmt.Sprintf("%.2f", *r.Ratio)
		}
		fmt.Fprintf(&b, "| %s | %s %s | %s | %s | %s |\n", r.Name, plain(r.Value), r.Unit, ref, ratio, r.verdict())
	}
	return os.WriteFile(name, b.Bytes(), 0o644)
}

// plain shows v with three digits, or its integer part if that has more.
func plain(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// verdict is the target with whether it is met.
func (r *row) verdict() string {
	switch {
	case r.Met == nil:
		return ""
	case *r.Met:
		return r.goal + " met"
	}
	return r.goal + " missed"
}

// machine says where the numbers come from and what else ran there.
func machine() (name, load string) {
	model := "unknown processor"
	load = "unknown load"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		load = "load before " + strings.Join(strings.Fields(string(b))[:3], " ")
	}
	return fmt.Sprintf("%s, %d processors, %s", model, runtime.NumCPU(), runtime.Version()), load
}
