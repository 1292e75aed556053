package main

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/ike"
	"github.com/q-ipsec/q-ipsec/kms/store"
)

// What happened before a restart is the most wanted after it: the operator sees
// the events of earlier starts, each once, newest first, and those of one
// connection if that is asked for.
func TestEventsOfEarlierStarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	st, err := store.Open(t.Context(), store.Options{URL: "sqlite:" + filepath.Join(dir, "i.db"), RootFile: filepath.Join(dir, "root"), Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	}()
	var o *operatorNode
	for life := 1; life <= 2; life++ {
		r := newRecorder(quiet())
		r.keep(st)
		k := &kms{}
		k.reign.Store(&reign{store: st})
		o = &operatorNode{started: time.Now(), ring: r.ring, keys: &operatorKeys{k}}
		r.source("kma").Event("LOW", "alarm", fmt.Sprintf("life %d: few keys", life))
		ikeEvents{r}.Event(ike.Event{Severity: ike.Run, Code: ike.EventUp, Connection: "a-b", Text: fmt.Sprintf("life %d: up", life)})
		ikeEvents{r}.Event(ike.Event{Severity: ike.Run, Code: ike.EventUp, Connection: "a-c", Text: "up"})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.run(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		connection string
		limit      int
		want       string
	}{
		{"", 10, "[a-c up a-b life 2: up  life 2: few keys a-c up a-b life 1: up  life 1: few keys]"},
		{"", 4, "[a-c up a-b life 2: up  life 2: few keys a-c up]"},
		{"a-b", 10, "[a-b life 2: up a-b life 1: up]"},
		{"a-b", 1, "[a-b life 2: up]"},
	} {
		list, err := o.Events(t.Context(), c.connection, c.limit)
		if err != nil {
			t.Fatal(err)
		}
		got := []string{}
		for _, e := range list {
			got = append(got, e.Connection+" "+e.Text)
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("connection %q, limit %d: %v, want %s", c.connection, c.limit, got, c.want)
		}
	}
}
