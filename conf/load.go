package conf

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// The defaults of qipsecd.toml; the sample file shows each in its place.
const (
	defaultStateDir       = "/var/lib/q-ipsec"
	defaultSocket         = "/run/q-ipsec/operator.sock"
	defaultVICI           = "/run/charon.vici"
	defaultPlugin         = "/run/q-ipsec/plugin.sock"
	defaultIntakeInterval = time.Second
	defaultLease          = 1024
	defaultNoticeTTL      = 5 * time.Minute
	defaultRatchet        = 10 * time.Minute
	defaultRatchetKeys    = 100_000
	defaultStoredAge      = 30 * 24 * time.Hour
	defaultMaxKeys        = 10_000_000
	defaultMaxKeyAge      = time.Hour
	defaultIKERekey       = 4 * time.Hour
	defaultChildRekey     = 10 * time.Minute
	defaultDPD            = 30 * time.Second
	defaultReplayWindow   = 128
)

// LoadNode reads qipsecd's config from a file and checks that file and those it
// names as well: what others can change, secrets that they can read, missing
// certificates and intake directories are faults. The error is a *Faults unless the file cannot be read.
func LoadNode(name string) (*Node, error) {
	text, dir, err := readConfig(name)
	if err != nil {
		return nil, err
	}
	r := &reader{dir: dir}
	r.private(name)
	n := r.node(text)
	if n != nil {
		r.nodeFiles(n)
	}
	if err := r.err(name); err != nil {
		return nil, err
	}
	n.File = filepath.Join(dir, filepath.Base(name))
	return n, nil
}

// ReadNode reads qipsecd's config from a file without a look at any other file:
// for what must work while a certificate is missing, such as the guard.
func ReadNode(name string) (*Node, error) {
	text, dir, err := readConfig(name)
	if err != nil {
		return nil, err
	}
	n, err := ParseNode(name, dir, text)
	if err != nil {
		return nil, err
	}
	n.File = filepath.Join(dir, filepath.Base(name))
	return n, nil
}

// ParseNode reads qipsecd's config from text without a look at any other file.
// Relative paths start at dir; file is its name in errors, which are *Faults.
func ParseNode(file, dir string, text []byte) (*Node, error) {
	r := &reader{dir: dir}
	n := r.node(text)
	if err := r.err(file); err != nil {
		return nil, err
	}
	return n, nil
}

func (r *reader) node(text []byte) *Node {
	var raw rawNode
	if !r.decode(text, &raw) {
		return nil
	}
	n := &Node{
		Name:     need(r, "node.name", raw.Node.Name, checked(pki.CheckNode)),
		StateDir: r.path("node.state_dir", raw.Node.StateDir, defaultStateDir),
		Operator: Operator{Socket: r.socket("operator.socket", raw.Operator.Socket, defaultSocket)},
		Log: Log{
			JSON:  parse(r, "log.format", raw.Log.Format, "text", oneOf("text", "json")) == "json",
			Level: parse(r, "log.level", raw.Log.Level, slog.LevelInfo, parseLevel),
		},
	}
	n.RootFile = r.path("node.root_file", raw.Node.RootFile, filepath.Join(n.StateDir, "root"))
	if n.RootCredential = raw.Node.RootCredential; strings.Contains(n.RootCredential, "/") {
		n.RootCredential = r.path("node.root_credential", n.RootCredential, "")
	} else {
		n.RootCredential = parse(r, "node.root_credential", n.RootCredential, "", credentialName)
	}
	r.inventory(n, raw.Node)
	if raw.KMS == nil && raw.IPsec == nil {
		r.fault("", "neither [kms] nor [ipsec]: this node would do nothing")
	}
	if raw.KMS != nil {
		n.KMS = r.kms(raw.KMS, &raw.TLS, n.Name)
		if len(n.KMS.Members) > 0 && !n.Shared() {
			r.fault("kms.members", "several machines share an inventory on PostgreSQL only: set node.inventory to its URL")
		}
	}
	if raw.IPsec != nil {
		n.IPsec = r.ipsec(raw.IPsec, n)
	}
	r.intakesApart(n, filepath.Clean)
	return n
}

