package twonodes

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/pki"
	"github.com/q-ipsec/q-ipsec/testenv/pgtest"
)

var (
	siteKills    = flag.Int("site-kills", 3, "how often the leader of a site is killed under load")
	siteFreezes  = flag.Int("site-freezes", 1, "how often the leader is stopped for longer than the server waits")
	siteOutages  = flag.Int("site-outages", 2, "how often PostgreSQL is stopped under load")
	siteStarts   = flag.Int("site-starts", 3, "how often both members are started at once")
	sitePostgres = sync.OnceValues(func() (*pgtest.Server, error) { return pgtest.Start(context.Background()) }) //nolint:contextcheck // it ends with the process
)

// newMembers is newSite with node b on PostgreSQL, run by two members, both of which
// are started; b alone first, so that both begin with one root file.
func newMembers(t *testing.T, n int, pg *pgtest.Server, kms string) *site {
	t.Helper()
	s := newSite(t, n, kms)
	s.moreIP = fmt.Sprintf("%s%d", s.ip[1][:strings.LastIndex(s.ip[1], ".")+1], 10*n+3)
	dir := filepath.Join(s.dir, "b2")
	s.qipsec("pki", "issue", "node", "b", "--ca", filepath.Join(s.dir, "ca"), "--out", mkdir(t, dir, "pki"), "--as", "km")
	s.qipsec("pki", "issue", "kme", "b", "--ca", filepath.Join(s.dir, "ca"), "--out", filepath.Join(dir, "pki"), "--as", "kme", "--ip", s.moreIP)
	for _, ca := range []string{"km-ca.crt", "sae-ca.crt"} {
		copyFile(t, s.path(1, "pki", ca), filepath.Join(dir, "pki", ca))
	}
	inventory := fmt.Sprintf("[node]\ninventory = %q\n", pg.URL("postgres", fmt.Sprintf("site%d", n)))
	edit := func(from, to string, subs ...string) {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(subs); i += 2 {
			if !bytes.Contains(b, []byte(subs[i])) {
				t.Fatalf("%s has no %q", from, subs[i])
			}
			b = bytes.ReplaceAll(b, []byte(subs[i]), []byte(subs[i+1]))
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a, b := s.path(0, "qipsecd.toml"), s.path(1, "qipsecd.toml")
	edit(a, a, fmt.Sprintf("address = \"%s:8441\"\n", s.ip[1]), fmt.Sprintf("address = \"%s:8441\"\nmore_addresses = [\"%s:8441\"]\n", s.ip[1], s.moreIP))
	edit(b, b, "[node]\n", inventory)
	edit(b, filepath.Join(dir, "qipsecd.toml"), "[kms]\n", fmt.Sprintf("[kms]\nmembers = [\"%s:8441\"]\n", s.ip[1]), s.ip[1]+":8442", s.moreIP+":8442",
		fmt.Sprintf("type1_listen = \"%s:", s.ip[1]), fmt.Sprintf("type1_listen = \"%s:", s.moreIP), `intake = "intake"`, fmt.Sprintf("intake = %q", s.pair[1].Intake))
	edit(b, b, "[kms]\n", fmt.Sprintf("[kms]\nmembers = [\"%s:8441\"]\n", s.moreIP))
	mkdir(t, dir, "run")
	s.more = &node{t: t, name: "b2", config: filepath.Join(dir, "qipsecd.toml"), log: filepath.Join(s.dir, "b2.log"), op: operator.NewClient(filepath.Join(dir, "run", "operator.sock"))}
	t.Cleanup(s.more.end)
	s.up()
	s.leader(s.nodes[1])
	copyFile(t, s.path(1, "state", "root"), filepath.Join(mkdir(t, dir, "state"), "root"))
	s.more.start()
	s.standsBy(s.more)
	return s
}

func mkdir(t *testing.T, elem ...string) string {
	t.Helper()
	dir := filepath.Join(elem...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// state is what a member of b says of itself.
func (n *node) state(ctx context.Context) (operator.Site, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	v, err := n.op.Status(ctx)
	if err == nil && v.Site == nil {
		err = errors.New(n.name + " is no member of a site")
	}
	if err != nil {
		return operator.Site{}, err
	}
	return *v.Site, nil
}

func (s *site) is(n *node, want operator.SiteState) operator.Site {
	s.t.Helper()
	var v operator.Site
	await(s.t, fmt.Sprintf("%s is %s", n.name, want), func() (err error) {
		if v, err = n.state(s.t.Context()); err == nil && v.State != want {
			err = fmt.Errorf("it is %+v", v)
		}
		return err
	})
	return v
}

func (s *site) leader(n *node)   { s.t.Helper(); s.is(n, operator.SiteLeader) }
func (s *site) standsBy(n *node) { s.t.Helper(); s.is(n, operator.SiteStandby) }

// roles waits until just one member leads and gives both.
func (s *site) roles() (leads, waits *node) {
	s.t.Helper()
	await(s.t, "one member of b leads", func() error {
		one, err1 := s.nodes[1].state(s.t.Context())
		two, err2 := s.more.state(s.t.Context())
		switch {
		case one.State == operator.SiteLeader && two.State == operator.SiteStandby:
			leads, waits = s.nodes[1], s.more
		case one.State == operator.SiteStandby && two.State == operator.SiteLeader:
			leads, waits = s.more, s.nodes[1]
		default:
			return errors.Join(fmt.Errorf("b is %+v, b2 is %+v", one, two), err1, err2)
		}
		return nil
	})
	return leads, waits
}

// moving waits until both nodes have answered enc_keys calls again, and tells how
// long that took.
func (d *load) moving() time.Duration {
	d.s.t.Helper()
	began, before := time.Now(), [2]int64{d.calls[0].Load(), d.calls[1].Load()}
	await(d.s.t, "both nodes supply", func() error {
		if d.calls[0].Load() > before[0]+8 && d.calls[1].Load() > before[1]+8 || broken(d.l) {
			return nil
		}
		return errors.New("they do not")
	})
	return time.Since(began)
}

// mostStranded is what can be on its way between the SAEs when a leader goes: the
// tickets of all masters, slaves and queues, each of at most 32 keys.
const mostStranded = 2 * (masters + slaves + killBacklog) * 32

// settle compares what both nodes hold, ends the load, and reports. The leader may
// have changed so many times.
func (s *site) settle(d *load, stop func(), changes int) {
	s.t.Helper()
	resume := d.pause()
	stop()
	if !broken(d.l) {
		s.agree()
		s.pairsEqual(d.l)
	}
	resume()
	d.end()
	d.report(s.t)
	if _, _, stranded := d.l.count(); stranded > changes*mostStranded {
		s.t.Errorf("%d keys are at one side only, after %d changes of leader", stranded, changes)
	}
}

const memberConfig = "intake_interval = \"50ms\"\nlease = 64\nratchet_keys = 2000\n"

func startMembers(t *testing.T, n int, pg *pgtest.Server) (s *site, d *load, stop func(), rng *rand.Rand) {
	t.Helper()
	s = newMembers(t, n, pg, memberConfig)
	stop = s.feeding(1_000, 2_000)
	s.supplying()
	sd := drawSeed(t)
	return s, startLoad(s, newLedger(), false, sd), stop, rand.New(rand.NewPCG(sd, 3))
}

func shared(t *testing.T) *pgtest.Server {
	t.Helper()
	pg, err := sitePostgres()
	if err != nil {
		t.Fatal(err)
	}
	return pg
}

// kill -9 of the member that leads, under load at both: the other one takes over.
func TestSiteKill9(t *testing.T) {
	t.Parallel()
	s, d, stop, rng := startMembers(t, 20, shared(t))
	var worst time.Duration
	for range *siteKills {
		leads, waits := s.roles()
		d.moving()
		time.Sleep(time.Duration(rng.Int64N(int64(500 * time.Millisecond)))) // the random moment
		if err := leads.kill(); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, d.moving())
		s.leader(waits)
		leads.start()
		if broken(d.l) {
			break
		}
	}
	s.roles()
	s.settle(d, stop, *siteKills)
	t.Logf("%d kills of the leader; supply came back within %v", *siteKills, worst.Round(time.Millisecond))
}

// The leader is stopped for longer than the server waits for it, so that the other
// takes over; when it goes on, it supplies nothing of what it had.
func TestSiteFrozenLeader(t *testing.T) {
	t.Parallel()
	s, d, stop, _ := startMembers(t, 21, shared(t))
	for range *siteFreezes {
		leads, waits := s.roles()
		d.moving()
		leads.freeze()
		s.leader(waits)
		d.moving()
		leads.thaw()
		ids := s.takeAt(d, leads, 20)
		s.standsBy(leads)
		s.leader(waits)
		s.suppliedBy(waits, ids)
		if broken(d.l) {
			break
		}
	}
	s.settle(d, stop, *siteFreezes)
}

func (n *node) freeze() { n.signal(syscall.SIGSTOP); n.frozen.Store(true) }
func (n *node) thaw()   { n.signal(syscall.SIGCONT); n.frozen.Store(false) }

func (n *node) signal(sig syscall.Signal) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.cmd.Process.Signal(sig); err != nil {
		n.t.Fatal(err)
	}
}

// takeAt takes keys at one member, and gives their ids.
func (s *site) takeAt(d *load, at *node, number int) (ids []key.ID) {
	s.t.Helper()
	i := 0
	if at == s.more {
		i = 1
	}
	c, other := s.door(1, i), s.te(0)
	await(s.t, "keys at "+at.name, func() error {
		for len(ids) < number {
			ks, err := c.GetKey(s.t.Context(), teOf(0), 1, 256)
			if err != nil {
				return err
			}
			d.l.issue(1, ks)
			ids = append(ids, ks[0].ID)
			key.WipeAll(ks)
			d.ask(0, other, ids[len(ids)-1:], false)
		}
		return nil
	})
	return ids
}

// suppliedBy makes sure that all of ids are in the history as one member keeps it,
// which what another one supplies from its memory never is.
func (s *site) suppliedBy(n *node, ids []key.ID) {
	s.t.Helper()
	for _, id := range ids {
		await(s.t, "the history of "+n.name, func() error {
			list, err := n.op.History(s.t.Context(), operator.HistoryQuery{Key: id, Limit: 10})
			if err == nil && len(list) == 0 {
				err = fmt.Errorf("key %s is not there", id)
			}
			return err
		})
	}
}

// PostgreSQL is stopped like by a crash, and started again, under load.
func TestSitePostgresOutage(t *testing.T) {
	t.Parallel()
	pg, err := pgtest.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.Close(); err != nil {
			t.Error(err)
		}
	})
	s, d, stop, _ := startMembers(t, 22, pg)
	var worst time.Duration
	for i := range *siteOutages {
		s.roles()
		d.moving()
		resume := func() {}
		if i%2 == 1 { // so that the leader has keys in memory
			resume = d.pause()
			s.supplying()
		}
		if err := pg.Stop(t.Context(), "immediate"); err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 { // longer than anybody may go on without it
			time.Sleep(7 * time.Second)
			s.supplyNothing(d)
		}
		resume()
		if err := pg.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, d.moving())
		if broken(d.l) {
			break
		}
	}
	s.roles()
	s.settle(d, stop, *siteOutages)
	t.Logf("%d outages of PostgreSQL; supply came back within %v", *siteOutages, worst.Round(time.Millisecond))
}

