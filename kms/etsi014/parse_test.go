package etsi014

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// tree reads any JSON by the cursor the way encoding/json reads it into an any,
// but for numbers, which it skips.
func tree(c *cursor) (any, error) {
	switch c.next() {
	case '{':
		m := map[string]any{}
		err := c.object(func(name []byte) error {
			k := string(name)
			v, err := tree(c)
			m[k] = v
			return err
		})
		return m, err
	case '[':
		l := []any{}
		err := c.array(func() error {
			v, err := tree(c)
			l = append(l, v)
			return err
		})
		return l, err
	case '"':
		s, err := c.str()
		return string(s), err
	}
	c.skip()
	return nil, nil
}

func withoutNumbers(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = withoutNumbers(v[k])
		}
		return v
	case []any:
		for i := range v {
			v[i] = withoutNumbers(v[i])
		}
		return v
	case string:
		return v
	}
	return nil
}

// The cursor reads what encoding/json reads, and skips as far as it reads.
func FuzzCursor(f *testing.F) {
	for _, s := range []string{
		`{}`, `[]`, ` { "a" : [ 1 , -2.5e3 , true , null , "x" ] , "b":{"c":[[],{}]}} `, `"\u0041\ud83d\ude00\ud800\"\\\/\b\f\n\r\t"`, `"\ud800\u0041"`,
		`"\udc00"`, `7`, `"ÿ"`, `[[[[]]]]`, `{"a":1,"a":2}`, `"\uD83D\uDE00"`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4096 {
			return
		}
		var want any
		err := json.Unmarshal(b, &want)
		c, cErr := newCursor(bytes.Clone(b))
		if cErr != nil {
			if err == nil && bytes.Equal(b, []byte(strings.ToValidUTF8(string(b), "\ufffd"))) {
				t.Fatalf("refused: %q", b)
			}
			return
		}
		if err != nil {
			return // valid, but for instance a number too large for a float64
		}
		got, err := tree(c)
		if err != nil {
			t.Fatal(err)
		}
		if want = withoutNumbers(want); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %#v, want %#v", b, got, want)
		}
		end := c.i
		c, _ = newCursor(bytes.Clone(b))
		if c.skip(); c.i != end {
			t.Errorf("%q: skip ends at %d, reading at %d", b, c.i, end)
		}
	})
}

func TestInteger(t *testing.T) {
	for s, want := range map[string]int{"0": 0, "7": 7, " 128 ": 128, "999999999999999999": 999999999999999999} {
		c, err := newCursor([]byte(s))
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.integer(); err != nil || n != want {
			t.Errorf("%q: %d, %v", s, n, err)
		}
	}
	for _, s := range []string{"-1", "1.0", "1e1", "1E1", "0.5", "1000000000000000000", `"1"`, "null", "true", "[1]", "-0"} {
		c, err := newCursor([]byte(s))
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.integer(); err == nil {
			t.Errorf("%q is read as %d", s, n)
		}
	}
}

// mustRefuse fails unless every error for the SAE is a *key.BadRequest that has
// something to say and can be sent.
func mustRefuse(t *testing.T, err error) {
	t.Helper()
	b, ok := err.(*key.BadRequest) //nolint:errorlint // must be bare
	if !ok || b.Message == "" || len(b.Message) > 1000 {
		t.Fatalf("error is %#v", err)
	}
}