func (r *reader) kms(raw *rawKMS, tls *rawTLS, self string) *KMS {
	k := &KMS{
		Type1Listen:     need(r, "kms.type1_listen", raw.Type1Listen, listener),
		Type1:           r.files("tls.km", tls.KM),
		Type2Listen:     parse(r, "kms.type2_listen", raw.Type2Listen, netip.AddrPort{}, listener),
		IntakeInterval:  parse(r, "kms.intake_interval", raw.IntakeInterval, defaultIntakeInterval, span(10*time.Millisecond, time.Hour)),
		Lease:           int(r.number("kms.lease", raw.Lease, defaultLease, 1, 1<<16)),
		NoticeTTL:       parse(r, "kms.notice_ttl", raw.NoticeTTL, defaultNoticeTTL, seconds(time.Second, time.Hour)),
		RatchetInterval: parse(r, "kms.ratchet_interval", raw.RatchetInterval, defaultRatchet, span(time.Second, defaultRatchet)),
		RatchetKeys:     int(r.number("kms.ratchet_keys", raw.RatchetKeys, defaultRatchetKeys, 1, defaultRatchetKeys)),
		MaxKeyAge:       parse(r, "kms.max_key_age", raw.MaxKeyAge, defaultStoredAge, spanOrNone(time.Minute, 10*365*24*time.Hour)),
		MaxKeys:         int(r.number("kms.max_keys", raw.MaxKeys, defaultMaxKeys, 0, 1<<40)),
		RetryWindow:     parse(r, "kms.retry_window", raw.RetryWindow, 0, span(0, time.Minute)),
		Reserve:         int(r.number("kms.reserve", raw.Reserve, 0, 0, 1<<16)),
	}
	if k.Type2Listen.IsValid() {
		k.Type2 = r.files("tls.sae", tls.SAE)
	}
	if collide(k.Type1Listen, k.Type2Listen) {
		r.fault("kms.type2_listen", "%v and type1_listen, %v, are one port: the second could not be had", k.Type2Listen, k.Type1Listen)
	}
	k.Members = r.remotes("kms.members", raw.Members, "kms.type1_listen", raw.Type1Listen)
	nodes := map[string]string{self: "node.name"}
	for i, p := range raw.Peer {
		at := fmt.Sprintf("kms.peer[%d].", i)
		v := Peer{
			Name:    need(r, at+"name", p.Name, checked(pki.CheckNode)),
			Address: need(r, at+"address", p.Address, remote),
			More:    r.remotes(at+"more_addresses", p.More, at+"address", p.Address),
		}
		r.unique(at+"name", v.Name, nodes)
		k.Peers = append(k.Peers, v)
	}
	r.pairs(k, raw.Pair, nodes, self)
	ids := map[string]string{}
	for i, s := range raw.SAE {
		k.SAEs = append(k.SAEs, r.sae(fmt.Sprintf("kms.sae[%d].", i), s, nodes, ids))
	}
	for i, s := range k.SAEs {
		for _, p := range s.Peers {
			if !slices.ContainsFunc(k.SAEs, func(o SAE) bool { return o.ID == p && o.Node != self }) {
				r.fault(fmt.Sprintf("kms.sae[%d].peers", i), "%q is no SAE at another node", p)
			}
		}
	}
	return k
}

func (r *reader) pairs(k *KMS, raw []rawPair, nodes map[string]string, self string) {
	ids, intakes, devices := map[string]string{}, map[string]string{}, map[string]string{}
	for i, p := range raw {
		at := fmt.Sprintf("kms.pair[%d].", i)
		v := Pair{
			ID:         need(r, at+"id", p.ID, parseUUID),
			Role:       need(r, at+"role", p.Role, key.ParseRole),
			Peer:       need(r, at+"peer", p.Peer, checked(pki.CheckNode)),
			QKDID:      need(r, at+"qkd_id", p.QKDID, parseUUID),
			PeerQKDID:  need(r, at+"peer_qkd_id", p.PeerQKDID, parseUUID),
			Intake:     r.path(at+"intake", p.Intake, ""),
			Feeder:     p.Feeder,
			FeederAddr: parse(r, at+"feeder_addr", p.FeederAddr, netip.Addr{}, address), FeederListen: parse(r, at+"feeder_listen", p.FeederListen, netip.AddrPort{}, remote),
			Algorithm: parse(r, at+"algorithm", p.Algorithm, Poly1305, oneOf(Poly1305, SHA256, SHA3256)),
			Control:   parse(r, at+"control", p.Control, "", parseHTTPS),
		}
		if _, ok := nodes[v.Peer]; v.Peer != "" && (!ok || v.Peer == self) {
			r.fault(at+"peer", "%q is no [[kms.peer]]", v.Peer)
		}
		r.feeder(at, p)
		r.unique(at+"id", p.ID, ids)
		r.unique(at+"intake", v.Intake, intakes)
		r.unique(at+"qkd_id", p.QKDID, devices)
		r.unique(at+"peer_qkd_id", p.PeerQKDID, devices)
		k.Pairs = append(k.Pairs, v)
	}
}