// supplyNothing asks both members of b for keys, which neither may give.
func (s *site) supplyNothing(d *load) {
	s.t.Helper()
	for i := range 20 {
		c := s.door(1, i)
		ks, err := c.GetKey(s.t.Context(), teOf(0), 1, 256)
		var no *key.Unavailable
		switch {
		case err == nil:
			d.l.issue(1, ks)
			key.WipeAll(ks)
			d.l.wrong("keys were supplied though PostgreSQL has been off for more than 5 s")
		case !errors.As(err, &no) || no.RetryAfter <= 0:
			d.l.wrong("without PostgreSQL: %v", err)
		}
		c.Close()
	}
}

// Both members start at the same moment, again and again, and both are asked for
// keys at once: one leads.
func TestSiteStartsAtOnce(t *testing.T) {
	t.Parallel()
	s, d, stop, rng := startMembers(t, 23, shared(t))
	first := map[string]int{}
	for range *siteStarts {
		for _, n := range []*node{s.nodes[1], s.more} {
			if err := n.kill(); err != nil {
				t.Fatal(err)
			}
		}
		two := []*node{s.nodes[1], s.more}
		rng.Shuffle(2, func(i, j int) { two[i], two[j] = two[j], two[i] })
		two[0].start()
		two[1].start()
		d.moving()
		leads, _ := s.roles()
		first[leads.name]++
		if broken(d.l) {
			break
		}
	}
	s.settle(d, stop, *siteStarts)
	t.Logf("%d starts at once; who led: %v", *siteStarts, first)
}

