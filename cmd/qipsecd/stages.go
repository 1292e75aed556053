package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
)

// stages are the running parts of the daemon in the order in which they start,
// and what is closed once all have ended. Each stage has a context of its own,
// so that an orderly stop ends them in the opposite order: tunnels before the
// servers they need, servers before the agents behind them, the store last.
type stages struct {
	list    []stage
	closers []func() error
}

type stage struct {
	name  string
	tasks []func(context.Context) error
}

// add appends a stage of tasks. A task runs until its context ends; it returns
// nil then, and an earlier return of any kind stops the daemon.
func (s *stages) add(name string, tasks ...func(context.Context) error) {
	s.list = append(s.list, stage{name, tasks})
}

// atEnd notes f to be called by close, last noted first.
func (s *stages) atEnd(f func() error) { s.closers = append(s.closers, f) }

// close calls what atEnd noted, once.
func (s *stages) close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// running is a stage that was started.
type running struct {
	stage
	cancel context.CancelFunc
	done   chan struct{} // closed once all tasks have returned
	err    error         // valid then
}

// run starts all stages, calls ready, and waits until ctx ends or a task fails.
// Then it calls stopping and ends the stages one by one, each within grace; one
// that takes longer is left behind with an error.
func (s *stages) run(ctx context.Context, grace time.Duration, log *slog.Logger, ready, stopping func()) error {
	failed := make(chan struct{}, len(s.list))
	var all []*running
	for _, st := range s.list {
		all = append(all, st.start(context.WithoutCancel(ctx), failed))
	}
	ready()
	select {
	case <-ctx.Done():
	case <-failed:
	}
	stopping()
	var errs []error
	for i := len(all) - 1; i >= 0; i-- {
		r := all[i]
		r.cancel()
		t := time.NewTimer(grace)
		select {
		case <-r.done:
			if r.err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.name, r.err))
			}
			log.Debug("stopped", "part", r.name)
		case <-t.C:
			errs = append(errs, fmt.Errorf("%s did not stop within %v", r.name, grace))
		}
		t.Stop()
	}
	return errors.Join(errs...)
}

// start runs the stage's tasks; failed is told when they have ended, whether or
// not that was asked for.
func (st stage) start(ctx context.Context, failed chan<- struct{}) *running {
	ctx, cancel := context.WithCancel(ctx)
	r := &running{stage: st, cancel: cancel, done: make(chan struct{})}
	g, gctx := errgroup.WithContext(ctx)
	for _, task := range st.tasks {
		g.Go(func() error {
			err := task(gctx)
			if err == nil && gctx.Err() == nil {
				err = errors.New("ended without being asked to")
			}
			return err
		})
	}
	go func() {
		r.err = g.Wait()
		close(r.done)
		failed <- struct{}{} // has room for every stage
	}()
	return r
}
