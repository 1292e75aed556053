package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// exitUnknown is store check's when it cannot tell.
const exitUnknown = 2

// storeFlags say which inventory a command works on: not through qipsecd but on
// its files.
type storeFlags struct{ config, database, root, credential *string }

func newStoreFlags(fs *flag.FlagSet) storeFlags {
	return storeFlags{
		config:     fs.String("config", defaultConfig, "qipsecd's config `file`, which says where the inventory is"),
		database:   fs.String("database", "", "the inventory's `URL` instead, as in sqlite:/path; needs --root"),
		root:       fs.String("root", "", "its root `file`; needs --database"),
		credential: fs.String("credential", "", "`file` with the credential that seals the root file; default: root_credential of the config"),
	}
}

func (f storeFlags) options(a *app) (store.Options, error) {
	o := store.Options{URL: *f.database, RootFile: *f.root, RootCredential: *f.credential, Log: slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelWarn})), Now: a.now}
	if (*f.database == "") != (*f.root == "") {
		return o, usagef("--database and --root go together")
	}
	if *f.database != "" {
		return o, nil
	}
	n, err := conf.ReadNode(*f.config)
	if err != nil {
		return o, fmt.Errorf("find the inventory (--database and --root name it): %w", err)
	}
	o.URL, o.PasswordFile, o.RootFile = n.Inventory, n.InventoryPassword, n.RootFile
	if o.RootCredential == "" {
		o.RootCredential, err = n.CredentialPath()
	}
	return o, err
}

func storeCommands() []command {
	return []command{
		{
			name: "store check", about: "look for damage in the node's inventory, without changing it",
			detail: "Opens every sealed box and verifies schema, marks, logs, file modes, and that database\n" +
				"and root file belong together. Works beside a running qipsecd; where none runs, none\n" +
				"can start until it is done. Prints one line for each finding and what to do about it.\n" +
				"Exit code 0: sound; 1: damaged; 2: cannot tell.",
			example: "qipsec store check --config /etc/q-ipsec/qipsecd.toml",
			setup:   setupStoreCheck,
		},
		{
			name: "store export-history", args: "[FILE]", about: "write usage history and events as lines of JSON, oldest first",
			detail:  "To standard output, or to FILE with mode 0600. Works beside a running qipsecd.",
			example: "qipsec store export-history --from 2026-01-01T00:00:00Z history.jsonl",
			setup:   setupStoreExport,
		},
		{
			name: "store backup", args: "FILE", about: "save history, events and names of pools to FILE",
			detail: "No key, lease, mark or root is in it: a node restored from it starts with empty pools.\n" +
				"Keep the root file out of every backup. Works beside a running qipsecd.",
			example: "qipsec store backup /var/backups/q-ipsec-inventory.json",
			setup:   setupStoreBackup,
		},
		{
			name: "store restore", args: "FILE", about: "make a new inventory with what `store backup` saved",
			detail: "Only where no inventory is, and with qipsecd stopped. The new one has a root of its\n" +
				"own and empty pools; what was used since the backup, the peers' SYNC tells it.",
			example: "qipsec store restore /var/backups/q-ipsec-inventory.json",
			setup:   setupStoreRestore,
		},
		{
			name: "store seal-root", about: "seal the root file by root_credential, once and for all",
			detail: "The credential is 32 random bytes that systemd hands to qipsecd, themselves sealed by\n" +
				"the machine's TPM: without them the root file opens nothing. With qipsecd stopped.\n" +
				"Copies of the root file from before are worthless afterwards. A new inventory's root\n" +
				"file is sealed from the start; this is for one that was made without a credential.\n" +
				"Under systemd: systemd-run --pipe -p LoadCredentialEncrypted=qipsec-root qipsec store seal-root",
			example: "qipsec store seal-root --credential /run/qipsec-root",
			setup:   setupStoreSeal,
		},
	}
}

// exitError ends the command with a code of its own.
type exitError struct {
	code int
	text string
}

func (e exitError) Error() string { return e.text }

// checkFinding and checkReport are the JSON of store check.
type checkFinding struct {
	Verdict string `json:"verdict"`
	What    string `json:"what"`
	Do      string `json:"do"`
}

type checkReport struct {
	Verdict    string         `json:"verdict"`
	Database   string         `json:"database"`
	RootFile   string         `json:"root_file"`
	Store      uuid.UUID      `json:"store"`
	Generation uint64         `json:"generation"`
	Epoch      uint64         `json:"epoch"`
	Running    bool           `json:"running"`
	Pools      int            `json:"pools"`
	Blocks     int            `json:"blocks"`
	Keys       int            `json:"keys"`
	Boxes      int            `json:"boxes"`
	History    int            `json:"history"`
	Events     int            `json:"events"`
	Findings   []checkFinding `json:"findings"`
}

