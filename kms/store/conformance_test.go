package store_test

import (
	"context"
	"log/slog"
	"testing"

	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/store/storetest"
)

func TestSQLite(t *testing.T) {
	storetest.Run(t, func(ctx context.Context, dir string) (*store.Store, error) {
		return store.Open(ctx, store.Options{URL: "sqlite:" + dir + "/store.db", RootFile: dir + "/root", Log: slog.New(slog.DiscardHandler)})
	})
}

func TestPostgres(t *testing.T) {
	storetest.Run(t, func(ctx context.Context, dir string) (*store.Store, error) {
		return store.Open(ctx, store.Options{URL: store.PostgresURL(t, dir), RootFile: dir + "/root", Log: slog.New(slog.DiscardHandler)})
	})
}
