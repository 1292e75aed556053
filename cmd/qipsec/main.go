// Command qipsec is the operator's tool: it writes configs and certificates,
// asks qipsecd over the operator API, makes and reads QKD-Key files, and plays a
// transmission device that fetches keys over ETSI GS QKD 014.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/q-ipsec/q-ipsec/cmd/internal/version"
	"github.com/q-ipsec/q-ipsec/sad"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// app is what a command works with.
type app struct {
	out, err io.Writer
	now      func() time.Time
	guard    *sad.Guard // nil: that of the kernel
}

// command is one line of the command table.
type command struct {
	name    string // one or two words
	args    string // what follows the flags; empty: nothing may
	about   string // one line, imperative
	detail  string // more, for the command's own help; may be empty
	example string
	// setup declares the flags and gives what runs once they are parsed.
	setup func(*flag.FlagSet) func(context.Context, *app, []string) error
}

// commands is the whole of the tool, in the order of its help.
func commands() []command {
	var all []command
	for _, group := range [][]command{initCommands(), pkiCommands(), nodeCommands(), tunnelCommands(), keyfileCommands(), saeCommands(), guardCommands(), storeCommands()} {
		all = append(all, group...)
	}
	return append(all, command{
		name: "version", about: "print the version", example: "qipsec version",
		setup: func(*flag.FlagSet) func(context.Context, *app, []string) error {
			return func(_ context.Context, a *app, args []string) error {
				if err := wantArgs(args, 0); err != nil {
					return err
				}
				fmt.Fprintln(a.out, "qipsec", version.String())
				return nil
			}
		},
	})
}

// usageError is a wrong call: exit code 2.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

func wantArgs(args []string, n int) error {
	if len(args) != n {
		return usagef("takes %d argument(s), got %d: %q", n, len(args), args)
	}
	return nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, &app{out: os.Stdout, err: os.Stderr, now: time.Now}, os.Args[1:]))
}

// run finds the command of args and runs it; the result is the exit code.
func run(ctx context.Context, a *app, args []string) int {
	if len(args) == 0 {
		help(a.err)
		return exitUsage
	}
	if wantsHelp(args[0]) {
		if len(args) == 1 {
			help(a.out)
			return exitOK
		}
		args = append(args[1:], "-h")
	}
	c, rest, ok := find(args)
	if !ok {
		return noCommand(a, args)
	}
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	f := c.setup(fs)
	pos, err := parseArgs(fs, rest)
	if errors.Is(err, flag.ErrHelp) {
		c.help(a.out, fs)
		return exitOK
	}
	if err == nil {
		err = f(ctx, a, pos)
	}
	var u usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &u):
		fmt.Fprintf(a.err, "qipsec %s: %v; `qipsec help %s` shows how\n", c.name, err, c.name)
		return exitUsage
	}
	fmt.Fprintf(a.err, "qipsec %s: %v\n", c.name, err)
	var e exitError
	if errors.As(err, &e) {
		return e.code
	}
	return exitFailed
}

func wantsHelp(word string) bool {
	return word == "help" || word == "-h" || word == "-help" || word == "--help"
}

// noCommand answers args that no command's name begins. The first word of several
// commands' names gets their list.
func noCommand(a *app, args []string) int {
	asked := len(args) > 1 && wantsHelp(args[len(args)-1])
	if asked {
		args = args[:len(args)-1]
	}
	w, code := a.err, exitUsage
	if asked {
		w, code = a.out, exitOK
	}
	var group []command
	for _, c := range commands() {
		if first, _, ok := strings.Cut(c.name, " "); ok && len(args) == 1 && first == args[0] {
			group = append(group, c)
		}
	}
	if len(group) == 0 {
		fmt.Fprintf(a.err, "qipsec: no command %q; `qipsec help` lists them\n", strings.Join(args, " "))
		return exitUsage
	}
	fmt.Fprintf(w, "qipsec %s is several commands:\n", args[0])
	list(w, group)
	return code
}

// find takes the command with the longest name that args start with.
func find(args []string) (c command, rest []string, ok bool) {
	for _, v := range commands() {
		words := strings.Fields(v.name)
		if len(words) <= len(args) && v.name == strings.Join(args[:len(words)], " ") && len(v.name) > len(c.name) {
			c, rest, ok = v, args[len(words):], true
		}
	}
	return c, rest, ok
}

// parseArgs parses flags wherever they stand and gives the other arguments.
func parseArgs(fs *flag.FlagSet, args []string) (pos []string, err error) {
	for {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, err
			}
			return nil, usageError{err.Error()}
		}
		if fs.NArg() == 0 {
			return pos, nil
		}
		parsed := args[:len(args)-fs.NArg()]
		if len(parsed) > 0 && parsed[len(parsed)-1] == "--" {
			return append(pos, fs.Args()...), nil
		}
		pos = append(pos, fs.Arg(0))
		args = fs.Args()[1:]
	}
}

func help(w io.Writer) {
	fmt.Fprint(w, "qipsec operates Q-IPsec: QKD keys for IPsec tunnels and other devices.\n\nCommands:\n")
	list(w, commands())
	fmt.Fprint(w, "\n`qipsec help COMMAND` shows a command's flags and an example.\nExit codes: 0 done, 1 failed, 2 wrong call.\n")
}

func list(w io.Writer, all []command) {
	for _, c := range all {
		fmt.Fprintf(w, "  %-34s %s\n", strings.TrimSpace(c.name+" "+c.args), c.about)
	}
}

func (c command) help(w io.Writer, fs *flag.FlagSet) {
	fmt.Fprintf(w, "usage: qipsec %s\n\n%s\n", strings.TrimSpace(c.name+" [flags] "+c.args), upper(c.about)+".")
	if c.detail != "" {
		fmt.Fprintf(w, "\n%s\n", c.detail)
	}
	fmt.Fprint(w, "\nFlags:\n")
	n := 0
	fs.VisitAll(func(f *flag.Flag) {
		n++
		arg, text := flag.UnquoteUsage(f)
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
			text += fmt.Sprintf(" (default %s)", f.DefValue)
		}
		fmt.Fprintf(w, "  %-26s %s\n", strings.TrimSpace("--"+f.Name+" "+arg), text)
	})
	if n == 0 {
		fmt.Fprintln(w, "  none")
	}
	fmt.Fprintf(w, "\nExample:\n  %s\n", c.example)
}

func upper(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
