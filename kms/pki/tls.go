package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// sessions is how many servers a client remembers for TLS resumption.
const sessions = 64

// Server gives the TLS configuration of a server of one channel: TLS 1.3 only,
// X25519MLKEM768 first, every client shows a certificate that chains to the
// channel's CA. Who the client is, NodeFromRequest and SAEFromRequest say. A
// changed certificate or key file is taken up at the next full handshake; a
// changed trust file needs a restart.
func Server(f Files, log *slog.Logger) (*tls.Config, error) {
	pool, src, err := load(f, log)
	if err != nil {
		return nil, err
	}
	c := base(tls.VersionTLS13)
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.ClientCAs = pool
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return src.current(), nil }
	return c, nil
}

// NodeClient gives the TLS configuration for calls to the node named peer over
// Type-1. The server's certificate must chain to the channel's CA, be made out
// to the DNS name peer and carry the SAN URI of that node: being some node of
// the network is not enough.
func NodeClient(f Files, peer string, log *slog.Logger) (*tls.Config, error) {
	if err := CheckNode(peer); err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	c, err := client(f, tls.VersionTLS13, log)
	if err != nil {
		return nil, err
	}
	c.ServerName = peer
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return fmt.Errorf("pki: %w: the server showed no certificate", ErrNoIdentity)
		}
		name, err := Node(s.PeerCertificates[0])
		if err != nil {
			return err
		}
		if name != peer {
			return fmt.Errorf("pki: called node %q, but %q answered", peer, name)
		}
		return nil
	}
	return c, nil
}

// KMEClient gives the TLS configuration of an SAE that calls a KME over Type-2.
// The server's name is that of the URL. A vendor's KME may speak TLS 1.2 (ETSI
// GS QKD 014 section 5.1), which legacy allows; our own never does.
func KMEClient(f Files, legacy bool, log *slog.Logger) (*tls.Config, error) {
	version := uint16(tls.VersionTLS13)
	if legacy {
		version = tls.VersionTLS12
	}
	return client(f, version, log)
}

func client(f Files, version uint16, log *slog.Logger) (*tls.Config, error) {
	pool, src, err := load(f, log)
	if err != nil {
		return nil, err
	}
	c := base(version)
	c.RootCAs = pool
	c.ClientSessionCache = tls.NewLRUClientSessionCache(sessions)
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return src.current(), nil }
	return c, nil
}

func base(version uint16) *tls.Config {
	return &tls.Config{
		MinVersion:       version,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
	}
}

func load(f Files, log *slog.Logger) (*x509.CertPool, *source, error) {
	pool, err := Pool(f.CA)
	if err != nil {
		return nil, nil, err
	}
	src := &source{files: f, log: log}
	if src.cert, src.stamp, err = src.read(); err != nil {
		return nil, nil, err
	}
	return pool, src, nil
}

// source is a certificate that follows its files.
type source struct {
	files Files
	log   *slog.Logger

	mu    sync.Mutex
	cert  *tls.Certificate
	stamp [2]time.Time // of the files as last looked at, good or bad
}

// current is the certificate of the files, or the last good one while they are
// missing, do not match or are unsafe. A replacement in progress is thus seen
// as a bad pair first and as a good one at the next handshake.
func (s *source) current() *tls.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	stamp, err := stamps(s.files)
	if err == nil && stamp == s.stamp {
		return s.cert
	}
	var cert *tls.Certificate
	if err == nil {
		cert, stamp, err = s.read()
	}
	changed := stamp != s.stamp
	s.stamp = stamp
	switch {
	case err == nil:
		s.cert = cert
		s.log.Info("certificate reloaded", "file", s.files.Cert, "expires", cert.Leaf.NotAfter)
	case changed:
		s.log.Warn("certificate not reloaded, the old one stays in use", "file", s.files.Cert, "error", err)
	}
	return s.cert
}

func (s *source) read() (*tls.Certificate, [2]time.Time, error) {
	stamp, err := stamps(s.files)
	if err != nil {
		return nil, stamp, err
	}
	if err := CheckSecret(s.files.Key); err != nil {
		return nil, stamp, err
	}
	cert, err := readFile(s.files.Cert)
	if err != nil {
		return nil, stamp, err
	}
	key, err := readFile(s.files.Key)
	if err != nil {
		return nil, stamp, err
	}
	defer clear(key)
	c, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, stamp, fmt.Errorf("pki: certificate %s with key %s: %w", s.files.Cert, s.files.Key, err)
	}
	if c.Leaf == nil {
		return nil, stamp, errors.New("pki: certificate without a leaf")
	}
	return &c, stamp, nil
}

func stamps(f Files) (out [2]time.Time, err error) {
	for i, name := range []string{f.Cert, f.Key} {
		fi, err := os.Stat(name)
		if err != nil {
			return out, fmt.Errorf("pki: %w", err)
		}
		out[i] = fi.ModTime()
	}
	return out, nil
}
