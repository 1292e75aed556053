package keyfile

import (
	"errors"
	"fmt"
)

// Reason is the class of what is wrong with a QKD-Key file. Its text is in
// events and in the records of refused files and never changes.
type Reason string

// What the codec refuses.
const (
	TooLarge       Reason = "too large"              // above the size limit
	Syntax         Reason = "not one JSON object"    // truncated, not JSON, not UTF-8, more than one value
	UnknownVersion Reason = "unknown version"        // version is not 1
	UnknownField   Reason = "unknown field"          // a name that version 1 does not have
	DuplicateField Reason = "duplicate field"        // a name twice
	MissingField   Reason = "missing field"          //
	BadField       Reason = "malformed field"        // wrong type or range
	BadLength      Reason = "bad key_length"         // not a multiple of 32, not above 96, or not the size of key_data
	BadBase64      Reason = "bad Base64"             // key_data is not RFC 4648 section 4, strictly
	SHA1           Reason = "sha-1 is refused"       // collisions are practical; table 11 asks for a newer hash
	UnknownHash    Reason = "unknown hash_algorithm" // neither sha-256 nor sha3-256
	HashMismatch   Reason = "hash does not match"    // damaged on the way
	BadName        Reason = "bad file name"          // not PAIR-SEQ.qkd
	NameMismatch   Reason = "file name and content differ"
)

// Error says why a QKD-Key file is refused. It never holds key bytes, nor text
// of the file other than names of fields.
type Error struct {
	Reason Reason
	Field  string // the field at fault, if it is one
	Detail string // what was expected; may be empty
}

// Error is one line for a log.
func (e *Error) Error() string {
	s := "keyfile: " + string(e.Reason)
	if e.Field != "" {
		s += ": " + e.Field
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// ReasonOf gives the Reason in err's chain, if there is one.
func ReasonOf(err error) (Reason, bool) {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason, true
	}
	return "", false
}

func bad(r Reason, field, format string, args ...any) *Error {
	return &Error{Reason: r, Field: field, Detail: fmt.Sprintf(format, args...)}
}
