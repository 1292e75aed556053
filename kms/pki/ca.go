package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

// How long certificates are good for. NotBefore lies one hour back, so that two
// nodes whose clocks differ a little can meet.
const (
	CALife   = 10 * 365 * 24 * time.Hour
	LeafLife = 2 * 365 * 24 * time.Hour
	skew     = time.Hour
)

// Kind is what a certificate is for.
type Kind uint8

// The kinds. Each belongs to one CA: KindNode to km; KindKME and KindSAE to sae;
// KindGateway to ike.
const (
	KindNode    Kind = 1 // Type-1 server and client, SAN URI of the node
	KindKME     Kind = 2 // Type-2 server, SAN URI of the node
	KindSAE     Kind = 3 // Type-2 client, SAN URI of the SAE
	KindGateway Kind = 4 // IKE_AUTH; the DNS name is the IKE identity
)

// Request is what Issue certifies.
type Request struct {
	Kind Kind
	Name string       // node name, SAE id, or for KindGateway the IKE identity (FQDN)
	DNS  []string     // more DNS names; a node's and a KME's own name is added
	IPs  []netip.Addr // addresses the server is called by
}

// Credential is a certificate with its private key (PKCS #8), both as PEM. The
// key is a long-lived TLS secret, not a quantum key; crypto/tls holds it on the
// heap anyway.
type Credential struct {
	Cert, Key []byte
}

// CA is a certificate authority: it signs leaves and nothing else.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a CA with a fresh P-256 key, valid from now for CALife.
func NewCA(name string, now time.Time) (*CA, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("pki: make the key of CA %q: %w", name, err)
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(CALife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 0, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("pki: sign CA %q: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("pki: read back CA %q: %w", name, err)
	}
	return &CA{cert: cert, key: key}, nil
}

// ParseCA reads a CA from PEM, as Credential gave it.
func ParseCA(c Credential) (*CA, error) {
	cert, err := parseCert(c.Cert)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(c.Key)
	if block == nil {
		return nil, errors.New("pki: the CA's key is not PEM")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("pki: the CA's key: %w", err)
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("pki: the CA's key is not the ECDSA key of its certificate")
	}
	if !cert.IsCA {
		return nil, fmt.Errorf("pki: certificate %q is not a CA's", cert.Subject)
	}
	return &CA{cert: cert, key: key}, nil
}

// Credential gives the CA's certificate and private key. The certificate alone
// is what every member of the channel gets.
func (ca *CA) Credential() (Credential, error) { return encode(ca.cert.Raw, ca.key) }

// Issue makes a key and certifies it for what r says, valid from now for
// LeafLife, never longer than the CA itself.
func (ca *CA) Issue(r Request, now time.Time) (Credential, error) {
	t, err := template(r, now)
	if err != nil {
		return Credential{}, err
	}
	if t.SerialNumber, err = newSerial(); err != nil {
		return Credential{}, err
	}
	if t.NotAfter.After(ca.cert.NotAfter) {
		t.NotAfter = ca.cert.NotAfter
	}
	if !t.NotAfter.After(now) {
		return Credential{}, fmt.Errorf("pki: CA %q expired on %s: make a new one", ca.cert.Subject.CommonName, ca.cert.NotAfter.Format(time.DateOnly))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Credential{}, fmt.Errorf("pki: make the key of %q: %w", r.Name, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.cert, key.Public(), ca.key)
	if err != nil {
		return Credential{}, fmt.Errorf("pki: sign %q: %w", r.Name, err)
	}
	return encode(der, key)
}

// template is the certificate of r but for its serial.
func template(r Request, now time.Time) (*x509.Certificate, error) {
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: r.Name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(LeafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		DNSNames: append([]string(nil), r.DNS...),
	}
	for _, ip := range r.IPs {
		t.IPAddresses = append(t.IPAddresses, ip.Unmap().AsSlice())
	}
	server, client := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	var err error
	switch r.Kind {
	case KindNode:
		err = CheckNode(r.Name)
		t.ExtKeyUsage = []x509.ExtKeyUsage{server, client}
		t.URIs = []*url.URL{uri(NodePrefix, r.Name)}
		t.DNSNames = append(t.DNSNames, r.Name)
	case KindKME:
		err = CheckNode(r.Name)
		t.ExtKeyUsage = []x509.ExtKeyUsage{server}
		t.URIs = []*url.URL{uri(NodePrefix, r.Name)}
		t.DNSNames = append(t.DNSNames, r.Name)
	case KindSAE:
		err = CheckSAE(r.Name)
		t.ExtKeyUsage = []x509.ExtKeyUsage{client}
		t.URIs = []*url.URL{uri(SAEPrefix, r.Name)}
	case KindGateway:
		if r.Name == "" || strings.ContainsAny(r.Name, " @,=/") {
			err = fmt.Errorf("IKE identity %q is not a domain name", r.Name)
		}
		t.ExtKeyUsage = []x509.ExtKeyUsage{server, client}
		t.DNSNames = append(t.DNSNames, r.Name)
	default:
		err = fmt.Errorf("unknown kind %d", r.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("pki: issue: %w", err)
	}
	return t, nil
}

// newSerial is 127 random bits and never zero (RFC 5280 section 4.1.2.2).
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("pki: draw a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func encode(der []byte, key *ecdsa.PrivateKey) (Credential, error) {
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Credential{}, fmt.Errorf("pki: encode a key: %w", err)
	}
	defer clear(k)
	return Credential{
		Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k}),
	}, nil
}

// parseCert reads the first certificate of PEM text.
func parseCert(b []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("pki: not a certificate in PEM")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	return c, nil
}
