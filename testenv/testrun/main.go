// Command testrun runs every test of the project and sums up: the Go tests,
// then the scenarios that are named on its command line, each a command in one
// argument. It prints failures and skips as they are, searches all output for
// key bytes, repeats in a few lines what failed, and ends with the line
// "total: N passed, N failed, N skipped".
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

func main() {
	out := flag.String("out", "out/test", "`directory` for logs")
	pkgs := flag.String("go", "./kms/store ./testenv/twonodes ./...", "Go packages to test, the longest first, space separated; empty: none")
	timeout := flag.Duration("timeout", 25*time.Minute, "bound of each part")
	parallel := flag.Int("parallel", 2, "scenarios at once")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := run(ctx, *out, strings.Fields(*pkgs), flag.Args(), *parallel, *timeout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		os.Exit(1)
	}
	if !ok {
		os.Exit(1)
	}
}

// tally counts results; a skip is shown with its reason.
type tally struct {
	passed, failed, skipped int

	failures []string // a few lines each, repeated at the end
}

// lastLines is how many lines of output stand beside a failure at the end.
const lastLines = 12

func (t *tally) fail(what string, lines []string) {
	t.failed++
	lines = lines[max(0, len(lines)-lastLines):]
	t.failures = append(t.failures, strings.Join(append([]string{what}, lines...), "\n    "))
}

func run(ctx context.Context, out string, pkgs, commands []string, parallel int, timeout time.Duration) (bool, error) {
	if err := os.RemoveAll(out); err != nil {
		return false, err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return false, err
	}
	keys, err := os.CreateTemp("", "keytrace")
	if err != nil {
		return false, err
	}
	keys.Close()
	defer os.Remove(keys.Name())
	var t tally
	if len(pkgs) > 0 {
		if err := goTests(ctx, &t, filepath.Join(out, "go.log"), pkgs, keys.Name(), timeout); err != nil {
			return false, err
		}
	}
	if err := scenarios(ctx, &t, out, commands, parallel, timeout); err != nil {
		return false, err
	}
	leaks, err := search(keys.Name(), out)
	if err != nil {
		return false, err
	}
	if len(leaks) > 0 {
		t.fail("key bytes in the output of the run", leaks)
	} else {
		t.passed++
	}
	for _, f := range t.failures {
		fmt.Println("failed:", f)
	}
	fmt.Printf("total: %d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped)
	return t.failed == 0, nil
}

// event is a line of go test -json.
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

// goTests runs the Go tests under the race detector, with every Material's
// bytes traced to the file keys; by GOFLAGS in the daemons that tests build, too.
func goTests(ctx context.Context, t *tally, log string, pkgs []string, keys string, timeout time.Duration) error {
	f, err := os.Create(log)
	if err != nil {
		return err
	}
	defer f.Close()
	args := append([]string{"test", "-json", "-race", "-timeout", timeout.String()}, pkgs...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "QIPSEC_KEYTRACE="+keys, "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -tags=keytrace"))
	cmd.Stderr = io.MultiWriter(os.Stdout, f)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	failed := t.failed
	output := map[string]*bytes.Buffer{} // by package and test
	d := json.NewDecoder(pipe)
	for {
		var e event
		if err := d.Decode(&e); err != nil {
			if !errors.Is(err, io.EOF) {
				t.fail(fmt.Sprintf("go test -json cannot be read: %v", err), nil)
			}
			break
		}
		_, _ = f.WriteString(e.Output)
		t.goEvent(e, output)
	}
	_, _ = io.Copy(io.Discard, pipe)
	if err := cmd.Wait(); err != nil && t.failed == failed {
		t.fail(fmt.Sprintf("go test: %v (see %s)", err, log), nil)
	}
	return ctx.Err()
}