// What the strict parsers take, encoding/json (which is less strict) takes in
// the same sense.
func FuzzRequestBody(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `{"number":2,"size":256}`, `{"Number":2}`, `{"number":1,"number":2}`, `{"additional_slave_SAE_IDs":[],"extension_mandatory":[],"extension_optional":[{"a":1}]}`,
		`{"extension_mandatory":[{"x":1}]}`, `{"key_IDs":[{"key_ID":"11111111-1111-4111-8111-111111111111","key_ID_extension":{}}],"size":8}`,
		`{"key_IDs":["x"]}`, `{"reports":[{"key_ID":"11111111-1111-4111-8111-111111111111","usage":"used","bytes":1}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseKeyRequest(bytes.Clone(b)); err != nil {
			mustRefuse(t, err)
		} else if len(bytes.TrimSpace(b)) > 0 {
			want := struct {
				Number int               `json:"number"`
				Size   int               `json:"size"`
				More   []json.RawMessage `json:"additional_slave_SAE_IDs"`
				Must   []json.RawMessage `json:"extension_mandatory"`
			}{Number: 1}
			if err := json.Unmarshal(b, &want); err != nil || want.Number != r.number || want.Size != r.size || len(want.More)+len(want.Must) > 0 {
				t.Errorf("%q: %+v, encoding/json says %+v, %v", b, r, want, err)
			}
		}
		if r, err := parseKeyIDs(bytes.Clone(b)); err != nil {
			mustRefuse(t, err)
		} else {
			var want struct {
				IDs []struct {
					ID key.ID `json:"key_ID"`
				} `json:"key_IDs"`
				Size int `json:"size"`
			}
			if err := json.Unmarshal(b, &want); err != nil || len(want.IDs) != len(r.ids) || want.Size != r.size {
				t.Fatalf("%q: %+v, encoding/json says %+v, %v", b, r, want, err)
			}
			for i := range r.ids {
				if r.ids[i] != want.IDs[i].ID || r.ids[i].IsZero() {
					t.Errorf("%q: id %d", b, i)
				}
			}
		}
		if reports, err := parseUsage(bytes.Clone(b)); err != nil {
			mustRefuse(t, err)
		} else {
			for _, r := range reports {
				if r.ID.IsZero() || !r.Usage.Valid() {
					t.Errorf("%q: %+v", b, r)
				}
			}
		}
	})
}

func FuzzRequestQuery(f *testing.F) {
	for _, s := range []string{"", "number=1&size=256", "number=1&number=2", "%6eumber=3", "key_ID=11111111-1111-4111-8111-111111111111", "a;b", "%", "size=00", "x=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if r, err := queryKeyRequest(raw); err != nil {
			mustRefuse(t, err)
		} else if r.number < 0 || r.size < 0 {
			t.Errorf("%q: %+v", raw, r)
		}
		if r, err := queryKeyIDs(raw); err != nil {
			mustRefuse(t, err)
		} else if len(r.ids) != 1 || r.ids[0].IsZero() {
			t.Errorf("%q: %+v", raw, r)
		}
	})
}

// What the client takes for keys, encoding/json takes for the same keys, and a
// container written from them is read again.
func FuzzResponse(f *testing.F) {
	k := `{"key_ID":"11111111-1111-4111-8111-111111111111","key":"AAECAwQFBgcICQoLDA0ODw=="}`
	for _, s := range []string{
		``, `{}`, `{"keys":[]}`, `{"keys":[` + k + `]}`, `{"keys":[` + k + `,` + k + `]}`, `{"Keys":[{"KEY":"\/w","key_id":"11111111-1111-4111-8111-111111111111"}]}`,
		`{"keys":[{"key":"=","key_ID":"11111111-1111-4111-8111-111111111111"}]}`, `{"message":"x","details":[{}]}`, `{"key_size":256,"source_KME_ID":"x"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = errorMessage(bytes.Clone(b))
		if _, err := parseStatus(bytes.Clone(b)); err == nil && !json.Valid(b) {
			t.Errorf("%q is taken for a status", b)
		}
		keys, err := parseContainer(bytes.Clone(b), 0)
		defer key.WipeAll(keys)
		if err != nil {
			if keys != nil {
				t.Error("keys beside an error")
			}
			return
		}
		again, err := parseContainer(container(keys), 0)
		defer key.WipeAll(again)
		if err != nil || len(again) != len(keys) {
			t.Fatalf("%q: its keys written and read again: %v", b, err)
		}
		for i := range keys {
			if keys[i].ID != again[i].ID || !keys[i].Material.Equal(again[i].Material) {
				t.Errorf("%q: key %d changes", b, i)
			}
		}
		if len(keys) == 1 {
			text := base64.RawStdEncoding.EncodeToString(keys[0].Material.Bytes())
			var any1 any
			if err := json.Unmarshal(b, &any1); err == nil && !mentions(any1, text) {
				t.Errorf("%q: the key is not in the answer", b)
			}
		}
	})
}

func mentions(v any, text string) bool {
	switch v := v.(type) {
	case map[string]any:
		for _, e := range v {
			if mentions(e, text) {
				return true
			}
		}
	case []any:
		for _, e := range v {
			if mentions(e, text) {
				return true
			}
		}
	case string:
		v = strings.NewReplacer("\r", "", "\n", "").Replace(v)
		return strings.TrimRight(v, "=") == text
	}
	return false
}

// The buffer with the keys is made once, so no smaller copy stays behind.
func TestContainerNeverGrows(t *testing.T) {
	for _, n := range []int{1, 2, 128} {
		for _, size := range []int{8, 9, 10, 32, 512} {
			keys := make([]key.SupplyKey, n)
			for i := range keys {
				m, err := key.New(size)
				if err != nil {
					t.Fatal(err)
				}
				defer m.Wipe()
				keys[i] = key.SupplyKey{ID: key.ID{byte(i + 1)}, Material: m}
			}
			b := container(keys)
			if allocs := testing.AllocsPerRun(1, func() { b = container(keys) }); allocs > float64(1+2*n) {
				t.Errorf("%d keys of %d bytes: %v allocations", n, size, allocs)
			}
			if spare := cap(b) - len(b); spare < 0 || spare > 64 {
				t.Errorf("%d keys of %d bytes: %d bytes in a buffer of %d", n, size, len(b), cap(b))
			}
		}
	}
}
