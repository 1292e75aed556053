package kma

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
)

// What intake refuses besides what the codec does.
const (
	NotRegular  keyfile.Reason = "not a regular file"
	Symlink     keyfile.Reason = "symbolic link"
	HardLinked  keyfile.Reason = "has another hard link"
	WrongOwner  keyfile.Reason = "wrong owner"
	WrongMode   keyfile.Reason = "others may read or change it"
	WrongPair   keyfile.Reason = "wrong pair"
	WrongDevice keyfile.Reason = "wrong device"
	WrongRole   keyfile.Reason = "wrong role"
	OldSeq      keyfile.Reason = "repeated or older seq"
	Unreadable  keyfile.Reason = "cannot be read"
)

const (
	refusedDir = "refused"
	maxNames   = 1 << 16 // names looked at in one scan
)

// refusal is why a file is refused.
func refusal(r keyfile.Reason, format string, args ...any) error {
	return &keyfile.Error{Reason: r, Detail: fmt.Sprintf(format, args...)}
}

// intakeDir is an open intake directory. All access goes through its
// descriptor, so that nobody can exchange the directory in between.
type intakeDir struct {
	f       *os.File
	feeder  uint32
	maxSize int
}

// openIntake opens the directory and checks that only we, root and the feeder
// can write there.
func openIntake(path string, feeder, maxSize int) (*intakeDir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("kma: open intake directory %s: %w", path, err)
	}
	d := &intakeDir{f: os.NewFile(uintptr(fd), path), feeder: uint32(max(feeder, 0)), maxSize: maxSize}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(fmt.Errorf("kma: intake directory %s: %w", path, err), d.close())
	}
	if !d.trusted(st.Uid) || st.Mode&0o022 != 0 {
		return nil, errors.Join(fmt.Errorf("kma: intake directory %s has owner %d and mode %04o: it must belong to user %d, root or the feeder, and nobody else may write there (chmod go-w)",
			path, st.Uid, st.Mode&0o7777, os.Geteuid()), d.close())
	}
	return d, nil
}

func (d *intakeDir) close() error { return d.f.Close() }

func (d *intakeDir) fd() int { return int(d.f.Fd()) }

func (d *intakeDir) trusted(uid uint32) bool {
	return uid == uint32(os.Geteuid()) || uid == 0 || uid == d.feeder
}

// names lists the files to look at: those of the pair above seq after by seq,
// and all others, which must not hold the former up. Files being written and
// the records of refused ones are in neither.
func (d *intakeDir) names(pair uuid.UUID, after uint64) (good, other []string, err error) {
	if _, err := d.f.Seek(0, io.SeekStart); err != nil {
		return nil, nil, fmt.Errorf("kma: list %s: %w", d.f.Name(), err)
	}
	list, err := d.f.Readdirnames(maxNames)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("kma: list %s: %w", d.f.Name(), err)
	}
	for _, n := range list {
		switch of, seq, err := keyfile.ParseName(n); {
		case keyfile.Unfinished(n) || n == refusedDir:
		case err == nil && of == pair && seq > after:
			good = append(good, n)
		default:
			other = append(other, n)
		}
	}
	slices.Sort(good) // by seq
	return good, other, nil
}

// read opens and reads a file, whose text the caller wipes. An *keyfile.Error
// means that the file is to be refused.
func (d *intakeDir) read(name string) (*key.Material, error) {
	f, st, err := d.open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if st.Size > int64(d.maxSize) {
		return nil, refusal(keyfile.TooLarge, "%d bytes, at most %d", st.Size, d.maxSize)
	}
	if st.Size == 0 {
		return nil, refusal(keyfile.Syntax, "the file is empty")
	}
	m, err := key.New(int(st.Size))
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(f, m.Bytes()); err != nil {
		m.Wipe()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, refusal(keyfile.Syntax, "the file shrank while it was read")
		}
		return nil, refusal(Unreadable, "%v", err)
	}
	return m, nil
}

