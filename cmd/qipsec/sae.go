package main

import (
	"context"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

const saeTimeout = 30 * time.Second

// saeFlags say which SAE is played and which KME it asks.
type saeFlags struct {
	url, ca, cert, key, peer *string
	tls12, get               *bool
	json                     *bool
}

func newSAEFlags(fs *flag.FlagSet) saeFlags {
	return saeFlags{
		url:   fs.String("url", "", "the KME, https://HOST[:PORT]"),
		ca:    fs.String("ca", "", "`file` with the CA of the KME's certificate"),
		cert:  fs.String("cert", "", "`file` with the SAE's certificate"),
		key:   fs.String("key", "", "`file` with the SAE's private key"),
		peer:  fs.String("peer", "", "`id` of the other SAE"),
		tls12: fs.Bool("tls12", false, "allow TLS 1.2, for KMEs of others"),
		get:   fs.Bool("use-get", false, "use GET, for KMEs without POST"),
		json:  jsonFlag(fs),
	}
}

// client gives a client of the KME and the context of one call.
func (f saeFlags) client(ctx context.Context, a *app) (*etsi014.Client, context.Context, context.CancelFunc, error) {
	for name, v := range map[string]string{"url": *f.url, "ca": *f.ca, "cert": *f.cert, "key": *f.key, "peer": *f.peer} {
		if v == "" {
			return nil, nil, nil, usagef("wants --%s", name)
		}
	}
	t, err := pki.KMEClient(pki.Files{CA: *f.ca, Cert: *f.cert, Key: *f.key}, *f.tls12, slog.New(slog.NewTextHandler(a.err, nil)))
	if err != nil {
		return nil, nil, nil, err
	}
	c, err := etsi014.NewClient(etsi014.ClientConfig{URL: *f.url, TLS: t, GETOnly: *f.get})
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, saeTimeout)
	return c, ctx, cancel, nil
}

func saeCommands() []command {
	const files = " --ca pki/sae-ca.crt --cert pki/saes/a-te.crt --key pki/saes/a-te.key"
	return []command{
		{
			name: "sae status", about: "ask a KME what it has for an SAE and its peer (ETSI GS QKD 014)",
			example: "qipsec sae status --url https://192.0.2.1:8442 --peer b-te" + files,
			setup:   setupSAEStatus,
		},
		{
			name: "sae get-key", about: "play an SAE that asks for new keys (GetKey)",
			detail:  "A key is shown by its fingerprint, unless --show-key is given.",
			example: "qipsec sae get-key --url https://192.0.2.1:8442 --peer b-te" + files,
			setup:   setupSAEGetKey,
		},
		{
			name: "sae get-key-with-id", args: "KEY-ID...", about: "play an SAE that asks for its peer's keys (GetKeyWithID)",
			detail:  "A key is shown by its fingerprint, unless --show-key is given.",
			example: "qipsec sae get-key-with-id --url https://192.0.2.2:8442 --peer a-te" + files + " 9db7eac5-403a-8272-8de8-26231aa4ae95",
			setup:   setupSAEGetKeyWithID,
		},
	}
}

func setupSAEStatus(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newSAEFlags(fs)
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 0); err != nil {
			return err
		}
		c, ctx, cancel, err := f.client(ctx, a)
		if err != nil {
			return err
		}
		defer cancel()
		defer c.Close()
		s, err := c.Status(ctx, *f.peer)
		if err != nil {
			return err
		}
		if *f.json {
			return printJSON(a.out, s)
		}
		fmt.Fprintf(a.out, "KME %s to %s, SAE %s to %s\nkeys stored  %d of %d\nkey size     %d bits (%d to %d), %d keys a request at most\n",
			s.SourceKME, s.TargetKME, s.MasterSAE, s.SlaveSAE, s.StoredKeyCount, s.MaxKeyCount, s.KeySize, s.MinKeySize, s.MaxKeySize, s.MaxKeyPerRequest)
		return nil
	}
}

func setupSAEGetKey(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newSAEFlags(fs)
	number := fs.Int("number", 1, "`how many` keys")
	size := fs.Int("size", 256, "`bits` of each key")
	show := fs.Bool("show-key", false, "print the keys themselves, in Base64")
	return func(ctx context.Context, a *app, args []string) error {
		if err := wantArgs(args, 0); err != nil {
			return err
		}
		if *number < 1 || *size < 1 {
			return usagef("--number and --size must be positive")
		}
		c, ctx, cancel, err := f.client(ctx, a)
		if err != nil {
			return err
		}
		defer cancel()
		defer c.Close()
		keys, err := c.GetKey(ctx, *f.peer, *number, *size)
		defer key.WipeAll(keys)
		if err != nil {
			return err
		}
		return printKeys(a.out, keys, *show, *f.json)
	}
}

func setupSAEGetKeyWithID(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	f := newSAEFlags(fs)
	show := fs.Bool("show-key", false, "print the keys themselves, in Base64")
	return func(ctx context.Context, a *app, args []string) error {
		if len(args) == 0 {
			return usagef("wants the Key-IDs")
		}
		var ids []key.ID
		for _, s := range args {
			id, err := key.ParseID(s)
			if err != nil {
				return usageError{err.Error()}
			}
			ids = append(ids, id)
		}
		c, ctx, cancel, err := f.client(ctx, a)
		if err != nil {
			return err
		}
		defer cancel()
		defer c.Close()
		keys, err := c.GetKeyWithID(ctx, *f.peer, ids, 0)
		defer key.WipeAll(keys)
		if err != nil {
			return err
		}
		return printKeys(a.out, keys, *show, *f.json)
	}
}

// printKeys is the one place of the project that prints keys, and only with
// --show-key. It goes past no encoder that could keep a copy.
func printKeys(w io.Writer, keys []key.SupplyKey, show, asJSON bool) error {
	var err error
	put := func(b []byte) {
		if err == nil {
			_, err = w.Write(b)
		}
	}
	if asJSON {
		put([]byte("{\"keys\":["))
	}
	for i, k := range keys {
		b64 := make([]byte, base64.StdEncoding.EncodedLen(k.Material.Len()))
		if show {
			base64.StdEncoding.Encode(b64, k.Material.Bytes())
		}
		switch {
		case asJSON:
			if i > 0 {
				put([]byte(","))
			}
			put(fmt.Appendf(nil, "\n  {\"key_ID\":%q,\"bits\":%d,\"fingerprint\":%q", k.ID.String(), k.Material.Len()*8, k.Material.Fingerprint()))
			if show {
				put([]byte(",\"key\":\""))
				put(b64)
				put([]byte("\""))
			}
			put([]byte("}"))
		default:
			put(fmt.Appendf(nil, "key_ID %v  %d bits  fingerprint %s", k.ID, k.Material.Len()*8, k.Material.Fingerprint()))
			if show {
				put([]byte("  key "))
				put(b64)
			}
			put([]byte("\n"))
		}
		clear(b64)
	}
	if asJSON {
		put([]byte("\n]}\n"))
	}
	return errors.Join(err)
}
