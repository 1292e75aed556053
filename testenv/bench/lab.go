package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

const bound = 60 * time.Second // for anything a process is waited for

// lab is two qipsecd on loopback addresses of their own, with what qipsec init
// wrote for them. Its files lie on the disk of the output, not in memory: the
// store's fsync is part of what is measured.
type lab struct {
	dir   string
	bin   string
	ip    [2]string
	pairs [2]conf.Pair
	api   [2]*operator.Client
	seq   uint64
	procs []*process
}

// process is a child of ours.
type process struct {
	words []string
	cmd   *exec.Cmd    // nil: it did not start
	log   bytes.Buffer // valid when it has ended
}

// newLab writes the lab and starts its nodes; number keeps labs apart, edit
// changes each config, inside are words before the daemon's command.
func newLab(ctx context.Context, o options, number int, edit func(string) string, inside func(node int) []string) (l *lab, err error) {
	l = &lab{bin: o.bin}
	if l.dir, err = os.MkdirTemp(filepath.Dir(o.out), "bench-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.dir, err = filepath.Abs(l.dir); err != nil {
		return nil, err
	}
	copy(l.ip[:], addresses(number))
	init := exec.CommandContext(ctx, filepath.Join(l.bin, "qipsec"), "init", "--pair", "a", "b", "--here", "--no-ipsec", "--out", l.dir, "--force", "--address", l.ip[0]+","+l.ip[1])
	if out, err := init.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("qipsec init: %w: %s", err, out)
	}
	for i, node := range []string{"a", "b"} {
		if err := l.startNode(ctx, i, node, edit, inside(i)); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// addresses are on loopback: those of a lab's nodes, and one more.
func addresses(number int) []string {
	pid := os.Getpid()
	out := make([]string, 3)
	for i := range out {
		out[i] = fmt.Sprintf("127.%d.%d.%d", 128+pid>>7&63, 1+pid&127, 10*number+1+i)
	}
	return out
}

func (l *lab) startNode(ctx context.Context, i int, node string, edit func(string) string, inside []string) error {
	name := filepath.Join(l.dir, node, "qipsecd.toml")
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if err := os.WriteFile(name, []byte(edit(string(text))), 0o600); err != nil {
		return err
	}
	c, err := conf.LoadNode(name)
	if err != nil {
		return err
	}
	l.pairs[i] = c.KMS.Pairs[0]
	l.api[i] = operator.NewClient(c.Operator.Socket)
	words := append(inside, filepath.Join(l.bin, "qipsecd"), "-config", name)
	if err := l.spawn(words...); err != nil {
		return err
	}
	return await(ctx, "node "+node, func() error { _, err := l.api[i].Status(ctx); return err })
}

// spawn starts a process that ends with the lab, and with us.
func (l *lab) spawn(words ...string) error {
	l.procs = append(l.procs, &process{words: words})
	return l.begin(len(l.procs) - 1)
}

// begin starts process i, again if it has ended.
func (l *lab) begin(i int) error {
	p := &process{words: l.procs[i].words}
	p.cmd = exec.Command(p.words[0], p.words[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	l.procs[i] = p
	return nil
}

// end stops process i. What it logs of its own failure comes with the error.
func (l *lab) end(i int) error {
	p := l.procs[i]
	if p.cmd == nil || p.cmd.ProcessState != nil {
		return nil // did not start, or has ended
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // an error if it has ended
	kill := time.AfterFunc(bound, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w: %s", p.cmd.Path, err, tail(p.log.String()))
	}
	return nil
}

// close ends the processes in order and removes the files.
func (l *lab) close() error {
	var errs []error
	for i := range l.procs {
		errs = append(errs, l.end(i))
	}
	for _, c := range l.api {
		if c != nil {
			c.Close()
		}
	}
	return errors.Join(append(errs, os.RemoveAll(l.dir))...)
}

func tail(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}

// pool is what a node says of the pool.
func (l *lab) pool(ctx context.Context, node int) (operator.Pool, error) {
	pools, err := l.api[node].Pools(ctx)
	if err == nil && len(pools) != 1 {
		err = fmt.Errorf("%d pools", len(pools))
	}
	if err != nil {
		return operator.Pool{}, err
	}
	return pools[0], nil
}

// stage writes the next QKD-Key files of both ends, n of so many keys, beside
// the intake directories, and gives what moves them there.
func (l *lab) stage(n, keys int) (deliver func() error, err error) {
	type move struct{ from, to string }
	var moves []move
	for range n {
		l.seq++
		data, err := key.Random(rand.Reader, keys*key.MasterSize+keyfile.Trailer)
		if err != nil {
			return nil, err
		}
		for i, p := range l.pairs {
			stage := filepath.Join(l.dir, fmt.Sprintf("stage-%d", i))
			err := os.MkdirAll(stage, 0o700)
			var path string
			if err == nil {
				path, err = keyfile.WriteAtomic(stage, &keyfile.File{Data: data, Header: keyfile.Header{
					Pair: p.ID, QKD: p.QKDID, PeerQKD: p.PeerQKDID, Role: p.Role, Seq: l.seq,
					Created: time.Now().UTC().Truncate(time.Second), QBER: 0.015, HashAlgorithm: keyfile.SHA256,
				}})
			}
			if err != nil {
				data.Wipe()
				return nil, err
			}
			moves = append(moves, move{path, filepath.Join(p.Intake, filepath.Base(path))})
		}
		data.Wipe()
	}
	return func() error {
		for _, m := range moves {
			if err := os.Rename(m.from, m.to); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// topUp feeds both ends, by files of perFile keys, until node a has so many keys of
// its own to supply: half of those delivered.
func (l *lab) topUp(ctx context.Context, keys, perFile int) error {
	p, err := l.pool(ctx, 0)
	if err != nil {
		return err
	}
	for have := p.OwnActive + p.Leased; have < keys; have += perFile / 2 {
		deliver, err := l.stage(1, perFile)
		if err != nil {
			return err
		}
		if err := deliver(); err != nil {
			return err
		}
	}
	return await(ctx, "keys at node a", func() error {
		p, err := l.pool(ctx, 0)
		if err == nil && (!p.Synced || p.Leased == 0 || p.Received > 0 || p.OwnActive+p.Leased < keys) {
			err = fmt.Errorf("pool %+v", p)
		}
		return err
	})
}

// sae gives the certificate files of the SAE at a node.
func (l *lab) sae(node int) pki.Files {
	name := string("ab"[node])
	p := filepath.Join(l.dir, name, "pki")
	return pki.Files{CA: p + "/sae-ca.crt", Cert: p + "/saes/" + name + "-te.crt", Key: p + "/saes/" + name + "-te.key"}
}

// url is the node's Type-2 interface.
func (l *lab) url(node int) string { return "https://" + l.ip[node] + ":8442" }

// cpu is the processor time that this process and the lab's have used.
func (l *lab) cpu() (time.Duration, error) {
	pids := []int{os.Getpid()}
	for _, p := range l.procs {
		pids = append(pids, p.cmd.Process.Pid)
	}
	var sum int64
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		if len(f) < 13 {
			return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
		}
		for _, v := range f[11:13] { // utime and stime, proc(5)
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return time.Duration(sum) * (time.Second / 100), nil // USER_HZ is 100 everywhere Go runs
}

// await polls until ok, for bound.
func await(ctx context.Context, what string, ok func() error) error {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	for {
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %v: %w", what, bound, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
