package twonodes

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

var (
	loadTime    = flag.Duration("load", 30*time.Second, "how long both nodes supply at full speed")
	kills       = flag.Int("kills", 20, "how often a node is killed under load")
	seed        = flag.Uint64("seed", 0, "of the random moments; 0: drawn and printed")
	logs        = flag.String("logs", "", "`directory` to keep the daemons' logs in")
	raceDaemons = flag.Bool("race-daemons", false, "build the daemons with the race detector")
)

// bound is for anything a node is waited for; a machine under load is slow.
const bound = 60 * time.Second

// bin is where TestMain puts the real programs.
var bin string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "twonodes")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
		bin = dir
		args := []string{"build", "-o", dir + "/"}
		if *raceDaemons {
			args = append(args, "-race")
		}
		build := exec.Command("go", append(args, "github.com/q-ipsec/q-ipsec/cmd/qipsecd", "github.com/q-ipsec/q-ipsec/cmd/qipsec")...)
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v: %s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// names are the nodes; a number below 2 means one of them, or its SAE.
var names = [2]string{"a", "b"}

// site is two nodes as `qipsec init` makes them.
type site struct {
	t     *testing.T
	dir   string
	ip    [2]string
	nodes [2]*node
	more  *node // a second member of node 1, if there is one; it listens on moreIP
	pair  [2]conf.Pair
	seq   uint64 // of the newest QKD-Key file fed

	moreIP string

	scarce atomic.Bool // feeding waits until both nodes have few keys of their own
}

// newSite writes the configs, with kms as further lines of [kms], and more, of
// each node, at the end. The addresses are drawn from the process id, so that
// two runs on one machine do not meet.
func newSite(t *testing.T, n int, kms string, more ...string) *site {
	t.Helper()
	pid := os.Getpid()
	s := &site{t: t, dir: filepath.Join(t.TempDir(), "site")}
	for i := range s.ip {
		s.ip[i] = fmt.Sprintf("127.%d.%d.%d", 128+pid>>7&63, 1+pid&127, 10*n+1+i)
	}
	s.qipsec("init", "--pair", "a", "b", "--here", "--no-ipsec", "--out", s.dir, "--address", s.ip[0]+","+s.ip[1])
	for i, name := range names {
		file := s.path(i, "qipsecd.toml")
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		b = bytes.Replace(b, []byte("[kms]\n"), []byte("[kms]\n"+kms), 1)
		if len(more) > 0 {
			b = append(b, more[i]...)
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := conf.LoadNode(file)
		if err != nil {
			t.Fatal(err)
		}
		s.pair[i] = c.KMS.Pairs[0]
		s.nodes[i] = &node{t: t, name: name, config: file, log: filepath.Join(s.dir, name+".log"), op: operator.NewClient(c.Operator.Socket)}
		t.Cleanup(s.nodes[i].end)
	}
	return s
}

// up starts both nodes.
func (s *site) up() {
	for _, n := range s.nodes {
		n.start()
	}
}

func (s *site) path(node int, elem ...string) string {
	return filepath.Join(append([]string{s.dir, names[node]}, elem...)...)
}

// qipsec runs the real qipsec.
func (s *site) qipsec(args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), bound)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "qipsec"), args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("qipsec %q: %v: %s", args, err, out)
	}
	return string(out)
}

// sae gives a client that calls KME node with the certificate cert (.crt, .key).
func (s *site) sae(node int, cert string) *etsi014.Client { return s.saeAt(s.ip[node], node, cert) }

