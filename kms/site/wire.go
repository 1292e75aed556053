package site

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// The paths.
const (
	Prefix = "/site/v1/" // of all of them

	pathGetKey       = Prefix + "getKey"
	pathGetKeyWithID = Prefix + "getKeyWithID"
	pathStatus       = Prefix + "status"
	pathUsage        = Prefix + "usage"
	pathLead         = Prefix + "lead"
)

const (
	maxRequest = 64 << 10 // bytes
	maxAnswer  = 256 << 10
	maxSAE     = 64 // characters
	maxKeys    = 128
)

// request is every call. The KSA judges what it asks for; here only its form counts.
type request struct {
	SAE      string   `json:"sae"` // who asks
	Peer     string   `json:"peer"`
	Number   int      `json:"number,omitempty"`
	SizeBits int      `json:"size_bits,omitempty"`
	KeyIDs   []key.ID `json:"key_ids,omitempty"`
	Reports  []report `json:"reports,omitempty"`
}

// report is key.UsageReport.
type report struct {
	KeyID key.ID    `json:"key_id"`
	Usage key.Usage `json:"usage"`
	Bytes uint64    `json:"bytes"`
}

func parseRequest(b []byte) (request, error) {
	var r request
	if err := decode(b, &r); err != nil {
		return request{}, err
	}
	if r.SAE == "" || r.Peer == "" || len(r.SAE) > maxSAE || len(r.Peer) > maxSAE {
		return request{}, fmt.Errorf("site: sae and peer need 1 to %d characters", maxSAE)
	}
	if len(r.KeyIDs) > maxKeys || len(r.Reports) > maxKeys {
		return request{}, fmt.Errorf("site: more than %d keys", maxKeys)
	}
	return r, nil
}

// decode takes one JSON value without unknown fields and nothing after it.
func decode(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("site: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("site: something follows the JSON value")
	}
	return nil
}

// leads is the answer of pathLead.
type leads struct {
	Leads bool      `json:"leads"`
	Since time.Time `json:"since"`
}

// code says which of the errors of a Supplier a refusal is.
type code string

const (
	standby      code = "standby"
	unauthorised code = "unauthorised" // the SAE is
	badRequest   code = "bad-request"
	unavailable  code = "unavailable"
	forbidden    code = "forbidden" // the caller is no member
	malformed    code = "malformed"
)

// refusal is every answer but 200.
type refusal struct {
	Code         code         `json:"code"`
	Message      string       `json:"message,omitempty"` // for the SAE if bad-request, else for the log
	Details      []key.Detail `json:"details,omitempty"`
	NotFound     bool         `json:"not_found,omitempty"`
	RetryAfterMS int64        `json:"retry_after_ms,omitempty"`
}

// ErrStandby is the error of a Supplier on a member that does not lead.
var ErrStandby = errors.New("site: this member stands by")

// refusalOf puts a Supplier's error on the wire.
func refusalOf(err error) (status int, r refusal) {
	var bad *key.BadRequest
	var no *key.Unavailable
	switch {
	case errors.Is(err, ErrStandby):
		return 503, refusal{Code: standby}
	case errors.Is(err, key.ErrUnauthorised):
		return 403, refusal{Code: unauthorised}
	case errors.As(err, &bad):
		return 400, refusal{Code: badRequest, Message: bad.Message, Details: bad.Details, NotFound: bad.NotFound}
	case errors.As(err, &no):
		return 503, refusal{Code: unavailable, Message: fmt.Sprint(no.Err), RetryAfterMS: no.RetryAfter.Milliseconds()}
	}
	return 503, refusal{Code: unavailable, Message: "a fault of the leader, see its log"}
}

// maxRetry bounds what a leader may say.
const maxRetry = time.Hour

// err takes a Supplier's error off the wire.
func (r refusal) err() error {
	switch r.Code {
	case standby:
		return ErrStandby
	case unauthorised:
		return key.ErrUnauthorised
	case badRequest:
		return &key.BadRequest{Message: r.Message, Details: r.Details, NotFound: r.NotFound}
	case unavailable:
		after := time.Duration(min(max(r.RetryAfterMS, 0), maxRetry.Milliseconds())) * time.Millisecond
		return &key.Unavailable{RetryAfter: after, Err: fmt.Errorf("site: the leader has none: %.200q", r.Message)}
	}
	return fmt.Errorf("site: the member refuses us: %.32q: %.200q", string(r.Code), r.Message)
}
