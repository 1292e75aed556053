package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

// The prefixes of the SAN URIs that name a peer (docs/architecture.md).
const (
	NodePrefix = "urn:q-ipsec:node:"
	SAEPrefix  = "urn:q-ipsec:sae:"

	anyPrefix = "urn:q-ipsec:"
)

// ErrNoIdentity is wrapped by every error about a peer whose certificate does
// not say who it is: the caller answers 401 and records an event.
var ErrNoIdentity = errors.New("certificate names no such peer")

var (
	nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)
	saeID    = regexp.MustCompile(`^[A-Za-z0-9._~-]{1,64}$`)
)

// CheckNode says what is wrong with a node's name, nil if nothing is. A name is
// a DNS label of at most 32 characters, because it is also a server name.
func CheckNode(name string) error {
	if !nodeName.MatchString(name) {
		return fmt.Errorf("node name %q: want 1 to 32 of a-z, 0-9 and inner hyphens", name)
	}
	return nil
}

// CheckSAE says what is wrong with an SAE's id, nil if nothing is. The
// characters are those that need no escape in a URL's path.
func CheckSAE(id string) error {
	if !saeID.MatchString(id) || id == "." || id == ".." {
		return fmt.Errorf("SAE id %q: want 1 to 64 of A-Z, a-z, 0-9, '.', '_', '~', '-'", id)
	}
	return nil
}

// Node reads the node's name from its certificate. The certificate must have
// exactly one SAN URI that starts with urn:q-ipsec: and it must name a node.
// The caller has verified the certificate's chain.
func Node(c *x509.Certificate) (string, error) {
	return named(c, NodePrefix, CheckNode)
}

// SAE reads the SAE's id from its certificate, under the rules of Node.
func SAE(c *x509.Certificate) (string, error) {
	return named(c, SAEPrefix, CheckSAE)
}

// NodeFromRequest gives the name of the node that sent r, from the client
// certificate that TLS verified against the channel's CA. The error wraps
// ErrNoIdentity.
func NodeFromRequest(r *http.Request) (string, error) {
	c, err := verified(r)
	if err != nil {
		return "", err
	}
	return Node(c)
}

// SAEFromRequest gives the id of the SAE that sent r, under the rules of
// NodeFromRequest.
func SAEFromRequest(r *http.Request) (string, error) {
	c, err := verified(r)
	if err != nil {
		return "", err
	}
	return SAE(c)
}

// verified is the leaf of the client's verified chain. PeerCertificates alone
// proves nothing: a server with a laxer ClientAuth fills it unverified.
func verified(r *http.Request) (*x509.Certificate, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.VerifiedChains[0]) == 0 {
		return nil, fmt.Errorf("pki: %w: the client showed no verified certificate", ErrNoIdentity)
	}
	return r.TLS.VerifiedChains[0][0], nil
}

func named(c *x509.Certificate, prefix string, check func(string) error) (string, error) {
	var ours []string
	for _, u := range c.URIs {
		if s := u.String(); strings.HasPrefix(strings.ToLower(s), anyPrefix) {
			ours = append(ours, s)
		}
	}
	if len(ours) != 1 {
		return "", fmt.Errorf("pki: %w: subject %q has %d SAN URIs that begin with %s, want exactly one", ErrNoIdentity, c.Subject, len(ours), anyPrefix)
	}
	name, ok := strings.CutPrefix(ours[0], prefix)
	if !ok {
		return "", fmt.Errorf("pki: %w: SAN URI %q does not begin with %s", ErrNoIdentity, ours[0], prefix)
	}
	if err := check(name); err != nil {
		return "", fmt.Errorf("pki: %w: SAN URI %q: %w", ErrNoIdentity, ours[0], err)
	}
	return name, nil
}

// uri makes the SAN URI. The name has been checked: it needs no escaping.
func uri(prefix, name string) *url.URL {
	return &url.URL{Scheme: "urn", Opaque: strings.TrimPrefix(prefix, "urn:") + name}
}