// open opens a file that only trusted users can have written.
func (d *intakeDir) open(name string) (*os.File, *unix.Stat_t, error) {
	// O_NONBLOCK: a FIFO or device must not hang us before it is recognised.
	fd, err := unix.Openat(d.fd(), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, nil, refusal(Symlink, "")
	case errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EOPNOTSUPP):
		return nil, nil, refusal(NotRegular, "")
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return nil, nil, refusal(Unreadable, "%v", err)
	case err != nil:
		return nil, nil, fmt.Errorf("kma: open %s in %s: %w", name, d.f.Name(), err)
	}
	f := os.NewFile(uintptr(fd), name)
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		err = d.check(&st)
	}
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return f, &st, nil
}

func (d *intakeDir) check(st *unix.Stat_t) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return refusal(NotRegular, "")
	case st.Nlink != 1:
		return refusal(HardLinked, "%d links", st.Nlink)
	case !d.trusted(st.Uid):
		return refusal(WrongOwner, "user %d", st.Uid)
	case st.Mode&0o027 != 0:
		return refusal(WrongMode, "mode %04o: want 0600, at most group-readable", st.Mode&0o7777)
	}
	return nil
}

// destroy overwrites a file and removes its name. What is not a regular file
// with one link is removed only: its bytes may be somebody else's. Overwriting
// is the best that can be done from here; a journal, a snapshot or flash memory
// may keep a copy.
func (d *intakeDir) destroy(name string) error {
	fd, err := unix.Openat(d.fd(), name, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err == nil {
		f := os.NewFile(uintptr(fd), name)
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 1 {
			err = overwrite(f, st.Size)
		}
		err = errors.Join(err, f.Close())
	} else {
		err = nil // no regular file of ours: nothing to overwrite
	}
	if e := unix.Unlinkat(d.fd(), name, 0); e != nil && !errors.Is(e, unix.ENOENT) {
		err = errors.Join(err, e)
	}
	if err != nil {
		return fmt.Errorf("kma: destroy %s in %s: %w", name, d.f.Name(), err)
	}
	return nil
}

// overwrite writes zeros over what is on disk of a file. Holes are left: there
// is nothing in them, and filling those of a huge file would fill the disk.
func overwrite(f *os.File, size int64) error {
	zero := make([]byte, 64<<10)
	for at := int64(0); at < size; {
		from, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole up to the end
		}
		if err != nil {
			return err
		}
		to, err := f.Seek(from, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for at = from; at < to; {
			n, err := f.WriteAt(zero[:min(to-at, int64(len(zero)))], at)
			if err != nil {
				return err
			}
			at += int64(n)
		}
	}
	return f.Sync()
}

// record is what is kept of a refused file: everything but key_data and hash.
type record struct {
	File    string    `json:"file"`
	Refused time.Time `json:"refused"`
	Reason  string    `json:"reason"`
	Detail  string    `json:"detail,omitempty"`
	Pair    string    `json:"qkd_pair_id,omitempty"`
	QKD     string    `json:"qkd_id,omitempty"`
	PeerQKD string    `json:"peer_qkd_id,omitempty"`
	Role    string    `json:"role,omitempty"`
	Seq     uint64    `json:"seq,omitempty"`
	Created string    `json:"created,omitempty"`
	QBER    float64   `json:"qber,omitempty"`
	Length  int       `json:"key_length,omitempty"`
}

// setAside writes rec as number slot of the refused/ directory, over what had
// that number before.
func (d *intakeDir) setAside(slot int, rec record) error {
	b, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return fmt.Errorf("kma: record of a refused file: %w", err)
	}
	dir, err := d.refused()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(dir) }()
	name := fmt.Sprintf("%06d.json", slot)
	if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("kma: replace %s: %w", filepath.Join(d.f.Name(), refusedDir, name), err)
	}
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("kma: write %s: %w", filepath.Join(d.f.Name(), refusedDir, name), err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(append(b, '\n'))
	return errors.Join(err, f.Close())
}

// refused opens the directory of records, which must be our own.
func (d *intakeDir) refused() (int, error) {
	where := filepath.Join(d.f.Name(), refusedDir)
	if err := unix.Mkdirat(d.fd(), refusedDir, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, fmt.Errorf("kma: make %s: %w", where, err)
	}
	fd, err := unix.Openat(d.fd(), refusedDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("kma: open %s: %w", where, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || !d.trusted(st.Uid) || st.Mode&0o022 != 0 {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("kma: %s must belong to this user with mode 0700: %w", where, errors.Join(err, os.ErrPermission))
	}
	return fd, nil
}
