package sad

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// journal is the file of intents: JSON lines, each with a checksum, only
// appended to. An intent is on disk before the kernel is asked, so that after
// any crash what is ours in the SAD is known. A torn last line is an intent
// that was never carried out; anything else that does not read is an error,
// because guessing could delete an SA that is not ours or leave one of ours.
type journal struct {
	path   string
	file   *os.File
	size   int64 // bytes in the file, all of whole lines
	lines  int
	broken error // a half-written line could not be cut off
}

// compactAbove is how many lines beyond twice the live records make the file be
// written anew.
const compactAbove = 1000

// The operations of a line.
const (
	opIntend = "intend" // about to add: record follows
	opCommit = "commit" // charon knows of it
	opGone   = "gone"   // not in the SAD, or not ours any more
)

// entry is one line's content. Record is complete for opIntend; else only its
// ID counts.
type entry struct {
	Op     string  `json:"op"`
	Record *record `json:"sa"`
}

// line wraps an entry's JSON with the CRC-32 (IEEE) of exactly those bytes.
type line struct {
	CRC   uint32          `json:"crc"`
	Entry json.RawMessage `json:"entry"`
}

func (e entry) encode() ([]byte, error) {
	raw, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("sad: journal: %w", err)
	}
	out, err := json.Marshal(line{crc32.ChecksumIEEE(raw), raw})
	if err != nil {
		return nil, fmt.Errorf("sad: journal: %w", err)
	}
	return append(out, '\n'), nil
}

func decodeEntry(b []byte) (entry, error) {
	var l line
	if err := strictJSON(b, &l); err != nil {
		return entry{}, err
	}
	if crc32.ChecksumIEEE(l.Entry) != l.CRC {
		return entry{}, errors.New("checksum differs")
	}
	var e entry
	if err := strictJSON(l.Entry, &e); err != nil {
		return entry{}, err
	}
	switch {
	case e.Op != opIntend && e.Op != opCommit && e.Op != opGone:
		return entry{}, fmt.Errorf("unknown operation %q", e.Op)
	case e.Record == nil || !e.Record.ID.Src.IsValid() || !e.Record.ID.Dst.IsValid() || e.Record.ID.SPI == 0:
		return entry{}, errors.New("no SA")
	}
	return e, nil
}

func strictJSON(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one value")
	}
	return nil
}

// openJournal opens and locks the file and replays it.
func openJournal(path string) (*journal, records, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("sad: open the journal: %w", err)
	}
	j := &journal{path: path, file: f}
	live, err := j.load()
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return j, live, nil
}

func (j *journal) load() (records, error) {
	if err := unix.Flock(int(j.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("sad: journal %s is in use by another process: %w", j.path, err)
	}
	info, err := j.file.Stat()
	if err != nil {
		return nil, fmt.Errorf("sad: journal: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("sad: journal %s has mode %v; it must be a regular file that only its owner can use (chmod 600)", j.path, info.Mode())
	}
	if named, err := os.Lstat(j.path); err != nil || !os.SameFile(named, info) {
		return nil, fmt.Errorf("sad: journal %s was replaced while it was opened", j.path)
	}
	b, err := io.ReadAll(j.file)
	if err != nil {
		return nil, fmt.Errorf("sad: read journal: %w", err)
	}
	live, lines, end, err := replay(b)
	if err != nil {
		return nil, fmt.Errorf("sad: journal %s: %w; if the machine was started anew since, remove the file, else compare it with `ip xfrm state` first", j.path, err)
	}
	j.lines, j.size = lines, int64(end)
	if end < len(b) {
		if err := j.file.Truncate(int64(end)); err != nil {
			return nil, fmt.Errorf("sad: cut the torn last line of journal %s: %w", j.path, err)
		}
	}
	return live, nil
}

// replay gives the records that b leaves alive, its whole lines and where they
// end.
func replay(b []byte) (live records, lines, end int, err error) {
	live = records{}
	for end < len(b) {
		n := bytes.IndexByte(b[end:], '\n')
		if n < 0 {
			break // torn: the append did not finish
		}
		e, err := decodeEntry(b[end : end+n])
		if err != nil {
			return nil, 0, 0, fmt.Errorf("line %d is damaged: %w", lines+1, err)
		}
		k := e.Record.ID.Key()
		switch e.Op {
		case opIntend:
			live[k] = e.Record
		case opCommit:
			if r := live[k]; r != nil {
				r.committed = true
			}
		case opGone:
			delete(live, k)
		}
		lines++
		end += n + 1
	}
	return live, lines, end, nil
}

// append writes one entry, durably if sync.
func (j *journal) append(e entry, sync bool) error {
	if j.broken != nil {
		return j.broken
	}
	b, err := e.encode()
	if err != nil {
		return err
	}
	if _, err := j.file.Write(b); err != nil {
		err = fmt.Errorf("sad: write journal %s: %w", j.path, err)
		if cut := j.file.Truncate(j.size); cut != nil {
			j.broken = fmt.Errorf("%w; a half line could not be cut off: %w", err, cut)
		}
		return err
	}
	j.size += int64(len(b))
	j.lines++
	if !sync {
		return nil
	}
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("sad: sync journal %s: %w", j.path, err)
	}
	return nil
}

// compact replaces the file by one that holds live only, when that is worth it.
func (j *journal) compact(live records) error {
	if j.lines <= 2*len(live)+compactAbove {
		return nil
	}
	// Opened first: once the new file has the journal's name, nothing may keep it
	// from being the one that is written to.
	dir, err := os.Open(filepath.Dir(j.path))
	if err != nil {
		return fmt.Errorf("sad: compact journal: %w", err)
	}
	defer dir.Close()
	tmp := j.path + ".new"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("sad: compact journal: %w", err)
	}
	n := &journal{path: j.path, file: f}
	if err := n.fill(live, tmp); err != nil {
		_ = f.Close()
		_ = os.Remove(tmp)
		return err
	}
	_ = j.file.Close() // the old file has no name any more
	*j = *n
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sad: sync the directory of journal %s: %w", j.path, err)
	}
	return nil
}

// fill writes live to a new file and gives it the journal's name.
func (j *journal) fill(live records, tmp string) error {
	if err := unix.Flock(int(j.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("sad: compact journal: lock %s: %w", tmp, err)
	}
	for _, r := range live {
		if err := j.append(entry{opIntend, r}, false); err != nil {
			return err
		}
		if r.committed {
			if err := j.append(entry{opCommit, r}, false); err != nil {
				return err
			}
		}
	}
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("sad: compact journal: %w", err)
	}
	if err := os.Rename(tmp, j.path); err != nil {
		return fmt.Errorf("sad: compact journal: %w", err)
	}
	return nil
}

func (j *journal) close() error { return j.file.Close() }
