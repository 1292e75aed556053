package vici

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	govici "github.com/strongswan/govici/vici"
)

// Conn is a connection as load-conn takes it. Empty fields are left to charon's
// defaults. Authentication is by public key on both sides, IKEv2 only.
type Conn struct {
	Name                    string
	LocalAddrs, RemoteAddrs []string
	Proposals               []string
	Unique                  string        // no, never, keep, replace
	RekeyTime, ReauthTime   time.Duration // 0: never
	DPDDelay                time.Duration
	Encap                   bool
	MOBIKE                  bool
	Local, Remote           Auth
	Children                []Child
}

// Auth is one side's authentication round.
type Auth struct {
	ID      string
	Certs   [][]byte // PEM or DER
	CACerts [][]byte // PEM or DER; only certificates under one of these are taken
}

// Child is a CHILD_SA's configuration. Zero counts and times of rekeying are
// sent and switch it off; a zero LifeTime or ReplayWindow leaves charon's default.
type Child struct {
	Name                     string
	LocalTS, RemoteTS        []string
	Proposals                []string
	Mode                     string        // tunnel or transport
	RekeyTime                time.Duration // the latest; charon begins up to a tenth earlier, by chance
	LifeTime                 time.Duration // 0: charon's default, a tenth above RekeyTime
	RekeyBytes, RekeyPackets uint64
	LifeBytes, LifePackets   uint64 // 0: no limit
	Trap                     bool   // install a trap policy: traffic brings the child up
	ReplayWindow             uint32
	MarkIn, MarkOut          string // VALUE/MASK; MarkIn is that of the inbound policies, not of the SA
	SetMarkIn, SetMarkOut    string
	IfIDIn, IfIDOut          uint32
	NoCopyDF, NoCopyECN      bool
	CopyDSCP                 string // out (charon's default), in, yes, no
}

type connMessage struct {
	Version     string   `vici:"version"`
	LocalAddrs  []string `vici:"local_addrs"`
	RemoteAddrs []string `vici:"remote_addrs"`
	Proposals   []string `vici:"proposals"`
	Unique      string   `vici:"unique"`
	RekeyTime   string   `vici:"rekey_time"`
	ReauthTime  string   `vici:"reauth_time"`
	DPDDelay    string   `vici:"dpd_delay"`
	Encap       bool     `vici:"encap"`
	MOBIKE      bool     `vici:"mobike"`
	Local       authPart `vici:"local"`
	Remote      authPart `vici:"remote"`
}

type authPart struct {
	Auth    string   `vici:"auth"`
	ID      string   `vici:"id"`
	Certs   []string `vici:"certs"`
	CACerts []string `vici:"cacerts"`
}

type childMessage struct {
	LocalTS      []string `vici:"local_ts"`
	RemoteTS     []string `vici:"remote_ts"`
	Proposals    []string `vici:"esp_proposals"`
	Mode         string   `vici:"mode"`
	RekeyTime    string   `vici:"rekey_time"`
	RandTime     string   `vici:"rand_time"`
	LifeTime     string   `vici:"life_time"`
	RekeyBytes   string   `vici:"rekey_bytes"`
	RandBytes    string   `vici:"rand_bytes"`
	LifeBytes    string   `vici:"life_bytes"`
	RekeyPackets string   `vici:"rekey_packets"`
	RandPackets  string   `vici:"rand_packets"`
	LifePackets  string   `vici:"life_packets"`
	StartAction  string   `vici:"start_action"`
	CloseAction  string   `vici:"close_action"`
	DPDAction    string   `vici:"dpd_action"`
	ReplayWindow string   `vici:"replay_window"`
	MarkIn       string   `vici:"mark_in"`
	MarkOut      string   `vici:"mark_out"`
	SetMarkIn    string   `vici:"set_mark_in"`
	SetMarkOut   string   `vici:"set_mark_out"`
	IfIDIn       string   `vici:"if_id_in"`
	IfIDOut      string   `vici:"if_id_out"`
	CopyDF       string   `vici:"copy_df"`
	CopyECN      string   `vici:"copy_ecn"`
	CopyDSCP     string   `vici:"copy_dscp"`
}

