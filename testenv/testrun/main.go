// Command testrun runs every test of the project and sums up: the Go tests,
// then the scenarios that are named on its command line, each a command in one
// argument. It prints failures and skips as they are, searches all output for
// key bytes, and ends with the line "total: N passed, N failed, N skipped".
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
	"strings"
	"syscall"
	"time"
)

func main() {
	out := flag.String("out", "out/test", "`directory` for logs")
	pkgs := flag.String("go", "./...", "Go packages to test, space separated; empty: none")
	timeout := flag.Duration("timeout", 25*time.Minute, "bound of each part")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := run(ctx, *out, strings.Fields(*pkgs), flag.Args(), *timeout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		os.Exit(1)
	}
	if !ok {
		os.Exit(1)
	}
}

// tally counts results; a skip is shown with its reason.
type tally struct{ passed, failed, skipped int }

func run(ctx context.Context, out string, pkgs, scenarios []string, timeout time.Duration) (bool, error) {
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
	for _, s := range scenarios {
		if err := scenario(ctx, &t, out, s, timeout); err != nil {
			return false, err
		}
	}
	leaks, err := search(keys.Name(), out)
	if err != nil {
		return false, err
	}
	if len(leaks) > 0 {
		t.failed++
		fmt.Printf("FAIL key bytes in the output of the run:\n  %s\n", strings.Join(leaks, "\n  "))
	} else {
		t.passed++
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
// bytes traced to the file keys.
func goTests(ctx context.Context, t *tally, log string, pkgs []string, keys string, timeout time.Duration) error {
	f, err := os.Create(log)
	if err != nil {
		return err
	}
	defer f.Close()
	args := append([]string{"test", "-json", "-race", "-tags", "keytrace", "-timeout", timeout.String()}, pkgs...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "QIPSEC_KEYTRACE="+keys)
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
				fmt.Printf("FAIL go test -json cannot be read: %v\n", err)
				t.failed++
			}
			break
		}
		_, _ = f.WriteString(e.Output)
		t.goEvent(e, output)
	}
	_, _ = io.Copy(io.Discard, pipe)
	if err := cmd.Wait(); err != nil && t.failed == failed {
		fmt.Printf("FAIL go test: %v (see %s)\n", err, log)
		t.failed++
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
		if e.Test != "" {
			t.failed++
			fmt.Printf("FAIL %s\n%s", id, output[id])
		} else {
			// A package that fails to build or dies outside a test counts too.
			t.failed++
			fmt.Printf("FAIL %s\n%s", e.Package, output[id])
		}
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

// scenario runs one command whose output has a line "ok - NAME",
// "not ok - NAME: why" or "skip - NAME: why" for each thing it checked. An exit
// status that does not fit is a failure of its own, as is a run that checked
// nothing.
func scenario(ctx context.Context, t *tally, out, command string, timeout time.Duration) error {
	name := strings.Map(func(r rune) rune {
		if strings.ContainsRune(" /", r) {
			return '_'
		}
		return r
	}, command)
	f, err := os.Create(filepath.Join(out, name+".log"))
	if err != nil {
		return err
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
		return err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait(); w.Close() }()
	before := *t
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := strings.TrimRight(sc.Text(), "\r")
		fmt.Fprintln(f, line)
		switch {
		case strings.HasPrefix(line, "ok - "):
			t.passed++
		case strings.HasPrefix(line, "not ok - "):
			t.failed++
			fmt.Printf("FAIL %s: %s\n", command, line)
		case strings.HasPrefix(line, "skip - "):
			t.skipped++
			fmt.Printf("skip %s: %s\n", command, line)
		}
	}
	_, _ = io.Copy(io.Discard, r)
	err = <-done
	checks := t.passed - before.passed + t.failed - before.failed
	if (err != nil && t.failed == before.failed) || checks == 0 {
		t.failed++
		fmt.Printf("FAIL %s: exit: %v, %d checks (see %s)\n", command, err, checks, f.Name())
	} else if t.failed == before.failed {
		fmt.Printf("ok   %s: %d checks (%.1f s)\n", command, checks, time.Since(start).Seconds())
	}
	return ctx.Err()
}
