package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// trace records what happens in order.
type trace struct {
	mu sync.Mutex
	s  []string
}

func (tr *trace) add(s string) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.s = append(tr.s, s)
}

func (tr *trace) String() string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return strings.Join(tr.s, " ")
}

// task runs until it is stopped.
func (tr *trace) task(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		<-ctx.Done()
		tr.add(name)
		return nil
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestStagesStopInReverse(t *testing.T) {
	var tr trace
	var s stages
	for i := range 4 {
		s.add(fmt.Sprint(i), tr.task(fmt.Sprint("stop", i)))
		s.atEnd(func() error { tr.add(fmt.Sprint("close", i)); return nil })
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := errors.Join(s.run(ctx, time.Minute, quiet(), func() { tr.add("ready"); cancel() }, func() { tr.add("stopping") }), s.close(), s.close())
	if want := "ready stopping stop3 stop2 stop1 stop0 close3 close2 close1 close0"; err != nil || tr.String() != want {
		t.Errorf("%v: %s, want %s", err, &tr, want)
	}
}

func TestStagesStopWhenATaskFails(t *testing.T) {
	for name, fail := range map[string]error{"fault": errors.New("the disk is full"), "early end": nil} {
		var tr trace
		var s stages
		s.add("low", tr.task("low"))
		s.add("bad", tr.task("beside"), func(context.Context) error { return fail })
		s.add("high", tr.task("high"))
		err := s.run(t.Context(), time.Minute, quiet(), func() {}, func() {})
		want := "ended without being asked"
		if fail != nil {
			want = fail.Error()
		}
		if err == nil || !strings.Contains(err.Error(), "bad: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
		if got := tr.String(); !strings.Contains(got, "low") || !strings.Contains(got, "high") || !strings.Contains(got, "beside") {
			t.Errorf("%s: only %s stopped", name, got)
		}
	}
}

func TestStageThatHangsIsLeftBehind(t *testing.T) {
	var tr trace
	var s stages
	release := make(chan struct{})
	defer close(release)
	s.add("low", tr.task("low"))
	s.add("stuck", func(context.Context) error { <-release; return nil })
	ctx, cancel := context.WithCancel(t.Context())
	err := s.run(ctx, 50*time.Millisecond, quiet(), cancel, func() {})
	if err == nil || !strings.Contains(err.Error(), "stuck did not stop") || tr.String() != "low" {
		t.Errorf("%v, stopped %s", err, &tr)
	}
}