// A member that stands by serves its SAEs through the leader, under the same rights;
// nobody but a member uses that way; the operator sees who leads; and an orderly stop
// hands over.
func TestSiteStandby(t *testing.T) {
	t.Parallel()
	s := newMembers(t, 24, shared(t), memberConfig)
	defer s.feeding(500, 1_000)()
	s.supplying()
	leads, waits := s.nodes[1], s.more
	l := newLedger()
	s.pairEqual(l, 1, 10, s.door(1, 1), s.te(0))
	s.pairEqual(l, 0, 10, s.te(0), s.door(1, 1))
	if _, err := s.door(1, 1).GetKey(t.Context(), "nobody", 1, 256); !errors.Is(err, key.ErrUnauthorised) {
		t.Errorf("an SAE without the right: %v", err)
	}
	if v, err := s.door(1, 1).Status(t.Context(), teOf(0)); err != nil || v.StoredKeyCount == 0 || v.SourceKME != "b" {
		t.Errorf("status at the member that stands by: %+v, %v", v, err)
	}
	if v := s.is(waits, operator.SiteStandby); v.Leader != s.ip[1]+":8441" || v.LeaderSince == nil {
		t.Errorf("who leads, says %s: %+v", waits.name, v)
	}
	if out := s.qipsec("status", "--config", waits.config); !strings.Contains(out, "; "+s.ip[1]+":8441 leads since") {
		t.Errorf("qipsec status: %s", out)
	}
	if _, err := waits.op.Pools(t.Context()); err == nil || !strings.Contains(err.Error(), "stands by") {
		t.Errorf("pools of %s: %v", waits.name, err)
	}
	s.strangers()
	leads.signal(syscall.SIGTERM)
	<-leads.done
	s.leader(waits)
	s.pairEqual(l, 1, 10, s.door(1, 1), s.te(0))
	leads.start()
	s.roles()
	s.pairEqual(l, 1, 10, s.door(1, 0), s.te(0))
	for _, f := range l.list() {
		t.Error(f)
	}
}