// message gives the argument of load-conn. Children are sent in the order of
// their names.
func (c Conn) message() (*govici.Message, error) {
	if c.Name == "" || len(c.Children) == 0 {
		return nil, fmt.Errorf("a connection needs a name and at least one child")
	}
	body, err := govici.MarshalMessage(connMessage{
		Version:    "2",
		LocalAddrs: c.LocalAddrs, RemoteAddrs: c.RemoteAddrs,
		Proposals: c.Proposals, Unique: c.Unique,
		RekeyTime: seconds(c.RekeyTime), ReauthTime: seconds(c.ReauthTime), DPDDelay: seconds(c.DPDDelay),
		Encap: c.Encap, MOBIKE: c.MOBIKE,
		Local: c.Local.part(), Remote: c.Remote.part(),
	})
	if err != nil {
		return nil, err
	}
	children := govici.NewMessage()
	byName := slices.SortedFunc(slices.Values(c.Children), func(a, b Child) int { return cmp.Compare(a.Name, b.Name) })
	for _, ch := range byName {
		if children.Get(ch.Name) != nil {
			return nil, fmt.Errorf("child %s is named twice", ch.Name)
		}
		m, err := ch.message()
		if err != nil {
			return nil, err
		}
		if err := children.Set(ch.Name, m); err != nil {
			return nil, err
		}
	}
	if err := body.Set("children", children); err != nil {
		return nil, err
	}
	m := govici.NewMessage()
	return m, m.Set(c.Name, body)
}

func (a Auth) part() authPart {
	p := authPart{Auth: "pubkey", ID: a.ID}
	for _, c := range a.Certs {
		p.Certs = append(p.Certs, string(c))
	}
	for _, c := range a.CACerts {
		p.CACerts = append(p.CACerts, string(c))
	}
	return p
}

func (c Child) message() (*govici.Message, error) {
	m := childMessage{
		LocalTS: c.LocalTS, RemoteTS: c.RemoteTS, Proposals: c.Proposals, Mode: c.Mode,
		RekeyTime: seconds(c.RekeyTime),
		// Charon's own choice, life minus rekey, may be more than rekey, and then
		// the soft limit is any number.
		RandTime:     seconds(c.RekeyTime / 10),
		RekeyBytes:   strconv.FormatUint(c.RekeyBytes, 10),
		RandBytes:    strconv.FormatUint(c.RekeyBytes/10, 10),
		LifeBytes:    strconv.FormatUint(c.LifeBytes, 10),
		RekeyPackets: strconv.FormatUint(c.RekeyPackets, 10),
		RandPackets:  strconv.FormatUint(c.RekeyPackets/10, 10),
		LifePackets:  strconv.FormatUint(c.LifePackets, 10),
		StartAction:  "none", CloseAction: "none", DPDAction: "clear",
		ReplayWindow: unlessZero(c.ReplayWindow),
		MarkIn:       c.MarkIn, MarkOut: c.MarkOut, SetMarkIn: c.SetMarkIn, SetMarkOut: c.SetMarkOut,
		IfIDIn: unlessZero(c.IfIDIn), IfIDOut: unlessZero(c.IfIDOut), CopyDSCP: c.CopyDSCP,
	}
	if c.LifeTime > 0 {
		m.LifeTime = seconds(c.LifeTime)
	}
	if c.Trap {
		m.StartAction = "trap"
	}
	if c.NoCopyDF {
		m.CopyDF = "no"
	}
	if c.NoCopyECN {
		m.CopyECN = "no"
	}
	return govici.MarshalMessage(m)
}

// seconds is charon's text of a time; fractions are cut.
func seconds(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }

// unlessZero is n's text; none for 0, which leaves charon's default.
func unlessZero(n uint32) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(n), 10)
}
