package etsi014_test

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
)

type container struct {
	Keys []struct {
		KeyID string `json:"key_ID"`
		Key   string `json:"key"`
	} `json:"keys"`
}

// mustKeys reads an answer that must be 200 with n keys of the size.
func mustKeys(t testing.TB, a answer, n, sizeBits int) container {
	t.Helper()
	var c container
	if a.status != 200 {
		t.Fatalf("answer %d %s", a.status, a.body)
	}
	if err := json.Unmarshal([]byte(a.body), &c); err != nil {
		t.Fatal(err)
	}
	if len(c.Keys) != n {
		t.Fatalf("%d keys, want %d", len(c.Keys), n)
	}
	for _, k := range c.Keys {
		b, err := base64.StdEncoding.Strict().DecodeString(k.Key)
		if err != nil || len(b)*8 != sizeBits {
			t.Errorf("key has %d bits, want %d (%v)", len(b)*8, sizeBits, err)
		}
	}
	return c
}

func idsBody(c container) string {
	var s []string
	for _, k := range c.Keys {
		s = append(s, fmt.Sprintf(`{"key_ID":%q}`, k.KeyID))
	}
	return `{"key_IDs":[` + strings.Join(s, ",") + `]}`
}

const keysPath = "/api/v1/keys/"

func TestSuccessPaths(t *testing.T) {
	w := newWorld(t, 500, nil)
	a1, b1 := w.as(t, "a1"), w.as(t, "b1")
	for _, c := range []struct {
		name, verb, query, body string
		n, size                 int
	}{
		{"GET, defaults", "GET", "", "", 1, 256},
		{"GET, number and size", "GET", "?number=3&size=128", "", 3, 128},
		{"GET, number", "GET", "?number=2", "", 2, 256},
		{"GET, escaped", "GET", "?n%75mber=2", "", 2, 256},
		{"POST, no body", "POST", "", "", 1, 256},
		{"POST, empty object", "POST", "", "{}", 1, 256},
		{"POST, number and size", "POST", "", `{"number":2,"size":512}`, 2, 512},
		{"POST, all fields", "POST", "", ` { "size" : 64 , "number" : 1 , "additional_slave_SAE_IDs" : [ ] , "extension_mandatory" : [ ] , "extension_optional" : [ { "x" : [ 1 , { "y" : null } ] } , { } ] } `, 1, 64},
		{"POST, the most", "POST", "", `{"number":128,"size":4096}`, 128, 4096},
		{"POST, escaped name", "POST", "", `{"n\u0075mber":2}`, 2, 256},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := do(t, a1, c.verb, w.url[nodeA]+keysPath+"b1/enc_keys"+c.query, c.body)
			enc := mustKeys(t, got, c.n, c.size)
			if h := got.header; h.Get("Cache-Control") != "no-store" || h.Get("Content-Type") != "application/json" {
				t.Errorf("header %v", h)
			}
			url := w.url[nodeB] + keysPath + "a1/dec_keys"
			dec := answer{}
			if c.n == 1 && c.verb == "GET" {
				dec = do(t, b1, "GET", url+"?key_ID="+enc.Keys[0].KeyID, "")
			} else {
				dec = do(t, b1, "POST", url, idsBody(enc))
			}
			if mustKeys(t, dec, c.n, c.size); dec.body != got.body {
				t.Error("the two sides differ")
			}
		})
	}
}

// The spelling of every name, as bytes: Go's decoder would take any case.
func TestExactOutput(t *testing.T) {
	w := newWorld(t, 100, nil)
	a1 := w.as(t, "a1")
	got := do(t, a1, "GET", w.url[nodeA]+keysPath+"b1/enc_keys?number=2", "")
	one := `\{"key_ID":"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}","key":"[A-Za-z0-9+/]{43}="\}`
	if !regexp.MustCompile(`^\{"keys":\[` + one + `,` + one + `\]\}$`).MatchString(got.body) {
		t.Error("the key container is not spelled as in the standard")
	}
	got = do(t, a1, "GET", w.url[nodeA]+keysPath+"b1/status", "")
	want := `{"source_KME_ID":"a","target_KME_ID":"b","master_SAE_ID":"a1","slave_SAE_ID":"b1","key_size":256,"stored_key_count":98,` +
		`"max_key_count":10000000,"max_key_per_request":128,"max_key_size":4096,"min_key_size":64,"max_SAE_ID_count":0}`
	if got.status != 200 || got.body != want {
		t.Errorf("status %d %s\nwant %s", got.status, got.body, want)
	}
	if strings.Contains(got.header.Get("Cache-Control"), "no-store") == false {
		t.Error("status may be cached")
	}
}

