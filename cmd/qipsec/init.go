package main

import (
	"bytes"
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
		"address":    {addresses, func(s *site, v string) (err error) { s.Address, err = parseAddr(v); return err }},
		"km-address": {km, func(s *site, v string) (err error) { s.KM, err = parseAddr(v); return err }},
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
	if err := p.fits(); err != nil {
		return err
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

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	return a.Unmap(), err
}

// fits refuses addresses and networks that no two gateways can have.
func (p *pairPlan) fits() error {
	a, b := p.Sites[0], p.Sites[1]
	for _, f := range []struct {
		flag string
		v    [2]netip.Addr
	}{{"address", [2]netip.Addr{a.Address, b.Address}}, {"km-address", [2]netip.Addr{a.KM, b.KM}}} {
		for _, v := range f.v {
			if v.IsUnspecified() || v.IsMulticast() || v.Zone() != "" {
				return usagef("--%s: %v is not a unicast address without a zone", f.flag, v)
			}
		}
		switch {
		case f.v[0] == f.v[1]:
			return usagef("--%s: %v is that of both nodes", f.flag, f.v[0])
		case f.v[0].Is4() != f.v[1].Is4():
			return usagef("--%s: %v and %v are of different families", f.flag, f.v[0], f.v[1])
		}
	}
	for _, v := range []netip.Prefix{a.Subnet, b.Subnet} {
		if v != v.Masked() {
			return usagef("--subnet: %v has bits set behind the prefix; %v is meant?", v, v.Masked())
		}
	}
	switch {
	case a.Subnet == b.Subnet:
		return usagef("--subnet: %v is behind both gateways", a.Subnet)
	case a.Subnet.Addr().Is4() != b.Subnet.Addr().Is4():
		return usagef("--subnet: %v and %v are of different families", a.Subnet, b.Subnet)
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

// write makes all files: aside first, then in their places, so that a failure
// leaves nothing behind. Without force it touches nothing that is there.
func (p *pairPlan) write(a *app, out string, force bool) (err error) {
	configs, err := p.configs(out)
	if err != nil {
		return err
	}
	for _, d := range p.dirs() {
		name := filepath.Join(out, d)
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) && !force {
			return fmt.Errorf("%s exists already: give another --out, or --force to replace what init writes", name)
		}
	}
	undo, err := makeDirs(out)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			undo()
		}
	}()
	aside, err := os.MkdirTemp(out, ".qipsec-init-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(aside)) }()
	if err := p.build(a, aside, configs); err != nil {
		return err
	}
	if force {
		return mergeInto(aside, out)
	}
	for i, d := range p.dirs() {
		if err := os.Rename(filepath.Join(aside, d), filepath.Join(out, d)); err != nil {
			for _, done := range p.dirs()[:i] {
				err = errors.Join(err, os.RemoveAll(filepath.Join(out, done)))
			}
			return err
		}
	}
	return nil
}

// dirs are the directories that init makes, for the CAs and for each node.
func (p *pairPlan) dirs() []string { return []string{"ca", p.Sites[0].Name, p.Sites[1].Name} }

// makeDirs makes out and what is missing above it; undo removes those again that
// are still empty.
func makeDirs(out string) (undo func(), err error) {
	var made []string
	for d := filepath.Clean(out); ; d = filepath.Dir(d) {
		if _, err := os.Lstat(d); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		made = append(made, d)
	}
	undo = func() {
		for _, d := range made {
			_ = os.Remove(d) // one that somebody has put something into meanwhile stays
		}
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		undo()
		return nil, err
	}
	return undo, nil
}

// mergeInto moves each file below from to its place below to, over what is there.
func mergeInto(from, to string) error {
	return filepath.WalkDir(from, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		return os.Rename(name, filepath.Join(to, rel))
	})
}

// configs writes both nodes' configs as text and reads them as their nodes will,
// in directories below out.
func (p *pairPlan) configs(out string) (text [2][]byte, err error) {
	t, err := template.New("qipsecd.toml").Parse(nodeTemplate)
	if err != nil {
		return text, err
	}
	out, err = filepath.Abs(out)
	if err != nil {
		return text, err
	}
	for i, own := range p.Sites {
		var b bytes.Buffer
		if err := t.Execute(&b, struct {
			*pairPlan
			Own, Peer site
			Role      string
			First     bool
		}{p, own, p.Sites[1-i], [2]string{"master", "slave"}[i], i == 0}); err != nil {
			return text, err
		}
		dir := filepath.Join(out, own.Name)
		if _, err := conf.ParseNode(filepath.Join(dir, "qipsecd.toml"), dir, b.Bytes()); err != nil {
			return text, fmt.Errorf("nothing is written: the config would have faults (do two options not fit?): %w", err)
		}
		text[i] = b.Bytes()
	}
	return text, nil
}

// build makes the three directories below dir.
func (p *pairPlan) build(a *app, dir string, configs [2][]byte) error {
	caDir := filepath.Join(dir, p.dirs()[0])
	if err := os.Mkdir(caDir, 0o700); err != nil {
		return err
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
		if err := c.Write(caDir, name, false); err != nil {
			return err
		}
		cas[name] = ca
	}
	for i, own := range p.Sites {
		node := filepath.Join(dir, own.Name)
		if err := p.buildNode(a, cas, node, own); err != nil {
			return err
		}
		if err := pki.WriteFile(filepath.Join(node, "qipsecd.toml"), configs[i], 0o600, false); err != nil {
			return err
		}
	}
	return nil
}

// buildNode makes the directory of one node, all but its config.
func (p *pairPlan) buildNode(a *app, cas map[string]*pki.CA, dir string, own site) error {
	for _, d := range []string{"pki/saes", "intake"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return err
		}
	}
	for name, ca := range cas {
		c, err := ca.Credential()
		if err != nil {
			return err
		}
		if err := pki.WriteFile(filepath.Join(dir, "pki", name+"-ca.crt"), c.Cert, 0o644, false); err != nil {
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
		if err := c.Write(filepath.Join(dir, "pki"), l.file, false); err != nil {
			return err
		}
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
