package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"time"

	"github.com/q-ipsec/q-ipsec/cmd/internal/guard"
	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/sad"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

const guardTimeout = 30 * time.Second

func guardCommands() []command {
	const what = "The guard is XFRM policies of lowest precedence that drop what goes to or comes from\n" +
		"the networks of `required` connections outside a tunnel, and blackhole routes to those\n" +
		"behind an XFRM interface."
	return []command{
		{
			name: "guard install", about: "put the guard in the kernel, or what of it is missing",
			detail: what + " qipsec-guard.service runs this at boot.\n" +
				"A config with faults does not keep it from that: then it installs the guard of the last\n" +
				"good one, kept in the state directory, and what the faulty one still names; exit code 1\n" +
				"only if neither is known. Blocks that the kernel has stay, whatever the config says now.",
			example: "qipsec guard install --config /etc/q-ipsec/qipsecd.toml",
			setup: guardSetup(true, func(ctx context.Context, a *app, g *sad.Guard, c sad.GuardConfig, asJSON bool) error {
				if err := g.Install(ctx, c); err != nil {
					return err
				}
				if asJSON {
					return printJSON(a.out, map[string]any{"installed": true, "networks": guard.Networks(c)})
				}
				fmt.Fprintf(a.out, "guarded: %v\n", guard.Networks(c))
				return nil
			}),
		},
		{
			name: "guard status", about: "say whether the guard is in place",
			detail: what + " Exit code 1 if it is not.", example: "qipsec guard status",
			setup: guardSetup(false, func(ctx context.Context, a *app, g *sad.Guard, c sad.GuardConfig, asJSON bool) error {
				ok, err := g.Installed(ctx, c)
				if err != nil {
					return err
				}
				if asJSON {
					err = printJSON(a.out, map[string]any{"installed": ok, "networks": guard.Networks(c)})
				} else if ok {
					fmt.Fprintf(a.out, "in place for %v\n", guard.Networks(c))
				}
				if err == nil && !ok {
					err = fmt.Errorf("not in place for all of %v: `qipsec guard install` completes it", guard.Networks(c))
				}
				return err
			}),
		},
		{
			name: "guard remove", about: "take the guard out of the kernel: traffic may pass in clear",
			detail:  what + " Nothing but this command removes it; a qipsecd that runs leaves it so until\n`qipsec guard install`, its own next start, or a boot, which put that of the config back.",
			example: "qipsec guard remove",
			setup: func(*flag.FlagSet) func(context.Context, *app, []string) error {
				return func(ctx context.Context, a *app, args []string) error {
					if err := wantArgs(args, 0); err != nil {
						return err
					}
					return a.withGuard(ctx, func(ctx context.Context, g *sad.Guard) error {
						if err := g.Remove(ctx); err != nil {
							return err
						}
						fmt.Fprintln(a.out, "removed")
						return nil
					})
				}
			},
		},
	}
}

// guardSetup makes a command that works on the guard of the config. With keep it is
// kept for the day on which the config has faults.
func guardSetup(keep bool, f func(context.Context, *app, *sad.Guard, sad.GuardConfig, bool) error) func(*flag.FlagSet) func(context.Context, *app, []string) error {
	return func(fs *flag.FlagSet) func(context.Context, *app, []string) error {
		config := fs.String("config", defaultConfig, "qipsecd's config `file`")
		stateDir := fs.String("state-dir", "", "`directory` of the last good guard; default: the config's state_dir")
		asJSON := jsonFlag(fs)
		return func(ctx context.Context, a *app, args []string) error {
			if err := wantArgs(args, 0); err != nil {
				return err
			}
			n, err := conf.ReadNode(*config)
			if err != nil {
				return a.withLastGood(ctx, *config, *stateDir, err, func(ctx context.Context, g *sad.Guard, c sad.GuardConfig) error {
					return f(ctx, a, g, c, *asJSON)
				})
			}
			c := guard.Config(n)
			if keep {
				if err := guard.Save(n, *stateDir, a.now()); err != nil {
					fmt.Fprintf(a.err, "WARNING: if the config has faults one day, this guard will not be known: %v\n", err)
				}
			}
			if len(guard.Networks(c)) == 0 {
				why := "no connection with policy required"
				if n.IPsec != nil && !n.IPsec.Guard {
					why = "guard = false"
				}
				if *asJSON {
					return printJSON(a.out, map[string]any{"installed": false, "networks": []string{}})
				}
				fmt.Fprintf(a.out, "%s says %s: nothing is guarded; blocks from before, if the kernel has any, stay until `qipsec guard remove`\n", *config, why)
				return nil
			}
			return a.withGuard(ctx, func(ctx context.Context, g *sad.Guard) error { return f(ctx, a, g, c, *asJSON) })
		}
	}
}

// withLastGood calls f with the guard that is left to a node whose config has faults,
// and says so whatever comes of it.
func (a *app) withLastGood(ctx context.Context, config, stateDir string, fault error, f func(context.Context, *sad.Guard, sad.GuardConfig) error) error {
	c, report, err := guard.LastGood(stateDir, config)
	fmt.Fprintf(a.err, "WARNING: %v\nqipsecd will not start with that config. For the guard there is:\n", fault)
	for _, line := range report {
		fmt.Fprintf(a.err, "  %s\n", line)
	}
	if err != nil {
		return fmt.Errorf("%w: NOTHING IS GUARDED; mend the config, see `qipsecd -check`", err)
	}
	fmt.Fprintln(a.err, "Mend the config (`qipsecd -check` lists every fault), then run `qipsec guard install` again.")
	if len(guard.Networks(c)) == 0 {
		fmt.Fprintln(a.out, "nothing is guarded: no connection with policy required is known")
		return nil
	}
	return a.withGuard(ctx, func(ctx context.Context, g *sad.Guard) error { return f(ctx, g, c) })
}

// withGuard calls f with a Guard of this network namespace.
func (a *app) withGuard(ctx context.Context, f func(context.Context, *sad.Guard) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, guardTimeout)
	defer cancel()
	if a.guard != nil {
		return f(ctx, a.guard)
	}
	marker, err := sad.GuardMarker()
	if err != nil {
		return err
	}
	c, err := xfrm.Open()
	if err != nil {
		return fmt.Errorf("%w (are you root?)", err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	return f(ctx, sad.NewGuard(c, marker))
}