// refusal is a request of an SAE to node a and how it is answered.
type refusal struct {
	sae, verb, path, body string
	status                int
	want                  string // the body; anyText: an Error, whatever it says
}

const (
	enc      = keysPath + "b1/enc_keys"
	dec      = keysPath + "b1/dec_keys"
	idText   = "9f8b2d6e-1111-8abc-8def-0123456789ab"
	id       = `"` + idText + `"`
	size8    = `{"message":"size shall be a multiple of 8"}`
	notFound = `{"message":"one or more keys specified are not found on KME"}`
	sizes    = `{"message":"size shall be between 64 and 4096"}`
	numbers  = `{"message":"number shall be between 1 and 128"}`
	notJSON  = `{"message":"request body is not valid JSON"}`
	notUUID  = `{"message":"key_ID shall be a UUID"}`
	anyText  = "*"
)

func unknown(field string) string {
	return `{"message":"field \"` + field + `\" is unknown (names are case-sensitive)"}`
}

// refuses makes the requests, none of which may consume a key.
func refuses(t *testing.T, requests []refusal) {
	t.Helper()
	w := newWorld(t, 100, nil)
	for _, c := range requests {
		name := c.sae + " " + c.verb + " " + c.path + " " + c.body
		name = name[:min(len(name), 120)]
		got := do(t, w.as(t, c.sae), c.verb, w.url[nodeA]+c.path, c.body)
		if got.status != c.status {
			t.Errorf("%q: %d %s, want %d", name, got.status, got.body, c.status)
			continue
		}
		if c.want == anyText && c.verb != "HEAD" {
			var e map[string]any
			if err := json.Unmarshal([]byte(got.body), &e); err != nil || e["message"] == "" {
				t.Errorf("%q: no Error in %q", name, got.body)
			}
		} else if c.want != anyText && got.body != c.want {
			t.Errorf("%q: %s, want %s", name, got.body, c.want)
		}
		if got.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%q: may be cached", name)
		}
		if c.status == 405 && got.header.Get("Allow") == "" {
			t.Errorf("%q: no Allow", name)
		}
	}
	if w.inv.left["a"] != 100 {
		t.Errorf("refused requests consumed %d keys", 100-w.inv.left["a"])
	}
}

// Sizes and numbers out of range, or no plain integers.
func TestRefusedAmounts(t *testing.T) {
	refuses(t, []refusal{
		{"a1", "GET", enc + "?size=0", "", 400, `{"message":"size shall not be 0"}`},
		{"a1", "GET", enc + "?size=7", "", 400, size8},
		{"a1", "GET", enc + "?size=257", "", 400, size8},
		{"a1", "GET", enc + "?size=4104", "", 400, sizes},
		{"a1", "GET", enc + "?size=999999999", "", 400, size8},
		{"a1", "GET", enc + "?number=0", "", 400, numbers},
		{"a1", "GET", enc + "?number=129", "", 400, numbers},
		{"a1", "POST", enc, `{"size":0}`, 400, `{"message":"size shall not be 0"}`},
		{"a1", "POST", enc, `{"size":7}`, 400, size8},
		{"a1", "POST", enc, `{"size":257}`, 400, size8},
		{"a1", "POST", enc, `{"size":56}`, 400, sizes},
		{"a1", "POST", enc, `{"size":4104}`, 400, sizes},
		{"a1", "POST", enc, `{"number":0}`, 400, numbers},
		{"a1", "POST", enc, `{"number":129}`, 400, numbers},
		{"a1", "POST", enc, `{"number":-1}`, 400, anyText},
		{"a1", "POST", enc, `{"number":1.0}`, 400, anyText},
		{"a1", "POST", enc, `{"number":1e0}`, 400, anyText},
		{"a1", "POST", enc, `{"number":"1"}`, 400, anyText},
		{"a1", "POST", enc, `{"number":null}`, 400, `{"message":"number: a non-negative integer of at most 18 digits is needed"}`},
		{"a1", "POST", enc, `{"number":99999999999999999999}`, 400, anyText},
	})
}

