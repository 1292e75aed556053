package etsi014_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Each row stands beside its bare reference: a Go handler behind the same mTLS
// with a body of the same size. Here the KSA draws on keys made in memory; the
// store's part comes on top where the daemon is measured.

func BenchmarkGetKeyKeepAlive(b *testing.B)  { benchGetKey(b, false) }
func BenchmarkBareKeepAlive(b *testing.B)    { benchBare(b, false) }
func BenchmarkGetKeyReconnect(b *testing.B)  { benchGetKey(b, true) }
func BenchmarkBareReconnect(b *testing.B)    { benchBare(b, true) }
func BenchmarkKeyOnBothSides(b *testing.B)   { benchBothSides(b) }
func BenchmarkBareTwoKeepAlive(b *testing.B) { benchBareTwo(b) }

const (
	benchKeys = 1 << 30
	request   = `{"number":1,"size":256}`
)

// bareBody is as long as the answer with one key of 256 bits.
var bareBody = []byte(`{"keys":[` + one(id1, b64) + `]}`)

func benchGetKey(b *testing.B, reconnect bool) {
	w := newWorld(b, benchKeys, nil)
	drive(b, w.ca, reconnect, func(c *http.Client) error {
		return post(c, w.url[nodeA]+keysPath+"b1/enc_keys", nil)
	})
}

func bareServer(b *testing.B, authority *ca) (url string) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(bareBody)))
		_, _ = w.Write(bareBody)
	})
	return serve(b, etsi014.ServerConfig{Handler: h, TLS: authority.serverTLS(b), Log: quiet})
}

func benchBare(b *testing.B, reconnect bool) {
	authority := newCA(b)
	url := bareServer(b, authority)
	drive(b, authority, reconnect, func(c *http.Client) error { return post(c, url, nil) })
}

func benchBothSides(b *testing.B) {
	w := newWorld(b, benchKeys, nil)
	slave := newClient(b, etsi014.ClientConfig{URL: w.url[nodeB], TLS: w.ca.clientTLS(b, "b1")})
	drive(b, w.ca, false, func(c *http.Client) error {
		var body bytes.Buffer
		if err := post(c, w.url[nodeA]+keysPath+"b1/enc_keys", &body); err != nil {
			return err
		}
		_, text, _ := strings.Cut(body.String(), `"key_ID":"`)
		id, err := key.ParseID(text[:36])
		if err != nil {
			return err
		}
		keys, err := slave.GetKeyWithID(b.Context(), "a1", []key.ID{id}, 256)
		key.WipeAll(keys)
		return err
	})
}

func benchBareTwo(b *testing.B) {
	authority := newCA(b)
	first, second := bareServer(b, authority), bareServer(b, authority)
	drive(b, authority, false, func(c *http.Client) error {
		if err := post(c, first, nil); err != nil {
			return err
		}
		return post(c, second, nil)
	})
}

func post(c *http.Client, url string, body *bytes.Buffer) error {
	resp, err := c.Post(url, "application/json", strings.NewReader(request))
	if err != nil {
		return err
	}
	var sink io.Writer = io.Discard
	if body != nil {
		sink = body
	}
	_, err = io.Copy(sink, resp.Body)
	_ = resp.Body.Close()
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("answer %s", resp.Status)
	}
	return err
}

// drive runs call from two clients per core, each with a connection of its own,
// and reports the median and the 99th percentile beside the rate.
func drive(b *testing.B, authority *ca, reconnect bool, call func(*http.Client) error) {
	var mu sync.Mutex
	var all []time.Duration
	clients := 2 * runtime.GOMAXPROCS(0)
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	for i := range clients {
		n := b.N / clients
		if i < b.N%clients {
			n++
		}
		tr := &http.Transport{TLSClientConfig: authority.clientTLS(b, "a1"), DisableKeepAlives: reconnect}
		wg.Go(func() {
			defer tr.CloseIdleConnections()
			took := make([]time.Duration, 0, n)
			c := &http.Client{Transport: tr, Timeout: 30 * time.Second}
			for range n {
				start := time.Now()
				if err := call(c); err != nil {
					b.Error(err)
					return
				}
				took = append(took, time.Since(start))
			}
			mu.Lock()
			all = append(all, took...)
			mu.Unlock()
		})
	}
	wg.Wait()
	b.StopTimer()
	if len(all) == 0 {
		return
	}
	slices.Sort(all)
	b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "calls/s")
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-µs")
}
