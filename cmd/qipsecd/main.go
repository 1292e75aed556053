// Command qipsecd is the gateway daemon: the QKMS of one site (KMA and KSA)
// and the SAE that keys IPsec tunnels through charon. Its config says which of
// the two roles it plays.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/q-ipsec/q-ipsec/cmd/internal/version"
	"github.com/q-ipsec/q-ipsec/conf"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// stageGrace is how long one stage of an orderly stop may take. Two that hang
// still end within the unit's TimeoutStopSec; with more of them systemd kills
// the process, which costs what a crash does.
const stageGrace = 12 * time.Second

func main() {
	config := flag.String("config", "/etc/q-ipsec/qipsecd.toml", "config `file`")
	check := flag.Bool("check", false, "report every fault of the config and end")
	show := flag.Bool("version", false, "print the version and end")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "qipsecd: takes no arguments, got %q\n", flag.Args())
		os.Exit(exitUsage)
	}
	if *show {
		fmt.Println("qipsecd", version.String())
		return
	}
	n, err := conf.LoadNode(*config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "qipsecd:", err)
		os.Exit(exitFailed)
	}
	if *check {
		fmt.Println(*config, "is in order")
		return
	}
	level := new(slog.LevelVar)
	level.Set(n.Log.Level)
	log := newLog(n.Log, level)
	if err := run(n, level, log); err != nil {
		log.Error("qipsecd ends", "err", err)
		os.Exit(exitFailed)
	}
}

// run builds the node, serves until a signal or a fault, and stops in order:
// what began last ends first.
func run(n *conf.Node, level *slog.LevelVar, log *slog.Logger) (err error) {
	if err := harden(); err != nil {
		return err
	}
	ctx, leave, stop := ending()
	defer stop()
	// From here on, so that no signal is lost once the node says that it serves.
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, syscall.SIGUSR1)
	defer signal.Stop(usr1)
	var s stages
	defer func() { err = errors.Join(err, s.close()) }()
	if err := build(ctx, n, &s, leave, log); err != nil {
		return err
	}
	s.add("log level", func(ctx context.Context) error { return toggleDebug(ctx, usr1, level, n.Log.Level, log) })
	return s.run(ctx, stageGrace, log, func() {
		log.Info("qipsecd serves", "node", n.Name, "version", version.String(), "kms", n.KMS != nil, "ipsec", n.IPsec != nil)
		if err := notify("READY=1"); err != nil {
			log.Warn("systemd was not told that the node is ready", "err", err)
		}
	}, func() {
		_ = notify("STOPPING=1")
		log.Info("qipsecd stops")
	})
}

// ending gives a context that ends at a signal to stop. leave says whether the
// tunnels stay up: they do after SIGHUP, which precedes a new start, and not after
// SIGTERM or SIGINT; the latest signal counts.
func ending() (ctx context.Context, leave func() bool, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	c := make(chan os.Signal, 4)
	signal.Notify(c, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	var left atomic.Bool
	var reader sync.WaitGroup
	reader.Go(func() {
		for s := range c {
			left.Store(s == syscall.SIGHUP)
			cancel()
		}
	})
	return ctx, left.Load, func() {
		signal.Stop(c)
		close(c)
		reader.Wait()
		cancel()
	}
}

// build makes the parts in the order in which they start.
func build(ctx context.Context, n *conf.Node, s *stages, leave func() bool, log *slog.Logger) error {
	r := newRecorder(log)
	s.add("events", r.run)
	op := &operatorNode{name: n.Name, started: time.Now(), ring: r.ring}
	var k *kms
	if n.KMS != nil {
		var err error
		if k, err = buildKMS(ctx, n, s, r, log); err != nil {
			return err
		}
		op.keys = &operatorKeys{k}
	}
	if n.IPsec != nil {
		v, err := buildIPsec(ctx, n, s, k, r, leave, log)
		if err != nil {
			return err
		}
		op.tunnels = &operatorTunnels{ipsec: v, kms: k, ring: r.ring}
	}
	return buildOperator(n, s, op, log)
}
