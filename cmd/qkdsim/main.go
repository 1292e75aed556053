// Command qkdsim plays a pair of QKD devices for two nodes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/qkdsim"
	"github.com/q-ipsec/q-ipsec/qkdsim/control"
)

func main() {
	config := flag.String("config", "/etc/q-ipsec/qkdsim.toml", "config `file`")
	check := flag.Bool("check", false, "check the config and exit")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "qkdsim: unexpected argument %q; see -help\n", flag.Arg(0))
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *config, *check); err != nil {
		fmt.Fprintln(os.Stderr, "qkdsim:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, config string, check bool) error {
	c, err := conf.LoadSim(config)
	if err != nil || check {
		return err
	}
	log := newLog(c.Log)
	pair, err := newPair(c, log)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	if c.Control != nil {
		srv, l, err := newControl(c, pair, log)
		if err != nil {
			return err
		}
		g.Go(func() error {
			if err := srv.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("control interface: %w", err)
			}
			return nil
		})
		g.Go(func() error {
			<-ctx.Done()
			bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			return srv.Shutdown(bound)
		})
	}
	g.Go(func() error { return pair.Run(ctx) })
	log.Info("pair runs", "pair", c.Pair, "device", c.Device, "km", c.Km)
	return g.Wait()
}

func newLog(c conf.Log) *slog.Logger {
	o := &slog.HandlerOptions{Level: c.Level}
	if c.JSON {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}

func newPair(c *conf.Sim, log *slog.Logger) (*qkdsim.Pair, error) {
	dev, err := qkdsim.DeviceByName(c.Device)
	if err != nil {
		return nil, err
	}
	dev.CapBits = c.CapBits
	master, err := newEnd(c.Master)
	if err != nil {
		return nil, err
	}
	slave, err := newEnd(c.Slave)
	if err != nil {
		return nil, err
	}
	if c.Seed != 0 {
		log.Warn("keys come from a seed: they are no secret")
	}
	return qkdsim.NewPair(qkdsim.Options{
		Pair: c.Pair, Master: master, Slave: slave,
		Link:      qkdsim.Link{Device: dev, Km: c.Km, DBPerKm: c.DBPerKm},
		Weather:   qkdsim.Weather(c.Weather),
		BlockBits: c.BlockBits, KeysPerFile: c.KeysPerFile, Hash: c.Hash, Seed: c.Seed, Speed: c.Speed,
		FirstKeys: c.FirstKeys, OnDemand: c.OnDemand, StateFile: c.StateFile,
		Log: log, Now: time.Now,
	})
}

func newEnd(c conf.SimEnd) (qkdsim.End, error) {
	if c.SFTP == nil {
		return qkdsim.End{QKD: c.QKD, Delivery: qkdsim.Local{Dir: c.Dir}}, nil
	}
	b, err := os.ReadFile(c.SFTP.Key)
	if err != nil {
		return qkdsim.End{}, fmt.Errorf("SFTP key: %w", err)
	}
	defer clear(b)
	signer, err := ssh.ParsePrivateKey(b)
	if err != nil {
		return qkdsim.End{}, fmt.Errorf("SFTP key %s: %w", c.SFTP.Key, err)
	}
	b, err = os.ReadFile(c.SFTP.HostKey)
	if err != nil {
		return qkdsim.End{}, fmt.Errorf("SFTP host key: %w", err)
	}
	host, _, _, _, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return qkdsim.End{}, fmt.Errorf("SFTP host key %s: want a line as in ssh_host_ed25519_key.pub: %w", c.SFTP.HostKey, err)
	}
	d, err := qkdsim.NewSFTP(qkdsim.SFTPOptions{Address: c.SFTP.Address, User: c.SFTP.User, Key: signer, HostKey: host, Dir: c.SFTP.Dir})
	return qkdsim.End{QKD: c.QKD, Delivery: d}, err
}

// newControl listens at once, so that a caller who sees the pair run can reach
// it.
func newControl(c *conf.Sim, pair *qkdsim.Pair, log *slog.Logger) (*http.Server, net.Listener, error) {
	tls, err := pki.Server(c.Control.Files, log)
	if err != nil {
		return nil, nil, err
	}
	l, err := net.Listen("tcp", c.Control.Listen.String())
	if err != nil {
		return nil, nil, fmt.Errorf("control interface: %w", err)
	}
	devices := map[string]control.Device{
		c.Master.Node: device{pair, key.Master},
		c.Slave.Node:  device{pair, key.Slave},
	}
	return &http.Server{
		Handler: control.NewHandler(pki.NodeFromRequest, devices, log), TLSConfig: tls,
		ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}, l, nil
}

// device is one end of the pair for the control interface. Both ends stop and
// start together: they share one link.
type device struct {
	pair *qkdsim.Pair
	role key.Role
}

func (d device) Status() control.Status { return d.pair.Status(d.role) }
func (d device) Generate(n int) error   { return d.pair.Generate(n) }
func (d device) Init()                  { d.pair.Init() }
func (d device) Stop()                  { d.pair.Stop() }
