package store

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

func TestFileModes(t *testing.T) {
	old := unix.Umask(0) // the modes must not come from the umask
	defer unix.Umask(old)
	dir := filepath.Join(t.TempDir(), "s")
	s := filled(t, testOptions(dir), 10)
	must(t, s.Ratchet(testContext(t)))
	entries, err := os.ReadDir(dir)
	must(t, err)
	names := ""
	for _, e := range entries {
		fi, err := e.Info()
		must(t, err)
		names += e.Name() + " "
		if fi.Mode() != 0o600 {
			t.Errorf("%s has mode %s", e.Name(), fi.Mode())
		}
	}
	if names != "root store.db store.db-shm store.db-wal store.db.lock " {
		t.Errorf("files: %s", names)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", fi.Mode(), err)
	}
}

func TestRefusedModes(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(dir string) error
		names string
	}{
		{"database readable", func(d string) error { return os.Chmod(d+"/store.db", 0o640) }, "store.db has mode 0640"},
		{"root readable", func(d string) error { return os.Chmod(d+"/root", 0o604) }, "root has mode 0604"},
		{"directory open", func(d string) error { return os.Chmod(d, 0o755) }, "chmod 0700"},
		{"lock file writable", func(d string) error { return os.Chmod(d+"/store.db.lock", 0o620) }, "store.db.lock"},
		{"root is a link", func(d string) error {
			return errors.Join(os.Rename(d+"/root", d+"/elsewhere"), os.Symlink("elsewhere", d+"/root"))
		}, "root is not a regular file"},
		{"database is a directory", func(d string) error {
			return errors.Join(os.Remove(d+"/store.db"), os.Mkdir(d+"/store.db", 0o700))
		}, "store.db is not a regular file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := damaged(t)
			must(t, tc.spoil(dir))
			_, err := Open(testContext(t), testOptions(dir))
			if !errors.Is(err, ErrAccess) || !strings.Contains(err.Error(), tc.names) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// A root file that cannot be replaced, as on a read-only mount, can be used;
// only the ratchet fails, and says so.
func TestReadOnlyRoot(t *testing.T) {
	dir := damaged(t)
	opt := testOptions(dir)
	cred := filepath.Join(t.TempDir(), "cred")
	must(t, os.Mkdir(cred, 0o700))
	must(t, os.Rename(opt.RootFile, cred+"/root"))
	must(t, os.Chmod(cred+"/root", 0o400))
	opt.RootFile = cred + "/root"
	opt.files = readOnlyFiles{}
	s, ctx := mustOpen(t, opt), testContext(t)
	if err := s.Ratchet(ctx); !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "must be writable") {
		t.Errorf("error %v", err)
	}
	if n, err := drain(t, s); n != allKeys || err != nil {
		t.Errorf("%d keys, %v", n, err)
	}
}

// A ratchet that cannot end does not lock the node out at its next start: one
// that finds the root file not replaceable has changed nothing, and what one
// left that failed at the very end is usable until a later one ends it.
func TestOpenAfterAFailedRatchet(t *testing.T) {
	for name, files := range map[string]rootFiles{"read-only": readOnlyFiles{}, "no rename": noRename{}} {
		t.Run(name, func(t *testing.T) {
			opt, ctx := testOptions(damaged(t)), testContext(t)
			opt.files = files
			s, err := Open(ctx, opt)
			must(t, err)
			if err := s.Ratchet(ctx); !errors.Is(err, unix.EROFS) {
				t.Errorf("error %v", err)
			}
			must(t, s.Close())
			s, err = Open(ctx, opt)
			if err != nil {
				t.Fatalf("the next start: %v", err)
			}
			if st, err := s.Stats(ctx); err != nil || st.Epoch != 1 || s.epoch != 1 && name == "read-only" {
				t.Errorf("root file at epoch %d, rows at %d, %v", st.Epoch, s.epoch, err)
			}
			must(t, s.Close())
			opt.files = nil
			s = mustOpen(t, opt)
			if st, err := s.Stats(ctx); err != nil || st.Epoch != s.epoch {
				t.Errorf("root file at epoch %d, rows at %d, %v", st.Epoch, s.epoch, err)
			}
			if n, err := drain(t, s); n != allKeys || err != nil {
				t.Errorf("%d keys, %v", n, err)
			}
		})
	}
}

// noRename lets everything happen but the last step.
type noRename struct{ osFiles }

func (noRename) rename(from, to string) error {
	return &os.LinkError{Op: "rename", Old: from, New: to, Err: unix.EROFS}
}

// readOnlyFiles stands for a read-only mount, which root's permissions pass by.
type readOnlyFiles struct{ osFiles }

func (readOnlyFiles) create(path string, _ []byte) error {
	return &os.PathError{Op: "open", Path: path, Err: unix.EROFS}
}

func TestBadOptions(t *testing.T) {
	good := testOptions(filepath.Join(t.TempDir(), "s"))
	for name, change := range map[string]func(*Options){
		"no scheme": func(o *Options) { o.URL = "/tmp/x" }, "other scheme": func(o *Options) { o.URL = "postgres://x" }, "no path": func(o *Options) { o.URL = "sqlite:" },
		"no root": func(o *Options) { o.RootFile = "" }, "no log": func(o *Options) { o.Log = nil },
		"no parent": func(o *Options) { o.URL = "sqlite:" + filepath.Dir(o.RootFile) + "/a/b/c/db" },
	} {
		opt := good
		change(&opt)
		if s, err := Open(testContext(t), opt); err == nil {
			t.Errorf("%s: opened", name)
			_ = s.Close()
		}
	}
	odd := testOptions(filepath.Join(t.TempDir(), "a%2f b?c#d"))
	mustOpen(t, odd)
	if _, err := os.Stat(strings.TrimPrefix(odd.URL, "sqlite:")); err != nil {
		t.Errorf("a path with odd characters: %v", err)
	}
}

// Both logs are bounded.
func TestLogsAreBounded(t *testing.T) {
	opt := testOptions(filepath.Join(t.TempDir(), "s"))
	opt.HistoryRows, opt.EventRows = 30, 5
	s, ctx := filled(t, opt, 10), testContext(t)
	for range 20 {
		must(t, s.Record(ctx, make([]Event, 7)))
		must(t, s.AppendEvent(ctx, LogEvent{Severity: SeverityRun, Code: "x"}))
	}
	h, err := s.History(ctx, HistoryQuery{Limit: 1000})
	must(t, err)
	e, err := s.Events(ctx, EventQuery{Limit: 1000})
	must(t, err)
	if len(h) != 30 || len(e) != 5 || h[0].Serial != 142 || e[0].Serial != 20 {
		t.Errorf("%d history rows up to %d, %d events up to %d", len(h), h[0].Serial, len(e), e[0].Serial)
	}
}

// child runs this test binary again, as the test named, with dir in its
// environment. Its output is read line by line until it prints "ready".
func child(t *testing.T, name, dir string, attr *syscall.SysProcAttr) (*exec.Cmd, io.WriteCloser, string) {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), os.Args[0], "-test.run=^"+name+"$", "-test.v")
	cmd.Env = append(os.Environ(), "STORE_TEST_DIR="+dir)
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = cmd.Stdout
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	text := ""
	for sc := bufio.NewScanner(out); sc.Scan(); {
		text += sc.Text() + "\n"
		if sc.Text() == "ready" {
			break
		}
	}
	return cmd, in, text
}

