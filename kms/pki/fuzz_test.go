package pki

import (
	"crypto/x509"
	"errors"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"
)

// A certificate names one node or one SAE or nobody, and only by a URI that is
// exactly the one that Issue would have written.
func FuzzIdentity(f *testing.F) {
	f.Add("urn:q-ipsec:node:a", "")
	f.Add("urn:q-ipsec:sae:line-7", "https://example.org/")
	f.Add("URN:q-ipsec:node:a", "urn:q-ipsec:node:b")
	f.Add("urn:q-ipsec:node:a%2Fb", "urn:q-ipsec:sae:..")
	f.Add("urn:q-ipsec:node:a?x#y", "")
	f.Fuzz(func(t *testing.T, a, b string) {
		c := &x509.Certificate{}
		var ours []string
		for _, s := range []string{a, b} {
			if u, err := url.Parse(s); err == nil && s != "" {
				c.URIs = append(c.URIs, u)
				if strings.HasPrefix(strings.ToLower(u.String()), anyPrefix) {
					ours = append(ours, u.String())
				}
			}
		}
		node, errNode := Node(c)
		sae, errSAE := SAE(c)
		if errNode == nil && errSAE == nil || (errNode == nil || errSAE == nil) && len(ours) != 1 {
			t.Fatalf("%q %q: node %q and SAE %q", a, b, node, sae)
		}
		for _, v := range []struct {
			name, prefix string
			err          error
			check        func(string) error
		}{{node, NodePrefix, errNode, CheckNode}, {sae, SAEPrefix, errSAE, CheckSAE}} {
			switch {
			case v.err != nil:
				if !errors.Is(v.err, ErrNoIdentity) || v.name != "" {
					t.Fatalf("%q, %v", v.name, v.err)
				}
			case v.check(v.name) != nil || uri(v.prefix, v.name).String() != ours[0]:
				t.Fatalf("%q is read as %q", ours[0], v.name)
			}
		}
	})
}

// What a name may be, its URI can carry and is read back as it was.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"a", "paris-2", "Line_7.x~y", "..", "a b", "a/b", "a\n", "\u00e9"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, v := range []struct {
			prefix string
			check  func(string) error
			read   func(*x509.Certificate) (string, error)
		}{{NodePrefix, CheckNode, Node}, {SAEPrefix, CheckSAE, SAE}} {
			if v.check(s) != nil {
				continue
			}
			u, err := url.Parse(uri(v.prefix, s).String())
			if err != nil {
				t.Fatalf("%q: %v", s, err)
			}
			if got, err := v.read(&x509.Certificate{URIs: []*url.URL{u}}); err != nil || got != s {
				t.Fatalf("%q is read back as %q, %v", s, got, err)
			}
			if strings.ContainsAny(s, "/\\ \n\x00") || s == ".." {
				t.Fatalf("%q would be a path or more than a word", s)
			}
		}
	})
}

// Bytes from a file give a CA, a trust pool or an error.
func FuzzFiles(f *testing.F) {
	now := time.Unix(1_800_000_000, 0)
	ca, err := NewCA("fuzz", now)
	if err != nil {
		f.Fatal(err)
	}
	root, err := ca.Credential()
	if err != nil {
		f.Fatal(err)
	}
	leaf, err := ca.Issue(Request{Kind: KindNode, Name: "a", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}, now)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(root.Cert, root.Key)
	f.Add(leaf.Cert, leaf.Key)
	f.Add(root.Key, root.Cert)
	f.Add(append(append([]byte("text\n"), root.Cert...), leaf.Cert...), []byte{})
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		if c, err := ParseCA(Credential{Cert: cert, Key: key}); (c == nil) == (err == nil) {
			t.Fatalf("%v, %v", c, err)
		} else if err == nil && !c.cert.IsCA {
			t.Fatal("a CA that is none")
		}
		if p, err := parsePool("f", cert); (p == nil) == (err == nil) {
			t.Fatalf("%v, %v", p, err)
		}
		if c, err := parseCert(cert); err == nil {
			_, errNode := Node(c)
			_, errSAE := SAE(c)
			if errNode == nil && errSAE == nil {
				t.Fatal("a node that is an SAE")
			}
		}
	})
}
