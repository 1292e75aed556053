package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// The calls, as an SAE makes them.
const (
	getKey    = `{"number":1,"size":256}`
	getBatch  = `{"number":100,"size":256}`
	getWithID = `{"key_IDs":[{"key_ID":"%s"}]}`
	keyIDMark = `"key_ID":"`

	batchKeys = 100
	batchPath = "/batch" // of the bare server, for answers with so many keys
)

// answer is one with n keys of 256 bits, as the bare server gives it; a node's has
// the same length.
func answer(n int) []byte {
	k := fmt.Sprintf(`{"key_ID":"%s","key":"%s="}`, key.ID{15: 1}, strings.Repeat("A", 43))
	return []byte(`{"keys":[` + strings.Repeat(k+",", n-1) + k + `]}`)
}

// sizes are the lengths of answers by their number of keys.
var sizes = map[int]int{1: len(answer(1)), batchKeys: len(answer(batchKeys))}

// bare serves any POST on -listen with an answer as long as that of GetKey, below
// batchPath of that for batchKeys, over plain net/http and the TLS configuration of
// a node, until ctx ends.
func bare(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench bare", flag.ContinueOnError)
	listen := fs.String("listen", "", "`address:port`")
	var f pki.Files
	fs.StringVar(&f.CA, "ca", "", "CA `file` of the clients")
	fs.StringVar(&f.Cert, "cert", "", "certificate `file`")
	fs.StringVar(&f.Key, "key", "", "key `file`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	t, err := pki.Server(f, quiet())
	if err != nil {
		return err
	}
	t.NextProtos = []string{"http/1.1"}
	single, batch := answer(1), answer(batchKeys)
	srv := &http.Server{TLSConfig: t, ReadHeaderTimeout: bound, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		body := single
		if strings.HasSuffix(r.URL.Path, batchPath) {
			body = batch
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body) // the client sees what is missing
	})}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
