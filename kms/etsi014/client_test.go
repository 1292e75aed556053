package etsi014_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
)

func newClient(t testing.TB, cfg etsi014.ClientConfig) *etsi014.Client {
	t.Helper()
	c, err := etsi014.NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func equalKeys(t *testing.T, x, y []key.SupplyKey, n, bits int) {
	t.Helper()
	if len(x) != n || len(y) != n {
		t.Fatalf("%d and %d keys, want %d", len(x), len(y), n)
	}
	for i := range x {
		if x[i].ID != y[i].ID || !x[i].Material.Equal(y[i].Material) || x[i].Material.Len()*8 != bits {
			t.Errorf("key %d differs", i)
		}
	}
}

func TestClientWithOurServer(t *testing.T) {
	w := newWorld(t, 100, nil)
	for _, getOnly := range []bool{false, true} {
		t.Run(fmt.Sprintf("GETOnly=%v", getOnly), func(t *testing.T) {
			a := newClient(t, etsi014.ClientConfig{URL: w.url[nodeA], TLS: w.ca.clientTLS(t, "a1"), GETOnly: getOnly})
			b := newClient(t, etsi014.ClientConfig{URL: w.url[nodeB] + "/api/v1/keys/", TLS: w.ca.clientTLS(t, "b1"), GETOnly: getOnly})
			n := 3
			if getOnly {
				n = 1
			}
			x, err := a.GetKey(t.Context(), "b1", n, 512)
			defer key.WipeAll(x)
			if err != nil {
				t.Fatal(err)
			}
			want := make([]key.ID, 0, n)
			for i := range x { // another order than the KME's own
				want = append(want, x[n-1-i].ID)
			}
			y, err := b.GetKeyWithID(t.Context(), "a1", want, 512)
			defer key.WipeAll(y)
			if err != nil {
				t.Fatal(err)
			}
			for i, j := 0, len(y)-1; i < j; i, j = i+1, j-1 {
				y[i], y[j] = y[j], y[i]
			}
			equalKeys(t, x, y, n, 512)
			var badReq *key.BadRequest
			if _, err := b.GetKeyWithID(t.Context(), "a1", want, 0); !errors.As(err, &badReq) || !badReq.NotFound {
				t.Errorf("a second time: %v", err)
			}
			if _, err := a.GetKey(t.Context(), "b2", 1, 256); !errors.Is(err, key.ErrUnauthorised) {
				t.Errorf("not its pair: %v", err)
			}
			if _, err := a.GetKey(t.Context(), "b1", 1, 56); !errors.As(err, &badReq) || badReq.NotFound || badReq.Message != "size shall be between 64 and 4096" {
				t.Errorf("too small: %v", err)
			}
			s, err := a.Status(t.Context(), "b1")
			if err != nil || s.SourceKME != "a" || s.TargetKME != "b" || s.MasterSAE != "a1" || s.SlaveSAE != "b1" ||
				s.KeySize != 256 || s.StoredKeyCount == 0 || s.MaxKeyPerRequest != 128 || s.MaxKeySize != 4096 || s.MinKeySize != 64 || s.MaxKeyCount == 0 {
				t.Errorf("status %+v, %v", s, err)
			}
			if err := a.Usage(t.Context(), "b1", []key.UsageReport{{ID: x[0].ID, Usage: key.Used, Bytes: 7}}); err != nil {
				t.Error(err)
			}
		})
	}
	a := newClient(t, etsi014.ClientConfig{URL: w.url[nodeA], TLS: w.ca.clientTLS(t, "a1")})
	var unavailable *key.Unavailable
	_, err := a.GetKey(t.Context(), "b1", 128, 256)
	if !errors.As(err, &unavailable) || unavailable.RetryAfter != 2*time.Second {
		t.Errorf("no key left: %v", err)
	}
}

// A KME that reads a request and cuts the connection: did it give a key? The
// client must not find out by asking again.
func TestClientNeverSendsTwice(t *testing.T) {
	for _, getOnly := range []bool{false, true} {
		t.Run(fmt.Sprintf("GETOnly=%v", getOnly), func(t *testing.T) {
			authority := newCA(t)
			var calls, conns atomic.Int32
			url := rawKME(t, authority, func(c net.Conn) {
				conns.Add(1)
				r := bufio.NewReader(c)
				for {
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					if _, err := io.Copy(io.Discard, req.Body); err != nil {
						return
					}
					if !strings.HasSuffix(req.URL.Path, "/status") {
						calls.Add(1)
						return
					}
					if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"); err != nil {
						return
					}
				}
			})
			c := newClient(t, etsi014.ClientConfig{URL: url, TLS: authority.clientTLS(t, "a1"), GETOnly: getOnly})
			for i := range int32(5) {
				if _, err := c.Status(t.Context(), "b1"); err != nil { // so that the connection is one used before
					t.Fatal(err)
				}
				var unavailable *key.Unavailable
				if _, err := c.GetKey(t.Context(), "b1", 1, 256); !errors.As(err, &unavailable) {
					t.Fatalf("cut off: %v", err)
				}
				if calls.Load() != i+1 {
					t.Fatalf("%d requests for %d calls", calls.Load(), i+1)
				}
			}
			if want := map[bool]int32{false: 5, true: 10}[getOnly]; conns.Load() != want {
				t.Errorf("%d connections, want %d", conns.Load(), want)
			}
		})
	}
}

