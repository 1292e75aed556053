package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// The files of `qipsec init` and `qipsec pki`, the same everywhere: what is
// signed by which CA.
const (
	caKM  = "km"  // nodes, Type-1
	caSAE = "sae" // KMEs and SAEs, Type-2
	caIKE = "ike" // gateways, IKE_AUTH
)

// kinds are the words of `pki issue` and the CA each belongs to.
var kinds = []struct {
	word, ca, what string
	kind           pki.Kind
}{
	{"node", caKM, "a node on the KM channel (Type-1)", pki.KindNode},
	{"kme", caSAE, "a node as the KME that SAEs call (Type-2)", pki.KindKME},
	{"sae", caSAE, "an SAE", pki.KindSAE},
	{"gateway", caIKE, "a gateway in IKE_AUTH; NAME is its IKE identity", pki.KindGateway},
}

func pkiCommands() []command {
	var detail strings.Builder
	detail.WriteString("KIND is one of:")
	for _, k := range kinds {
		fmt.Fprintf(&detail, "\n  %-8s %s; signed by the %s CA", k.word, k.what, k.ca)
	}
	return []command{
		{
			name: "pki issue", args: "KIND NAME", about: "make a key and a certificate, signed by the CA of its channel",
			detail:  detail.String(),
			example: "qipsec pki issue sae line-7 --ca ca --out a/pki/saes",
			setup:   setupPKIIssue,
		},
		{
			name: "pki show", args: "FILE...", about: "show whose certificates these are and when they expire",
			example: "qipsec pki show a/pki/*.crt",
			setup:   setupPKIShow,
		},
	}
}

func setupPKIIssue(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	ca := fs.String("ca", "ca", "`directory` of the CAs, made by qipsec init")
	out := fs.String("out", ".", "`directory` for NAME.crt and NAME.key")
	as := fs.String("as", "", "`base` of the file names instead of NAME")
	dns := fs.String("dns", "", "DNS `names` of a server, separated by commas")
	ips := fs.String("ip", "", "`addresses` of a server, separated by commas")
	force := fs.Bool("force", false, "replace existing files")
	return func(_ context.Context, a *app, args []string) error {
		if err := wantArgs(args, 2); err != nil {
			return err
		}
		if b := *as; b != "" && (b == "." || b == ".." || filepath.Base(b) != b) {
			return usagef("--as %q is not the base of a file name: --out names the directory", *as)
		}
		r := pki.Request{Name: args[1], DNS: words(*dns)}
		for _, s := range words(*ips) {
			ip, err := netip.ParseAddr(s)
			if err != nil {
				return usagef("--ip %q is not an address", s)
			}
			r.IPs = append(r.IPs, ip)
		}
		for _, k := range kinds {
			if k.word == args[0] {
				r.Kind = k.kind
				return issue(a, filepath.Clean(*ca), k.ca, r, *out, or(*as, r.Name), *force)
			}
		}
		return usagef("KIND %q is unknown", args[0])
	}
}

func issue(a *app, caDir, caName string, r pki.Request, dir, base string, force bool) error {
	root, err := pki.ReadCredential(caDir, caName)
	if err != nil {
		return err
	}
	ca, err := pki.ParseCA(root)
	if err != nil {
		return fmt.Errorf("CA %s in %s: %w", caName, caDir, err)
	}
	c, err := ca.Issue(r, a.now())
	if err != nil {
		return err
	}
	if err := c.Write(dir, base, force); err != nil {
		return fmt.Errorf("%w (--force replaces files)", err)
	}
	fmt.Fprintf(a.out, "%s and .key\n", filepath.Join(dir, base+".crt"))
	return nil
}

// certInfo is what show prints of one certificate.
type certInfo struct {
	File     string    `json:"file"`
	Subject  string    `json:"subject"`
	Issuer   string    `json:"issuer"`
	Identity string    `json:"identity,omitempty"`
	Servers  []string  `json:"servers,omitempty"`
	Expires  time.Time `json:"expires"`
	Expired  bool      `json:"expired"`
}

func setupPKIShow(fs *flag.FlagSet) func(context.Context, *app, []string) error {
	asJSON := jsonFlag(fs)
	return func(_ context.Context, a *app, args []string) error {
		if len(args) == 0 {
			return usagef("wants files")
		}
		var list []certInfo
		for _, name := range args {
			v, err := showCert(name, a.now())
			if err != nil {
				return err
			}
			list = append(list, v)
		}
		if *asJSON {
			return printJSON(a.out, list)
		}
		rows := make([][]string, len(list))
		for i, v := range list {
			expires := v.Expires.Format(time.DateOnly)
			if v.Expired {
				expires += " EXPIRED"
			}
			rows[i] = []string{v.File, v.Identity, v.Subject, v.Issuer, strings.Join(v.Servers, ","), expires}
		}
		return table(a.out, "FILE IDENTITY SUBJECT ISSUER SERVERS EXPIRES", rows)
	}
}

func showCert(name string, now time.Time) (certInfo, error) {
	b, err := readAtMost(name, 1<<20)
	if err != nil {
		return certInfo{}, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return certInfo{}, fmt.Errorf("%s does not hold a certificate", name)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return certInfo{}, fmt.Errorf("%s: %w", name, err)
	}
	v := certInfo{
		File: name, Subject: c.Subject.CommonName, Issuer: c.Issuer.CommonName,
		Servers: c.DNSNames, Expires: c.NotAfter, Expired: now.After(c.NotAfter),
	}
	for _, u := range c.URIs {
		v.Identity = strings.TrimSpace(v.Identity + " " + u.String())
	}
	for _, ip := range c.IPAddresses {
		v.Servers = append(v.Servers, ip.String())
	}
	return v, nil
}

// words splits at commas; empty text gives none.
func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}