func setupStoreCheck(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newStoreFlags(fs)
	asJSON := jsonFlag(fs)
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 0); err != nil {
			return err
		}
		o, err := f.options(a)
		var u usageError
		if errors.As(err, &u) {
			return err
		}
		if err != nil {
			return exitError{exitUnknown, err.Error()}
		}
		r := store.Check(ctx, o)
		v := checkReport{
			Verdict: string(r.Verdict()), Database: o.URL, RootFile: o.RootFile, Store: r.Store, Generation: r.Generation, Epoch: r.Epoch, Running: r.Running,
			Pools: r.Pools, Blocks: r.Blocks, Keys: r.Keys, Boxes: r.Parts, History: r.History, Events: r.Events, Findings: []checkFinding{},
		}
		for _, g := range r.Findings {
			v.Findings = append(v.Findings, checkFinding{string(g.Verdict), g.What, g.Do})
		}
		if *asJSON {
			err = printJSON(a.out, v)
		} else {
			printCheck(a, &v)
		}
		switch {
		case err != nil:
			return exitError{exitUnknown, err.Error()}
		case r.Verdict() == store.Damaged:
			return exitError{exitFailed, "the inventory is damaged"}
		case r.Verdict() == store.Unknown:
			return exitError{exitUnknown, "cannot tell whether the inventory is sound"}
		}
		return nil
	}
}

func printCheck(a *app, v *checkReport) {
	for _, g := range v.Findings {
		line := g.Verdict + ": " + g.What
		if g.Do != "" {
			line += "; " + g.Do
		}
		fmt.Fprintln(a.out, line)
	}
	beside := ""
	if v.Running {
		beside = ", beside a running qipsecd"
	}
	fmt.Fprintf(a.out, "looked at %s%s: %d pools, %d blocks in %d boxes, %d keys to lease, %d rows of history, %d events\n",
		v.Database, beside, v.Pools, v.Blocks, v.Boxes, v.Keys, v.History, v.Events)
	if v.Verdict == string(store.Sound) {
		fmt.Fprintln(a.out, "sound")
	}
}

func setupStoreExport(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newStoreFlags(fs)
	pool := fs.String("pool", "", "only the history of one pool, by its `UUID`")
	from := fs.String("from", "", "from this `time` (RFC 3339) on")
	to := fs.String("to", "", "before this `time` (RFC 3339)")
	return func(ctx context.Context, a *app, args []string) error {
		if len(args) > 1 {
			return wantArgs(args, 1)
		}
		var q store.ExportQuery
		var errs [3]error
		if *pool != "" {
			q.Pool, errs[0] = uuid.Parse(*pool)
		}
		if *from != "" {
			q.From, errs[1] = time.Parse(time.RFC3339Nano, *from)
		}
		if *to != "" {
			q.To, errs[2] = time.Parse(time.RFC3339Nano, *to)
		}
		if err := errors.Join(errs[:]...); err != nil {
			return usageError{err.Error()}
		}
		o, err := f.options(a)
		if err != nil {
			return err
		}
		if len(args) == 0 {
			_, err := store.Export(ctx, o, q, a.out)
			return err
		}
		n := 0
		err = writeWhole(args[0], func(w io.Writer) (err error) { n, err = store.Export(ctx, o, q, w); return err })
		if err == nil {
			fmt.Fprintf(a.out, "%s  %d rows\n", args[0], n)
		}
		return err
	}
}

func setupStoreBackup(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newStoreFlags(fs)
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 1); err != nil {
			return err
		}
		o, err := f.options(a)
		if err != nil {
			return err
		}
		var info store.BackupInfo
		err = writeWhole(args[0], func(w io.Writer) (err error) { info, err = store.Backup(ctx, o, w); return err })
		if err == nil {
			fmt.Fprintf(a.out, "%s  store %s: %d pools, %d rows of history and events; no keys\n", args[0], info.Store, info.Pools, info.Rows)
		}
		return err
	}
}

func setupStoreRestore(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newStoreFlags(fs)
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 1); err != nil {
			return err
		}
		o, err := f.options(a)
		if err != nil {
			return err
		}
		file, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer file.Close() //nolint:errcheck // only read
		info, err := store.Restore(ctx, o, file)
		if err != nil {
			return err
		}
		fmt.Fprintf(a.out, "made %s and root file %s: %d empty pools, %d rows of history and events as of %s\n", o.URL, o.RootFile, info.Pools, info.Rows, info.Made.Format(time.RFC3339))
		return nil
	}
}

func setupStoreSeal(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newStoreFlags(fs)
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 0); err != nil {
			return err
		}
		o, err := f.options(a)
		if err != nil {
			return err
		}
		if o.RootCredential == "" {
			return errors.New("root_credential is not set")
		}
		if err := store.SealRoot(ctx, o); err != nil {
			return err
		}
		fmt.Fprintf(a.out, "%s is sealed: from now on qipsecd needs the credential\n", o.RootFile)
		return nil
	}
}

// writeWhole makes a file of mode 0600 that is whole or as it was before:
// written beside, synced, renamed.
func writeWhole(name string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
