package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
)

func keyfileCommands() []command {
	return []command{
		{
			name: "keyfile make", about: "put one QKD-Key file of random keys into both nodes' intake directories",
			detail: "Plays both QKD devices of a pair, for trials and tests: both ends get the same key\n" +
				"data, as a QKD link would make it. Both configs are read here, so both nodes'\n" +
				"directories must be on this machine. A pair takes rising numbers (seq) only; the\n" +
				"default is the time in seconds, after which a simulator that counts from 1 is too old.",
			example: "qipsec keyfile make --config a/qipsecd.toml --peer-config b/qipsecd.toml --keys 1000",
			setup:   setupKeyfileMake,
		},
		{
			name: "keyfile inspect", args: "FILE", about: "check a QKD-Key file and show what it says, without its keys",
			example: "qipsec keyfile inspect intake/0f4d7c9e-3b1a-8c2d-9e4f-5a6b7c8d9e0f-00000000000000000001.qkd",
			setup:   setupKeyfileInspect,
		},
	}
}

func setupKeyfileMake(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	config := fs.String("config", "", "qipsecd's config `file` of one end")
	peer := fs.String("peer-config", "", "qipsecd's config `file` of the other end")
	pairID := fs.String("pair", "", "the pair's `UUID`, if the nodes share several")
	seq := fs.Uint64("seq", 0, "`number` of the file; default: seconds since 1970")
	count := fs.Int("keys", 1024, "`number` of master keys")
	return func(_ context.Context, a *app, args []string) error {
		if err := wantArgs(args, 0); err != nil {
			return err
		}
		if *config == "" || *peer == "" {
			return usagef("wants --config and --peer-config")
		}
		if max := (keyfile.DefaultMaxSize - 4096) / 4 * 3 / key.MasterSize; *count < 1 || *count > max {
			return usagef("--keys %d is not between 1 and %d", *count, max)
		}
		if *seq == 0 {
			*seq = uint64(a.now().Unix())
		}
		ends, err := pairEnds(*config, *peer, *pairID)
		if err != nil {
			return err
		}
		return makeKeyfiles(a, ends, *seq, *count)
	}
}

// pairEnds finds the pair in both configs: the master's end, then the slave's.
func pairEnds(config, peer, id string) (ends [2]conf.Pair, err error) {
	var nodes [2]*conf.Node
	for i, name := range []string{config, peer} {
		if nodes[i], err = conf.LoadNode(name); err != nil {
			return ends, err
		}
		if nodes[i].KMS == nil {
			return ends, fmt.Errorf("%s has no [kms]", name)
		}
	}
	found := 0
	for _, p := range nodes[0].KMS.Pairs {
		for _, q := range nodes[1].KMS.Pairs {
			if p.ID == q.ID && (id == "" || id == p.ID.String()) {
				ends[0], ends[1] = p, q
				found++
			}
		}
	}
	if found != 1 {
		return ends, fmt.Errorf("%s and %s share %d such QKD pairs: name one with --pair", config, peer, found)
	}
	if ends[0].Role == ends[1].Role || ends[0].QKDID != ends[1].PeerQKDID || ends[1].QKDID != ends[0].PeerQKDID {
		return ends, fmt.Errorf("pair %v: the two configs do not fit: roles must differ, qkd_id and peer_qkd_id be exchanged", ends[0].ID)
	}
	if ends[0].Role == key.Slave {
		ends[0], ends[1] = ends[1], ends[0]
	}
	for _, e := range ends {
		if uid, err := conf.FeederUID(e.Feeder); err != nil || uid != os.Geteuid() {
			return ends, fmt.Errorf("pair %v: files must belong to its feeder %q: run this command as that user: %w", e.ID, e.Feeder, errors.Join(err, os.ErrPermission))
		}
	}
	return ends, nil
}

func makeKeyfiles(a *app, ends [2]conf.Pair, seq uint64, count int) error {
	data, err := key.Random(rand.Reader, count*key.MasterSize+keyfile.Trailer)
	if err != nil {
		return err
	}
	defer data.Wipe()
	for _, e := range ends {
		f := &keyfile.File{Data: data, Header: keyfile.Header{
			Pair: e.ID, QKD: e.QKDID, PeerQKD: e.PeerQKDID, Role: e.Role, Seq: seq,
			Created: a.now().UTC().Truncate(time.Second), QBER: 0.015, HashAlgorithm: keyfile.SHA256,
		}}
		path, err := keyfile.WriteAtomic(e.Intake, f)
		if err != nil {
			return err
		}
		fmt.Fprintf(a.out, "%s  %d keys, %v\n", path, count, e.Role)
	}
	return nil
}

// keyfileInfo is what inspect shows.
type keyfileInfo struct {
	File    string    `json:"file"`
	Pair    uuid.UUID `json:"qkd_pair_id"`
	QKD     uuid.UUID `json:"qkd_id"`
	PeerQKD uuid.UUID `json:"peer_qkd_id"`
	Role    string    `json:"role"`
	Seq     uint64    `json:"seq"`
	Created time.Time `json:"created"`
	QBER    float64   `json:"qber"`
	Hash    string    `json:"hash_algorithm"`
	Keys    int       `json:"keys"`
}

func setupKeyfileInspect(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	asJSON := jsonFlag(fs)
	return func(_ context.Context, a *app, args []string) error {
		if err := wantArgs(args, 1); err != nil {
			return err
		}
		text, err := readAtMost(args[0], keyfile.DefaultMaxSize)
		if err != nil {
			return err
		}
		f, h, err := keyfile.Decode(text, keyfile.DefaultMaxSize)
		if err != nil {
			return err
		}
		defer f.Wipe()
		v := keyfileInfo{
			File: args[0], Pair: h.Pair, QKD: h.QKD, PeerQKD: h.PeerQKD, Role: h.Role.String(), Seq: h.Seq,
			Created: h.Created, QBER: h.QBER, Hash: h.HashAlgorithm, Keys: (h.KeyLength - keyfile.Trailer) / key.MasterSize,
		}
		if *asJSON {
			return printJSON(a.out, v)
		}
		fmt.Fprintf(a.out, "pair     %v\nfrom     %v (%s)\nto       %v\nseq      %d\ncreated  %s\nQBER     %.2f %%\nkeys     %d of %d bytes, intact (%s)\n",
			v.Pair, v.QKD, v.Role, v.PeerQKD, v.Seq, v.Created.Format(time.RFC3339), v.QBER*100, v.Keys, key.MasterSize, v.Hash)
		return nil
	}
}

// readAtMost reads a file of at most max bytes. The caller wipes what it holds.
// The open of a FIFO must not wait for a writer: nothing could end that.
func readAtMost(name string, max int) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > int64(max) {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", name, max)
	}
	b := make([]byte, fi.Size()) // one buffer, so that one can be wiped
	if _, err := io.ReadFull(f, b); err != nil {
		clear(b)
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}
