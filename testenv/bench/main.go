// Command bench measures the installed programs and prints a table, each row
// beside its reference, which runs in the same minute, slice by slice in turns
// with what is measured. `make bench` builds and calls it.
//
// The nodes are the real qipsecd with its store on disk; what they are compared
// with (bench bare) is a process of its own as well, with the same certificates,
// TLS configuration and length of body; both are called by the same clients.
//
// The rows that need a kernel with ESP come from a file of testenv/esp-bench.sh,
// whose TCP is bench sink and bench push.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	bin, out  string
	rounds    int
	clients   int // at once
	slice     time.Duration
	children  int // CHILD_SAs of the tunnel row
	fileKeys  int // keys of one QKD-Key file of the intake row
	inventory int // keys of the large inventory
	profile   string
	samples   string         // file of testenv/esp-bench.sh
	markdown  string         // file for the README's table
	of        string         // date and commit, for the same
	only      *regexp.Regexp // names of rows
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "bare":
			return bare(ctx, args[1:])
		case "sink":
			return sink(ctx, args[1:])
		case "push":
			return push(ctx, args[1:], os.Stdout)
		}
	}
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&o.bin, "bin", "bin", "`directory` of qipsecd and qipsec")
	fs.StringVar(&o.out, "out", "out/bench.json", "`file` for the numbers; the inventories lie beside it meanwhile")
	fs.IntVar(&o.rounds, "rounds", 9, "how many times each row and its reference take turns")
	fs.IntVar(&o.clients, "clients", 2*runtime.NumCPU(), "how many clients call at once")
	fs.DurationVar(&o.slice, "slice", time.Second, "length of one turn")
	fs.IntVar(&o.children, "children", 300, "CHILD_SAs of the tunnel row")
	fs.IntVar(&o.fileKeys, "file-keys", 100_000, "keys of one QKD-Key file of the intake row")
	fs.IntVar(&o.inventory, "inventory", 10_000_000, "keys of the large inventory")
	fs.StringVar(&o.profile, "profile", "", "write a CPU profile of the tunnel row to this `file`")
	fs.StringVar(&o.samples, "samples", "", "add the rows of this `file` of testenv/esp-bench.sh")
	fs.StringVar(&o.markdown, "markdown", "", "write the README's table of measurements to this `file`")
	fs.StringVar(&o.of, "of", "", "`text` that says in it, behind the machine, what was measured")
	only := fs.String("run", "", "measure the rows with such a name only (`regexp`)")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return err
	}
	if fs.NArg() > 0 || o.rounds < 1 || o.clients < 1 || o.slice <= 0 || o.children < 1 || o.fileKeys < 1 || o.inventory < 1 {
		return errors.New("-rounds, -clients, -slice, -children, -file-keys and -inventory are 1 or more; there are no other arguments")
	}
	return measure(ctx, o, os.Stdout)
}

// measure runs all rows, prints the table and writes o.out.
func measure(ctx context.Context, o options, w io.Writer) (err error) {
	var t table
	if err := os.MkdirAll(filepath.Dir(o.out), 0o755); err != nil {
		return err
	}
	name, load := machine()
	fmt.Fprintf(w, "%s, %s\n", name, load)
	for _, part := range []func(context.Context, options, *table) error{supplyRows, siteRows, intakeRow, inventoryRows} {
		if err := part(ctx, o, &t); err != nil {
			return err
		}
	}
	if err := espRows(o, &t); err != nil {
		return err
	}
	t.print(w)
	if o.markdown != "" {
		if err := t.markdown(o.markdown, name+o.of); err != nil {
			return err
		}
	}
	return t.write(o.out)
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }
