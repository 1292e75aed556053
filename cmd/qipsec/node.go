package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/operator"
)

const (
	defaultConfig = "/etc/q-ipsec/qipsecd.toml"
	socketEnv     = "QIPSEC_SOCKET"
	askTimeout    = 40 * time.Second
)

// nodeFlags say which node a command asks.
type nodeFlags struct {
	socket, config *string
	json           *bool
}

func newNodeFlags(fs *flag.FlagSet) nodeFlags {
	return nodeFlags{
		socket: fs.String("socket", "", "operator `socket` of qipsecd; default: $"+socketEnv+", or that of the config"),
		config: fs.String("config", defaultConfig, "qipsecd's config `file`, to find its socket"),
		json:   jsonFlag(fs),
	}
}

// client gives a client of the node and the context of one call.
func (f nodeFlags) client(ctx context.Context) (*operator.Client, context.Context, context.CancelFunc, error) {
	name := or(*f.socket, os.Getenv(socketEnv))
	if name == "" {
		n, err := conf.ReadNode(*f.config)
		if err != nil {
			return nil, nil, nil, fmt.Errorf("find the operator socket (--socket names it): %w", err)
		}
		name = n.Operator.Socket
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	return operator.NewClient(name), ctx, cancel, nil
}

// ask makes one call and prints its answer.
func ask[T any](ctx context.Context, a *app, f nodeFlags, call func(context.Context, *operator.Client) (T, error), print func(*app, T) error) error {
	c, ctx, cancel, err := f.client(ctx)
	if err != nil {
		return err
	}
	defer cancel()
	defer c.Close()
	v, err := call(ctx, c)
	if err != nil {
		return err
	}
	if *f.json {
		return printJSON(a.out, v)
	}
	return print(a, v)
}

func nodeCommands() []command {
	return []command{
		{
			name: "status", about: "show the node at a glance: pools, tunnels, alarms",
			example: "qipsec status",
			setup: func(fs *flag.FlagSet) func(context.Context, *app, []string) error {
				f := newNodeFlags(fs)
				return func(ctx context.Context, a *app, args []string) error {
					if err := wantArgs(args, 0); err != nil {
						return err
					}
					return ask(ctx, a, f, func(ctx context.Context, c *operator.Client) (operator.Status, error) { return c.Status(ctx) }, printStatus)
				}
			},
		},
		{
			name: "keys", args: "[KEY-ID]", about: "show the pools, or where one key is in its life",
			example: "qipsec keys 9db7eac5-403a-8272-8de8-26231aa4ae95",
			setup:   setupKeys,
		},
		{
			name: "history", about: "show what became of keys, newest first",
			example: "qipsec history --limit 20",
			setup:   setupHistory,
		},
		{
			name: "events", about: "show alarms, faults and what else happened, newest first",
			example: "qipsec events --connection a-b",
			setup: func(fs *flag.FlagSet) func(context.Context, *app, []string) error {
				f := newNodeFlags(fs)
				limit := fs.Int("limit", 50, "at most `N` events")
				conn := fs.String("connection", "", "only those of one `connection`")
				return func(ctx context.Context, a *app, args []string) error {
					if err := wantArgs(args, 0); err != nil {
						return err
					}
					return ask(ctx, a, f, func(ctx context.Context, c *operator.Client) ([]operator.Event, error) {
						return c.Events(ctx, *conn, *limit)
					}, printEvents)
				}
			},
		},
	}
}

func setupKeys(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newNodeFlags(fs)
	return func(ctx context.Context, a *app, args []string) error {
		if len(args) == 0 {
			return ask(ctx, a, f, func(ctx context.Context, c *operator.Client) ([]operator.Pool, error) { return c.Pools(ctx) }, printPools)
		}
		if err := wantArgs(args, 1); err != nil {
			return err
		}
		id, err := key.ParseID(args[0])
		if err != nil {
			return usageError{err.Error()}
		}
		return ask(ctx, a, f, func(ctx context.Context, c *operator.Client) (operator.Key, error) { return c.Find(ctx, id) },
			func(a *app, k operator.Key) error {
				fmt.Fprintf(a.out, "key       %v\npool      %v\nposition  %s\nclass     %s\nstate     %s\nowner     %s\n", k.ID, k.Pool, k.Position, k.Class, k.State, k.Owner)
				return nil
			})
	}
}

func setupHistory(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newNodeFlags(fs)
	limit := fs.Int("limit", 50, "at most `N` lines")
	pool := fs.String("pool", "", "only of one pool, by its `UUID`")
	keyID := fs.String("key", "", "only of one key, by its `Key-ID`")
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 0); err != nil {
			return err
		}
		q := operator.HistoryQuery{Limit: *limit}
		var err error
		if *pool != "" {
			if q.Pool, err = uuid.Parse(*pool); err != nil {
				return usagef("--pool %q: %v", *pool, err)
			}
		}
		if *keyID != "" {
			if q.Key, err = key.ParseID(*keyID); err != nil {
				return usagef("--key %q: %v", *keyID, err)
			}
		}
		return ask(ctx, a, f, func(ctx context.Context, c *operator.Client) ([]operator.Usage, error) { return c.History(ctx, q) }, printHistory)
	}
}

