package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/conf"
)

// harden keeps this process's memory out of core dumps and of other processes'
// reach, makes files it creates ours alone, and allows as much locked memory as
// the limits let it.
func harden() error {
	unix.Umask(0o077)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("switch core dumps and ptrace off: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("limit core dumps to nothing: %w", err)
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return fmt.Errorf("read the limit of locked memory: %w", err)
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return fmt.Errorf("raise the limit of locked memory: %w", err)
	}
	return nil
}

// newLog logs to standard error.
func newLog(c conf.Log, level *slog.LevelVar) *slog.Logger {
	o := &slog.HandlerOptions{Level: level}
	if c.JSON {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}

// toggleDebug switches between the level of the config and debug at each
// signal of usr1, until ctx ends.
func toggleDebug(ctx context.Context, usr1 <-chan os.Signal, level *slog.LevelVar, normal slog.Level, log *slog.Logger) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-usr1:
			next := slog.LevelDebug
			if level.Level() == slog.LevelDebug {
				next = normal
			}
			level.Set(next)
			log.Info("log level changed", "level", next.String())
		}
	}
}

// notify tells systemd the state of the service (sd_notify(3)); without systemd
// it does nothing.
func notify(state string) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	_, err = c.Write([]byte(state))
	return errors.Join(err, c.Close())
}
