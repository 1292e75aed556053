package conf

import (
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// Sim is the configuration of qkdsim: one QKD pair.
type Sim struct {
	Pair        uuid.UUID
	Hash        string // of the files: "sha-256" or "sha3-256"
	KeysPerFile int
	FirstKeys   int     // keys delivered at once at the very first start
	OnDemand    bool    // generate only what the control interface asks for
	Speed       float64 // simulated seconds per second
	Seed        uint64  // 0: keys and chances from the kernel
	StateFile   string

	Device    string // name of a built-in device
	Km        float64
	DBPerKm   float64
	CapBits   float64 // bit/s, 0: none
	BlockBits int     // sifted bits per post-processing block

	Weather       SimWeather
	Master, Slave SimEnd
	Control       *SimControl // nil: no control interface
	Log           Log
}

// SimWeather is what goes wrong; see package qkdsim.
type SimWeather struct {
	Jitter, Drift                 float64
	OutageEvery, OutageLasts      time.Duration
	IntruderEvery, IntruderLasts  time.Duration
	IntruderShare                 float64
	LoseMaster, LoseSlave         float64
	DamageMaster, DamageSlave     float64
	TruncateMaster, TruncateSlave float64
}

// SimEnd is one device and the way to its node.
type SimEnd struct {
	Node string // who may control the device
	QKD  uuid.UUID
	Dir  string   // local intake directory; empty with SFTP
	SFTP *SimSFTP // nil with Dir
}

// SimSFTP names a node's SFTP server.
type SimSFTP struct {
	Address string // host:port
	User    string
	Key     string // file: the private key, OpenSSH format
	HostKey string // file: the server's public key, one line as in ssh_host_*_key.pub
	Dir     string // intake directory on the server
}

// SimControl is the QKDE control interface.
type SimControl struct {
	Listen netip.AddrPort
	Files  pki.Files
}

type rawSim struct {
	Log  rawLog `toml:"log"`
	Pair struct {
		ID          string   `toml:"id"`
		Hash        string   `toml:"hash"`
		KeysPerFile *int64   `toml:"keys_per_file"`
		FirstKeys   *int64   `toml:"first_keys"`
		OnDemand    bool     `toml:"on_demand"`
		Speed       *float64 `toml:"speed"`
		Seed        *int64   `toml:"seed"`
		StateFile   string   `toml:"state_file"`
	} `toml:"pair"`
	Link struct {
		Device    string   `toml:"device"`
		Km        *float64 `toml:"km"`
		DBPerKm   *float64 `toml:"db_per_km"`
		Cap       *float64 `toml:"cap_bps"`
		BlockBits *int64   `toml:"block_bits"`
	} `toml:"link"`
	Weather struct {
		Jitter         *float64 `toml:"jitter"`
		Drift          *float64 `toml:"drift"`
		OutageEvery    string   `toml:"outage_every"`
		OutageLasts    string   `toml:"outage_lasts"`
		IntruderEvery  string   `toml:"intruder_every"`
		IntruderLasts  string   `toml:"intruder_lasts"`
		IntruderShare  *float64 `toml:"intruder_share"`
		LoseMaster     *float64 `toml:"lose_master"`
		LoseSlave      *float64 `toml:"lose_slave"`
		DamageMaster   *float64 `toml:"damage_master"`
		DamageSlave    *float64 `toml:"damage_slave"`
		TruncateMaster *float64 `toml:"truncate_master"`
		TruncateSlave  *float64 `toml:"truncate_slave"`
	} `toml:"weather"`
	Master  rawSimEnd `toml:"master"`
	Slave   rawSimEnd `toml:"slave"`
	Control *struct {
		Listen string `toml:"listen"`
		rawFiles
	} `toml:"control"`
}

type rawSimEnd struct {
	Node string `toml:"node"`
	QKD  string `toml:"qkd_id"`
	Dir  string `toml:"dir"`
	SFTP *struct {
		Address string `toml:"address"`
		User    string `toml:"user"`
		Key     string `toml:"key"`
		HostKey string `toml:"host_key"`
		Dir     string `toml:"dir"`
	} `toml:"sftp"`
}

// LoadSim reads qkdsim's config from a file and checks that file and those it
// names: what others can change, and keys that they can read, are faults.
// The error is a *Faults unless the file cannot be read.
func LoadSim(name string) (*Sim, error) {
	text, dir, err := readConfig(name)
	if err != nil {
		return nil, err
	}
	r := &reader{dir: dir}
	r.trusted("", resolved(name))
	s := r.sim(text)
	if s != nil {
		r.simFiles(s)
	}
	if err := r.err(name); err != nil {
		return nil, err
	}
	return s, nil
}

// ParseSim reads qkdsim's config from text without a look at any other file.
// Relative paths start at dir; file is its name in errors, which are *Faults.
func ParseSim(file, dir string, text []byte) (*Sim, error) {
	r := &reader{dir: dir}
	s := r.sim(text)
	if err := r.err(file); err != nil {
		return nil, err
	}
	return s, nil
}

func (r *reader) sim(text []byte) *Sim {
	var raw rawSim
	if !r.decode(text, &raw) {
		return nil
	}
	p, l := &raw.Pair, &raw.Link
	s := &Sim{
		Pair:        need(r, "pair.id", p.ID, parseUUID),
		Hash:        parse(r, "pair.hash", p.Hash, "sha-256", oneOf("sha-256", "sha3-256")),
		KeysPerFile: int(r.number("pair.keys_per_file", p.KeysPerFile, 1000, 1, 1<<20)),
		FirstKeys:   int(r.number("pair.first_keys", p.FirstKeys, 0, 0, 10_000_000)),
		OnDemand:    p.OnDemand,
		Speed:       r.real("pair.speed", p.Speed, 1, 1e-3, 1e4),
		Seed:        uint64(r.number("pair.seed", p.Seed, 0, 0, math.MaxInt64)),
		Device:      need(r, "link.device", l.Device, oneOf("ingaas-1ghz", "snspd-1ghz", "ingaas-100mhz")),
		Km:          r.real("link.km", l.Km, 50, 0, 1000),
		DBPerKm:     r.real("link.db_per_km", l.DBPerKm, 0.2, 0.01, 10),
		CapBits:     r.real("link.cap_bps", l.Cap, 0, 0, 1e12),
		BlockBits:   int(r.number("link.block_bits", l.BlockBits, 1_000_000, 1, 1<<40)),
		Weather:     r.weather(&raw),
		Master:      r.simEnd("master.", &raw.Master),
		Slave:       r.simEnd("slave.", &raw.Slave),
		Log: Log{
			JSON:  parse(r, "log.format", raw.Log.Format, "text", oneOf("text", "json")) == "json",
			Level: parse(r, "log.level", raw.Log.Level, slog.LevelInfo, parseLevel),
		},
	}
	if p.StateFile != "" {
		s.StateFile = r.path("pair.state_file", p.StateFile, "")
	} else if s.Seed == 0 {
		r.fault("pair.state_file", "is missing: without it a restart would use its seq numbers again, which the nodes refuse")
	}
	if s.Master.QKD == s.Slave.QKD && s.Master.QKD != uuid.Nil {
		r.fault("slave.qkd_id", "is that of the master")
	}
	if c := raw.Control; c != nil {
		s.Control = &SimControl{Listen: need(r, "control.listen", c.Listen, listener), Files: r.files("control", c.rawFiles)}
	}
	return s
}

func (r *reader) weather(raw *rawSim) SimWeather {
	w := &raw.Weather
	long := span(0, 366*24*time.Hour)
	chance := func(field string, v *float64) float64 { return r.real("weather."+field, v, 0, 0, 1) }
	return SimWeather{
		Jitter: chance("jitter", w.Jitter), Drift: chance("drift", w.Drift),
		OutageEvery:   parse(r, "weather.outage_every", w.OutageEvery, 0, long),
		OutageLasts:   parse(r, "weather.outage_lasts", w.OutageLasts, 0, long),
		IntruderEvery: parse(r, "weather.intruder_every", w.IntruderEvery, 0, long),
		IntruderLasts: parse(r, "weather.intruder_lasts", w.IntruderLasts, 0, long),
		IntruderShare: r.real("weather.intruder_share", w.IntruderShare, 1, 0, 1),
		LoseMaster:    chance("lose_master", w.LoseMaster), LoseSlave: chance("lose_slave", w.LoseSlave),
		DamageMaster: chance("damage_master", w.DamageMaster), DamageSlave: chance("damage_slave", w.DamageSlave),
		TruncateMaster: chance("truncate_master", w.TruncateMaster), TruncateSlave: chance("truncate_slave", w.TruncateSlave),
	}
}

func (r *reader) simEnd(at string, raw *rawSimEnd) SimEnd {
	e := SimEnd{
		Node: need(r, at+"node", raw.Node, checked(pki.CheckNode)),
		QKD:  need(r, at+"qkd_id", raw.QKD, parseUUID),
	}
	switch {
	case (raw.Dir == "") == (raw.SFTP == nil):
		r.fault(at+"dir", "want either dir or [%ssftp]", at)
	case raw.SFTP == nil:
		e.Dir = r.path(at+"dir", raw.Dir, "")
	default:
		f := raw.SFTP
		text := func(s string) (string, error) { return s, nil }
		e.SFTP = &SimSFTP{
			Address: need(r, at+"sftp.address", f.Address, text),
			User:    need(r, at+"sftp.user", f.User, text),
			Key:     r.path(at+"sftp.key", f.Key, ""),
			HostKey: r.path(at+"sftp.host_key", f.HostKey, ""),
			Dir:     need(r, at+"sftp.dir", f.Dir, text),
		}
	}
	return e
}

// real gives the value of a floating-point field between lo and hi, def if
// absent.
func (r *reader) real(field string, v *float64, def, lo, hi float64) float64 {
	if v == nil {
		return def
	}
	if !(*v >= lo && *v <= hi) {
		r.fault(field, "%v: want %v to %v", *v, lo, hi)
	}
	return *v
}

func (r *reader) simFiles(s *Sim) {
	for role, e := range map[key.Role]SimEnd{key.Master: s.Master, key.Slave: s.Slave} {
		switch {
		case e.Dir != "":
			if fi, err := os.Stat(e.Dir); err != nil || !fi.IsDir() {
				r.fault(fmt.Sprintf("%s.dir", role), "%s is not a directory we can reach", e.Dir)
			} else if m := fi.Mode().Perm(); m&0o022 != 0 {
				r.fault(fmt.Sprintf("%s.dir", role), "%s has mode %#o: others can change what is delivered; chmod go-w it", e.Dir, m)
			}
		case e.SFTP != nil:
			if err := pki.CheckSecret(e.SFTP.Key); err != nil {
				r.fault(fmt.Sprintf("%s.sftp.key", role), "%v", err)
			}
			r.dirOf(fmt.Sprintf("%s.sftp.key", role), e.SFTP.Key)
			r.trusted(fmt.Sprintf("%s.sftp.host_key", role), e.SFTP.HostKey)
			if _, err := os.Stat(e.SFTP.HostKey); err != nil {
				r.fault(fmt.Sprintf("%s.sftp.host_key", role), "%v", err)
			}
		}
	}
	if s.StateFile != "" {
		r.trusted("pair.state_file", s.StateFile)
	}
	if s.Control != nil {
		r.certificate("control", s.Control.Files)
	}
}
