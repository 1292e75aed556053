package ike

import "log/slog"

// Severity orders events by what an operator must do about them.
type Severity uint8

// The severities. An Alarm needs someone to act, a Fault is a single failure
// that was dealt with, Run is normal operation.
const (
	Run Severity = iota + 1
	Fault
	Alarm
)

// String is the lower-case name.
func (s Severity) String() string {
	switch s {
	case Run:
		return "run"
	case Fault:
		return "fault"
	case Alarm:
		return "alarm"
	}
	return "unknown"
}

// Codes of the events of this package; append only.
const (
	EventFallback    = "ipsec-fallback"     // optional connection runs without a quantum key
	EventRefused     = "ipsec-refused"      // a CHILD_SA was refused
	EventPlugin      = "ipsec-plugin"       // plugin missing or of another version
	EventCharon      = "ipsec-charon"       // charon unreachable or gone
	EventForeignSA   = "ipsec-foreign-sa"   // CHILD_SA of a required connection that is not ours
	EventUp          = "ipsec-up"           // connection came up
	EventDown        = "ipsec-down"         // connection went down
	EventMissingSA   = "ipsec-missing-sa"   // charon has an SA that the SAD has not
	EventLoadFailed  = "ipsec-load-failed"  // connection could not be loaded
	EventKeyUnusable = "ipsec-key-unusable" // a key was supplied that the policy does not allow
	EventIgnored     = "ipsec-ignored"      // an IKE_SA_INIT answer without Q-IPsec was ignored
)

// Event is what happened, for alarms and the audit trail. Text names no secret.
type Event struct {
	Severity   Severity
	Code       string
	Connection string // empty: concerns all
	Text       string
}

// eventSink takes events. It must not block.
type eventSink interface {
	Event(e Event)
}

// report logs e in one line and hands it to the sink.
func report(log *slog.Logger, sink eventSink, e Event) {
	write := log.Info
	if e.Severity != Run {
		write = log.Warn
	}
	write(e.Text, "event", e.Code, "severity", e.Severity.String(), "connection", e.Connection)
	if sink != nil {
		sink.Event(e)
	}
}
