package twonodes

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// check runs `qipsec store check` on a node's inventory and compares its exit
// code.
func (s *site) check(node, want int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), bound)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "qipsec"), "store", "check", "--config", s.nodes[node].config).CombinedOutput()
	code := 0
	var e *exec.ExitError
	if errors.As(err, &e) {
		code = e.ExitCode()
	} else if err != nil {
		s.t.Fatal(err)
	}
	if code != want {
		s.t.Errorf("store check of %s: exit %d, want %d: %s", names[node], code, want, out)
	}
}

// restored waits until node says that its store was older than what its peer
// knows.
func (s *site) restored(node int) {
	s.t.Helper()
	await(s.t, names[node]+" knows that its store is old", func() error {
		events, err := s.nodes[node].op.Events(s.t.Context(), "", 1000)
		for _, e := range events {
			if e.Code == "STORE_RESTORED" && e.Severity == "alarm" {
				return nil
			}
		}
		return errors.Join(err, errors.New("no alarm"))
	})
}

func (s *site) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// A node is set back, database and root file together, as when a snapshot of
// its machine is started again; then only the database, which it refuses; then it
// loses both and begins anew from a backup
// of its history. Neither shows on its own disk. The peer's SYNC finds both: no
// key is supplied twice, and the nodes agree again.
func TestRollbackOfOneNode(t *testing.T) {
	t.Parallel()
	for n, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, 8+n, "intake_interval = \"50ms\"\nlease = 64\nratchet_keys = 200\n")
			state, snapshot, backup := s.path(n, "state"), s.path(n, "snapshot"), s.path(n, "backup")
			s.up()
			l := newLedger()
			use := func() {
				t.Helper()
				s.ok(s.feed(3000))
				s.agree()
				s.supplying()
				for range 3 {
					s.pairsEqual(l)
				}
			}
			use()
			s.check(n, 0) // beside the running daemon
			s.ok(s.nodes[n].kill())
			s.check(n, 0) // as a crash leaves it
			s.ok(os.CopyFS(snapshot, os.DirFS(state)))
			s.nodes[n].start()
			use()
			s.qipsec("store", "backup", "--config", s.nodes[n].config, backup)
			use()
			s.ok(s.nodes[n].kill())
			s.ok(os.RemoveAll(state))
			s.ok(os.CopyFS(state, os.DirFS(snapshot)))
			s.ok(errors.Join(os.Chmod(state, 0o700), chmodAll(state)))
			s.check(n, 0) // nothing on this disk alone shows that it is old
			s.nodes[n].start()
			s.restored(n)
			use()

			// The database alone is set back: it does not go with its root file.
			s.ok(s.nodes[n].kill())
			for _, name := range []string{"inventory.db", "inventory.db-wal"} { // a database is both
				old, err := os.ReadFile(filepath.Join(snapshot, name))
				s.ok(err)
				s.ok(os.WriteFile(filepath.Join(state, name), old, 0o600))
			}
			s.ok(os.Remove(filepath.Join(state, "inventory.db-shm")))
			s.check(n, 1)
			s.nodes[n].start()
			await(t, "the node says that its database is old", func() error {
				if !s.nodes[n].ended() || !strings.Contains(s.nodes[n].tail(), "database is an older copy") {
					return errors.New(s.nodes[n].tail())
				}
				return nil
			})

			// Both are lost.
			s.ok(os.RemoveAll(state))
			s.check(n, 2)
			s.qipsec("store", "restore", "--config", s.nodes[n].config, backup)
			s.check(n, 0)
			s.nodes[n].start()
			s.restored(n)
			use()
			s.check(1-n, 0)
			for _, f := range l.list() {
				t.Error(f)
			}
		})
	}
}

// A node whose root file is sealed by a credential works as any other: it is
// made so, ratchets, is killed and starts again. Without the credential it does
// not start, says why, and is none the worse for it.
func TestSealedRootFile(t *testing.T) {
	t.Parallel()
	s := newSite(t, 10, "intake_interval = \"50ms\"\nlease = 64\nratchet_keys = 100\n")
	cred, config := s.path(0, "credential"), s.nodes[0].config
	s.ok(os.WriteFile(cred, bytes.Repeat([]byte{3}, 32), 0o400))
	text, err := os.ReadFile(config)
	s.ok(err)
	s.ok(os.WriteFile(config, bytes.Replace(text, []byte("[node]\n"), []byte("[node]\nroot_credential = \""+cred+"\"\n"), 1), 0o600))
	s.up()
	l := newLedger()
	for range 2 {
		s.ok(s.feed(2000))
		s.agree()
		s.supplying()
		for range 3 {
			s.pairsEqual(l)
		}
		s.ok(s.nodes[0].kill())
		s.check(0, 0)
		b, err := os.ReadFile(s.path(0, "state", "root"))
		s.ok(err)
		if !bytes.HasPrefix(b, []byte("QIPROOT2")) {
			t.Error("the root file is not sealed")
		}
		s.ok(os.Rename(cred, cred+".away"))
		s.nodes[0].start()
		await(t, "the node says that it has no credential", func() error {
			if !s.nodes[0].ended() || !strings.Contains(s.nodes[0].tail(), "credential cannot be used") {
				return errors.New(s.nodes[0].tail())
			}
			return nil
		})
		s.ok(os.Rename(cred+".away", cred))
		s.nodes[0].start()
	}
	s.agree()
	for _, f := range l.list() {
		t.Error(f)
	}
}

// chmodAll gives the files of dir the mode they must have, which copying does
// not.
func chmodAll(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.Chmod(filepath.Join(dir, e.Name()), 0o600))
	}
	return err
}