// saeAt is sae for a member of the node.
func (s *site) saeAt(ip string, node int, cert string) *etsi014.Client {
	s.t.Helper()
	f := pki.Files{CA: s.path(node, "pki", "sae-ca.crt"), Cert: cert + ".crt", Key: cert + ".key"}
	t, err := pki.KMEClient(f, false, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := etsi014.NewClient(etsi014.ClientConfig{URL: "https://" + ip + ":8442", TLS: t})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// te gives a client of the node's own transmission device.
func (s *site) te(node int) *etsi014.Client {
	return s.sae(node, s.path(node, "pki", "saes", names[node]+"-te"))
}

// door gives a client of the node's transmission device that calls one of the node's
// members, by turns.
func (s *site) door(node, i int) *etsi014.Client {
	if node == 1 && s.more != nil && i%2 == 1 {
		return s.saeAt(s.moreIP, node, s.path(node, "pki", "saes", names[node]+"-te"))
	}
	return s.te(node)
}

// teOf is the SAE id of a node's transmission device.
func teOf(node int) string { return names[node] + "-te" }

// feed delivers the next QKD-Key file of so many keys to both ends.
func (s *site) feed(keys int) error {
	data, err := key.Random(rand.Reader, keys*key.MasterSize+keyfile.Trailer)
	if err != nil {
		return err
	}
	defer data.Wipe()
	s.seq++
	for _, p := range s.pair {
		f := &keyfile.File{Data: data, Header: keyfile.Header{
			Pair: p.ID, QKD: p.QKDID, PeerQKD: p.PeerQKDID, Role: p.Role, Seq: s.seq,
			Created: time.Now().UTC(), QBER: 0.02, HashAlgorithm: keyfile.SHA256,
		}}
		if _, err := keyfile.WriteAtomic(p.Intake, f); err != nil {
			return err
		}
	}
	return nil
}

// waiting counts the QKD-Key files, good or bad, that a node has yet to take in.
func (s *site) waiting(node int) int {
	list, err := os.ReadDir(s.pair[node].Intake)
	if err != nil {
		s.t.Error(err)
	}
	n := 0
	for _, e := range list {
		if !e.IsDir() && !keyfile.Unfinished(e.Name()) {
			n++
		}
	}
	return n
}

// feeding feeds so that either node has at least so many keys of its own on
// disk, or one of them while keys are scarce, until the function it gives is called.
func (s *site) feeding(own, perFile int) (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.keep(ctx, own, perFile); err != nil {
			s.t.Error(err)
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

func (s *site) keep(ctx context.Context, own, perFile int) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if s.waiting(0) > 2 || s.waiting(1) > 2 {
			continue
		}
		low := 0
		for i := range s.nodes {
			if p, err := s.poolOf(ctx, i); err == nil && p.OwnActive+p.Received/2 < own {
				low++
			}
		}
		if low == 0 || low == 1 && s.scarce.Load() {
			continue
		}
		if err := s.feed(perFile); err != nil {
			return fmt.Errorf("feed: %w", err)
		}
	}
}

// await polls until ok, for bound.
func await(t *testing.T, what string, ok func() error) {
	t.Helper()
	end := time.Now().Add(bound)
	for {
		err := ok()
		if err == nil {
			return
		}
		if t.Failed() || time.Now().After(end) {
			t.Fatalf("%s: not within %v: %v", what, bound, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// supplying waits until both nodes have keys of their own in memory.
func (s *site) supplying() {
	s.t.Helper()
	for i := range s.nodes {
		await(s.t, names[i]+" can supply keys", func() error {
			p, err := s.poolOf(s.t.Context(), i)
			if err == nil && (!p.Synced || p.Leased == 0) {
				err = fmt.Errorf("pool %+v", p)
			}
			return err
		})
	}
}

// agree waits until nothing is under way, and both nodes say the same of the
// pool. Nobody may take keys meanwhile.
func (s *site) agree() operator.Pool {
	s.t.Helper()
	var p [2]operator.Pool
	await(s.t, "the two nodes agree", func() error {
		for i, name := range names {
			if w := s.waiting(i); w > 0 {
				return fmt.Errorf("%d files wait at %s", w, name)
			}
			var err error
			if p[i], err = s.poolOf(s.t.Context(), i); err != nil {
				return err
			}
		}
		a, b := p[0], p[1]
		if !a.Synced || !b.Synced || a.Received+b.Received > 0 || a.Active != b.Active || a.NewestSeq != b.NewestSeq || a.Mark != b.PeerMark || b.Mark != a.PeerMark ||
			a.OwnActive+b.OwnActive != a.Active {
			return fmt.Errorf("a has %+v\nb has %+v", a, b)
		}
		return nil
	})
	return p[0]
}

// node is one daemon, started and killed again and again.
type node struct {
	t                 *testing.T
	name, config, log string
	op                *operator.Client
	inside            []string    // words before the command: where it runs
	never             []string    // what its log must not have, besides what none may
	frozen            atomic.Bool // by SIGSTOP: it does not answer

	mu     sync.Mutex
	cmd    *exec.Cmd
	done   chan struct{} // closed when cmd has ended
	err    error         // valid then
	starts int
}

// spawner starts processes from one thread that lives as long as this process,
// so that the kernel ends them with it, however that ends.
var spawner = sync.OnceValue(func() chan<- func() {
	c := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

// start starts the daemon and does not wait for it.
func (n *node) start() {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	f, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	words := append(n.inside[:len(n.inside):len(n.inside)], filepath.Join(bin, "qipsecd"), "-config", n.config)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	spawner() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		n.t.Fatal(err)
	}
	done := make(chan struct{})
	n.cmd, n.done = cmd, done
	n.starts++
	go func() {
		err := cmd.Wait()
		n.mu.Lock()
		n.err = err
		n.mu.Unlock()
		close(done)
	}()
}

// kill is kill -9, and waits for the end. A daemon that has ended by itself is
// a failure.
func (n *node) kill() error {
	n.mu.Lock()
	cmd, done := n.cmd, n.done
	n.mu.Unlock()
	select {
	case <-done:
		return fmt.Errorf("qipsecd of %s has ended by itself: %w", n.name, errors.Join(n.err, errors.New(n.tail())))
	default:
	}
	if err := cmd.Process.Kill(); err != nil {
		return fmt.Errorf("qipsecd of %s: %w: %s", n.name, err, n.tail())
	}
	<-done
	return nil
}

// ended reports whether the daemon has ended by itself.
func (n *node) ended() bool {
	n.mu.Lock()
	done := n.done
	n.mu.Unlock()
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// end kills the daemon after the test and looks for what must be in no log.
func (n *node) end() {
	if n.cmd == nil {
		return
	}
	if err := n.kill(); err != nil && !n.t.Failed() {
		n.t.Error(err)
	}
	n.op.Close()
	b, err := os.ReadFile(n.log)
	if err != nil {
		n.t.Error(err)
		return
	}
	for _, bad := range append(n.never, "DATA RACE", "panic:", "fatal error:", "database is locked", "database disk image is malformed") {
		if at := bytes.Index(b, []byte(bad)); at >= 0 {
			n.t.Errorf("log of %s: %s", n.name, b[max(0, at-500):min(len(b), at+4000)])
		}
	}
	if n.t.Failed() {
		n.t.Logf("end of the log of %s:\n%s", n.name, n.tail())
	}
	if *logs != "" {
		name := strings.ReplaceAll(n.t.Name(), "/", "_") + "-" + n.name + ".log"
		if err := os.WriteFile(filepath.Join(*logs, name), b, 0o600); err != nil {
			n.t.Error(err)
		}
	}
}

// tail is the end of the daemon's log.
func (n *node) tail() string {
	b, err := os.ReadFile(n.log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-6000):])
}

// poolOf asks the node's member that has the inventory.
func (s *site) poolOf(ctx context.Context, of int) (p operator.Pool, err error) {
	members := []*node{s.nodes[of]}
	if of == 1 && s.more != nil {
		members = append(members, s.more)
	}
	err = errors.New("no member of " + names[of] + " answers")
	for _, n := range members {
		if n.frozen.Load() {
			continue
		}
		if p, err = n.pool(ctx); err == nil {
			return p, nil
		}
	}
	return p, err
}

// pool asks the running daemon for its only pool.
func (n *node) pool(ctx context.Context) (operator.Pool, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	ps, err := n.op.Pools(ctx)
	if err == nil && len(ps) != 1 {
		err = fmt.Errorf("%s has %d pools", n.name, len(ps))
	}
	if err != nil {
		return operator.Pool{}, err
	}
	return ps[0], nil
}
