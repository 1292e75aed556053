package main

import (
	"bytes"
	"context"
	"encoding/json"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The whole program, with the smallest counts, on daemons built from this tree:
// every row is there, beside its reference, and the file says what the table
// says.
func TestBench(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	bin, work := t.TempDir(), t.TempDir()
	build := exec.CommandContext(ctx, "go", "build", "-o", bin+"/", "../../cmd/qipsecd", "../../cmd/qipsec", ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	file := filepath.Join(work, "bench.json")
	c := exec.CommandContext(ctx, filepath.Join(bin, "bench"), "-bin", bin, "-out", file, "-rounds", "1", "-slice", "20ms", "-children", "2", "-file-keys", "1000")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var rows []row
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&rows); err != nil {
		t.Fatal(err)
	}
	gated := 0
	for _, r := range rows {
		if !(r.Value > 0) || r.Unit == "" || !strings.Contains(string(out), r.Name) {
			t.Errorf("%+v", r)
		}
		if (r.Ratio == nil) != (r.Reference == nil) || (r.Met == nil) != (r.Target == nil) {
			t.Errorf("%+v", r)
		}
		if r.Met != nil {
			gated++
		}
	}
	if gated != 6 {
		t.Errorf("%d rows are gated: %s", gated, b)
	}
	if left, err := os.ReadDir(work); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestTable(t *testing.T) {
	var tb table
	tb.add("fast enough", "1/s", sample{60, 70, 80}, sample{100, 100, 100}, "bare", goal{least: 0.7})
	tb.add("too slow", "1/s", sample{60, 70, 80}, sample{100, 120, 100}, "bare", goal{least: 0.7})
	tb.add("late", "ms", sample{6, 5, 4}, nil, "", goal{most: 4.9})
	tb.add("record", "Mbit/s", sample{100, 200}, sample{100}, "published", goal{least: 1})
	tb.add("shown", "ms", sample{3}, nil, "", goal{})
	want := []struct {
		value, ratio float64
		met          string
	}{{70, 0.7, "true"}, {70, 0.6, "false"}, {5, 0, "false"}, {150, 1.5, "true"}, {3, 0, "null"}}
	for i, w := range want {
		r := tb.rows[i]
		ratio := 0.0
		if r.Ratio != nil {
			ratio = *r.Ratio
		}
		met, err := json.Marshal(r.Met)
		if err != nil {
			t.Fatal(err)
		}
		if math.Abs(r.Value-w.value) > 1e-9 || math.Abs(ratio-w.ratio) > 1e-9 || string(met) != w.met {
			t.Errorf("%s: %v, ratio %v, met %s; want %+v", r.Name, r.Value, ratio, met, w)
		}
	}
	var out strings.Builder
	tb.print(&out)
	for _, w := range []string{">= 0.7 met", ">= 0.7 missed", "<= 4.9 missed", "70 (65-75)"} {
		if !strings.Contains(out.String(), w) {
			t.Errorf("no %q in\n%s", w, &out)
		}
	}
}
