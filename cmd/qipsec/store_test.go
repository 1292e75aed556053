package main

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// inventory makes a store where a config says that it is.
func inventory(t *testing.T) (config, state string) {
	t.Helper()
	dir := t.TempDir()
	sample, err := os.ReadFile("../../conf/qipsecd.toml")
	if err != nil {
		t.Fatal(err)
	}
	config, state = filepath.Join(dir, "qipsecd.toml"), filepath.Join(dir, "state")
	if err := os.WriteFile(config, bytes.Replace(sample, []byte(`# state_dir = "/var/lib/q-ipsec"`), []byte(`state_dir = "state"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Options{URL: "sqlite:" + state + "/inventory.db", RootFile: state + "/root", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.EnsurePool(t.Context(), uuid.UUID{1}, "b", key.Master, key.Direct); err != nil {
		t.Fatal(err)
	}
	if err := s.Record(t.Context(), []store.Event{{Pool: uuid.UUID{1}, Side: store.Own, First: 1, Last: 1, State: key.Supplied, Count: 1}}); err != nil {
		t.Fatal(err)
	}
	return config, state
}

func TestStoreCheck(t *testing.T) {
	config, state := inventory(t)
	check := func(want int, says string) {
		t.Helper()
		code, out, errs := qipsec(t, "store", "check", "--config", config)
		if code != want || !strings.Contains(out+errs, says) {
			t.Errorf("exit %d, want %d and %q: %s%s", code, want, says, out, errs)
		}
		codeJSON, out, _ := qipsec(t, "store", "check", "--json", "--database", "sqlite:"+state+"/inventory.db", "--root", state+"/root")
		var v checkReport
		if err := json.Unmarshal([]byte(out), &v); err != nil || codeJSON != code {
			t.Errorf("as JSON: exit %d, %v: %s", codeJSON, err, out)
		}
		if verdict := map[int]string{0: "sound", 1: "damaged", 2: "unknown"}[code]; v.Verdict != verdict {
			t.Errorf("verdict %q with exit %d", v.Verdict, code)
		}
	}
	check(0, "1 pools, 0 blocks in 0 boxes, 0 keys to lease, 1 rows of history, 0 events\nsound\n")
	if err := os.Rename(state+"/root", state+"/away"); err != nil {
		t.Fatal(err)
	}
	check(1, "root file is missing")
	if err := os.Rename(state, state+"2"); err != nil {
		t.Fatal(err)
	}
	check(2, "there is no store")
	if code, _, errs := qipsec(t, "store", "check", "--config", "/nonexistent"); code != 2 || errs == "" {
		t.Errorf("no config: exit %d, %s", code, errs)
	}
}

func TestStoreExportBackupRestore(t *testing.T) {
	config, state := inventory(t)
	out := mustRun(t, "store", "export-history", "--config", config)
	if strings.Count(out, "\n") != 1 || !strings.Contains(out, `"state":"supplied"`) {
		t.Errorf("exported %q", out)
	}
	file := filepath.Join(filepath.Dir(config), "history")
	mustRun(t, "store", "export-history", "--config", config, file)
	if b, err := os.ReadFile(file); err != nil || string(b) != out {
		t.Errorf("%q, %v", b, err)
	}
	if out := mustRun(t, "store", "export-history", "--config", config, "--pool", uuid.NewString()); out != "" {
		t.Errorf("another pool's: %q", out)
	}
	backup := filepath.Join(filepath.Dir(config), "backup")
	mustRun(t, "store", "backup", "--config", config, backup)
	for _, name := range []string{file, backup} {
		if fi, err := os.Stat(name); err != nil || fi.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	if code, _, errs := qipsec(t, "store", "restore", "--config", config, backup); code != exitFailed || !strings.Contains(errs, "there is a store already") {
		t.Errorf("over a store: exit %d, %s", code, errs)
	}
	if err := os.Rename(state, state+"2"); err != nil {
		t.Fatal(err)
	}
	if out := mustRun(t, "store", "restore", "--config", config, backup); !strings.Contains(out, "1 empty pools, 1 rows") {
		t.Errorf("%s", out)
	}
	if again := mustRun(t, "store", "export-history", "--config", config, "--pool", uuid.UUID{1}.String()); again != out {
		t.Errorf("after restore: %q, want %q", again, out)
	}
	mustRun(t, "store", "check", "--config", config)
	left, err := filepath.Glob(filepath.Join(filepath.Dir(config), ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestStoreSealRoot(t *testing.T) {
	config, state := inventory(t)
	credentials := t.TempDir()
	if err := os.WriteFile(filepath.Join(credentials, "qipsec-root"), bytes.Repeat([]byte{5}, store.CredentialSize), 0o400); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := qipsec(t, "store", "seal-root", "--config", config); code != exitFailed || !strings.Contains(errs, "root_credential is not set") {
		t.Errorf("exit %d, %s", code, errs)
	}
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, bytes.Replace(text, []byte(`# root_credential = ""`), []byte(`root_credential = "qipsec-root"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := qipsec(t, "store", "check", "--config", config); code != exitUnknown || !strings.Contains(errs, "LoadCredentialEncrypted=qipsec-root") {
		t.Errorf("without systemd: exit %d, %s", code, errs)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	if code, out, _ := qipsec(t, "store", "check", "--config", config); code != exitFailed || !strings.Contains(out, "run `qipsec store seal-root` once") {
		t.Errorf("not sealed yet: exit %d, %s", code, out)
	}
	mustRun(t, "store", "seal-root", "--config", config)
	mustRun(t, "store", "check", "--config", config)
	mustRun(t, "store", "check", "--database", "sqlite:"+state+"/inventory.db", "--root", state+"/root", "--credential", credentials+"/qipsec-root")
	if code, out, _ := qipsec(t, "store", "check", "--database", "sqlite:"+state+"/inventory.db", "--root", state+"/root"); code != exitUnknown || !strings.Contains(out, "sealed by a credential") {
		t.Errorf("without the credential: exit %d, %s", code, out)
	}
}
