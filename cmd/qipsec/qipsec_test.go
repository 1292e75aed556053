package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/conf"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/operator"
	"github.com/q-ipsec/q-ipsec/kms/pki"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// qipsec runs the real command table.
func qipsec(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), &app{out: &o, err: &e, now: time.Now}, args)
	return code, o.String(), e.String()
}

func mustRun(t *testing.T, args ...string) string {
	t.Helper()
	code, out, errs := qipsec(t, args...)
	if code != exitOK {
		t.Fatalf("qipsec %q: exit %d: %s%s", args, code, out, errs)
	}
	return out
}

func TestHelpIsGolden(t *testing.T) {
	var b strings.Builder
	b.WriteString(mustRun(t, "help"))
	for _, c := range commands() {
		b.WriteString("\n---\n" + mustRun(t, append([]string{"help"}, strings.Fields(c.name)...)...))
	}
	const name = "testdata/help.txt"
	if *update {
		if err := os.WriteFile(name, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("the help is not that of %s (go test -update rewrites it):\n%s", name, b.String())
	}
}

// Each example's command and flags exist: only what they name may be missing.
func TestExamplesParse(t *testing.T) {
	for _, c := range commands() {
		words := strings.Fields(c.example)
		if words[0] != "qipsec" {
			t.Errorf("%s: example %q", c.name, c.example)
		}
		got, rest, ok := find(words[1:])
		if !ok || got.name != c.name {
			t.Errorf("%s: its example runs %q", c.name, got.name)
			continue
		}
		fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
		fs.SetOutput(new(bytes.Buffer))
		c.setup(fs)
		if _, err := parseArgs(fs, rest); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestUsageIsExit2(t *testing.T) {
	for _, args := range [][]string{
		{},
		{"nonsense"},
		{"sae"},
		{"status", "x"},
		{"status", "--nonsense"},
		{"keys", "not-a-uuid"},
		{"explain"},
		{"init", "--pair", "a"},
		{"init", "a", "b"},
		{"init", "--pair", "A", "B"},
		{"init", "--pair", "a", "a"},
		{"init", "--pair", "a", "ca"},
		{"init", "--pair", "a", "b", "--address", "192.0.2.1"},
		{"init", "--pair", "a", "b", "--subnet", "10.0.0.0/8,x"},
		{"pki", "issue", "sae"},
		{"pki", "issue", "king", "x"},
		{"pki", "show"},
		{"history", "--pool", "x"},
		{"keyfile", "make"},
		{"sae", "get-key"},
		{"sae", "get-key-with-id", "--url", "https://x"},
		{"guard", "remove", "now"},
		{"store"},
		{"store", "check", "x"},
		{"store", "check", "--root", "x"},
		{"store", "export-history", "--from", "yesterday"},
		{"store", "backup"},
		{"store", "restore"},
		{"version", "x"},
	} {
		if code, out, errs := qipsec(t, args...); code != exitUsage || out != "" || errs == "" {
			t.Errorf("%q: exit %d, out %q, err %q", args, code, out, errs)
		}
	}
	if code, _, errs := qipsec(t, "pki", "show", "/nonexistent"); code != exitFailed || errs == "" {
		t.Errorf("a failure is exit %d", code)
	}
}

func TestFlagsMayFollowArguments(t *testing.T) {
	fs := flag.NewFlagSet("x", flag.ContinueOnError)
	a, b := fs.String("a", "", ""), fs.Bool("b", false, "")
	pos, err := parseArgs(fs, []string{"one", "-a", "v", "two", "--b", "--", "-c", "three"})
	if err != nil || *a != "v" || !*b || strings.Join(pos, " ") != "one two -c three" {
		t.Errorf("%q %q %v %v", pos, *a, *b, err)
	}
}

// The tunnels show how long the keys last.
func TestTunnelsShowTheSupply(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	for want, v := range map[string]operator.Tunnel{
		"120 never": {Supply: &operator.Supply{Level: 120, Rates: &operator.Rates{Supply: 2, Use: 1}}},
		"120 2m0s":  {Supply: &operator.Supply{Level: 120, Rates: &operator.Rates{Use: 1, DryInS: n(120)}}},
		"120 -":     {Supply: &operator.Supply{Level: 120}},
		"0 dry":     {Supply: &operator.Supply{}},
		"- -":       {},
		"1m0s 9m0s": {Children: []operator.Child{{KeyID: "id", AgeS: 60, RekeyInS: n(540)}}},
		"1m0s 0s":   {Children: []operator.Child{{KeyID: "id", AgeS: 60, RekeyInS: n(-5)}}},
	} {
		var b bytes.Buffer
		if err := printTunnels(&app{out: &b}, []operator.Tunnel{v}); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(strings.Fields(b.String()), " "); !strings.Contains(got, " "+want+" -") {
			t.Errorf("%q is not in %q", want, got)
		}
	}
}

// initPair writes a pair for trials and gives its directory.
func initPair(t *testing.T, more ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "site")
	mustRun(t, append([]string{"init", "--pair", "a", "b", "--out", dir, "--here", "--address", "127.0.0.1,127.0.0.2"}, more...)...)
	return dir
}

func TestInitWritesTwoNodesThatFit(t *testing.T) {
	dir := initPair(t, "--seed", "7")
	var n [2]*conf.Node
	for i, name := range []string{"a", "b"} {
		var err error
		if n[i], err = conf.LoadNode(filepath.Join(dir, name, "qipsecd.toml")); err != nil {
			t.Fatal(err)
		}
		if n[i].Name != name || n[i].KMS == nil || n[i].IPsec == nil {
			t.Errorf("%+v", n[i])
		}
	}
	p, q := n[0].KMS.Pairs[0], n[1].KMS.Pairs[0]
	if p.ID != q.ID || p.Role != key.Master || q.Role != key.Slave || p.QKDID != q.PeerQKDID || q.QKDID != p.PeerQKDID || p.ID.Version() != 8 {
		t.Errorf("pairs do not fit: %+v %+v", p, q)
	}
	if n[0].KMS.Peers[0].Address != n[1].KMS.Type1Listen || n[1].KMS.Peers[0].Address != n[0].KMS.Type1Listen {
		t.Error("addresses do not fit")
	}
	c, d := n[0].IPsec.Connection[0], n[1].IPsec.Connection[0]
	if c.Name != d.Name || c.LocalSAE != d.PeerSAE || c.RemoteID != d.LocalID || c.LocalAddr != d.RemoteAddr || c.Children[0].LocalTS[0] != d.Children[0].RemoteTS[0] {
		t.Errorf("connections do not fit: %+v %+v", c, d)
	}
	if c.Policy != conf.Required || c.Children[0].Start != conf.StartNow || d.Children[0].Start != conf.StartNone {
		t.Error("policy or start")
	}
	if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		want := os.FileMode(0o700)
		if !e.IsDir() {
			want = 0o600
			if filepath.Ext(path) == ".crt" {
				want = 0o644
			}
		}
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, fi.Mode().Perm(), want)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	for _, kind := range [][]string{{"km", "km-ca"}, {"kme", "sae-ca"}, {"ike", "ike-ca"}, {"saes/a-te", "sae-ca"}} {
		b := filepath.Join(dir, "a/pki", kind[0])
		if _, err := pki.KMEClient(pki.Files{CA: filepath.Join(dir, "a/pki", kind[1]+".crt"), Cert: b + ".crt", Key: b + ".key"}, false, slog.New(slog.DiscardHandler)); err != nil {
			t.Error(err)
		}
	}
	again := initPair(t, "--seed", "7")
	m, err := conf.LoadNode(filepath.Join(again, "a", "qipsecd.toml"))
	if err != nil || m.KMS.Pairs[0].ID != p.ID {
		t.Errorf("the same seed gave another pair: %v", err)
	}
	if m, err := conf.LoadNode(filepath.Join(initPair(t), "a", "qipsecd.toml")); err != nil || m.KMS.Pairs[0].ID == p.ID {
		t.Errorf("no seed gave the same pair: %v", err)
	}
}

func TestInitVariants(t *testing.T) {
	dir := initPair(t, "--no-ipsec")
	if n, err := conf.LoadNode(filepath.Join(dir, "b/qipsecd.toml")); err != nil || n.IPsec != nil || n.KMS == nil {
		t.Errorf("%+v %v", n, err)
	}
	out := filepath.Join(t.TempDir(), "v6")
	text := mustRun(t, "init", "--pair", "a", "b", "--out", out, "--address", "2001:db8::1,2001:db8::2", "--km-address", "192.0.2.1,192.0.2.2", "--subnet", "2001:db8:a::/64,2001:db8:b::/64")
	n, err := conf.LoadNode(filepath.Join(out, "a/qipsecd.toml"))
	if err != nil || n.KMS.Type1Listen.String() != "192.0.2.1:8441" || n.IPsec.Connection[0].RemoteAddr.String() != "2001:db8::2" || n.StateDir != "/var/lib/q-ipsec" {
		t.Errorf("%+v %v", n, err)
	}
	for _, must := range []string{"offline", "systemctl", "qipsec explain a-b"} {
		if !strings.Contains(text, must) {
			t.Errorf("what to do next lacks %q:\n%s", must, text)
		}
	}
}

func TestInitOverwritesOnlyByForce(t *testing.T) {
	dir := initPair(t)
	name := filepath.Join(dir, "a/pki/km.key")
	before, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"init", "--pair", "a", "b", "--out", dir, "--here"}
	if code, _, errs := qipsec(t, args...); code != exitFailed || !strings.Contains(errs, "--force") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if after, err := os.ReadFile(name); err != nil || !bytes.Equal(before, after) {
		t.Error("a key was overwritten without --force")
	}
	mustRun(t, append(args, "--force")...)
	if after, err := os.ReadFile(name); err != nil || bytes.Equal(before, after) {
		t.Error("--force replaced nothing")
	}
}

