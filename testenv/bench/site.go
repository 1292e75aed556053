package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/testenv/pgtest"
)

// siteName begins the names of the rows below.
const siteName = "GetKey over mTLS, keep-alive, inventory on PostgreSQL"

// atSite is a supply whose node a has its inventory on PostgreSQL and a second
// machine, which stands by.
type atSite struct {
	*supply
	standby string // URL
	next    atomic.Uint64
}

// siteRows measures GetKey of a node of two machines (docs/site.md): asked at the one
// that leads, and at both at once, half of whose calls are passed on.
func siteRows(ctx context.Context, o options, t *table) (err error) {
	leader, both := siteName+", asked where it leads", siteName+", asked at two machines at once"
	if !o.only.MatchString(leader) && !o.only.MatchString(both) {
		return nil
	}
	pg, err := pgtest.Start(ctx)
	if errors.Is(err, pgtest.ErrNotInstalled) {
		t.note("%s: left out: %v", siteName, err)
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pg.Close()) }()
	s, err := newSite(ctx, o, pg.URL("postgres", ""))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	for _, m := range []match{
		{name: leader, ours: side{do: s.getKeys}},
		{name: both, ours: side{do: s.inTurn}},
	} {
		if !o.only.MatchString(m.name) {
			continue
		}
		m.reference, m.against = side{do: s.bareCalls, bare: true}, "bare mTLS handler"
		m.keys, m.slice, m.of = 40_000, o.slice, 1
		value, ref, err := s.compare(ctx, o, m)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		m.rows(value, ref, t)
	}
	return nil
}

// inTurn asks one machine, and the next time the other.
func (s *atSite) inTurn(c *caller) error {
	url := s.url(0)
	if s.next.Add(1)%2 == 1 {
		url = s.standby
	}
	return c.call(0, url+"/api/v1/keys/b-te/enc_keys", getKey, 1)
}

func newSite(ctx context.Context, o options, url string) (*atSite, error) {
	const number = 4
	own, second := addresses(number)[0], addresses(number)[2]
	edit := func(s string) string {
		if strings.Contains(s, "name = \"a\"\nstate_dir") {
			s = strings.Replace(s, "[node]\n", fmt.Sprintf("[node]\ninventory = %q\n", url), 1)
			return strings.Replace(s, "[kms]\n", fmt.Sprintf("[kms]\nmembers = [\"%s:8441\"]\n", second), 1)
		}
		return strings.Replace(s, fmt.Sprintf("address = \"%s:8441\"\n", own), fmt.Sprintf("address = \"%s:8441\"\nmore_addresses = [\"%s:8441\"]\n", own, second), 1)
	}
	s, err := newSupply(ctx, o, number, edit)
	if err != nil {
		return nil, err
	}
	at := &atSite{supply: s, standby: "https://" + second + ":8442"}
	if err := s.secondMachine(ctx, own, second); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return at, nil
}

// secondMachine starts another machine of node a, which leads by then.
func (l *lab) secondMachine(ctx context.Context, own, second string) error {
	if err := await(ctx, "node a leads", func() error { _, err := l.pool(ctx, 0); return err }); err != nil {
		return err
	}
	from, to := filepath.Join(l.dir, "a"), filepath.Join(l.dir, "a2")
	for _, dir := range []string{"pki", "state", "run"} {
		if err := os.MkdirAll(filepath.Join(to, dir), 0o700); err != nil {
			return err
		}
	}
	for _, name := range []string{"pki/km-ca.crt", "pki/sae-ca.crt", "pki/km.crt", "pki/km.key", "state/root", "qipsecd.toml"} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return err
		}
		if name == "qipsecd.toml" {
			text := strings.NewReplacer(own+":", second+":", second+":", own+":", `intake = "intake"`, fmt.Sprintf("intake = %q", filepath.Join(from, "intake"))).Replace(string(b))
			b = []byte(text)
		}
		if err := os.WriteFile(filepath.Join(to, name), b, 0o600); err != nil {
			return err
		}
	}
	issue := exec.CommandContext(ctx, filepath.Join(l.bin, "qipsec"), "pki", "issue", "kme", "a", "--ca", filepath.Join(l.dir, "ca"), "--out", filepath.Join(to, "pki"), "--as", "kme", "--ip", second)
	if out, err := issue.CombinedOutput(); err != nil {
		return fmt.Errorf("qipsec pki issue: %w: %s", err, out)
	}
	if err := l.spawn(filepath.Join(l.bin, "qipsecd"), "-config", filepath.Join(to, "qipsecd.toml")); err != nil {
		return err
	}
	api := operator.NewClient(filepath.Join(to, "run", "operator.sock"))
	defer api.Close()
	return await(ctx, "the second machine of node a stands by", func() error {
		v, err := api.Status(ctx)
		if err == nil && (v.Site == nil || v.Site.State != operator.SiteStandby || v.Site.Leader == "") {
			err = fmt.Errorf("it is %+v", v.Site)
		}
		return err
	})
}
