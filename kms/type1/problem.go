package type1

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
)

// Code is the class of a refusal; on the wire it is the end of the problem's
// type URI.
type Code string

// The refusals of Type-1.
const (
	Malformed         Code = "malformed"          // 400: not a message of this version
	Unauthenticated   Code = "unauthenticated"    // 401: the certificate names no node
	NotAuthorised     Code = "not-authorised"     // 403: the pool is not shared with this peer
	NotFound          Code = "not-found"          // 404: no such path
	NotSynced         Code = "not-synced"         // 409: other instances; sync first
	NotValidated      Code = "not-validated"      // 409: the lease covers blocks that are not active here yet; repeat after M102
	Conflict          Code = "conflict"           // 409: the lease does not go on where the last one ended; burn it
	AlgorithmMismatch Code = "algorithm-mismatch" // 409: the two ends are configured differently
	Internal          Code = "internal"           // 500: the receiver's own fault; repeat later
	Overloaded        Code = "overloaded"         // 503: repeat later
	Standby           Code = "standby"            // 503: this machine of the node does not have its inventory now; ask another one, or later
)

var statuses = map[Code]int{
	Malformed: 400, Unauthenticated: 401, NotAuthorised: 403, NotFound: 404, NotSynced: 409, NotValidated: 409,
	Conflict: 409, AlgorithmMismatch: 409, Internal: 500, Overloaded: 503, Standby: 503,
}

const typePrefix = "urn:q-ipsec:problem:"

// maxDetail bounds what a peer can put into our logs, in bytes.
const maxDetail = 256

// Problem is a refusal, as an error and as RFC 9457 has it on the wire.
type Problem struct {
	Code   Code
	Detail string // for the log of the other end; no secrets, no key bytes
}

// Error is one line for a log.
func (p *Problem) Error() string { return "type1: " + string(p.Code) + ": " + p.Detail }

// Is makes errors.Is(err, &Problem{Code: c}) ask for the Code alone.
func (p *Problem) Is(target error) bool {
	t, ok := target.(*Problem)
	return ok && t.Code == p.Code && t.Detail == ""
}

// CodeOf gives the Code of the Problem in err's chain, "" if there is none.
func CodeOf(err error) Code {
	var p *Problem
	if errors.As(err, &p) {
		return p.Code
	}
	return ""
}

// wireProblem is RFC 9457 section 3.1.
type wireProblem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
}

func writeProblem(w http.ResponseWriter, p *Problem) {
	status, ok := statuses[p.Code]
	if !ok {
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	// An error here is a peer that has gone; it will ask again.
	_ = json.NewEncoder(w).Encode(wireProblem{typePrefix + string(p.Code), strings.ReplaceAll(string(p.Code), "-", " "), status, p.Detail})
}

// readProblem makes the best of an answer that is no success: what is not a
// problem of ours becomes Internal with the status as its text.
func readProblem(status int, body []byte) *Problem {
	var w wireProblem
	if err := json.Unmarshal(body, &w); err == nil {
		c := Code(strings.TrimPrefix(w.Type, typePrefix))
		if want, ok := statuses[c]; ok && want == status {
			return &Problem{Code: c, Detail: clean(w.Detail)}
		}
	}
	return &Problem{Code: Internal, Detail: "the peer answered HTTP " + http.StatusText(status)}
}

// clean makes a peer's text fit for a log line.
func clean(s string) string {
	if len(s) > maxDetail {
		s = s[:maxDetail]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			return '?'
		}
		return r
	}, s)
}