func TestSecondProcess(t *testing.T) {
	dir := damaged(t)
	cmd, _, out := child(t, "TestChildHolds", dir, nil)
	if !strings.Contains(out, "ready") {
		t.Fatalf("the child did not open the store: %s", out)
	}
	_, err := Open(testContext(t), testOptions(dir))
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", cmd.Process.Pid)) {
		t.Errorf("error %v, want %v with pid %d", err, ErrInUse, cmd.Process.Pid)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	if n, err := drain(t, mustOpen(t, testOptions(dir))); n != allKeys || err != nil {
		t.Errorf("after kill -9: %d keys, %v", n, err)
	}
}

// TestChildHolds is the other process of TestSecondProcess.
func TestChildHolds(t *testing.T) {
	dir := os.Getenv("STORE_TEST_DIR")
	if dir == "" {
		return
	}
	mustOpen(t, testOptions(dir))
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin) // until killed
}

// The disk is full: clear errors, nothing changed, and on it goes once there is
// space. On a small tmpfs of the child's own mount namespace if we may, else
// with a limit on the size of files.
func TestDiskFull(t *testing.T) {
	for _, how := range []string{"TestChildTmpfs", "TestChildFileLimit"} {
		t.Run(how, func(t *testing.T) {
			var attr *syscall.SysProcAttr
			if how == "TestChildTmpfs" {
				if os.Geteuid() != 0 {
					t.Skip("mounting a tmpfs needs root")
				}
				attr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
			}
			cmd, in, out := child(t, how, t.TempDir(), attr)
			_ = in.Close()
			if err := cmd.Wait(); err != nil || !strings.Contains(out, "ready") {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// TestChildTmpfs is the process of TestDiskFull that has a full file system.
func TestChildTmpfs(t *testing.T) {
	dir := os.Getenv("STORE_TEST_DIR")
	if dir == "" {
		return
	}
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1500k,mode=0700"))
	ballast := filepath.Join(dir, "ballast")
	must(t, os.WriteFile(ballast, make([]byte, 700<<10), 0o600))
	fillUp(t, dir, func() { must(t, os.Remove(ballast)) })
}

// TestChildFileLimit is the one whose files may not grow.
func TestChildFileLimit(t *testing.T) {
	dir := os.Getenv("STORE_TEST_DIR")
	if dir == "" {
		return
	}
	signal.Ignore(syscall.SIGXFSZ)
	must(t, os.Chmod(dir, 0o700))
	must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 400 << 10, Max: unix.RLIM_INFINITY}))
	fillUp(t, dir, func() {
		must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}))
	})
}