// strangers tries the way from member to member with every certificate at hand.
func (s *site) strangers() {
	s.t.Helper()
	call := func(ca, cert string) (int, string, error) {
		c, err := tls.LoadX509KeyPair(cert+".crt", cert+".key")
		if err != nil {
			s.t.Fatal(err)
		}
		pool, err := pki.Pool(ca)
		if err != nil {
			s.t.Fatal(err)
		}
		tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: "b",
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil },
		}}
		body := strings.NewReader(`{"sae":"b-te","peer":"a-te","number":1,"size_bits":256}`)
		resp, err := (&http.Client{Transport: tr, Timeout: 30 * time.Second}).Post("https://"+s.ip[1]+":8441/site/v1/getKey", "", body)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		return resp.StatusCode, string(b), err
	}
	km := s.path(1, "pki", "km-ca.crt")
	if status, body, err := call(km, filepath.Join(s.dir, "b2", "pki", "km")); err != nil || status != 200 || len(body) != 19+32 {
		s.t.Errorf("a member: %d, %d bytes, %v", status, len(body), err)
	}
	if status, body, err := call(km, s.path(0, "pki", "km")); err != nil || status != 403 || !strings.Contains(body, "forbidden") {
		s.t.Errorf("another node: %d %q, %v", status, body, err)
	}
	for _, cert := range []string{s.path(1, "pki", "saes", "b-te"), s.path(1, "pki", "kme")} {
		if status, body, err := call(km, cert); err == nil {
			s.t.Errorf("%s of another CA is served: %d %q", cert, status, body)
		}
	}
	events, err := s.nodes[1].op.Events(s.t.Context(), "", 100)
	if err != nil || !slices.ContainsFunc(events, func(e operator.Event) bool {
		return e.Code == "SITE_NOT_AUTHORISED" && e.Severity == "alarm" && e.Peer == "a"
	}) {
		s.t.Errorf("no event about the other node: %v", err)
	}
}
