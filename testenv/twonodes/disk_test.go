package twonodes

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smallDisk gives node, before its first start, a state directory on a disk of
// its own of so many MiB, in a mount namespace that nothing outlives. The
// function it gives changes the size. Needs root.
func (s *site) smallDisk(node, mib int) (resize func(mib int)) {
	t := s.t
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small disk")
	}
	dir := s.path(node, "state")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mount -t tmpfs -o "mode=0700,size=$1m" qipsec-test "$0" && echo mounted && exec cat`, dir, strconv.Itoa(mib))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err1 := cmd.StdinPipe() // cat ends when it is closed
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	started := make(chan error)
	spawner() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "mounted\n" {
		t.Fatalf("mount a small disk: %q, %v", line, err)
	}
	inside := []string{"nsenter", "--mount=/proc/" + strconv.Itoa(cmd.Process.Pid) + "/ns/mnt"}
	s.nodes[node].inside = inside
	return func(mib int) {
		t.Helper()
		args := append(inside[1:len(inside):len(inside)], "mount", "-o", fmt.Sprintf("remount,size=%dm", mib), dir)
		if b, err := exec.Command(inside[0], args...).CombinedOutput(); err != nil {
			t.Fatalf("resize the small disk: %v: %s", err, b)
		}
	}
}

// A full disk takes no key away: files wait in the intake directory, SAEs get
// what is leased, one event says what is wrong, and with space all goes on by
// itself; a daemon killed and started meanwhile either serves or says why not.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	const lease, perFile = 64, 3000
	s := newSite(t, 5, fmt.Sprintf("intake_interval = \"50ms\"\nlease = %d\n", lease))
	s.nodes[0].never, s.nodes[1].never = lost, lost
	resize := s.smallDisk(0, 4)
	s.up()
	if err := s.feed(perFile); err != nil {
		t.Fatal(err)
	}
	s.supplying() // a lease takes a write, so it must be there before the disk is full
	l := newLedger()
	for round := range 2 {
		s.fillDisk(perFile)
		left := s.waiting(0)
		log := s.nodes[0].tail()
		if !strings.Contains(log, "full") && !strings.Contains(log, "no space") {
			t.Errorf("the log does not say that the disk is full: %s", log)
		}
		if round == 1 { // nothing that was agreed may be lost by a crash either
			if err := s.nodes[0].kill(); err != nil {
				t.Fatal(err)
			}
			s.startOnFullDisk(0)
		} else {
			for node := range 2 {
				a, b := s.te(node), s.te(1-node)
				for range 10 {
					s.pairEqual(l, node, 1, a, b)
				}
			}
		}
		if n := s.waiting(0); n < left {
			t.Errorf("%d of %d files that were not taken in are still there", n, left)
		}
		resize(8 << (2 * round))
		if s.nodes[0].ended() {
			s.nodes[0].start()
		}
		p := s.agree()
		s.pairsEqual(l)
		// Of each owner the open leases, in use and next, and those that the kill
		// burned, each grown at most eightfold.
		if lostKeys, most := int(s.seq)*perFile-p.Active, (round+1)*2*2*8*lease; p.NewestSeq != s.seq || lostKeys > most {
			t.Errorf("round %d: newest seq %d of %d, %d keys are not active, at most %d may be leased", round, p.NewestSeq, s.seq, lostKeys, most)
		}
		t.Logf("round %d: %d files waited for space; then %d keys of %d files were active at both nodes", round, left, p.Active, p.NewestSeq)
	}
	for _, f := range l.list() {
		t.Error(f)
	}
}

// fillDisk feeds until a cannot take files in.
func (s *site) fillDisk(perFile int) {
	s.t.Helper()
	began := time.Now()
	await(s.t, "a full disk", func() error {
		if s.waiting(0) < 3 {
			if err := s.feed(perFile); err != nil {
				return err
			}
		}
		events, err := s.nodes[0].op.Events(s.t.Context(), "", 100)
		if err != nil {
			return err
		}
		for _, e := range events {
			if e.Code == "INTAKE_DOWN" && e.Severity == "fault" && e.Time.After(began) {
				return nil
			}
		}
		return fmt.Errorf("%d files fed, %d wait", s.seq, s.waiting(0))
	})
}

// startOnFullDisk starts a node that may not be able to: then it ends by itself
// with a line that says why.
func (s *site) startOnFullDisk(node int) {
	s.t.Helper()
	n := s.nodes[node]
	n.start()
	await(s.t, n.name+" serves or ends", func() error {
		if n.ended() {
			if log := n.tail(); !strings.Contains(log[max(0, len(log)-1000):], "qipsecd ends") {
				s.t.Errorf("%s has ended without a word: %s", n.name, log)
			}
			return nil
		}
		_, err := n.pool(s.t.Context())
		return err
	})
	s.t.Logf("started on a full disk, %s serves: %v", n.name, !n.ended())
}
