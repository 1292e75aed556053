package ike

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/q-ipsec/q-ipsec/sad"
)

// fakeGuard is whole until the test says otherwise.
type fakeGuard struct {
	mu    sync.Mutex
	state sad.GuardState
	err   error
	once  bool // whole after the next Keep
}

func (g *fakeGuard) Keep(context.Context) (sad.GuardState, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	state, err := g.state, g.err
	if g.once {
		g.state, g.once = sad.GuardWhole, false
	}
	return state, err
}

func (g *fakeGuard) set(s sad.GuardState, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.state, g.err, g.once = s, err, s == sad.GuardMended
}

// The guard is looked after, with a charon and without; each change is one event, and
// explain has a line for it.
func TestManagerGuard(t *testing.T) {
	g := &fakeGuard{state: sad.GuardWhole}
	s := newSite(t, nil)
	s.Manager.o.Guard = g
	explained := func(want string) func() bool {
		return func() bool {
			text, err := s.Explain("link")
			return err == nil && strings.Contains(text, "  guard: "+want)
		}
	}
	if !explained("put in place at the start, not looked at since.")() {
		t.Error("not explained before the first look")
	}
	s.run()
	eventually(t, "in place", explained("in place at "))
	steps := []struct {
		state  sad.GuardState
		err    error
		want   string // of explain
		event  Severity
		text   string // of the event
		events int    // so far
	}{
		{sad.GuardMended, nil, "in place at ", Alarm, "not in place any more", 1},
		{sad.GuardRemoved, nil, "removed by the operator", Alarm, "the operator has removed", 2},
		{sad.GuardWhole, nil, "in place at ", Run, "is in place", 3},
		{sad.GuardMended, errors.New("another policy"), "not whole at ", Alarm, "not to be completed: another policy", 4},
		{sad.GuardWhole, nil, "in place at ", Run, "is in place", 5},
	}
	for i, step := range steps {
		if i == 3 { // it does not need a charon
			s.charon.Stop()
		}
		g.set(step.state, step.err)
		eventually(t, step.text, func() bool { return s.events.count(EventGuard) >= step.events })
		eventually(t, step.want, explained(step.want))
		if e := s.events.last(EventGuard); e.Severity != step.event || !strings.Contains(e.Text, step.text) || s.events.count(EventGuard) != step.events {
			t.Errorf("step %d: %+v, %d events", i, e, s.events.count(EventGuard))
		}
	}
	if !explained("in place at")() || !strings.Contains(s.Manager.guardText(), "it was lost and put back") {
		t.Error("the loss is forgotten")
	}
}

// Without a guard explain says what that means.
func TestManagerWithoutGuard(t *testing.T) {
	s := newSite(t, nil)
	if text, err := s.Explain("link"); err != nil || !strings.Contains(text, "guard: off by the configuration") {
		t.Errorf("%s, %v", text, err)
	}
}