// Queries, extensions, more slaves than one.
func TestRefusedQueries(t *testing.T) {
	refuses(t, []refusal{
		{"a1", "GET", enc + "?number=1&number=2", "", 400, `{"message":"query parameter number shall be there once; for more use POST"}`},
		{"a1", "GET", enc + "?Number=1", "", 400, anyText},
		{"a1", "GET", enc + "?number=", "", 400, anyText},
		{"a1", "GET", enc + "?number=%2B1", "", 400, anyText},
		{"a1", "GET", enc + "?number=01", "", 400, anyText},
		{"a1", "GET", enc + "?number=1;size=8", "", 400, `{"message":"query is malformed"}`},
		{"a1", "GET", enc + "?extension_optional=x", "", 400, anyText},
		{"a1", "GET", enc + "?foo", "", 400, anyText},
		{"a1", "GET", keysPath + "b1/status?x=1", "", 400, anyText},
		{"a1", "POST", enc + "?number=1", `{}`, 400, `{"message":"POST takes no query parameters"}`},
		{"a1", "GET", enc, `{"number":1}`, 400, `{"message":"GET takes no body"}`},
		{"a1", "POST", enc, `{"extension_mandatory":[{"abc":1},{"d\"e":{"f":[]}}]}`, 400, `{"message":"not all extension_mandatory parameters are supported","details":[{"extension_mandatory_unsupported":"abc"},{"extension_mandatory_unsupported":"d\"e"}]}`},
		{"a1", "POST", enc, `{"extension_mandatory":[{}]}`, 400, `{"message":"not all extension_mandatory parameters are supported"}`},
		{"a1", "POST", enc, `{"extension_mandatory":{"abc":1}}`, 400, anyText},
		{"a1", "POST", enc, `{"extension_optional":["abc"]}`, 400, anyText},
		{"a1", "POST", enc, `{"additional_slave_SAE_IDs":["b2"]}`, 400, `{"message":"additional_slave_SAE_IDs shall not name more than max_SAE_ID_count SAEs, which is 0"}`},
	})
}

// Bodies that are no key request.
func TestRefusedBodies(t *testing.T) {
	refuses(t, []refusal{
		{"a1", "POST", enc, `{"Number":1}`, 400, unknown("Number")},
		{"a1", "POST", enc, `{"SIZE":256}`, 400, unknown("SIZE")},
		{"a1", "POST", enc, `{"Additional_slave_SAE_IDs":[]}`, 400, unknown("Additional_slave_SAE_IDs")},
		{"a1", "POST", enc, `{"foo":1}`, 400, unknown("foo")},
		{"a1", "POST", enc, `{"number":1,"number":1}`, 400, `{"message":"field number is there twice"}`},
		{"a1", "POST", enc, `{"number":1,"n\u0075mber":1}`, 400, `{"message":"field number is there twice"}`},
		{"a1", "POST", enc, `[]`, 400, `{"message":"a JSON object is needed"}`},
		{"a1", "POST", enc, `null`, 400, anyText},
		{"a1", "POST", enc, `{`, 400, notJSON},
		{"a1", "POST", enc, `{}{}`, 400, notJSON},
		{"a1", "POST", enc, `{"number":1,}`, 400, notJSON},
		{"a1", "POST", enc, "{\"num\xffber\":1}", 400, notJSON},
		{"a1", "POST", enc, "\x00", 400, notJSON},
		{"a1", "POST", enc, strings.Repeat("[", 60000), 400, notJSON},
		{"a1", "POST", enc, strings.Repeat(" ", 64<<10) + "{}", 400, `{"message":"request body shall not exceed 65536 bytes"}`},
	})
}

