package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// ErrBackup says that a file is no backup, or not a whole one.
var ErrBackup = errors.New("not a sound backup")

// ErrExists says that a backup would be restored over what is there.
var ErrExists = errors.New("there is a store already")

// A backup is lines of JSON: a backupHead, the rows of history and events as
// Export writes them, a backupEnd.
const (
	backupFormat  = "q-ipsec store backup"
	backupVersion = 1
	maxBackupLine = 1 << 20 // bytes; a row has a few kB at most
)

// backupHead says what a backup is of. It has no mark: those of a backup are
// not the last ones, and only the peer knows better. What it has of a pool and
// of the node are lower bounds, which can make a restored node refuse, never
// accept.
type backupHead struct {
	Format     string       `json:"format"`
	Version    int          `json:"version"`
	Made       time.Time    `json:"made"`
	Store      uuid.UUID    `json:"store"`
	Generation uint64       `json:"generation"` // the restored store's are higher
	Pools      []backupPool `json:"pools"`
}

type backupPool struct {
	ID             uuid.UUID `json:"id"`
	Peer           string    `json:"peer"`
	Role           string    `json:"role"`
	Class          string    `json:"class"`
	NewestSeq      uint64    `json:"newest_seq"`      // nothing up to it is taken in again
	PeerGeneration uint64    `json:"peer_generation"` // an older store of the peer's is refused
}

type backupEnd struct {
	Rows   int    `json:"rows"`
	SHA256 string `json:"sha256"` // of every byte before this line
}

// BackupInfo says what was backed up or restored.
type BackupInfo struct {
	Store uuid.UUID // the one the backup is of
	Made  time.Time
	Pools int
	Rows  int // of history and events
}

// Backup writes to w what may leave the node: names of pools, history and
// events, as of one moment. No key block, lease, mark or root is in it. It works
// beside a running daemon.
func Backup(ctx context.Context, opt Options, w io.Writer) (info BackupInfo, err error) {
	s, l, rootErr, err := openLook(ctx, opt)
	if err != nil {
		return info, err
	}
	defer func() { err = errors.Join(err, s.endLook(l)) }()
	if rootErr != nil {
		return info, rootErr
	}
	if err := s.lookNode(ctx); err != nil {
		return info, fmt.Errorf("store: %s: %w", s.eng, err)
	}
	pools, err := s.readPools(ctx, s.snap)
	if err != nil {
		return info, fmt.Errorf("store: %s: %w", s.eng, err)
	}
	head := backupHead{
		Format: backupFormat, Version: backupVersion, Made: s.opt.Now().UTC().Truncate(time.Second), Store: s.uuid, Generation: s.generation, Pools: []backupPool{},
	}
	for _, p := range pools {
		i := p.info
		head.Pools = append(head.Pools, backupPool{i.ID, i.Peer, i.Role.String(), i.Class.String(), i.NewestSeq, i.PeerGeneration})
	}
	slices.SortFunc(head.Pools, func(a, b backupPool) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	sum := sha256.New()
	out := bufio.NewWriter(w)
	both := io.MultiWriter(out, sum)
	if err := json.NewEncoder(both).Encode(head); err != nil {
		return info, fmt.Errorf("store: write backup: %w", err)
	}
	n, err := s.writeLogs(ctx, ExportQuery{}, both)
	if err == nil {
		err = json.NewEncoder(out).Encode(backupEnd{n, hex.EncodeToString(sum.Sum(nil))})
	}
	if err = errors.Join(err, out.Flush()); err != nil {
		return info, fmt.Errorf("store: write backup: %w", err)
	}
	return BackupInfo{s.uuid, head.Made, len(pools), n}, nil
}

// readBackup checks a backup and hands its rows to row, unless that is nil, in
// order. Rows come before the checksum is known: read it once without row first.
func readBackup(r io.Reader, row func(*logLine) error) (head backupHead, rows int, err error) {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("store: %w: %s", ErrBackup, fmt.Sprintf(format, args...))
	}
	sum := sha256.New()
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 64<<10), maxBackupLine)
	if !sc.Scan() {
		return head, 0, bad("it is empty, or cannot be read: %v", sc.Err())
	}
	if err := strict(sc.Bytes(), &head); err != nil || head.Format != backupFormat {
		return head, 0, bad("it does not begin with format %q (%v)", backupFormat, err)
	}
	if head.Version != backupVersion {
		return head, 0, bad("it has version %d, this program knows %d", head.Version, backupVersion)
	}
	addLine(sum, sc.Bytes())
	for sc.Scan() {
		var end backupEnd
		if strict(sc.Bytes(), &end) == nil && end.SHA256 != "" {
			if end.SHA256 != hex.EncodeToString(sum.Sum(nil)) || end.Rows != rows || sc.Scan() {
				return head, rows, bad("its checksum or length is wrong: it was changed or is torn")
			}
			return head, rows, nil
		}
		rows++
		addLine(sum, sc.Bytes())
		var l logLine
		if err := strict(sc.Bytes(), &l); err != nil || l.Kind != kindHistory && l.Kind != kindEvent {
			return head, rows, bad("row %d: %v", rows, err)
		}
		if row != nil {
			if err := row(&l); err != nil {
				return head, rows, err
			}
		}
	}
	return head, rows, bad("its end is missing (%v)", sc.Err())
}

func addLine(h hash.Hash, line []byte) {
	_, _ = h.Write(line) // never fails (hash.Hash)
	_, _ = h.Write([]byte{'\n'})
}

