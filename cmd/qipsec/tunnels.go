package main

import (
	"context"
	"flag"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/operator"
)

func tunnelCommands() []command {
	list := []command{
		{
			name: "tunnels", about: "show the connections and their CHILD_SAs",
			example: "qipsec tunnels",
			setup: func(fs *flag.FlagSet) func(context.Context, *app, []string) error {
				f := newNodeFlags(fs)
				return func(ctx context.Context, a *app, args []string) error {
					if err := wantArgs(args, 0); err != nil {
						return err
					}
					return ask(ctx, a, f, func(ctx context.Context, c *operator.Client) ([]operator.Tunnel, error) { return c.Tunnels(ctx) }, printTunnels)
				}
			},
		},
		{
			name: "sa", about: "show the SAs that qipsecd put in the kernel's SAD",
			detail:  "The fingerprint of an SA's key is the same at both ends; the key itself is not shown.",
			example: "qipsec sa --json",
			setup: func(fs *flag.FlagSet) func(context.Context, *app, []string) error {
				f := newNodeFlags(fs)
				return func(ctx context.Context, a *app, args []string) error {
					if err := wantArgs(args, 0); err != nil {
						return err
					}
					return ask(ctx, a, f, func(ctx context.Context, c *operator.Client) ([]operator.SA, error) { return c.SAs(ctx) }, printSAs)
				}
			},
		},
		{
			name: "explain", args: "CONNECTION", about: "say why a connection is up or not, and what to do",
			detail:  "Exit code 1 if it is not up.",
			example: "qipsec explain a-b",
			setup:   setupExplain,
		},
	}
	return append(list,
		actionCommand(operator.Initiate, "set a connection up"),
		actionCommand(operator.Rekey, "give a connection's CHILD_SAs a fresh quantum key"),
		actionCommand(operator.Terminate, "take a connection down"))
}

func actionCommand(action operator.Action, about string) command {
	return command{
		name: "tunnels " + string(action), args: "CONNECTION", about: about,
		example: "qipsec tunnels " + string(action) + " a-b",
		setup: func(fs *flag.FlagSet) func(context.Context, *app, []string) error {
			f := newNodeFlags(fs)
			return func(ctx context.Context, a *app, args []string) error {
				if err := wantArgs(args, 1); err != nil {
					return err
				}
				c, ctx, cancel, err := f.client(ctx)
				if err != nil {
					return err
				}
				defer cancel()
				defer c.Close()
				if err := c.Do(ctx, args[0], action); err != nil {
					return err
				}
				if *f.json {
					return printJSON(a.out, map[string]string{"connection": args[0], "done": string(action)})
				}
				fmt.Fprintf(a.out, "%s: %s done\n", args[0], action)
				return nil
			}
		},
	}
}

func setupExplain(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newNodeFlags(fs)
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 1); err != nil {
			return err
		}
		up := false
		err := ask(ctx, a, f, func(ctx context.Context, c *operator.Client) (operator.Explanation, error) {
			e, err := c.Explain(ctx, args[0])
			up = e.Up
			return e, err
		}, printExplanation)
		if err == nil && !up {
			err = fmt.Errorf("%s is not up", args[0])
		}
		return err
	}
}

func printExplanation(a *app, e operator.Explanation) error {
	for _, c := range e.Checks {
		mark := "ok  "
		if !c.OK {
			mark = "FAIL"
		}
		fmt.Fprintf(a.out, "%s  %-12s %s\n", mark, c.What, strings.ReplaceAll(strings.TrimSpace(c.Text), "\n", "\n"+strings.Repeat(" ", 19)))
		if c.Advice != "" {
			fmt.Fprintf(a.out, "      %-12s -> %s\n", "", c.Advice)
		}
	}
	if len(e.Events) > 0 {
		fmt.Fprintln(a.out)
		return printEvents(a, e.Events)
	}
	return nil
}

func printTunnels(a *app, list []operator.Tunnel) error {
	var rows [][]string
	for _, t := range list {
		keys, dry := supply(t.Supply)
		rows = append(rows, []string{t.Connection, "", t.State, t.Policy, t.KME, t.PeerSAE, keys, dry, t.Why})
		for _, c := range t.Children {
			age, next := "", ""
			if c.KeyID != "" {
				age = inSeconds(c.AgeS)
			}
			if c.RekeyInS != nil {
				next = inSeconds(max(0, *c.RekeyInS))
			}
			rows = append(rows, []string{"", c.Name, c.State, c.KeyClass, "", c.KeyID, age, next, ""})
		}
	}
	return table(a.out, "CONNECTION CHILD STATE POLICY/CLASS KME PEER/KEY-ID KEYS/AGE DRY/REKEY-IN WHY", rows)
}

// supply is how many keys there are for a tunnel and when the last one goes.
func supply(s *operator.Supply) (keys, dry string) {
	if s == nil {
		return "", ""
	}
	keys = strconv.Itoa(s.Level)
	switch {
	case s.Level == 0:
		dry = "dry"
	case s.Rates == nil:
	case s.Rates.DryInS == nil:
		dry = "never"
	default:
		dry = inSeconds(*s.Rates.DryInS)
	}
	return keys, dry
}

func inSeconds(s int64) string { return (time.Duration(s) * time.Second).String() }

func printSAs(a *app, list []operator.SA) error {
	rows := make([][]string, len(list))
	for i, s := range list {
		rows[i] = []string{s.Connection, s.Direction, s.Src, s.Dst, s.SPI, s.Algorithm, s.KeyID, s.Fingerprint, strconv.FormatUint(s.Packets, 10)}
	}
	return table(a.out, "CONNECTION DIR SRC DST SPI ALGORITHM KEY-ID FINGERPRINT PACKETS", rows)
}
