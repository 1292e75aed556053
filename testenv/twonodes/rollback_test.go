package twonodes

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
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
// its machine is started again; then it loses both and begins anew from a backup
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

			s.ok(s.nodes[n].kill())
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

// chmodAll gives the files of dir the mode they must have, which copying does
// not.
func chmodAll(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.Chmod(filepath.Join(dir, e.Name()), 0o600))
	}
	return err
}
