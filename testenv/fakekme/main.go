// Command fakekme is a KME of another maker for the fault scenarios: its keys
// follow from a seed, so that two of them with one seed give equal keys for one
// Key-ID, and with two seeds different ones, which no real KMS would do. Files
// switch it to refuse every Key-ID, and to give the last one again.
package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha512"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

func main() {
	listen := flag.String("listen", "", "`address:port`")
	dir := flag.String("pki", "", "`directory` with sae-ca.crt, kme.crt and kme.key")
	seed := flag.String("seed", "", "`text` that the keys follow from")
	deny := flag.String("deny", "", "`file`: while it exists no Key-ID is known")
	again := flag.String("again", "", "`file`: while it exists GetKey gives the last Key-ID again")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *listen, *dir, &supplier{seed: *seed, deny: *deny, again: *again}); err != nil {
		fmt.Fprintln(os.Stderr, "fakekme:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, listen, dir string, s *supplier) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	tls, err := pki.Server(pki.Files{CA: dir + "/sae-ca.crt", Cert: dir + "/kme.crt", Key: dir + "/kme.key"}, log)
	if err != nil {
		return err
	}
	h, err := etsi014.NewHandler(etsi014.Options{Supplier: s, Identity: pki.SAEFromRequest, Log: log})
	if err != nil {
		return err
	}
	defer h.Close()
	srv, err := etsi014.NewServer(etsi014.ServerConfig{Handler: h, TLS: tls, Log: log})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	log.Info("fake KME serves", "listen", listen)
	return srv.Serve(ctx, l)
}

type supplier struct {
	seed, deny, again string

	mu   sync.Mutex
	last key.ID
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return file != "" && err == nil
}

func (s *supplier) keys(ids []key.ID, bits int) ([]key.SupplyKey, error) {
	if bits != 0 && bits != 256 {
		return nil, &key.BadRequest{Message: "only 256 bits"}
	}
	var out []key.SupplyKey
	for _, id := range ids {
		mac := hmac.New(sha512.New, []byte(s.seed))
		mac.Write(id[:])
		m, err := key.Take(mac.Sum(nil)[:32])
		if err != nil {
			key.WipeAll(out)
			return nil, err
		}
		out = append(out, key.SupplyKey{ID: id, Class: key.Direct, Material: m})
	}
	return out, nil
}

func (s *supplier) GetKey(_ context.Context, _, _ string, number, bits int) ([]key.SupplyKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if exists(s.again) && !s.last.IsZero() {
		return s.keys([]key.ID{s.last}, bits)
	}
	var ids []key.ID
	for range number {
		var id key.ID
		if _, err := rand.Read(id[:]); err != nil {
			return nil, err
		}
		id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80
		ids = append(ids, id)
		s.last = id
	}
	return s.keys(ids, bits)
}

func (s *supplier) GetKeyWithID(_ context.Context, _, _ string, ids []key.ID, bits int) ([]key.SupplyKey, error) {
	if exists(s.deny) {
		return nil, &key.BadRequest{Message: "one or more keys specified are not found on KME", NotFound: true}
	}
	return s.keys(ids, bits)
}

func (s *supplier) Status(_ context.Context, caller, peer string) (key.SupplyStatus, error) {
	return key.SupplyStatus{SourceKME: "fake", TargetKME: "fake", MasterSAE: caller, SlaveSAE: peer, KeySize: 256, StoredKeyCount: 1, MaxKeyCount: 1, MaxKeyPerRequest: 1, MaxKeySize: 256, MinKeySize: 256}, nil
}

func (s *supplier) Usage(context.Context, string, string, []key.UsageReport) error {
	return errors.New("no usage reports here")
}