// rawKME speaks TLS and leaves HTTP to each connection's f.
func rawKME(t *testing.T, authority *ca, f func(net.Conn)) (url string) {
	t.Helper()
	cfg := authority.serverTLS(t)
	cfg.ClientAuth = tls.RequireAndVerifyClientCert
	ln, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				f(c)
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return "https://" + ln.Addr().String()
}

// scripted is a KME that gives every request the same answer.
func scripted(t *testing.T, authority *ca, maxVersion uint16, h http.HandlerFunc) (url string) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = authority.serverTLS(t)
	s.TLS.MaxVersion = maxVersion
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

const (
	id1  = "11111111-1111-4111-8111-111111111111"
	id2  = "22222222-2222-4222-8222-222222222222"
	b64  = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=" // 32 bytes
	b64b = "/wECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
)

func one(id, k string) string { return `{"key_ID":"` + id + `","key":"` + k + `"}` }

func TestClientReadsAnswers(t *testing.T) {
	authority := newCA(t)
	var body string
	url := scripted(t, authority, 0, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })
	c := newClient(t, etsi014.ClientConfig{URL: url, TLS: authority.clientTLS(t, "a1")})
	two := `{"keys":[` + one(id1, b64) + `,` + one(id2, b64b) + `]}`
	for name, a := range map[string]struct {
		body string
		ok   bool
	}{
		"as in the standard":      {two, true},
		"white space, extensions": {"{ \"x\":[{}], \"keys\" :\n[ {\"key_ID_extension\":{\"a\":[1]},\"key\":\"" + b64 + "\", \"key_ID\":\"" + id1 + "\"}, " + one(id2, b64b) + " ] ,\"key_container_extension\":{}}\n", true},
		"names in other case":     {strings.NewReplacer("keys", "Keys", "key_ID", "key_id").Replace(two), true},
		"escaped slash":           {strings.ReplaceAll(two, "/", `\/`), true},
		"escaped letter":          {strings.ReplaceAll(two, "AAEC", `\u0041AEC`), true},
		"no padding":              {strings.ReplaceAll(two, "=", ""), true},
		"one key too few":         {`{"keys":[` + one(id1, b64) + `]}`, false},
		"one key too many":        {`{"keys":[` + one(id1, b64) + `,` + one(id2, b64) + `,` + one("33333333-3333-4333-8333-333333333333", b64) + `]}`, false},
		"one id twice":            {`{"keys":[` + one(id1, b64) + `,` + one(id1, b64b) + `]}`, false},
		"two lists":               {`{"keys":[` + one(id1, b64) + `],"keys":[` + one(id2, b64b) + `]}`, false},
		"two ids in one entry":    {`{"keys":[` + one(id1, b64) + `,{"key_ID":"` + id1 + `","key_id":"` + id2 + `","key":"` + b64 + `"}]}`, false},
		"key too short":           {`{"keys":[` + one(id1, b64) + `,` + one(id2, "AAEC") + `]}`, false},
		"key too long":            {`{"keys":[` + one(id1, b64) + `,` + one(id2, "AAEC"+b64) + `]}`, false},
		"padding bits set":        {`{"keys":[` + one(id1, b64) + `,` + one(id2, strings.Replace(b64, "8=", "9=", 1)) + `]}`, false},
		"not Base64":              {`{"keys":[` + one(id1, b64) + `,` + one(id2, "*"+b64[1:]) + `]}`, false},
		"empty key":               {`{"keys":[` + one(id1, b64) + `,` + one(id2, "") + `]}`, false},
		"no id":                   {`{"keys":[` + one(id1, b64) + `,{"key":"` + b64 + `"}]}`, false},
		"nil id":                  {`{"keys":[` + one(id1, b64) + `,` + one("00000000-0000-0000-0000-000000000000", b64) + `]}`, false},
		"id not a UUID":           {`{"keys":[` + one(id1, b64) + `,` + one("7", b64) + `]}`, false},
		"no key":                  {`{"keys":[` + one(id1, b64) + `,{"key_ID":"` + id2 + `"}]}`, false},
		"two keys in one entry":   {`{"keys":[` + one(id1, b64) + `,{"key_ID":"` + id2 + `","key":"` + b64 + `","key":"` + b64b + `"}]}`, false},
		"key a number":            {`{"keys":[` + one(id1, b64) + `,{"key_ID":"` + id2 + `","key":7}]}`, false},
		"keys an object":          {`{"keys":{}}`, false},
		"no keys":                 {`{}`, false},
		"empty":                   {``, false},
		"cut off":                 {two[:len(two)-1], false},
		"HTML":                    {`<html>`, false},
		"endless":                 {`{"keys":[` + strings.Repeat(" ", 1<<20) + `]}`, false},
	} {
		body = a.body
		keys, err := c.GetKey(t.Context(), "b1", 2, 256)
		if (err == nil) != a.ok || (keys != nil) != a.ok {
			t.Errorf("%s: %v", name, err)
		}
		if a.ok && (keys[0].ID.String() != id1 || keys[1].Material.Bytes()[0] != 0xff || keys[1].Material.Bytes()[31] != 0x1f) {
			t.Errorf("%s: keys are not those sent", name)
		}
		if err != nil && strings.Contains(err.Error(), "AAEC") {
			t.Errorf("%s: the error shows a key", name)
		}
		key.WipeAll(keys)
	}
}

