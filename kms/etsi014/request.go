package etsi014

import (
	"bytes"
	"fmt"
	"net/url"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// keyRequest is the standard's "Key request" data format, as far as we have it.
type keyRequest struct {
	number int // 1 if absent
	size   int // bits; 0 if absent
}

// keyIDs is the standard's "Key IDs" data format, with the size of table 11.
type keyIDs struct {
	ids  []key.ID
	size int // bits; 0 if absent
}

func bad(format string, args ...any) error {
	return &key.BadRequest{Message: fmt.Sprintf(format, args...)}
}

// short bounds what of a request is shown in an answer.
func short(b []byte) string {
	if len(b) > 64 {
		b = b[:64]
	}
	return fmt.Sprintf("%q", b)
}

// strictObject walks over an object whose fields are all of names, each at most
// once, and refuses everything else.
func strictObject(c *cursor, names []string, f func(name string) error) error {
	var seen uint
	err := c.object(func(b []byte) error {
		for i, n := range names {
			if n != string(b) {
				continue
			}
			if seen&(1<<i) != 0 {
				return bad("field %s is there twice", n)
			}
			seen |= 1 << i
			return named(n, f(n))
		}
		return bad("field %s is unknown (names are case-sensitive)", short(b))
	})
	if err == errObject { //nolint:errorlint // the cursor's own, never wrapped
		return bad("%v", err)
	}
	return err
}

// named says in which field a value of the wrong kind stands.
func named(name string, err error) error {
	if _, ok := err.(*key.BadRequest); ok || err == nil { //nolint:errorlint // never wrapped
		return err
	}
	return bad("%s: %v", name, err)
}

func parseBody(b []byte) (*cursor, error) {
	c, err := newCursor(b)
	if err != nil {
		return nil, bad("request %v", err)
	}
	return c, nil
}

// parseKeyRequest reads the body of enc_keys.
func parseKeyRequest(b []byte) (keyRequest, error) {
	r := keyRequest{number: 1}
	if len(bytes.TrimSpace(b)) == 0 {
		return r, nil
	}
	c, err := parseBody(b)
	if err != nil {
		return r, err
	}
	names := []string{"number", "size", "additional_slave_SAE_IDs", "extension_mandatory", "extension_optional"}
	var details []key.Detail
	mandatory := 0
	err = strictObject(c, names, func(name string) (err error) {
		switch name {
		case "number":
			r.number, err = c.integer()
		case "size":
			r.size, err = size(c.integer())
		case "additional_slave_SAE_IDs":
			err = c.array(func() error {
				return bad("additional_slave_SAE_IDs shall not name more than max_SAE_ID_count SAEs, which is 0")
			})
		case "extension_mandatory":
			err = c.array(func() error {
				mandatory++
				return c.object(func(name []byte) error {
					details = append(details, key.Detail{Name: "extension_mandatory_unsupported", Value: string(name)})
					c.skip()
					return nil
				})
			})
		case "extension_optional":
			err = c.array(func() error { return anyObject(c) })
		}
		return err
	})
	if err == nil && mandatory > 0 {
		err = &key.BadRequest{Message: "not all extension_mandatory parameters are supported", Details: details[:min(len(details), 16)]}
	}
	return r, err
}

func anyObject(c *cursor) error {
	return c.object(func([]byte) error { c.skip(); return nil })
}

// size refuses an explicit 0, which would else mean the default.
func size(n int, err error) (int, error) {
	if err == nil && n == 0 {
		return 0, bad("size shall not be 0")
	}
	return n, err
}

// parseKeyIDs reads the body of dec_keys.
func parseKeyIDs(b []byte) (keyIDs, error) {
	var r keyIDs
	c, err := parseBody(b)
	if err != nil {
		return r, err
	}
	err = strictObject(c, []string{"key_IDs", "key_IDs_extension", "size"}, func(name string) (err error) {
		switch name {
		case "key_IDs":
			err = c.array(func() error {
				id, err := parseKeyID(c)
				r.ids = append(r.ids, id)
				return err
			})
		case "key_IDs_extension":
			err = anyObject(c)
		case "size":
			r.size, err = size(c.integer())
		}
		return err
	})
	if err == nil && len(r.ids) == 0 {
		err = bad("key_IDs shall name at least one key")
	}
	return r, err
}

func parseKeyID(c *cursor) (id key.ID, err error) {
	err = strictObject(c, []string{"key_ID", "key_ID_extension"}, func(name string) error {
		if name == "key_ID_extension" {
			return anyObject(c)
		}
		s, err := c.str()
		if err != nil {
			return err
		}
		id, err = uuid(string(s))
		return err
	})
	if err == nil && id.IsZero() {
		err = bad("each of key_IDs shall have a key_ID")
	}
	return id, err
}

func uuid(s string) (key.ID, error) {
	id, err := key.ParseID(s)
	if err != nil || id.IsZero() {
		return key.ID{}, bad("key_ID shall be a UUID")
	}
	return id, nil
}

// query checks that q has only the parameters names, each once.
func query(raw string, names ...string) (url.Values, error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return nil, bad("query is malformed")
	}
next:
	for k, v := range q {
		for _, n := range names {
			if k == n && len(v) == 1 {
				continue next
			}
			if k == n {
				return nil, bad("query parameter %s shall be there once; for more use POST", n)
			}
		}
		return nil, bad("query parameter %s is unknown here (names are case-sensitive); extensions need POST", short([]byte(k)))
	}
	return q, nil
}