// Key IDs that are none or name no key.
func TestRefusedKeyIDs(t *testing.T) {
	refuses(t, []refusal{
		{"a1", "POST", dec, `{"key_IDs":[{"key_ID":` + id + `}]}`, 400, notFound},
		{"a1", "GET", dec + "?key_ID=" + idText, "", 400, notFound},
		{"a1", "GET", dec, "", 400, notUUID},
		{"a1", "GET", dec + "?key_ID=abc", "", 400, notUUID},
		{"a1", "GET", dec + "?key_id=" + idText, "", 400, anyText},
		{"a1", "GET", dec + "?key_ID=" + idText + "&key_ID=" + idText, "", 400, anyText},
		{"a1", "POST", dec, ``, 400, notJSON},
		{"a1", "POST", dec, `{}`, 400, `{"message":"key_IDs shall name at least one key"}`},
		{"a1", "POST", dec, `{"key_IDs":[]}`, 400, `{"message":"key_IDs shall name at least one key"}`},
		{"a1", "POST", dec, `{"key_IDs":[` + id + `]}`, 400, anyText},
		{"a1", "POST", dec, `{"key_ids":[{"key_ID":` + id + `}]}`, 400, unknown("key_ids")},
		{"a1", "POST", dec, `{"key_IDs":[{"key_id":` + id + `}]}`, 400, unknown("key_id")},
		{"a1", "POST", dec, `{"key_IDs":[{"key_ID":` + id + `,"key_ID":` + id + `}]}`, 400, `{"message":"field key_ID is there twice"}`},
		{"a1", "POST", dec, `{"key_IDs":[{"key_ID":` + id + `},{"key_ID":` + id + `}]}`, 400, `{"message":"key_IDs shall not name a key twice"}`},
		{"a1", "POST", dec, `{"key_IDs":[{}]}`, 400, `{"message":"each of key_IDs shall have a key_ID"}`},
		{"a1", "POST", dec, `{"key_IDs":[{"key_ID":"{9f8b2d6e-1111-8abc-8def-0123456789ab}"}]}`, 400, notUUID},
		{"a1", "POST", dec, `{"key_IDs":[{"key_ID":7}]}`, 400, `{"message":"key_ID: a JSON string is needed"}`},
	})
}

// SAEs without the right to a key, and what is no call of the API.
func TestRefusedCallers(t *testing.T) {
	refuses(t, []refusal{
		{"a1", "GET", keysPath + "b2/enc_keys", "", 401, ""},
		{"a1", "GET", keysPath + "nobody/enc_keys", "", 401, ""},
		{"a1", "GET", keysPath + "nobody/status", "", 401, ""},
		{"stranger", "GET", enc, "", 401, ""},
		{"", "GET", enc, "", 401, ""},
		{"b1", "GET", keysPath + "a1/enc_keys", "", 401, ""}, // the other node's SAE
		{"a1", "GET", keysPath + "a2/enc_keys", "", 400, anyText},
		{"a1", "GET", keysPath + strings.Repeat("x", 65) + "/status", "", 400, anyText},
		{"a1", "GET", "/", "", 404, `{"message":"there is no such call"}`},
		{"a1", "GET", "/api/v1/keys/b1", "", 404, anyText},
		{"a1", "GET", "/api/v1/keys//enc_keys", "", 404, anyText},
		{"a1", "GET", enc + "/", "", 404, anyText},
		{"a1", "GET", enc + "/number/1/size/256", "", 404, anyText},
		{"a1", "GET", keysPath + "b1/Enc_keys", "", 404, anyText},
		{"a1", "GET", keysPath + "x%2Fb1/enc_keys", "", 401, ""},
		{"a1", "PUT", enc, `{}`, 405, `{"message":"the method is not allowed for this call"}`},
		{"a1", "DELETE", dec, "", 405, anyText},
		{"a1", "POST", keysPath + "b1/status", `{}`, 405, anyText},
		{"a1", "GET", keysPath + "b1/usage", "", 405, anyText},
		{"a1", "HEAD", enc, "", 405, anyText},
		{"a1", "OPTIONS", enc, "", 405, anyText},
	})
}