// feeder checks that both ends of the QKDE's SFTP are named or none. It looks at the
// text, so that one that is at fault is not reported as missing as well.
func (r *reader) feeder(at string, p rawPair) {
	from, errFrom := netip.ParseAddr(p.FeederAddr)
	to, errTo := netip.ParseAddrPort(p.FeederListen)
	switch {
	case p.FeederAddr != "" && p.FeederListen == "" && errFrom == nil && !from.IsLoopback():
		r.fault(at+"feeder_listen", "is missing: the address and port that the QKDE at feeder_addr, %v, calls", from)
	case p.FeederAddr == "" && p.FeederListen != "":
		r.fault(at+"feeder_addr", "is missing: the address that calls feeder_listen, %s", p.FeederListen)
	case errFrom == nil && errTo == nil && from.Unmap().Is4() != to.Addr().Unmap().Is4():
		r.fault(at+"feeder_listen", "%v and feeder_addr, %v, are of different families", to, from)
	}
}

func (r *reader) sae(at string, raw rawSAE, nodes, ids map[string]string) SAE {
	s := SAE{
		ID:          need(r, at+"id", raw.ID, checked(pki.CheckSAE)),
		Node:        need(r, at+"node", raw.Node, checked(pki.CheckNode)),
		IPsec:       raw.IPsec,
		Peers:       raw.Peers,
		Rate:        int(r.number(at+"rate", raw.Rate, 0, 0, 1<<30)),
		NotFound404: raw.NotFound404,
	}
	s.Burst = int(r.number(at+"burst", raw.Burst, int64(s.Rate), 0, 1<<30))
	if s.Burst > 0 && s.Rate == 0 {
		r.fault(at+"burst", "means nothing without rate")
	}
	r.unique(at+"id", s.ID, ids)
	if nodes[""] != "" {
		return s // our own name is at fault: we cannot tell here from there
	}
	if _, ok := nodes[s.Node]; s.Node != "" && !ok {
		r.fault(at+"node", "%q is neither this node nor a [[kms.peer]]", s.Node)
	}
	if local := nodes[s.Node] == "node.name"; local && len(s.Peers) == 0 {
		r.fault(at+"peers", "is missing: the SAEs that %q may share keys with", s.ID)
	} else if !local && (len(s.Peers) > 0 || s.Rate > 0 || s.NotFound404) {
		r.fault(at+"node", "peers, rate and not_found_404 are set where the SAE is, at node %q", s.Node)
	}
	return s
}

// files takes the three files of one channel.
func (r *reader) files(at string, raw rawFiles) pki.Files {
	return pki.Files{
		CA:   r.path(at+".ca", raw.CA, ""),
		Cert: r.path(at+".cert", raw.Cert, ""),
		Key:  r.path(at+".key", raw.Key, ""),
	}
}

// socket takes a unix socket's path, which the kernel bounds at 107 bytes.
func (r *reader) socket(field, text, def string) string {
	p := r.path(field, text, def)
	if len(p) > 107 {
		r.fault(field, "%s has %d characters, a unix socket's path at most 107", p, len(p))
	}
	return p
}

func listener(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("want ADDRESS:PORT to listen on, such as 192.0.2.1:8441 or [2001:db8::1]:8441")
	}
	if a.Addr().IsMulticast() {
		return netip.AddrPort{}, fmt.Errorf("is a multicast address")
	}
	return a, nil
}

// remotes takes a list of addresses, none of them twice and none that of another field.
func (r *reader) remotes(field string, list []string, other, address string) (out []netip.AddrPort) {
	seen := map[string]string{}
	r.unique(other, address, seen)
	for i, text := range list {
		at := fmt.Sprintf("%s[%d]", field, i)
		out = append(out, need(r, at, text, remote))
		r.unique(at, text, seen)
	}
	return out
}

// collide tells whether one machine cannot listen on both. On [::] it listens on
// all addresses of IPv4 as well.
func collide(a, b netip.AddrPort) bool {
	x, y := a.Addr().Unmap(), b.Addr().Unmap()
	if !a.IsValid() || !b.IsValid() || a.Port() != b.Port() {
		return false
	}
	all := func(any, other netip.Addr) bool { return any.IsUnspecified() && (any.Is6() || other.Is4()) }
	return x == y || all(x, y) || all(y, x)
}

func remote(s string) (netip.AddrPort, error) {
	a, err := listener(s)
	if err == nil && a.Addr().IsUnspecified() {
		err = fmt.Errorf("want the address the peer listens on")
	}
	return a, err
}

func parseUUID(s string) (uuid.UUID, error) {
	if len(s) != 36 {
		return uuid.Nil, fmt.Errorf("want a UUID of 36 characters")
	}
	u, err := uuid.Parse(s)
	if err == nil && u == uuid.Nil {
		err = fmt.Errorf("is the nil UUID")
	}
	return u, err
}

func parseLevel(s string) (l slog.Level, err error) {
	w, err := oneOf("debug", "info", "warn", "error")(s)
	if err != nil {
		return 0, err
	}
	return l, l.UnmarshalText([]byte(w))
}