func printStatus(a *app, s operator.Status) error {
	fmt.Fprintf(a.out, "node %s, %s, version %s, up since %s\n", s.Node, strings.Join(s.Roles, " and "), s.Version, s.Started.Local().Format(time.DateTime))
	if s.Site != nil {
		fmt.Fprintln(a.out, siteLine(s.Site))
	}
	if len(s.Pools) > 0 {
		fmt.Fprintln(a.out)
		if err := printPools(a, s.Pools); err != nil {
			return err
		}
	}
	if len(s.Tunnels) > 0 {
		fmt.Fprintln(a.out)
		if err := printTunnels(a, s.Tunnels); err != nil {
			return err
		}
	}
	if len(s.Alarms) > 0 {
		fmt.Fprintln(a.out)
		return printEvents(a, s.Alarms)
	}
	return nil
}

// siteLine says what this machine is among those of its node.
func siteLine(v *operator.Site) string {
	since := " since " + v.Since.Local().Format(time.DateTime)
	switch {
	case v.State == operator.SiteLeader:
		return "leads" + since
	case v.State == operator.SiteUncertain:
		return "led, and cannot make sure that it still does: supplies nothing" + since
	case v.Leader == "":
		return "stands by" + since + "; no other member says that it leads"
	}
	return "stands by" + since + "; " + v.Leader + " leads since " + v.LeaderSince.Local().Format(time.DateTime)
}

func printPools(a *app, pools []operator.Pool) error {
	rows := make([][]string, len(pools))
	for i, p := range pools {
		synced := "no"
		if p.Synced {
			synced = "yes"
		}
		link := ""
		if p.Device != nil {
			link = fmt.Sprintf("%s, QBER %.1f %%, %.0f bit/s", p.Device.State, p.Device.QBER*100, p.Device.Rate)
		}
		rows[i] = []string{p.Peer, p.ID.String(), p.Role, p.Class, strconv.Itoa(p.Active), strconv.Itoa(p.OwnActive), strconv.Itoa(p.Leased), strconv.Itoa(p.Received), synced, (time.Duration(p.OldestS) * time.Second).String(), link}
	}
	return table(a.out, "PEER POOL ROLE CLASS ACTIVE OURS LEASED RECEIVED SYNCED OLDEST LINK", rows)
}

func printHistory(a *app, list []operator.Usage) error {
	rows := make([][]string, len(list))
	for i, u := range list {
		id := ""
		if u.Key != nil {
			id = u.Key.String()
		}
		rows[i] = []string{u.Time.Local().Format(time.DateTime), u.State, strconv.Itoa(u.Count), id, u.Position, u.Text}
	}
	return table(a.out, "TIME STATE COUNT KEY-ID POSITION WHAT", rows)
}

func printEvents(a *app, list []operator.Event) error {
	rows := make([][]string, len(list))
	for i, e := range list {
		rows[i] = []string{e.Time.Local().Format(time.DateTime), e.Severity, e.Code, or(e.Connection, e.Peer), e.Text}
	}
	return table(a.out, "TIME SEVERITY CODE ABOUT WHAT", rows)
}
