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

// Codes of the events of this package; append only. Each change is one event, when
// it begins, and where it lasts another one of severity Run when it is over.
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
	EventSupply      = "ipsec-supply"       // a pool affords its rekeyings no more, or again
	EventLoaded      = "ipsec-loaded"       // what kept a connection out of charon is over
	EventRekeyed     = "ipsec-rekeyed"      // a CHILD_SA was replaced
	EventMoved       = "ipsec-moved"        // an IKE_SA has other addresses or ports
	EventCommand     = "ipsec-command"      // the operator's command
	EventStalled     = "ipsec-stalled"      // nothing leads into a CHILD_SA that charon has
	EventGuard       = "ipsec-guard"        // the guard was lost, or removed by the operator
)

// actions are what is done about an event, by its code and severity.
var actions = map[string]map[Severity]string{
	EventFallback:    {Alarm: "rekeyed as soon as there is a quantum key", Run: "none needed"},
	EventRefused:     {Fault: "nothing was installed"},
	EventPlugin:      {Alarm: "taken out of charon with its SAs until the plugin is right"},
	EventCharon:      {Fault: "SAs stay as they are; tried again until charon answers", Run: "connections are loaded and SAs compared"},
	EventForeignSA:   {Alarm: "terminated"},
	EventUp:          {Run: "none needed"},
	EventDown:        {Fault: "children that start now are initiated again", Run: "stays down, as it was told to"},
	EventMissingSA:   {Alarm: "terminated"},
	EventLoadFailed:  {Alarm: "tried again every second"},
	EventKeyUnusable: {Alarm: "key wiped"},
	EventIgnored:     {Fault: "answer ignored; charon goes on waiting for another one"},
	EventSupply:      {Alarm: "rekeyings wait for the hard limit", Run: "rekeyings as the policy says and the pool affords"},
	EventLoaded:      {Run: "children that start now are initiated"},
	EventRekeyed:     {Run: "none needed"},
	EventMoved:       {Run: "SAs moved; rekeyed where that cost their sequence"},
	EventStalled:     {Alarm: "rekeyed, again and again until its policies are back", Run: "none needed"},
	EventGuard:       {Alarm: "put back, unless the operator has removed it", Run: "none needed"},
	EventCommand:     {Run: "done, or the command has failed with its cause"},
}

// Event is what happened, for alarms and the audit trail. Text names no secret.
type Event struct {
	Severity   Severity
	Code       string
	Connection string // empty: concerns all
	Text       string
	Action     string // what is done about it; set by report
}

// eventSink takes events. It must not block.
type eventSink interface {
	Event(e Event)
}

// report logs e in one line and hands it to the sink.
func report(log *slog.Logger, sink eventSink, e Event) {
	e.Action = actions[e.Code][e.Severity]
	write := log.Info
	if e.Severity != Run {
		write = log.Warn
	}
	write(e.Text, "event", e.Code, "severity", e.Severity.String(), "connection", e.Connection)
	if sink != nil {
		sink.Event(e)
	}
}