// strict decodes one JSON value that has no unknown members.
func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

// pool checks what the head says of one.
func (p *backupPool) pool() (PoolInfo, error) {
	i := PoolInfo{ID: p.ID, Peer: p.Peer, NewestSeq: p.NewestSeq, PeerGeneration: p.PeerGeneration}
	for _, r := range []key.Role{key.Master, key.Slave} {
		if r.String() == p.Role {
			i.Role = r
		}
	}
	var err error
	if i.Class, err = key.ParseClass(p.Class); err != nil {
		return i, err
	}
	if p.ID == uuid.Nil || p.Peer == "" || len(p.Peer) > 32 || strings.ContainsRune(p.Peer, 0) || i.Role == 0 || p.NewestSeq > key.MaxSeq || p.PeerGeneration > 1<<62 {
		return i, fmt.Errorf("pool %s with %q: a field is out of range", p.ID, p.Peer)
	}
	return i, nil
}

// Restore makes a new store, with a root and UUID of its own, and puts the
// history, events and pools of a backup into it. The pools are empty: what was
// leased since the backup only the peer knows, and its SYNC says so before
// anything is supplied. It refuses any store that is there (ErrExists) but one
// that a restore left half-made, and anything but a sound backup (ErrBackup).
func Restore(ctx context.Context, opt Options, r io.ReadSeeker) (info BackupInfo, err error) {
	head, rows, err := readBackup(r, nil)
	if err != nil {
		return info, err
	}
	if head.Generation > 1<<62 {
		return info, fmt.Errorf("store: %w: its generation is out of range", ErrBackup)
	}
	var pools []PoolInfo
	for _, p := range head.Pools {
		i, err := p.pool()
		if err != nil {
			return info, fmt.Errorf("store: %w: %w", ErrBackup, err)
		}
		pools = append(pools, i)
	}
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return info, fmt.Errorf("store: read backup: %w", err)
	}
	if err := restorable(ctx, opt); err != nil {
		return info, err
	}
	opt.setDefaults()
	now := opt.Now
	// Generations begin above both the clock and what the peer may have seen.
	opt.Now = func() time.Time {
		if t := now(); t.Unix() > int64(head.Generation) {
			return t
		}
		return time.Unix(int64(head.Generation), 0)
	}
	s, err := Open(ctx, opt)
	if err != nil {
		return info, err
	}
	s.opt.Now = now
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.fill(ctx, head, pools, r); err != nil {
		return info, err
	}
	return BackupInfo{head.Store, head.Made, len(pools), rows}, nil
}

// restorable refuses what a backup must not be put into, and changes nothing.
func restorable(ctx context.Context, opt Options) (err error) {
	const away = "move database and root file away first: a restored store has its own"
	s, l, _, err := openLook(ctx, opt)
	if errors.Is(err, fs.ErrNotExist) {
		if fileThere(opt.RootFile) {
			return fmt.Errorf("store: %w: root file %s; %s", ErrExists, opt.RootFile, away)
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.endLook(l)) }()
	if l.running {
		return fmt.Errorf("store: %s: %w; stop it first", s.eng, ErrInUse)
	}
	isNew, err := s.eng.fresh(ctx, s.snap)
	if err != nil {
		return fmt.Errorf("store: %s: %w", s.eng, err)
	}
	if isNew == fileThere(opt.RootFile) {
		return fmt.Errorf("store: %w: of database %s and root file %s one is there without the other; %s", ErrExists, s.eng, opt.RootFile, away)
	}
	if isNew {
		return nil
	}
	for _, table := range []string{"pool", "history", "event"} {
		var n int64
		if err := s.snap.QueryRowContext(ctx, "SELECT count(*) FROM "+table).Scan(&n); err != nil {
			return fmt.Errorf("store: %s: %w", s.eng, explain(err))
		}
		if n > 0 {
			return fmt.Errorf("store: %w: %s; %s", ErrExists, s.eng, away)
		}
	}
	return nil
}

// fill writes all of a backup in one transaction.
func (s *Store) fill(ctx context.Context, head backupHead, pools []PoolInfo, r io.Reader) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	if len(s.pools) > 0 || s.historyNext > 1 || s.eventNext > 1 {
		return fmt.Errorf("store: %w: %s was filled meanwhile", ErrExists, s.eng)
	}
	return s.write(ctx, "restore a backup", func(tx *sql.Tx) error {
		for _, i := range pools {
			if err := s.insertPool(ctx, tx, &i); err != nil {
				return err
			}
		}
		var page []Event // written together
		flush := func() error {
			err := s.note(ctx, tx, page...)
			page = page[:0]
			return err
		}
		_, rows, err := readBackup(r, func(l *logLine) error {
			if l.Kind == kindEvent {
				return s.append(ctx, tx, l.event())
			}
			e, err := l.history()
			if err != nil {
				return fmt.Errorf("%w: %w", ErrBackup, err)
			}
			if page = append(page, e); len(page) < exportPage {
				return nil
			}
			return flush()
		})
		if err == nil {
			err = flush()
		}
		if err != nil {
			return err
		}
		return s.append(ctx, tx, LogEvent{
			Severity: SeverityRun, Code: "store-restored", Source: "store",
			Text:   fmt.Sprintf("history of store %s as of %s, %d rows", head.Store, head.Made.Format(time.RFC3339), rows),
			Action: "pools start empty",
		})
	})
}
