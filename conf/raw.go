package conf

// The structs below are the shape of qipsecd.toml. Text that needs parsing
// stays text here, so that one pass can report every fault; pointers tell absent
// from zero. Nothing outside this package sees them.

type rawNode struct {
	Node     rawNodeSection `toml:"node"`
	Log      rawLog         `toml:"log"`
	Operator rawOperator    `toml:"operator"`
	TLS      rawTLS         `toml:"tls"`
	KMS      *rawKMS        `toml:"kms"`
	IPsec    *rawIPsec      `toml:"ipsec"`
}

type rawNodeSection struct {
	Name     string `toml:"name"`
	StateDir string `toml:"state_dir"`
	RootFile string `toml:"root_file"`

	RootCredential string `toml:"root_credential"`

	Inventory         string `toml:"inventory"`
	InventoryPassword string `toml:"inventory_password_file"`
}

type rawLog struct {
	Format string `toml:"format"`
	Level  string `toml:"level"`
}

type rawOperator struct {
	Socket string `toml:"socket"`
}

type rawTLS struct {
	KM  rawFiles `toml:"km"`
	SAE rawFiles `toml:"sae"`
}

type rawFiles struct {
	CA   string `toml:"ca"`
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

type rawKMS struct {
	Type1Listen     string    `toml:"type1_listen"`
	Type2Listen     string    `toml:"type2_listen"`
	IntakeInterval  string    `toml:"intake_interval"`
	Lease           *int64    `toml:"lease"`
	NoticeTTL       string    `toml:"notice_ttl"`
	RatchetInterval string    `toml:"ratchet_interval"`
	RatchetKeys     *int64    `toml:"ratchet_keys"`
	MaxKeyAge       string    `toml:"max_key_age"`
	MaxKeys         *int64    `toml:"max_keys"`
	RetryWindow     string    `toml:"retry_window"`
	Reserve         *int64    `toml:"reserve"`
	Members         []string  `toml:"members"`
	Peer            []rawPeer `toml:"peer"`
	Pair            []rawPair `toml:"pair"`
	SAE             []rawSAE  `toml:"sae"`
}

type rawPeer struct {
	Name    string   `toml:"name"`
	Address string   `toml:"address"`
	More    []string `toml:"more_addresses"`
}

type rawPair struct {
	ID        string `toml:"id"`
	Role      string `toml:"role"`
	Peer      string `toml:"peer"`
	QKDID     string `toml:"qkd_id"`
	PeerQKDID string `toml:"peer_qkd_id"`
	Intake    string `toml:"intake"`
	Feeder    string `toml:"feeder"`

	FeederAddr   string `toml:"feeder_addr"`
	FeederListen string `toml:"feeder_listen"`

	Algorithm string `toml:"algorithm"`
	Control   string `toml:"control"`
}

type rawSAE struct {
	ID          string   `toml:"id"`
	Node        string   `toml:"node"`
	IPsec       bool     `toml:"ipsec"`
	Peers       []string `toml:"peers"`
	Rate        *int64   `toml:"rate"`
	Burst       *int64   `toml:"burst"`
	NotFound404 bool     `toml:"not_found_404"`
}

type rawIPsec struct {
	VICI       string          `toml:"vici"`
	Plugin     string          `toml:"plugin"`
	CA         string          `toml:"ca"`
	Cert       string          `toml:"cert"`
	Key        string          `toml:"key"`
	Guard      *bool           `toml:"guard"`
	Reserve    *int64          `toml:"rekey_reserve"`
	KME        []rawKME        `toml:"kme"`
	Connection []rawConnection `toml:"connection"`
}

type rawKME struct {
	Name string `toml:"name"`
	URL  string `toml:"url"`
	rawFiles
	TLS12     bool   `toml:"tls12"`
	UseGET    bool   `toml:"use_get"`
	StringIDs bool   `toml:"string_ids"`
	Class     string `toml:"class"`
}

type rawConnection struct {
	Name             string     `toml:"name"`
	LocalSAE         string     `toml:"local_sae"`
	PeerSAE          string     `toml:"peer_sae"`
	KME              string     `toml:"kme"`
	Policy           string     `toml:"policy"`
	Mix              string     `toml:"mix"`
	MinClass         string     `toml:"min_class"`
	AllowRelayedOnly bool       `toml:"allow_relayed_only"`
	MaxKeyAge        string     `toml:"max_key_age"`
	MaxKeyBytes      *int64     `toml:"max_key_bytes"`
	MaxKeyPackets    *int64     `toml:"max_key_packets"`
	LocalAddr        string     `toml:"local_addr"`
	RemoteAddr       string     `toml:"remote_addr"`
	LocalID          string     `toml:"local_id"`
	RemoteID         string     `toml:"remote_id"`
	Proposals        []string   `toml:"proposals"`
	RekeyTime        string     `toml:"rekey_time"`
	ReauthTime       string     `toml:"reauth_time"`
	DPDDelay         string     `toml:"dpd_delay"`
	MOBIKE           bool       `toml:"mobike"`
	Encap            bool       `toml:"encap"`
	Child            []rawChild `toml:"child"`
}

type rawChild struct {
	Name         string   `toml:"name"`
	LocalTS      []string `toml:"local_ts"`
	RemoteTS     []string `toml:"remote_ts"`
	ESPProposals []string `toml:"esp_proposals"`
	Mode         string   `toml:"mode"`
	Start        string   `toml:"start"`
	RekeyTime    string   `toml:"rekey_time"`
	RekeyBytes   *int64   `toml:"rekey_bytes"`
	RekeyPackets *int64   `toml:"rekey_packets"`
	ReplayWindow *int64   `toml:"replay_window"`
	MarkIn       string   `toml:"mark_in"`
	MarkOut      string   `toml:"mark_out"`
	SetMarkIn    string   `toml:"set_mark_in"`
	SetMarkOut   string   `toml:"set_mark_out"`
	IfIDIn       *int64   `toml:"if_id_in"`
	IfIDOut      *int64   `toml:"if_id_out"`
	CopyDF       *bool    `toml:"copy_df"`
	CopyECN      *bool    `toml:"copy_ecn"`
	CopyDSCP     string   `toml:"copy_dscp"`
}
