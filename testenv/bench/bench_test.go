package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
	file, samples := filepath.Join(work, "bench.json"), filepath.Join(t.TempDir(), "samples")
	if err := os.WriteFile(samples, []byte(espSamples), 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(ctx, filepath.Join(bin, "bench"), "-bin", bin, "-out", file, "-samples", samples, "-rounds", "1", "-slice", "20ms", "-children", "2", "-file-keys", "1000", "-inventory", "20000")
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
		if loss := strings.HasPrefix(r.Name, "rekey-loss"); !(r.Value > 0 || loss && r.Value == 0) || r.Unit == "" || !strings.Contains(string(out), r.Name) {
			t.Errorf("%+v", r)
		}
		if (r.Ratio == nil) != (r.Reference == nil || *r.Reference == 0) || (r.Met == nil) != (r.Target == nil) {
			t.Errorf("%+v", r)
		}
		if r.Met != nil {
			gated++
		}
	}
	if gated != 11 {
		t.Errorf("%d rows are gated: %s", gated, b)
	}
	if left, err := os.ReadDir(work); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// What testenv/esp-bench.sh writes, on a machine that carries the target's load.
const espSamples = `esp-throughput ours 99
esp-throughput stock 100
esp-throughput stock 98.5
esp-throughput ours 97.5
esp-throughput ours 101
esp-throughput stock 101.5
rekey-loss rate 1000
rekey-loss ours 0
rekey-loss interval 1080
rekey-loss stock 0
`