func TestClientChecksIDs(t *testing.T) {
	authority := newCA(t)
	url := scripted(t, authority, 0, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"keys":[`+one(id1, b64)+`,`+one(id2, b64b)+`]}`)
	})
	c := newClient(t, etsi014.ClientConfig{URL: url, TLS: authority.clientTLS(t, "a1")})
	first, _ := key.ParseID(id1)
	second, _ := key.ParseID(id2)
	for name, a := range map[string]struct {
		ids  []key.ID
		bits int
		ok   bool
	}{
		"in order":      {[]key.ID{first, second}, 256, true},
		"other order":   {[]key.ID{second, first}, 0, true},
		"another key":   {[]key.ID{first, {9}}, 0, false},
		"one of two":    {[]key.ID{second}, 0, false},
		"one id twice":  {[]key.ID{first, first}, 0, false},
		"size differs":  {[]key.ID{first, second}, 128, false},
		"no id":         {nil, 0, false},
		"size not by 8": {[]key.ID{first, second}, 255, false},
	} {
		keys, err := c.GetKeyWithID(t.Context(), "b1", a.ids, a.bits)
		if (err == nil) != a.ok {
			t.Errorf("%s: %v", name, err)
		}
		for i := range keys {
			if keys[i].ID != a.ids[i] {
				t.Errorf("%s: key %d is %s", name, i, keys[i].ID)
			}
		}
		key.WipeAll(keys)
	}
}

func TestClientReadsRefusals(t *testing.T) {
	authority := newCA(t)
	var status int
	var body, location string
	var calls atomic.Int32
	url := scripted(t, authority, 0, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.Header().Set("Retry-After", "7")
		if location != "" {
			w.Header().Set("Location", location)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
	c := newClient(t, etsi014.ClientConfig{URL: url, TLS: authority.clientTLS(t, "a1")})
	get := func() error {
		keys, err := c.GetKeyWithID(t.Context(), "b1", []key.ID{{1}}, 0)
		key.WipeAll(keys)
		return err
	}
	var badReq *key.BadRequest
	var unavailable *key.Unavailable
	status, body = 400, `{"message":"size shall be\n a multiple of 8","details":[{"x":"y"}]}`
	if err := get(); !errors.As(err, &badReq) || badReq.NotFound || badReq.Message != `size shall be\n a multiple of 8` {
		t.Errorf("400: %v", err)
	}
	status, body = 400, `{"message":"one or more keys specified are not found on KME"}`
	if err := get(); !errors.As(err, &badReq) || !badReq.NotFound {
		t.Errorf("400, not found: %v", err)
	}
	status, body = 404, `nonsense`
	if err := get(); !errors.As(err, &badReq) || !badReq.NotFound || badReq.Message != "(no message)" {
		t.Errorf("404: %v", err)
	}
	for _, status = range []int{401, 403} {
		if err := get(); !errors.Is(err, key.ErrUnauthorised) {
			t.Errorf("%d: %v", status, err)
		}
	}
	status = 503
	if err := get(); !errors.As(err, &unavailable) || unavailable.RetryAfter != 7*time.Second {
		t.Errorf("503: %v", err)
	}
	for _, status = range []int{201, 204, 405, 500, 502} {
		if err := get(); err == nil {
			t.Errorf("%d is taken for success", status)
		}
	}
	calls.Store(0)
	for _, status = range []int{301, 302, 307, 308} {
		location = url + "/elsewhere"
		if err := get(); err == nil {
			t.Errorf("%d is taken for success", status)
		}
	}
	if calls.Load() != 4 {
		t.Errorf("redirects were followed: %d requests", calls.Load())
	}
}

func TestClientRequests(t *testing.T) {
	authority := newCA(t)
	var got string
	url := scripted(t, authority, tls.VersionTLS12, func(w http.ResponseWriter, r *http.Request) { // a vendor's KME
		b, _ := io.ReadAll(r.Body)
		got = r.Method + " " + r.RequestURI + " " + string(b)
		_, _ = io.WriteString(w, `{"keys":[`+one(id1, b64)+`]}`)
	})
	first, _ := key.ParseID(id1)
	for _, c := range []struct {
		cfg      etsi014.ClientConfig
		enc, dec string
	}{
		{
			etsi014.ClientConfig{URL: url},
			`POST /api/v1/keys/b1/enc_keys {"number":1,"size":256}`, `POST /api/v1/keys/b1/dec_keys {"key_IDs":[{"key_ID":"` + id1 + `"}]}`,
		},
		{
			etsi014.ClientConfig{URL: url + "/", StringIDs: true},
			`POST /api/v1/keys/b1/enc_keys {"number":1,"size":256}`, `POST /api/v1/keys/b1/dec_keys {"key_IDs":["` + id1 + `"]}`,
		},
		{
			etsi014.ClientConfig{URL: url + "/kme7/keys", GETOnly: true},
			`GET /kme7/keys/b1/enc_keys?number=1&size=256 `, `GET /kme7/keys/b1/dec_keys?key_ID=` + id1 + ` `,
		},
	} {
		c.cfg.TLS = authority.clientTLS(t, "a1")
		client := newClient(t, c.cfg)
		keys, err := client.GetKey(t.Context(), "b1", 1, 256)
		if err != nil || got != c.enc {
			t.Errorf("%s, want %s (%v)", got, c.enc, err)
		}
		key.WipeAll(keys)
		keys, err = client.GetKeyWithID(t.Context(), "b1", []key.ID{first}, 256)
		if err != nil || got != c.dec {
			t.Errorf("%s, want %s (%v)", got, c.dec, err)
		}
		key.WipeAll(keys)
		if c.cfg.GETOnly {
			got = ""
			if _, err := client.GetKeyWithID(t.Context(), "b1", []key.ID{first, {2}}, 256); err == nil || got != "" {
				t.Error("two ids by GET")
			}
		}
		for _, bits := range []int{0, 7, 257, 1 << 20} {
			got = ""
			if _, err := client.GetKey(t.Context(), "b1", 1, bits); err == nil || got != "" {
				t.Errorf("size %d was sent", bits)
			}
		}
	}
}

func TestClientTLS(t *testing.T) {
	w := newWorld(t, 10, nil)
	other := newCA(t)
	for _, bad := range []etsi014.ClientConfig{
		{URL: "http://kme", TLS: &tls.Config{}},
		{URL: "kme", TLS: &tls.Config{}},
		{URL: "https://", TLS: &tls.Config{}},
		{URL: "https://kme?x=1", TLS: &tls.Config{}},
		{URL: "https://u:p@kme", TLS: &tls.Config{}},
		{URL: "https://kme"},
		{URL: "https://kme", TLS: &tls.Config{InsecureSkipVerify: true}},
		{URL: "https://kme\n", TLS: &tls.Config{}},
	} {
		if _, err := etsi014.NewClient(bad); err == nil {
			t.Errorf("%q: accepted", bad.URL)
		}
	}
	cfg := w.ca.clientTLS(t, "a1")
	cfg.RootCAs = other.pool
	var unavailable *key.Unavailable
	c := newClient(t, etsi014.ClientConfig{URL: w.url[nodeA], TLS: cfg})
	if _, err := c.GetKey(t.Context(), "b1", 1, 256); !errors.As(err, &unavailable) {
		t.Errorf("KME of another CA: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c = newClient(t, etsi014.ClientConfig{URL: w.url[nodeA], TLS: w.ca.clientTLS(t, "a1")})
	if _, err := c.GetKey(ctx, "b1", 1, 256); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if w.inv.left["a"] != 10 {
		t.Error("keys were consumed")
	}
}
