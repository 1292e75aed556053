package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

const (
	type1Port = 8441
	type2Port = 8442
)

//go:embed qipsecd.toml.tmpl
var nodeTemplate string

// site is one end of the pair as init sees it.
type site struct {
	Name    string
	Address netip.Addr   // IKE and ESP
	KM      netip.Addr   // Type-1 and Type-2
	Subnet  netip.Prefix // behind the gateway
	QKDID   uuid.UUID
}

// IKE is the gateway's IKE identity.
func (s site) IKE() string { return s.Name + ".gw.q-ipsec" }

// Type1 is where the node's KM channel listens.
func (s site) Type1() netip.AddrPort { return netip.AddrPortFrom(s.KM, type1Port) }

// Type2 is where SAEs call the node.
func (s site) Type2() netip.AddrPort { return netip.AddrPortFrom(s.KM, type2Port) }

// pairPlan is all that init writes down.
type pairPlan struct {
	Sites  [2]site
	PairID uuid.UUID
	Seed   uint64
	IPsec  bool
	Here   bool // state and sockets inside the node's directory
}

func initCommands() []command {
	return []command{{
		name: "init", args: "--pair A B", about: "write configs and certificates of two nodes that share a QKD link",
		detail: "Makes OUT/A and OUT/B, each to be copied as it is to /etc/q-ipsec of its node, and\n" +
			"OUT/ca with the keys of the CAs, to be kept offline. The first node is the pair's\n" +
			"master and sets the tunnel up.",
		example: "qipsec init --pair paris lyon --address 192.0.2.1,192.0.2.2 --subnet 10.1.0.0/24,10.2.0.0/24 --out site",
		setup:   setupInit,
	}}
}

func setupInit(fl *flag.FlagSet) func(context.Context, *app, []string) error {
	first := fl.String("pair", "", "`A B`: names of the two nodes")
	out := fl.String("out", ".", "`directory` to write into; made if absent")
	addresses := fl.String("address", "192.0.2.1,192.0.2.2", "`A,B`: the gateways' addresses, for IKE and ESP")
	km := fl.String("km-address", "", "`A,B`: addresses for Type-1 and Type-2; default: those of --address")
	subnets := fl.String("subnet", "10.1.0.0/24,10.2.0.0/24", "`A,B`: networks behind the gateways")
	kmsOnly := fl.Bool("no-ipsec", false, "key management only: no tunnel")
	here := fl.Bool("here", false, "keep state and sockets in the node's directory, for trials without root")
	seed := fl.Uint64("seed", 0, "`number` that the pair's ids are made from; default: random")
	force := fl.Bool("force", false, "replace existing files, certificates too")
	return func(_ context.Context, a *app, args []string) error {
		if *first == "" || len(args) != 1 {
			return usagef("wants two names: --pair A B")
		}
		p := pairPlan{Seed: *seed, IPsec: !*kmsOnly, Here: *here}
		p.Sites[0].Name, p.Sites[1].Name = *first, args[0]
		if err := p.fill(*addresses, or(*km, *addresses), *subnets); err != nil {
			return err
		}
		if err := p.write(a, *out, *force); err != nil {
			return err
		}
		return p.next(a.out, *out)
	}
}

// fill reads the texts of the flags and makes the ids.
func (p *pairPlan) fill(addresses, km, subnets string) error {
	for i := range p.Sites {
		if err := pki.CheckNode(p.Sites[i].Name); err != nil {
			return usageError{err.Error()}
		}
	}
	if p.Sites[0].Name == p.Sites[1].Name || p.Sites[0].Name == "ca" || p.Sites[1].Name == "ca" {
		return usagef("the nodes need two different names, not %q", "ca")
	}
	for name, f := range map[string]struct {
		text string
		set  func(*site, string) error
	}{
		"address":    {addresses, func(s *site, v string) (err error) { s.Address, err = netip.ParseAddr(v); return err }},
		"km-address": {km, func(s *site, v string) (err error) { s.KM, err = netip.ParseAddr(v); return err }},
		"subnet":     {subnets, func(s *site, v string) (err error) { s.Subnet, err = netip.ParsePrefix(v); return err }},
	} {
		v := words(f.text)
		if len(v) != 2 {
			return usagef("--%s wants two values, one for each node, got %q", name, f.text)
		}
		for i := range v {
			if err := f.set(&p.Sites[i], v[i]); err != nil {
				return usagef("--%s: %v", name, err)
			}
		}
	}
	if p.Seed == 0 {
		var b [8]byte
		if _, err := io.ReadFull(rand.Reader, b[:]); err != nil {
			return fmt.Errorf("draw a seed: %w", err)
		}
		p.Seed = binary.BigEndian.Uint64(b[:])>>1 | 1 // TOML has no unsigned numbers
	}
	p.PairID = seededID(p.Seed, "pair", p.Sites[0].Name+" "+p.Sites[1].Name)
	for i := range p.Sites {
		p.Sites[i].QKDID = seededID(p.Seed, "qkde", p.Sites[i].Name)
	}
	return nil
}

// seededID is a UUIDv8 (RFC 9562) of a thing. It is a name, not a secret.
func seededID(seed uint64, what, name string) uuid.UUID {
	sum := sha256.Sum256(fmt.Appendf(nil, "qipsec init|%d|%s|%s", seed, what, name))
	id := uuid.UUID(sum[:16])
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id
}

