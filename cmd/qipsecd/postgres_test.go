package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/q-ipsec/q-ipsec/testenv/pgtest"
)

// A node whose inventory is at a PostgreSQL server, by its config alone: it
// supplies keys with a node that has SQLite, survives a crash of its own and one
// of the server, and the commands that read an inventory find it.
func TestPostgres(t *testing.T) {
	pg, err := pgtest.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := pg.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, sql := range []string{"CREATE ROLE qipsec LOGIN PASSWORD 'a password'", "CREATE DATABASE qipsec OWNER qipsec"} {
		if err := pg.Exec(t.Context(), "postgres", sql); err != nil {
			t.Fatal(err)
		}
	}
	l := newLab(t, 8)
	text, err := os.ReadFile(l.config("a"))
	if err != nil {
		t.Fatal(err)
	}
	password := filepath.Join(l.dir, "a", "database-password")
	url := strings.Replace(pg.URL("qipsec", ""), "user=owner", "user=qipsec", 1)
	config := strings.Replace(string(text), `state_dir = "state"`, "state_dir = \"state\"\ninventory = \""+url+"\"\ninventory_password_file = \"database-password\"", 1)
	for name, text := range map[string]string{
		l.config("a"): config, password: "a password\n",
		filepath.Join(pg.Data(), "pg_hba.conf"): "local all owner trust\nlocal qipsec qipsec scram-sha-256\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := pg.Exec(t.Context(), "postgres", "SELECT pg_reload_conf()"); err != nil {
		t.Fatal(err)
	}
	a := l.start("a")
	l.start("b")
	exchange := func(seq int) {
		t.Helper()
		l.feed(seq, 200)
		l.supplies("a", 5)
		l.supplies("b", 5)
		got, err := l.sae("a", "get-key", "--number", "3")
		if err != nil {
			t.Fatal(err)
		}
		again, err := l.sae("b", "get-key-with-id", got[0].ID, got[1].ID, got[2].ID)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(again) {
			t.Errorf("the two ends' keys differ: %v", err)
		}
	}
	exchange(1)
	if err := a.end(syscall.SIGKILL); err == nil {
		t.Error("a kill is no error")
	}
	l.await("the server has ended the killed daemon's session", func() error {
		return pg.Exec(t.Context(), "qipsec", "SELECT 1 / (count(*) = 0)::int FROM pg_locks WHERE locktype = 'advisory'")
	})
	a = l.start("a")
	exchange(2)
	if err := pg.Stop(t.Context(), "immediate"); err != nil {
		t.Fatal(err)
	}
	if err := pg.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	exchange(3)
	if out := l.must("store", "check", "--config", l.config("a")); !strings.Contains(out, "sound") {
		t.Errorf("check: %s", out)
	}
	if _, err := os.Stat(filepath.Join(l.dir, "a", "state", "inventory.db")); !os.IsNotExist(err) {
		t.Errorf("there is an SQLite database, too: %v", err)
	}
	if err := a.end(syscall.SIGTERM); err != nil {
		t.Errorf("an orderly stop is %v", err)
	}
	if strings.Contains(a.log.String(), "a password") {
		t.Error("the password is in the log")
	}
}
