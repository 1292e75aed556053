package qkdsim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// Delivery puts a file into a node's intake directory: under a temporary name
// first, then by rename, so that the node never sees half a file. It does not
// keep data.
type Delivery interface {
	Deliver(ctx context.Context, name string, data []byte) error
	Close() error
}

// tempName hides a file from intake until it is whole.
func tempName(name string) string { return "." + name + ".tmp" }

// Local delivers into a directory of this machine.
type Local struct{ Dir string }

// Deliver writes, fsyncs and renames. The file's mode is 0600.
func (l Local) Deliver(_ context.Context, name string, data []byte) error {
	if err := writeFile(l.Dir, name, data); err != nil {
		return fmt.Errorf("qkdsim: deliver %s: %w", name, err)
	}
	return nil
}

// Close does nothing: a directory holds nothing open.
func (l Local) Close() error { return nil }

// SFTPOptions name an SFTP server and how to trust it.
type SFTPOptions struct {
	Address string        // host:port
	User    string        // on the server
	Key     ssh.Signer    // the client's key; passwords are not used
	HostKey ssh.PublicKey // the server's key; any other is refused
	Dir     string        // intake directory on the server
	Timeout time.Duration // for one file, connecting included; 0 = 10 s
}

// SFTP delivers over one SSH connection that it opens when needed and opens
// anew after a failure. One goroutine at a time.
type SFTP struct {
	opt    SFTPOptions
	conn   net.Conn
	ssh    *ssh.Client
	client *sftp.Client
}

// NewSFTP checks the options; it does not connect yet.
func NewSFTP(opt SFTPOptions) (*SFTP, error) {
	if opt.Key == nil || opt.HostKey == nil {
		return nil, errors.New("qkdsim: SFTP wants the client's key and the server's host key")
	}
	if opt.Timeout == 0 {
		opt.Timeout = 10 * time.Second
	}
	return &SFTP{opt: opt}, nil
}

// Deliver uploads, fsyncs where the server can, and renames. The whole call is
// bounded by the Timeout option and by ctx.
func (s *SFTP) Deliver(ctx context.Context, name string, data []byte) error {
	ctx, cancel := context.WithTimeout(ctx, s.opt.Timeout)
	defer cancel()
	err := s.connect(ctx)
	if err == nil {
		// A cancelled ctx closes the connection under a stuck call.
		stop := context.AfterFunc(ctx, func() { _ = s.conn.Close() })
		err = s.put(name, data)
		stop()
	}
	if err != nil {
		_ = s.Close() // the next Deliver starts anew
		return fmt.Errorf("qkdsim: deliver %s to %s: %w", name, s.opt.Address, errors.Join(err, ctx.Err()))
	}
	return nil
}

func (s *SFTP) connect(ctx context.Context) error {
	if s.client != nil {
		return nil
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", s.opt.Address)
	if err != nil {
		return err
	}
	s.conn = conn
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	c, chans, reqs, err := ssh.NewClientConn(conn, s.opt.Address, &ssh.ClientConfig{
		User:            s.opt.User,
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(s.opt.Key)},
		HostKeyCallback: ssh.FixedHostKey(s.opt.HostKey),
		// The server shows several kinds of host key; only the pinned one will do.
		HostKeyAlgorithms: []string{s.opt.HostKey.Type()},
	})
	if err != nil {
		return err
	}
	s.ssh = ssh.NewClient(c, chans, reqs)
	s.client, err = sftp.NewClient(s.ssh)
	return err
}

func (s *SFTP) put(name string, data []byte) (err error) {
	tmp := path.Join(s.opt.Dir, tempName(name))
	f, err := s.client.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return fmt.Errorf("open %s: %w", tmp, err)
	}
	defer func() {
		if err != nil {
			_ = s.client.Remove(tmp)
		}
	}()
	err = f.Chmod(0o600)
	if err == nil {
		_, err = f.Write(data)
	}
	if err == nil {
		var st *sftp.StatusError
		if err = f.Sync(); errors.As(err, &st) && st.FxCode() == sftp.ErrSSHFxOpUnsupported {
			err = nil // a server without fsync@openssh.com
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return s.client.PosixRename(tmp, path.Join(s.opt.Dir, name))
}

// Close ends the connection. Deliver opens it again.
func (s *SFTP) Close() error {
	if s.client != nil {
		_ = s.client.Close() // says only what closing the connection says again
	}
	if s.ssh != nil {
		_ = s.ssh.Close()
	}
	var err error
	if s.conn != nil {
		if err = s.conn.Close(); errors.Is(err, net.ErrClosed) {
			err = nil
		}
	}
	s.client, s.ssh, s.conn = nil, nil, nil
	return err
}

// writeFile puts a whole file of mode 0600 into dir or none.
func writeFile(dir, name string, data []byte) (err error) {
	tmp := filepath.Join(dir, tempName(name))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(tmp, filepath.Join(dir, name)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
