package ike

import (
	"context"
	"fmt"
	"time"

	"github.com/q-ipsec/q-ipsec/sad"
)

// guard is what the Manager needs of the guard: it puts back what is missing of it.
type guard interface {
	Keep(ctx context.Context) (sad.GuardState, error)
}

// guardNote is the guard as it was last found.
type guardNote struct {
	state  sad.GuardState // zero: not looked at yet
	at     time.Time
	err    string
	mended time.Time // when some of it was put back; zero: never since the start
}

// keepGuard looks after the guard until ctx ends: with each comparison, charon or no
// charon, and when a charon is met, whose start may have flushed the SPD.
func (m *Manager) keepGuard(ctx context.Context) {
	t := time.NewTicker(m.o.Reconcile)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-m.met:
		}
		m.lookAtGuard(ctx)
	}
}

func (m *Manager) lookAtGuard(ctx context.Context) {
	state, err := m.o.Guard.Keep(ctx)
	if ctx.Err() != nil {
		return
	}
	now := time.Now()
	m.mu.Lock()
	was := m.guarded
	m.guarded = guardNote{state: state, at: now, mended: was.mended}
	if err != nil {
		m.guarded.err = err.Error()
	} else if state == sad.GuardMended {
		m.guarded.mended = now
	}
	is := m.guarded
	m.mu.Unlock()
	for _, e := range was.changes(is) {
		report(m.log, m.o.Events, e)
	}
}

// changes are the events between two looks at the guard.
func (n guardNote) changes(now guardNote) []Event {
	alarm := func(text string) []Event { return []Event{{Severity: Alarm, Code: EventGuard, Text: text}} }
	switch {
	case now.err != "" && now.err == n.err:
	case now.err != "":
		return alarm("the guard is not whole, and not to be completed: " + now.err)
	case now.state == sad.GuardMended:
		return alarm("the guard was not in place any more (somebody has flushed the SPD?): what was missing is there again")
	case now.state == sad.GuardRemoved && n.state != sad.GuardRemoved:
		return alarm("the operator has removed the guard: without an SA the networks of required connections can be reached in clear")
	case now.state == sad.GuardWhole && (n.err != "" || n.state == sad.GuardRemoved):
		return []Event{{Severity: Run, Code: EventGuard, Text: "the guard is in place"}}
	}
	return nil
}

// guardText is the line of Explain; m.mu is not held.
func (m *Manager) guardText() string {
	const open = "while there is no SA, its networks can be reached in clear"
	if m.o.Guard == nil {
		return "off by the configuration (`guard = false`): " + open
	}
	m.mu.Lock()
	n := m.guarded
	m.mu.Unlock()
	at := n.at.Format(time.RFC3339)
	switch {
	case n.at.IsZero():
		return "put in place at the start, not looked at since"
	case n.err != "":
		return fmt.Sprintf("not whole at %s, and not to be completed: %s", at, n.err)
	case n.state == sad.GuardRemoved:
		return "removed by the operator: " + open + "; `qipsec guard install` puts it back"
	case !n.mended.IsZero():
		return fmt.Sprintf("in place at %s; it was lost and put back at %s", at, n.mended.Format(time.RFC3339))
	}
	return "in place at " + at
}