func TestContentType(t *testing.T) {
	w := newWorld(t, 100, nil)
	for ct, want := range map[string]int{
		"application/json": 200, "application/json; charset=utf-8": 200, "Application/JSON": 200, "": 200,
		"application/x-www-form-urlencoded": 400, "text/plain": 400, "application/jsonx": 400, ";": 400,
	} {
		req, err := http.NewRequestWithContext(t.Context(), "POST", w.url[nodeA]+keysPath+"b1/enc_keys", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", ct)
		if ct == "" {
			req.Header.Del("Content-Type")
		}
		if got := send(t, w.as(t, "a1"), req); got.status != want {
			t.Errorf("Content-Type %q: %d, want %d", ct, got.status, want)
		}
	}
}

func TestFetchOnceAndAllOrNothing(t *testing.T) {
	w := newWorld(t, 100, nil)
	a1, b1, b2 := w.as(t, "a1"), w.as(t, "b1"), w.as(t, "b2")
	enc := do(t, a1, "POST", w.url[nodeA]+keysPath+"b1/enc_keys", `{"number":3}`)
	c := mustKeys(t, enc, 3, 256)
	url := w.url[nodeB] + keysPath + "a1/dec_keys"
	body := idsBody(c)
	with := func(extra string) string { return strings.TrimSuffix(body, "]}") + "," + extra + "]}" }
	for name, bad := range map[string]string{
		"unknown":   with(`{"key_ID":"9f8b2d6e-1111-8abc-8def-0123456789ab"}`),
		"malformed": with(`{"key_ID":"x"}`),
		"duplicate": with(fmt.Sprintf(`{"key_ID":%q}`, strings.ToUpper(c.Keys[0].KeyID))),
		"size":      strings.TrimSuffix(body, "}") + `,"size":128}`,
	} {
		if got := do(t, b1, "POST", url, bad); got.status != 400 {
			t.Errorf("%s: %d", name, got.status)
		}
	}
	if got := do(t, b2, "POST", w.url[nodeB]+keysPath+"a2/dec_keys", body); got.status != 401 || got.body != "" {
		t.Errorf("another SAE: %d %s", got.status, got.body)
	}
	if got := do(t, a1, "POST", w.url[nodeA]+keysPath+"b1/dec_keys", body); got.status != 400 {
		t.Errorf("the master itself: %d %s", got.status, got.body)
	}
	if got := do(t, b1, "POST", url, strings.TrimSuffix(body, "}")+`,"size":256}`); got.body != enc.body {
		t.Errorf("the slave gets %d, not what the master got", got.status)
	}
	for range 2 {
		if got := do(t, b1, "POST", url, body); got.status != 400 || got.body != `{"message":"one or more keys specified are not found on KME"}` {
			t.Errorf("a second time: %d %s", got.status, got.body)
		}
	}
}

func TestNoKeyLeft(t *testing.T) {
	w := newWorld(t, 2, nil)
	a1 := w.as(t, "a1")
	url := w.url[nodeA] + keysPath + "b1/enc_keys"
	got := do(t, a1, "POST", url, `{"number":3}`)
	if got.status != 503 || got.header.Get("Retry-After") != "2" || got.body != `{"message":"no key can be supplied now"}` {
		t.Errorf("%d %v %s", got.status, got.header, got.body)
	}
	mustKeys(t, do(t, a1, "POST", url, `{"number":2}`), 2, 256)
	if got := do(t, a1, "GET", url, ""); got.status != 503 || got.header.Get("Retry-After") == "" {
		t.Errorf("%d %v", got.status, got.header)
	}
}

func TestNotFoundQuirk(t *testing.T) {
	w := newWorld(t, 10, nil)
	q := w.url[nodeB] + keysPath + "a1/dec_keys?key_ID="
	if got := do(t, w.as(t, "b404"), "GET", q+"9f8b2d6e-1111-8abc-8def-0123456789ab", ""); got.status != 404 || !strings.Contains(got.body, "not found on KME") {
		t.Errorf("SAE with the quirk: %d %s", got.status, got.body)
	}
	if got := do(t, w.as(t, "b404"), "GET", q+"x", ""); got.status != 400 {
		t.Errorf("another fault: %d", got.status)
	}
	if got := do(t, w.as(t, "b1"), "GET", q+"9f8b2d6e-1111-8abc-8def-0123456789ab", ""); got.status != 400 {
		t.Errorf("SAE without it: %d", got.status)
	}
}

func TestRetryWindow(t *testing.T) {
	w := newWorld(t, 100, func(o *etsi014.Options) { o.RetryWindow = time.Minute })
	a1, b1, again := w.as(t, "a1"), w.as(t, "b1"), w.as(t, "b1") // again: the same SAE, another certificate
	enc := do(t, a1, "POST", w.url[nodeA]+keysPath+"b1/enc_keys", `{"number":2}`)
	body := idsBody(mustKeys(t, enc, 2, 256))
	url := w.url[nodeB] + keysPath + "a1/dec_keys"
	var wg sync.WaitGroup
	for range 8 { // at once, too
		wg.Go(func() {
			if got := do(t, b1, "POST", url, body); got.body != enc.body {
				t.Errorf("%d %s", got.status, got.body)
			}
		})
	}
	wg.Wait()
	if got := do(t, again, "POST", url, body); got.status != 400 {
		t.Errorf("another certificate: %d", got.status)
	}
	part := body[:strings.Index(body, ",")] + "]}"
	if got := do(t, b1, "POST", url, part); got.status != 400 {
		t.Errorf("not the same request: %d", got.status)
	}
	if got := do(t, a1, "POST", w.url[nodeA]+keysPath+"b1/enc_keys", `{"number":2}`); got.body == enc.body {
		t.Error("enc_keys was replayed")
	}
	w.handlers[nodeB].Close()
	if got := do(t, b1, "POST", url, body); got.status != 400 {
		t.Errorf("after Close: %d", got.status)
	}
	enc = do(t, a1, "POST", w.url[nodeA]+keysPath+"b1/enc_keys", `{}`)
	if got := do(t, b1, "POST", url, idsBody(mustKeys(t, enc, 1, 256))); got.body != enc.body {
		t.Errorf("a call after Close: %d", got.status)
	}
}

func TestUsage(t *testing.T) {
	w := newWorld(t, 10, nil)
	url := w.url[nodeA] + keysPath + "b1/usage"
	id := "9f8b2d6e-1111-8abc-8def-0123456789ab"
	good := `{"reports":[{"key_ID":"` + id + `","usage":"used","bytes":18446744073709},{"key_ID":"` + id + `","usage":"retired"}]}`
	if got := do(t, w.as(t, "a1"), "POST", url, good); got.status != 200 || got.body != "{}" {
		t.Errorf("%d %s", got.status, got.body)
	}
	if len(w.usage) != 2 || w.usage[0].Bytes != 18446744073709 || w.usage[1].Usage != "retired" {
		t.Errorf("kept: %v", w.usage)
	}
	for _, bad := range []string{
		``, `{}`, `{"reports":[]}`, `{"reports":[{}]}`, `{"reports":[{"key_ID":"` + id + `"}]}`, `{"reports":[{"key_ID":"` + id + `","usage":"Used"}]}`,
		`{"reports":[{"key_ID":"` + id + `","usage":"used","bytes":-1}]}`, `{"reports":[{"key_ID":"x","usage":"used"}]}`, `{"Reports":[]}`,
	} {
		if got := do(t, w.as(t, "a1"), "POST", url, bad); got.status != 400 {
			t.Errorf("%s: %d", bad, got.status)
		}
	}
	if got := do(t, w.as(t, "a2"), "POST", url, good); got.status != 401 {
		t.Errorf("not its pair: %d", got.status)
	}
}

// Without a good certificate nothing reaches the handler.
func TestCertificates(t *testing.T) {
	w := newWorld(t, 10, nil)
	foreign := newCA(t).issue(t, "a1")
	url := w.url[nodeA] + keysPath + "b1/enc_keys"
	for name, cfg := range map[string]*tls.Config{
		"none":     {RootCAs: w.ca.pool},
		"wrong CA": {RootCAs: w.ca.pool, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &foreign, nil }}, // though the server names its CA
		"TLS 1.2":  {RootCAs: w.ca.pool, Certificates: []tls.Certificate{w.ca.issue(t, "a1")}, MaxVersion: tls.VersionTLS12},
	} {
		tr := &http.Transport{TLSClientConfig: cfg}
		resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get(url)
		if err == nil {
			_ = resp.Body.Close()
			t.Errorf("%s: answer %d", name, resp.StatusCode)
		}
		tr.CloseIdleConnections()
	}
	if w.inv.left["a"] != 10 {
		t.Error("a key was consumed")
	}
	rec := httptest.NewRecorder() // should TLS ever let one through
	w.handlers[nodeA].ServeHTTP(rec, httptest.NewRequest("GET", keysPath+"b1/enc_keys", nil))
	if rec.Code != 401 || rec.Body.Len() != 0 {
		t.Errorf("without TLS: %d %s", rec.Code, rec.Body)
	}
}