// write makes all files. Without force it looks first and touches nothing if
// one of its directories exists.
func (p *pairPlan) write(a *app, out string, force bool) error {
	dirs := []string{filepath.Join(out, "ca"), filepath.Join(out, p.Sites[0].Name), filepath.Join(out, p.Sites[1].Name)}
	for _, d := range dirs {
		if _, err := os.Lstat(d); !errors.Is(err, fs.ErrNotExist) && !force {
			return fmt.Errorf("%s exists already: give another --out, or --force to replace what init writes", d)
		}
	}
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	cas := map[string]*pki.CA{}
	for _, name := range []string{caKM, caSAE, caIKE} {
		ca, err := pki.NewCA(fmt.Sprintf("Q-IPsec %s CA of %s and %s", name, p.Sites[0].Name, p.Sites[1].Name), a.now())
		if err != nil {
			return err
		}
		c, err := ca.Credential()
		if err != nil {
			return err
		}
		if err := c.Write(dirs[0], name, force); err != nil {
			return err
		}
		cas[name] = ca
	}
	for i := range p.Sites {
		if err := p.writeNode(a, cas, dirs[0], dirs[1+i], i, force); err != nil {
			return err
		}
	}
	return nil
}

// writeNode makes the directory of one node, and reads its config back.
func (p *pairPlan) writeNode(a *app, cas map[string]*pki.CA, caDir, dir string, i int, force bool) error {
	own, peer := p.Sites[i], p.Sites[1-i]
	for _, d := range []string{"pki", "pki/saes", "intake"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return err
		}
	}
	for _, name := range []string{caKM, caSAE, caIKE} {
		b, err := os.ReadFile(filepath.Join(caDir, name+".crt"))
		if err != nil {
			return err
		}
		if err := pki.WriteFile(filepath.Join(dir, "pki", name+"-ca.crt"), b, 0o644, force); err != nil {
			return err
		}
	}
	ips := []netip.Addr{own.KM}
	for _, l := range []struct {
		ca, file string
		r        pki.Request
	}{
		{caKM, "km", pki.Request{Kind: pki.KindNode, Name: own.Name, IPs: ips}},
		{caSAE, "kme", pki.Request{Kind: pki.KindKME, Name: own.Name, IPs: ips}},
		{caSAE, "saes/" + own.Name + "-te", pki.Request{Kind: pki.KindSAE, Name: own.Name + "-te"}},
		{caIKE, "ike", pki.Request{Kind: pki.KindGateway, Name: own.IKE()}},
	} {
		c, err := cas[l.ca].Issue(l.r, a.now())
		if err != nil {
			return err
		}
		if err := c.Write(filepath.Join(dir, "pki"), l.file, force); err != nil {
			return err
		}
	}
	t, err := template.New("qipsecd.toml").Parse(nodeTemplate)
	if err != nil {
		return err
	}
	var text strings.Builder
	role := [2]string{"master", "slave"}[i]
	if err := t.Execute(&text, struct {
		*pairPlan
		Own, Peer site
		Role      string
		First     bool
	}{p, own, peer, role, i == 0}); err != nil {
		return err
	}
	name := filepath.Join(dir, "qipsecd.toml")
	if err := pki.WriteFile(name, []byte(text.String()), 0o600, force); err != nil {
		return err
	}
	if _, err := conf.LoadNode(name); err != nil {
		return fmt.Errorf("the config written has faults (did two options not fit?): %w", err)
	}
	return nil
}

// next tells what to do with the files.
func (p *pairPlan) next(w io.Writer, out string) error {
	a, b := p.Sites[0].Name, p.Sites[1].Name
	dirA, dirB := filepath.Join(out, a), filepath.Join(out, b)
	fmt.Fprintf(w, "written: %s, %s and %s\n\nnext:\n", dirA, dirB, filepath.Join(out, "ca"))
	steps := []string{
		fmt.Sprintf("keep %s offline; `qipsec pki issue` needs it for more certificates", filepath.Join(out, "ca")),
		fmt.Sprintf("look over %s/qipsecd.toml and %s/qipsecd.toml", dirA, dirB),
		fmt.Sprintf("copy each directory, as root, to its node: scp -rp %s root@%s:/etc/q-ipsec", dirB, p.Sites[1].KM),
		"let the QKD devices, or qkdsim, deliver QKD-Key files into the intake directories",
		"on each node: systemctl enable --now qipsec-guard qipsecd",
		"qipsec status; qipsec explain " + a + "-" + b,
	}
	if p.Here {
		steps = []string{
			fmt.Sprintf("qipsecd -config %s/qipsecd.toml & qipsecd -config %s/qipsecd.toml &", dirA, dirB),
			fmt.Sprintf("qipsec keyfile make --config %s/qipsecd.toml --peer-config %s/qipsecd.toml", dirA, dirB),
			fmt.Sprintf("qipsec status --config %s/qipsecd.toml", dirA),
		}
	} else if !p.IPsec {
		steps = append(steps[:4], "on each node: systemctl enable --now qipsecd", "qipsec status")
	}
	for i, s := range steps {
		fmt.Fprintf(w, "  %d. %s\n", i+1, s)
	}
	return nil
}
