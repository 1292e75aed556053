package etsi014

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits of a Server. A caller has readHeader for the TLS handshake and for
// each header, and in all no longer than the sum for a call.
const (
	readHeader = 5 * time.Second
	readAll    = 10 * time.Second
	writeAll   = 15 * time.Second
	idle       = 90 * time.Second
	maxHeader  = 16 << 10
)

// ServerConfig configures a Server; Handler, TLS and Log are needed.
type ServerConfig struct {
	Handler http.Handler
	// TLS has the server's certificate and the CAs of the clients. The server
	// itself sees to it that every client shows a certificate, and that TLS
	// 1.3 is spoken. Session tickets stay on: SAEs that reconnect for each
	// call resume.
	TLS             *tls.Config
	AllowTLS12      bool          // for SAEs that have no TLS 1.3
	MaxConns        int           // connections at once; more wait to be accepted; default 1024
	ShutdownTimeout time.Duration // how long calls may go on after the end; default 5 s
	Log             *slog.Logger
}

// Server is an HTTPS server (HTTP/1.1) for a Handler or any other.
type Server struct {
	http http.Server
	cfg  ServerConfig
}

// NewServer checks the configuration.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Handler == nil || cfg.TLS == nil || cfg.Log == nil {
		return nil, errors.New("etsi014: Handler, TLS and Log are needed")
	}
	if cfg.TLS.ClientCAs == nil {
		return nil, errors.New("etsi014: TLS has no ClientCAs: any certificate of a public CA would do")
	}
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = 1024
	}
	if cfg.ShutdownTimeout <= 0 {
		cfg.ShutdownTimeout = 5 * time.Second
	}
	t := cfg.TLS.Clone()
	t.ClientAuth = tls.RequireAndVerifyClientCert
	t.MinVersion = tls.VersionTLS13
	if cfg.AllowTLS12 {
		t.MinVersion = tls.VersionTLS12
	}
	t.NextProtos = []string{"http/1.1"}
	s := &Server{cfg: cfg}
	s.http = http.Server{
		Handler:           cfg.Handler,
		TLSConfig:         t,
		ReadHeaderTimeout: readHeader,
		ReadTimeout:       readAll,
		WriteTimeout:      writeAll,
		IdleTimeout:       idle,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelInfo),
		Protocols:         new(http.Protocols),
	}
	s.http.Protocols.SetHTTP1(true)
	return s, nil
}

// Serve answers on ln, which it closes, until ctx ends. Then it takes no more
// calls, waits up to ShutdownTimeout for those under way, and cuts off the rest.
// It returns nil after an orderly end. It may be called once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- s.http.Serve(tls.NewListener(newBounded(ln, s.cfg.MaxConns), s.http.TLSConfig)) }()
	select {
	case err := <-failed:
		return fmt.Errorf("etsi014: serve on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.ShutdownTimeout)
	defer cancel()
	err := s.http.Shutdown(end)
	if errors.Is(err, context.DeadlineExceeded) {
		s.cfg.Log.Warn("calls were cut off at the end", "addr", ln.Addr().String())
		err = s.http.Close() // which also ends the calls' contexts
	}
	<-failed
	if err != nil {
		return fmt.Errorf("etsi014: end the server on %s: %w", ln.Addr(), err)
	}
	return nil
}

// bounded is a listener that accepts no more than so many connections at once.
type bounded struct {
	net.Listener
	free   chan struct{} // one element per connection that is open
	closed chan struct{}
	once   sync.Once
}

func newBounded(ln net.Listener, limit int) *bounded {
	return &bounded{Listener: ln, free: make(chan struct{}, limit), closed: make(chan struct{})}
}

// Accept waits until there is room.
func (b *bounded) Accept() (net.Conn, error) {
	select {
	case b.free <- struct{}{}:
	case <-b.closed:
		return nil, net.ErrClosed
	}
	c, err := b.Listener.Accept()
	if err != nil {
		<-b.free
		return nil, err
	}
	return &boundedConn{Conn: c, b: b}, nil
}

// Close ends the waiting, too.
func (b *bounded) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Listener.Close()
}

type boundedConn struct {
	net.Conn
	b    *bounded
	once sync.Once
}

// Close makes room.
func (c *boundedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { <-c.b.free })
	return err
}
