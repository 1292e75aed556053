package store

import (
	"context"
	"crypto/rand"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

func TestSmoke(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "s")
	opt := Options{URL: "sqlite:" + dir + "/db", RootFile: dir + "/root", Log: slog.New(slog.DiscardHandler)}
	s, err := Open(ctx, opt)
	if err != nil {
		t.Fatal(err)
	}
	pid := uuid.New()
	if err := s.EnsurePool(ctx, pid, "b", key.Master, key.Direct); err != nil {
		t.Fatal(err)
	}
	n := 5000
	m, _ := key.Random(rand.Reader, 32*n)
	defer m.Wipe()
	ids := make([]key.ID, n)
	for i := range ids {
		ids[i] = key.ID(uuid.New())
	}
	if err := s.PutBlock(ctx, Block{Pool: pid, Seq: 1, Class: key.Direct, Keys: m, IDs: ids, Algorithm: "poly1305", Bytes: 32*n + 96}); err != nil {
		t.Fatal(err)
	}
	if err := s.Activate(ctx, pid, 1); err != nil {
		t.Fatal(err)
	}
	mark, k, err := s.NextLease(ctx, pid, 2100)
	if err != nil || k != 2100 {
		t.Fatal(k, err)
	}
	if err := s.Advance(ctx, pid, Own, mark, "lease", s.Generation()); err != nil {
		t.Fatal(err)
	}
	keys, err := s.Load(ctx, pid, Own, 0, mark)
	if err != nil || len(keys) != 2100 {
		t.Fatal(len(keys), err)
	}
	for _, k := range keys {
		i := k.Position.Index()
		if k.ID != ids[i] || string(k.Material.Bytes()) != string(m.Bytes()[32*i:32*i+32]) {
			t.Fatal("wrong key", i)
		}
		k.Material.Wipe()
	}
	if err := s.Ratchet(ctx); err != nil {
		t.Fatal(err)
	}
	st, _ := s.Stats(ctx)
	t.Logf("%+v", st)
	if _, err := Open(ctx, opt); err == nil {
		t.Fatal("second open")
	} else {
		t.Log(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(ctx, opt); err != nil {
		t.Fatal(err)
	}
	ev, err := s.History(ctx, HistoryQuery{})
	t.Log(ev, err)
	p, _ := s.Pool(ctx, pid)
	t.Logf("%+v", p)
	ki, err := s.Find(ctx, ids[4999])
	t.Logf("%+v %v", ki, err)
	s.Close()
}