func espTable(t *testing.T, text string) (table, error) {
	t.Helper()
	o := options{only: regexp.MustCompile(""), samples: filepath.Join(t.TempDir(), "samples")}
	if err := os.WriteFile(o.samples, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var tb table
	err := espRows(o, &tb)
	return tb, err
}

// Losses of any round are one sum, against none at all; a machine too slow for the
// load of the target cannot meet it.
func TestRekeyLoss(t *testing.T) {
	for _, c := range []struct {
		name, from, to string
		met            string
		value          float64
		ratio          string
	}{
		{"none", "", "", "true", 0, "null"},
		{"one, in one round of many", "ours 0\n", "ours 1\nrekey-loss stock 0\nrekey-loss ours 0\nrekey-loss rate 990\nrekey-loss interval 1080\n", "false", 1, "null"},
		{"less than stock", "ours 0\nrekey-loss interval 1080\nrekey-loss stock 0", "ours 2\nrekey-loss interval 1080\nrekey-loss stock 8", "false", 2, "0.25"},
		{"a little late", "rate 1000", "rate 960", "true", 0, "null"},
		{"a low rate", "rate 1000", "rate 700", "null", 0, "null"},
		{"rare rekeys", "interval 1080", "interval 2900", "null", 0, "null"},
		{"a loss at a low rate", "rate 1000\nrekey-loss ours 0", "rate 700\nrekey-loss ours 3", "false", 3, "null"},
	} {
		text := strings.Replace(espSamples, c.from, c.to, 1)
		tb, err := espTable(t, text)
		if err != nil || len(tb.rows) != 2 || c.from != "" && text == espSamples {
			t.Errorf("%s: %v, %+v", c.name, err, tb.rows)
			continue
		}
		r := tb.rows[0]
		got, err := json.Marshal([]any{r.Value, r.Ratio, r.Target, r.Met})
		if err != nil {
			t.Fatal(err)
		}
		target := "0"
		if c.met == "null" {
			target = "null"
		}
		if want := fmt.Sprintf("[%v,%s,%s,%s]", c.value, c.ratio, target, c.met); string(got) != want {
			t.Errorf("%s: %s, want %s", c.name, got, want)
		}
		if gated := c.met != "null"; gated != (len(tb.notes) == 0) {
			t.Errorf("%s: notes %q", c.name, tb.notes)
		}
	}
}

// The ratio is of pairs; below 0.98 the medians may be as far apart as the
// reference's quartiles.
func TestThroughput(t *testing.T) {
	for _, c := range []struct {
		name        string
		ours, stock sample
		ratio       float64
		met         bool
	}{
		{"equal", sample{100, 102, 98}, sample{100, 102, 98}, 1, true},
		{"2 % less", sample{98, 98, 98}, sample{100, 100, 100}, 0.98, true},
		{"3 % less, narrow", sample{97, 97, 97}, sample{100, 101, 99}, 0.97, false},
		{"3 % less, inside", sample{97, 97, 97}, sample{100, 104, 100}, 0.97, false},
		{"3 % less, wide", sample{95, 97, 100}, sample{96, 100, 104}, 0.97, true},
		{"half, ours erratic", sample{10, 50, 150}, sample{100, 100, 100}, 0.5, false},
		{"pairs drift together", sample{50, 75, 99}, sample{50, 75, 100}, 1, true},
	} {
		var b strings.Builder
		for i := range c.ours {
			fmt.Fprintf(&b, "esp-throughput ours %v\nesp-throughput stock %v\n", c.ours[i], c.stock[i])
		}
		tb, err := espTable(t, "rekey-loss rate 1000\nrekey-loss interval 1000\nrekey-loss ours 0\nrekey-loss stock 0\n"+b.String())
		if err != nil || len(tb.rows) != 2 {
			t.Fatal(err)
		}
		if r := tb.rows[1]; math.Abs(*r.Ratio-c.ratio) > 0.006 || *r.Met != c.met || *r.Target != 0.98 {
			t.Errorf("%s: ratio %v, met %v", c.name, *r.Ratio, *r.Met)
		}
		if wide := c.name == "pairs drift together"; wide != (len(tb.notes) == 1) {
			t.Errorf("%s: notes %q", c.name, tb.notes)
		}
	}
}

func TestBadSamples(t *testing.T) {
	for _, text := range []string{
		"",
		espSamples + "rekey-loss ours 0\nrekey-loss rate 1\nrekey-loss interval 1\n",
		espSamples + "rekey-loss ours 0\nrekey-loss stock 0\nrekey-loss rate 1\n",
		espSamples + "esp-throughput stock 3\n",
		espSamples + "rekey-loss rate 700\n",
		espSamples + "rekey-loss ours\n",
		espSamples + "rekey-loss ours unknown\nrekey-loss stock 0\n",
		espSamples + "rekey-loss ours NaN\nrekey-loss stock 0\n",
		strings.ReplaceAll(espSamples, "rekey-loss interval 10", "x y 1"),
		strings.ReplaceAll(espSamples, "esp-throughput", "espthroughput"),
	} {
		if tb, err := espTable(t, text); err == nil {
			t.Errorf("%q: %+v", text, tb.rows)
		}
	}
}

// push takes turns, the first of a round changing, and believes no sink that has
// not got all.
func TestPush(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	var sinks [2]string
	for i := range sinks {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		sinks[i] = l.Addr().String()
		go func() { done <- takeAll(ctx, l) }()
	}
	var out strings.Builder
	args := []string{"-ours", sinks[0], "-stock", sinks[1], "-rounds", "3", "-slice", "20ms"}
	if err := push(ctx, args, &out); err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^stock N\nours N\nours N\nstock N\nstock N\nours N\n$`).MatchString(regexp.MustCompile(`[1-9][0-9.]+`).ReplaceAllString(out.String(), "N")) {
		t.Errorf("%q", &out)
	}
	cancel()
	if err := errors.Join(<-done, <-done); err != nil {
		t.Error(err)
	}

	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a test's
	go func() {
		if conn, err := l.Accept(); err == nil {
			_, _ = io.Copy(io.Discard, conn)
			_, _ = conn.Write([]byte{7: 99})
			_ = conn.Close()
		}
	}()
	if _, err := pushSlice(t.Context(), l.Addr().String(), time.Millisecond, make([]byte, 100)); err == nil || !strings.Contains(err.Error(), "99 of ") {
		t.Errorf("a sink that lost bytes: %v", err)
	}
}

func TestTable(t *testing.T) {
	var tb table
	tb.add("fast enough", "1/s", sample{60, 70, 80}, sample{100, 100, 100}, "bare", goal{least: 0.7})
	tb.add("too slow", "1/s", sample{60, 70, 80}, sample{100, 120, 100}, "bare", goal{least: 0.7})
	tb.add("late", "ms", sample{6, 5, 4}, nil, "", goal{most: 4.9})
	tb.add("record", "Mbit/s", sample{100, 200}, sample{100}, "published", goal{least: 1})
	tb.add("shown", "ms", sample{3}, nil, "", goal{})
	tb.add("shown: a detail", "ms", sample{3}, nil, "", goal{})
	tb.add("  of it a detail", "ms", sample{3}, nil, "", goal{})
	tb.add("large", "1/s", sample{24070.4}, nil, "", goal{})
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
	md := filepath.Join(t.TempDir(), "md")
	if err := tb.markdown(md, "a machine, a day"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(md)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{
		"`make bench`, a machine, a day.", "\n| fast enough | 70 1/s | 100, bare | 0.70 | >= 0.7 met |\n", "\n| late | 5 ms | - | - | <= 4.9 missed |\n", "\n| shown | 3 ms | - | - |  |\n", "\n| large | 24070 1/s |",
	} {
		if !strings.Contains(string(text), w) {
			t.Errorf("no %q in\n%s", w, text)
		}
	}
	if strings.Contains(string(text), "detail") {
		t.Errorf("a detail stands in\n%s", text)
	}
	for _, w := range []string{">= 0.7 met", ">= 0.7 missed", "<= 4.9 missed", "70 (65-75)"} {
		if !strings.Contains(out.String(), w) {
			t.Errorf("no %q in\n%s", w, &out)
		}
	}
}