func (t *tally) goEvent(e event, output map[string]*bytes.Buffer) {
	id := e.Package + " " + e.Test
	switch e.Action {
	case "output", "build-output":
		b := output[id]
		if b == nil {
			b = new(bytes.Buffer)
			output[id] = b
		}
		b.WriteString(e.Output)
		return
	case "pass":
		if e.Test != "" {
			t.passed++
		} else {
			fmt.Printf("ok   %s (%.1f s)\n", e.Package, e.Elapsed)
		}
	case "fail":
		// A package that fails to build or dies outside a test counts too.
		fmt.Printf("FAIL %s\n%s", id, output[id])
		t.fail(id, said(output[id]))
	case "skip":
		if e.Test != "" {
			t.skipped++
			fmt.Printf("skip %s\n%s", id, output[id])
		}
	default:
		return
	}
	delete(output, id)
}

// said gives what a test itself printed, without the logs of the daemons it ran;
// without such lines, all of it.
func said(output *bytes.Buffer) []string {
	if output == nil {
		return nil
	}
	all := strings.Split(strings.TrimSpace(output.String()), "\n")
	var own []string
	for _, line := range all {
		if testLine.MatchString(line) {
			own = append(own, line)
		}
	}
	if own == nil {
		return all
	}
	return own
}

var testLine = regexp.MustCompile(`^\s*\w+\.go:\d+: `)

// scenarios runs the commands in their order, so many at once, and prints what
// each has to say when it has ended.
func scenarios(ctx context.Context, t *tally, out string, commands []string, parallel int, timeout time.Duration) error {
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, command := range commands {
		g.Go(func() error {
			var text bytes.Buffer
			one, err := scenario(ctx, &text, out, command, timeout)
			mu.Lock()
			defer mu.Unlock()
			t.passed += one.passed
			t.failed += one.failed
			t.skipped += one.skipped
			t.failures = append(t.failures, one.failures...)
			fmt.Print(text.String())
			return err
		})
	}
	return g.Wait()
}

// scenario runs one command whose output has a line "ok - NAME",
// "not ok - NAME: why" or "skip - NAME: why" for each thing it checked. An exit
// status that does not fit is a failure of its own, as is a run that checked
// nothing. What is to be shown goes to text.
func scenario(ctx context.Context, text io.Writer, out, command string, timeout time.Duration) (t tally, err error) {
	name := strings.Map(func(r rune) rune {
		if strings.ContainsRune(" /", r) {
			return '_'
		}
		return r
	}, command)
	f, err := os.Create(filepath.Join(out, name+".log"))
	if err != nil {
		return t, err
	}
	defer f.Close()
	ctx2, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	words := strings.Fields(command)
	cmd := exec.CommandContext(ctx2, words[0], words[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		return t, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait(); w.Close() }()
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	var recent []string
	for sc.Scan() {
		line := strings.TrimRight(sc.Text(), "\r")
		fmt.Fprintln(f, line)
		recent = append(recent[max(0, len(recent)-lastLines+1):], line)
		switch {
		case strings.HasPrefix(line, "ok - "):
			t.passed++
		case strings.HasPrefix(line, "not ok - "):
			fmt.Fprintf(text, "FAIL %s: %s\n", command, line)
			t.fail(command, recent)
		case strings.HasPrefix(line, "skip - "):
			t.skipped++
			fmt.Fprintf(text, "skip %s: %s\n", command, line)
		}
	}
	_, _ = io.Copy(io.Discard, r)
	failure := <-done
	checks := t.passed + t.failed
	switch {
	case failure != nil && t.failed == 0 || checks == 0:
		fmt.Fprintf(text, "FAIL %s: exit: %v, %d checks (see %s)\n", command, failure, checks, f.Name())
		t.fail(fmt.Sprintf("%s: exit: %v", command, failure), recent)
	case t.failed == 0:
		fmt.Fprintf(text, "ok   %s: %d checks (%.1f s)\n", command, checks, time.Since(start).Seconds())
	}
	return t, ctx.Err()
}