func TestPKI(t *testing.T) {
	dir := initPair(t)
	saes := filepath.Join(dir, "a/pki/saes")
	mustRun(t, "pki", "issue", "sae", "line-7", "--ca", filepath.Join(dir, "ca"), "--out", saes)
	var got []certInfo
	if err := json.Unmarshal([]byte(mustRun(t, "pki", "show", "--json", filepath.Join(saes, "line-7.crt"))), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Identity != "urn:q-ipsec:sae:line-7" || got[0].Expired || !strings.Contains(got[0].Issuer, "sae CA") {
		t.Errorf("%+v", got)
	}
	if code, _, errs := qipsec(t, "pki", "issue", "sae", "line-7", "--ca", filepath.Join(dir, "ca"), "--out", saes); code != exitFailed || !strings.Contains(errs, "--force") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if code, _, _ := qipsec(t, "pki", "show", filepath.Join(saes, "line-7.key")); code != exitFailed {
		t.Error("a key was shown as a certificate")
	}
}

func TestKeyfileMakeFeedsBothEnds(t *testing.T) {
	dir := initPair(t)
	args := []string{"keyfile", "make", "--config", filepath.Join(dir, "b/qipsecd.toml"), "--peer-config", filepath.Join(dir, "a/qipsecd.toml"), "--keys", "5", "--seq", "3"}
	mustRun(t, args...)
	var files [2]*keyfile.File
	for i, n := range []string{"a", "b"} {
		names, err := filepath.Glob(filepath.Join(dir, n, "intake", "*.qkd"))
		if err != nil || len(names) != 1 {
			t.Fatalf("%v %v", names, err)
		}
		var info keyfileInfo
		out := mustRun(t, "keyfile", "inspect", "--json", names[0])
		if err := json.Unmarshal([]byte(out), &info); err != nil {
			t.Fatal(err)
		}
		if info.Keys != 5 || info.Seq != 3 || info.Role != [2]string{"master", "slave"}[i] {
			t.Errorf("%+v", info)
		}
		text, err := os.ReadFile(names[0])
		if err != nil {
			t.Fatal(err)
		}
		if files[i], _, err = keyfile.Decode(text, keyfile.DefaultMaxSize); err != nil {
			t.Fatal(err)
		}
		defer files[i].Wipe()
		if b := base64.StdEncoding.EncodeToString(files[i].Data.Bytes()); strings.Contains(out, b[:40]) {
			t.Error("inspect shows key bytes")
		}
	}
	if !files[0].Data.Equal(files[1].Data) || files[0].QKD != files[1].PeerQKD {
		t.Error("the two ends' files do not fit")
	}
	if code, _, errs := qipsec(t, args...); code != exitFailed {
		t.Errorf("the same seq twice: exit %d %s", code, errs)
	}
	if code, _, errs := qipsec(t, append(args, "--pair", uuid.NewString())...); code != exitFailed || !strings.Contains(errs, "share 0 such") {
		t.Errorf("unknown pair: exit %d %s", code, errs)
	}
	if code, _, errs := qipsec(t, append(args, "--keys", "100000000")...); code != exitUsage {
		t.Errorf("too many keys: exit %d %s", code, errs)
	}
	bad := filepath.Join(dir, "bad")
	if err := os.WriteFile(bad, []byte(`{"version":1`), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := qipsec(t, "keyfile", "inspect", bad); code != exitFailed {
		t.Error("a truncated file passes")
	}
}

func TestPrintKeysShowsKeysOnlyWhenAsked(t *testing.T) {
	m, err := key.Take(bytes.Repeat([]byte{0xA5}, 32))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Wipe()
	b64 := base64.StdEncoding.EncodeToString(m.Bytes())
	keys := []key.SupplyKey{{ID: key.ID(uuid.New()), Material: m}}
	for _, c := range []struct{ show, json bool }{{false, false}, {false, true}, {true, false}, {true, true}} {
		var w bytes.Buffer
		if err := printKeys(&w, keys, c.show, c.json); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(w.String(), b64); got != c.show {
			t.Errorf("%+v: key shown: %v", c, got)
		}
		if strings.Contains(strings.ToLower(w.String()), "a5a5") || !strings.Contains(w.String(), m.Fingerprint()) || !strings.Contains(w.String(), keys[0].ID.String()) {
			t.Errorf("%+v: %s", c, &w)
		}
		if c.json && !json.Valid(w.Bytes()) {
			t.Errorf("not JSON: %s", &w)
		}
	}
}

// A member of a site says what it is, and who leads if it knows.
func TestSiteLine(t *testing.T) {
	at := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for want, v := range map[string]operator.Site{
		"leads since 2026":                        {State: operator.SiteLeader, Since: at},
		"supplies nothing since 2026":             {State: operator.SiteUncertain, Since: at},
		"no other member says that it leads":      {State: operator.SiteStandby, Since: at},
		"stands by since 2026":                    {State: operator.SiteStandby, Since: at, Leader: "192.0.2.4:8441", LeaderSince: &at},
		"; 192.0.2.4:8441 leads since 2026-05-01": {State: operator.SiteStandby, Since: at, Leader: "192.0.2.4:8441", LeaderSince: &at},
	} {
		if got := siteLine(&v); !strings.Contains(got, want) {
			t.Errorf("%+v: %q has no %q", v, got, want)
		}
	}
}

// fakeNode plays a daemon with one tunnel that is down.
type fakeNode struct{ did string }

func (*fakeNode) Status(context.Context) (operator.Status, error) {
	return operator.Status{Node: "a", Version: "v1", Roles: []string{"kms", "ipsec"}, Pools: []operator.Pool{{Peer: "b", Active: 42}}, Alarms: []operator.Event{{Severity: "alarm", Text: "the sky"}}}, nil
}

func (*fakeNode) Events(context.Context, string, int) ([]operator.Event, error) {
	return []operator.Event{{Severity: "fault", Code: "c", Text: "it rained"}}, nil
}

func (*fakeNode) Pools(context.Context) ([]operator.Pool, error) {
	return []operator.Pool{{Peer: "b", Active: 42, Synced: true}}, nil
}

func (*fakeNode) Find(_ context.Context, id key.ID) (operator.Key, error) {
	return operator.Key{ID: id, State: "leased"}, nil
}

func (*fakeNode) History(context.Context, operator.HistoryQuery) ([]operator.Usage, error) {
	return []operator.Usage{{State: "supplied", Count: 3}}, nil
}

func (*fakeNode) Tunnels(context.Context) ([]operator.Tunnel, error) {
	return []operator.Tunnel{{Connection: "a-b", State: "down", Children: []operator.Child{{Name: "net", State: "none"}}}}, nil
}

func (*fakeNode) SAs(context.Context) ([]operator.SA, error) {
	return []operator.SA{{Connection: "a-b", SPI: "0xc0ffee", Fingerprint: "0123456789abcdef"}}, nil
}

func (*fakeNode) Explain(_ context.Context, c string) (operator.Explanation, error) {
	return operator.Explanation{Connection: c, Checks: []operator.Check{{What: "keys", Text: "pool empty", Advice: "feed it"}}}, nil
}

func (f *fakeNode) Do(_ context.Context, c string, a operator.Action) error {
	if c != "a-b" {
		return operator.ErrNotFound
	}
	f.did = string(a)
	return nil
}

func TestCommandsThatAskTheNode(t *testing.T) {
	name := filepath.Join(t.TempDir(), "op.sock")
	log := slog.New(slog.DiscardHandler)
	l, err := operator.Listen(name, log)
	if err != nil {
		t.Fatal(err)
	}
	n := &fakeNode{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- operator.Serve(ctx, l, operator.NewHandler(operator.Options{Node: n, Keys: n, Tunnels: n, Log: log}), time.Second, log)
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	t.Setenv(socketEnv, name)
	id := uuid.NewString()
	for _, c := range []struct {
		args, want string
		code       int
	}{
		{"status", "the sky", exitOK},
		{"keys", "42", exitOK},
		{"keys " + id, "leased", exitOK},
		{"history --limit 3", "supplied", exitOK},
		{"events", "it rained", exitOK},
		{"tunnels", "a-b", exitOK},
		{"sa", "0123456789abcdef", exitOK},
		{"explain a-b", "feed it", exitFailed},
		{"tunnels rekey a-b", "done", exitOK},
	} {
		for _, asJSON := range []bool{false, true} {
			args := strings.Fields(c.args)
			if asJSON {
				args = append(args, "--json")
			}
			code, out, errs := qipsec(t, args...)
			want := c.want
			if strings.Contains(c.args, "rekey") && asJSON {
				want = `"done": "rekey"`
			}
			if code != c.code || !strings.Contains(out, want) {
				t.Errorf("%q: exit %d, %s%s", args, code, out, errs)
			}
			if asJSON && !json.Valid([]byte(out)) {
				t.Errorf("%q: not JSON: %s", args, out)
			}
		}
	}
	if n.did != "rekey" {
		t.Errorf("did %q", n.did)
	}
	if code, _, errs := qipsec(t, "tunnels", "terminate", "nobody"); code != exitFailed || !strings.Contains(errs, "not found") {
		t.Errorf("exit %d %s", code, errs)
	}
	t.Setenv(socketEnv, filepath.Join(t.TempDir(), "none"))
	if code, _, errs := qipsec(t, "status"); code != exitFailed || !strings.Contains(errs, "is it running") {
		t.Errorf("exit %d %s", code, errs)
	}
	t.Setenv(socketEnv, "")
	if code, _, errs := qipsec(t, "status", "--config", "/nonexistent.toml"); code != exitFailed || !strings.Contains(errs, "--socket") {
		t.Errorf("exit %d %s", code, errs)
	}
}

func TestErrorsAreNotHidden(t *testing.T) {
	if err := printKeys(failing{}, []key.SupplyKey{{}}, false, false); !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v", err)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, os.ErrClosed }