// fillUp stores blocks until there is no space, then makes some with free.
func fillUp(t *testing.T, dir string, free func()) {
	s, ctx := filled(t, testOptions(dir), 300), testContext(t)
	// A failure closes the connection, which may make room in the log: only
	// several in a row mean that there is none.
	seq, failed := uint64(2), 0
	for failed < 4 && seq < 500 {
		before, _ := s.Pool(ctx, testPool)
		err := s.PutBlock(ctx, testBlock(t, seq, 300))
		if err == nil {
			seq, failed = seq+1, 0
			continue
		}
		failed++
		if !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "free some space") {
			t.Fatalf("block %d: %v", seq, err)
		}
		if after, err := s.Pool(ctx, testPool); after != before || err != nil {
			t.Fatalf("a failed PutBlock changed %+v to %+v, %v", before, after, err)
		}
	}
	if failed < 4 {
		t.Fatal("the disk never became full")
	}
	ratchetErr := s.Ratchet(ctx) // may find room in the log, or not
	free()
	must(t, s.PutBlock(ctx, testBlock(t, seq, 300)))
	must(t, s.Ratchet(ctx))
	must(t, s.Close())
	s = mustOpen(t, testOptions(dir))
	st, err := s.Stats(ctx)
	if err != nil || st.Keys != int(seq)*300 || st.Damaged != 0 {
		t.Fatalf("%+v, %v; %d blocks were stored", st, err, seq)
	}
	for i := uint64(2); i <= seq; i++ {
		must(t, s.Activate(ctx, testPool, i))
	}
	if keys := lease(t, s, Own, 0, key.At(seq, 299)); len(keys) != int(seq)*150 {
		t.Fatalf("%d keys", len(keys))
	}
	t.Logf("%d blocks; ratchet while full: %v", seq, ratchetErr)
	fmt.Println("ready")
}
