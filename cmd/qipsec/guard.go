package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"time"

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
			detail:  what + " qipsec-guard.service runs this at boot.",
			example: "qipsec guard install --config /etc/q-ipsec/qipsecd.toml",
			setup: guardSetup(func(ctx context.Context, a *app, g *sad.Guard, c sad.GuardConfig, _ bool) error {
				if err := g.Install(ctx, c); err != nil {
					return err
				}
				fmt.Fprintf(a.out, "guarded: %v\n", networks(c))
				return nil
			}),
		},
		{
			name: "guard status", about: "say whether the guard is in place",
			detail: what + " Exit code 1 if it is not.", example: "qipsec guard status",
			setup: guardSetup(func(ctx context.Context, a *app, g *sad.Guard, c sad.GuardConfig, asJSON bool) error {
				ok, err := g.Installed(ctx, c)
				if err != nil {
					return err
				}
				if asJSON {
					err = printJSON(a.out, map[string]any{"installed": ok, "networks": networks(c)})
				} else if ok {
					fmt.Fprintf(a.out, "in place for %v\n", networks(c))
				}
				if err == nil && !ok {
					err = fmt.Errorf("not in place for all of %v: `qipsec guard install` completes it", networks(c))
				}
				return err
			}),
		},
		{
			name: "guard remove", about: "take the guard out of the kernel: traffic may pass in clear",
			detail:  what + " Nothing but this command removes it; a qipsecd that runs leaves it so until\n`qipsec guard install`, its own next start, or a boot.",
			example: "qipsec guard remove",
			setup: func(*flag.FlagSet) func(context.Context, *app, []string) error {
				return func(ctx context.Context, a *app, args []string) error {
					if err := wantArgs(args, 0); err != nil {
						return err
					}
					return withGuard(ctx, func(ctx context.Context, g *sad.Guard) error {
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

// guardSetup makes a command that needs the config.
func guardSetup(f func(context.Context, *app, *sad.Guard, sad.GuardConfig, bool) error) func(*flag.FlagSet) func(context.Context, *app, []string) error {
	return func(fs *flag.FlagSet) func(context.Context, *app, []string) error {
		config := fs.String("config", defaultConfig, "qipsecd's config `file`")
		asJSON := jsonFlag(fs)
		return func(ctx context.Context, a *app, args []string) error {
			if err := wantArgs(args, 0); err != nil {
				return err
			}
			n, err := conf.ReadNode(*config)
			if err != nil {
				return err
			}
			if n.IPsec != nil && !n.IPsec.Guard {
				fmt.Fprintf(a.out, "%s says guard = false: nothing is guarded\n", *config)
				return nil
			}
			var c sad.GuardConfig
			var allow []conf.Channel
			c.Remotes, allow = n.Guarded()
			c.Routed = n.Routed()
			for _, v := range allow {
				c.Allow = append(c.Allow, sad.Channel(v))
			}
			if len(networks(c)) == 0 {
				return fmt.Errorf("%s has no connection with policy required: there is nothing to guard", *config)
			}
			return withGuard(ctx, func(ctx context.Context, g *sad.Guard) error { return f(ctx, a, g, c, *asJSON) })
		}
	}
}

func networks(c sad.GuardConfig) []netip.Prefix { return slices.Concat(c.Remotes, c.Routed) }

func withGuard(ctx context.Context, f func(context.Context, *sad.Guard) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, guardTimeout)
	defer cancel()
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