// decimal reads a query parameter: digits only, no leading zero.
func decimal(name, s string) (int, error) {
	if len(s) < 1 || len(s) > 9 || len(s) > 1 && s[0] == '0' {
		return 0, bad("%s: %v", name, errInt)
	}
	n := 0
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, bad("%s: %v", name, errInt)
		}
		n = n*10 + int(s[i]-'0')
	}
	return n, nil
}

// queryKeyRequest reads enc_keys by GET.
func queryKeyRequest(raw string) (keyRequest, error) {
	r := keyRequest{number: 1}
	q, err := query(raw, "number", "size")
	if err == nil && q.Has("number") {
		r.number, err = decimal("number", q.Get("number"))
	}
	if err == nil && q.Has("size") {
		r.size, err = size(decimal("size", q.Get("size")))
	}
	return r, err
}

// queryKeyIDs reads dec_keys by GET.
func queryKeyIDs(raw string) (keyIDs, error) {
	var r keyIDs
	q, err := query(raw, "key_ID", "size")
	if err == nil && q.Has("size") {
		r.size, err = size(decimal("size", q.Get("size")))
	}
	if err != nil {
		return r, err
	}
	id, err := uuid(q.Get("key_ID"))
	r.ids = []key.ID{id}
	return r, err
}

// parseUsage reads the body of usage: {"reports":[{"key_ID", "usage",
// "bytes"}]}, of which bytes may be left out.
func parseUsage(b []byte) ([]key.UsageReport, error) {
	c, err := parseBody(b)
	if err != nil {
		return nil, err
	}
	var reports []key.UsageReport
	err = strictObject(c, []string{"reports"}, func(string) error {
		return c.array(func() error {
			r, err := parseReport(c)
			reports = append(reports, r)
			return err
		})
	})
	if err == nil && len(reports) == 0 {
		err = bad("reports shall name at least one key")
	}
	return reports, err
}

func parseReport(c *cursor) (r key.UsageReport, err error) {
	err = strictObject(c, []string{"key_ID", "usage", "bytes"}, func(name string) error {
		if name == "bytes" {
			n, err := c.integer()
			r.Bytes = uint64(n)
			return err
		}
		s, err := c.str()
		if err != nil {
			return err
		}
		if name == "key_ID" {
			r.ID, err = uuid(string(s))
			return err
		}
		r.Usage = key.Usage(s)
		return nil
	})
	if err == nil && (r.ID.IsZero() || !r.Usage.Valid()) {
		err = bad("a report needs a key_ID and a usage, one of used, unused, failed, retired")
	}
	return r, err
}
