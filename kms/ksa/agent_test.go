package ksa

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

func mustGet(t testing.TB, s *site, master, slave string, n, size int) []key.SupplyKey {
	t.Helper()
	keys, err := s.GetKey(t.Context(), master, slave, n, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { key.WipeAll(keys) })
	return keys
}

func ids(keys []key.SupplyKey) []key.ID {
	out := make([]key.ID, len(keys))
	for i, k := range keys {
		out[i] = k.ID
	}
	return out
}

func equalKeys(t testing.TB, x, y []key.SupplyKey) {
	t.Helper()
	if len(x) != len(y) {
		t.Fatalf("%d and %d keys", len(x), len(y))
	}
	for i := range x {
		if x[i].ID != y[i].ID || x[i].Class != y[i].Class || !x[i].Material.Equal(y[i].Material) {
			t.Errorf("key %d differs: %s and %s", i, x[i].ID, y[i].ID)
		}
	}
}

// kind is how a call was refused, for tables.
func kind(err error) string {
	var badReq *key.BadRequest
	var unavailable *key.Unavailable
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, key.ErrUnauthorised):
		return "unauthorised"
	case errors.As(err, &badReq) && badReq.NotFound:
		return "not found"
	case errors.As(err, &badReq):
		return "bad: " + badReq.Message
	case errors.As(err, &unavailable):
		return "unavailable"
	}
	return err.Error()
}

func wantKind(t testing.TB, err error, want string) {
	t.Helper()
	if got := kind(err); got != want {
		t.Errorf("refusal is %q, want %q", got, want)
	}
}

func fetch(t testing.TB, s *site, slave, master string, ids []key.ID, size int) ([]key.SupplyKey, error) {
	t.Helper()
	keys, err := s.GetKeyWithID(t.Context(), slave, master, ids, size)
	if err != nil && keys != nil {
		t.Error("keys beside an error")
	}
	t.Cleanup(func() { key.WipeAll(keys) })
	return keys, err
}

func TestBothSidesGetTheSameKeysOnce(t *testing.T) {
	a, b := twoSites(t, 20, nil)
	a.run(t)
	b.run(t)
	for _, c := range []struct {
		from, to      *site
		master, slave string
		n, size       int
	}{
		{a, b, "a1", "b1", 1, 0},
		{b, a, "b1", "a1", 1, 256},
		{a, b, "a2", "b2", 3, 64},
		{b, a, "b2", "a2", 16, 4096},
	} {
		x := mustGet(t, c.from, c.master, c.slave, c.n, c.size)
		y, err := fetch(t, c.to, c.slave, c.master, ids(x), c.size)
		if err != nil {
			t.Fatal(err)
		}
		equalKeys(t, x, y)
		want := c.size / 8
		if want == 0 {
			want = 32
		}
		if len(x) != c.n || x[0].Material.Len() != want || x[0].Class != key.Direct {
			t.Errorf("%d keys of %d bytes, class %v", len(x), x[0].Material.Len(), x[0].Class)
		}
		_, err = fetch(t, c.to, c.slave, c.master, ids(x), 0)
		wantKind(t, err, "not found")
	}
	for _, s := range []*site{a, b} {
		if n := s.keys.unwiped(); n != 0 {
			t.Errorf("%d master keys are left in memory", n)
		}
	}
	if a.count(Supplied) != 4 || a.count(Fetched) != 17 || b.count(Supplied) != 17 || b.count(Fetched) != 4 {
		t.Errorf("history: a %d/%d, b %d/%d", a.count(Supplied), a.count(Fetched), b.count(Supplied), b.count(Fetched))
	}
}

func TestGetKeyRefusals(t *testing.T) {
	a, _ := twoSites(t, 3, nil)
	for _, c := range []struct {
		master, slave string
		n, size       int
		want          string
	}{
		{"a1", "b1", 1, 7, "bad: size shall be a multiple of 8"},
		{"a1", "b1", 1, 257, "bad: size shall be a multiple of 8"},
		{"a1", "b1", 1, -8, "bad: size shall be between 64 and 4096"},
		{"a1", "b1", 1, 56, "bad: size shall be between 64 and 4096"},
		{"a1", "b1", 1, 4104, "bad: size shall be between 64 and 4096"},
		{"a1", "b1", 0, 256, "bad: number shall be between 1 and 128"},
		{"a1", "b1", -1, 256, "bad: number shall be between 1 and 128"},
		{"a1", "b1", 129, 256, "bad: number shall be between 1 and 128"},
		{"a1", "b1", 4, 256, "unavailable"},
		{"aq", "b1", 5, 256, "bad: number shall be at most 4, the quota of this SAE"},
		{"a1", "b2", 1, 256, "unauthorised"},
		{"a1", "nobody", 1, 256, "unauthorised"},
		{"nobody", "b1", 1, 256, "unauthorised"},
		{"", "b1", 1, 256, "unauthorised"},
		{"b1", "a1", 1, 256, "unauthorised"}, // not local
		{"a1", "a2", 1, 256, "bad: both SAEs belong to this KME: quantum keys are for SAEs at two sites"},
	} {
		keys, err := a.GetKey(t.Context(), c.master, c.slave, c.n, c.size)
		if keys != nil {
			t.Errorf("%+v: keys", c)
		}
		if got := kind(err); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
	if own, _ := a.keys.left(); own != 3 {
		t.Errorf("refused requests left %d keys of 3", own)
	}
	if a.count(Refused) != 5 {
		t.Errorf("%d refusals in the history", a.count(Refused))
	}
}

// A request that runs dry gives back what it took, in order.
func TestAllOrNothing(t *testing.T) {
	a, b := twoSites(t, 3, nil)
	first := a.keys.lease[0].ID
	_, err := a.GetKey(t.Context(), "a1", "b1", 4, 256)
	wantKind(t, err, "unavailable")
	if own, _ := a.keys.left(); own != 3 || a.keys.putBack != 3 {
		t.Fatalf("%d keys left, %d put back", own, a.keys.putBack)
	}
	keys := mustGet(t, a, "a1", "b1", 3, 256)
	if keys[0].ID != first {
		t.Errorf("the head of the lease is %s, was %s", keys[0].ID, first)
	}
	got, err := fetch(t, b, "b1", "a1", ids(keys), 0)
	if err != nil {
		t.Fatal(err)
	}
	equalKeys(t, keys, got)
	_, err = a.GetKey(t.Context(), "a1", "b1", 1, 256)
	wantKind(t, err, "unavailable")
	var u *key.Unavailable
	if !errors.As(err, &u) || u.RetryAfter != time.Second || !errors.Is(err, errEmpty) {
		t.Errorf("error is %#v", err)
	}
}

func TestCallerThatIsGoneConsumesNothing(t *testing.T) {
	a, _ := twoSites(t, 2, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := a.GetKey(ctx, "a1", "b1", 2, 256)
	wantKind(t, err, "unavailable")
	if own, _ := a.keys.left(); own != 2 {
		t.Errorf("%d keys left of 2", own)
	}
}

func TestFetchRefusalsConsumeNothing(t *testing.T) {
	a, b := twoSites(t, 10, nil)
	x := mustGet(t, a, "a1", "b1", 4, 128)
	y := mustGet(t, a, "a2", "b2", 1, 256)
	unknown := key.ID{1, 2, 3}
	id := ids(x)
	for _, c := range []struct {
		name, slave, master string
		ids                 []key.ID
		size                int
		want                string
	}{
		{"none", "b1", "a1", nil, 0, "bad: number of key_IDs shall be between 1 and 128"},
		{"too many", "b1", "a1", make([]key.ID, 129), 0, "bad: number of key_IDs shall be between 1 and 128"},
		{"twice", "b1", "a1", []key.ID{id[0], id[1], id[0]}, 0, "bad: key_IDs shall not name a key twice"},
		{"unknown", "b1", "a1", []key.ID{unknown}, 0, "not found"},
		{"one of them unknown", "b1", "a1", []key.ID{id[0], unknown, id[1]}, 0, "not found"},
		{"size", "b1", "a1", id, 256, "bad: size differs from that of the key"},
		{"other slave", "b2", "a2", id[:1], 0, "unauthorised"},
		{"one of them for another slave", "b1", "a1", []key.ID{id[0], y[0].ID}, 0, "unauthorised"},
		{"other master", "b1", "aq", id[:1], 0, "not found"},
		{"master itself", "a1", "b1", id[:1], 0, "unauthorised"},
		{"stranger", "nobody", "a1", id[:1], 0, "unauthorised"},
		{"own key", "b1", "b2", id[:1], 0, "unauthorised"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := fetch(t, b, c.slave, c.master, c.ids, c.size)
			wantKind(t, err, c.want)
		})
	}
	if _, remote := b.keys.left(); remote != 10 {
		t.Errorf("refused requests consumed %d keys", 10-remote)
	}
	got, err := fetch(t, b, "b1", "a1", id, 128)
	if err != nil {
		t.Fatal(err)
	}
	equalKeys(t, x, got)
}

// One key of the batch is burned: the others stay, those claimed before it
// included.
func TestBatchWithBurnedKey(t *testing.T) {
	a, b := twoSites(t, 5, nil)
	x := mustGet(t, a, "a1", "b1", 5, 256)
	id := ids(x)
	b.keys.mu.Lock()
	mk := b.keys.remote[id[2]]
	mk.Material.Wipe()
	delete(b.keys.remote, id[2])
	b.keys.mu.Unlock()
	_, err := fetch(t, b, "b1", "a1", id, 0)
	wantKind(t, err, "not found")
	rest := []key.ID{id[4], id[0], id[3], id[1]}
	got, err := fetch(t, b, "b1", "a1", rest, 0)
	if err != nil {
		t.Fatal(err)
	}
	equalKeys(t, []key.SupplyKey{x[4], x[0], x[3], x[1]}, got)
	if n := b.keys.unwiped(); n != 0 {
		t.Errorf("%d master keys are left in memory", n)
	}
}

func TestQuotaAndReserve(t *testing.T) {
	a, _ := twoSites(t, 20, func(o *Options) { o.Reserve = 5 })
	mustGet(t, a, "aq", "b1", 3, 256)
	_, err := a.GetKey(t.Context(), "aq", "b1", 2, 256)
	var u *key.Unavailable
	if !errors.As(err, &u) || u.RetryAfter != 500*time.Millisecond {
		t.Fatalf("above the quota: %v", err)
	}
	mustGet(t, a, "aq", "b1", 1, 256)
	a.advance(time.Second)
	mustGet(t, a, "aq", "b1", 2, 256) // 14 left
	mustGet(t, a, "a1", "b1", 9, 256) // 5 left: the reserve
	_, err = a.GetKey(t.Context(), "a1", "b1", 1, 256)
	wantKind(t, err, "unavailable")
	if !errors.Is(err, errReserve) {
		t.Errorf("cause is %v", err)
	}
	a.advance(2 * time.Second)
	for range 10 { // what the pool refuses does not cost quota
		_, err = a.GetKey(t.Context(), "aq", "b1", 4, 256)
		if !errors.Is(err, errReserve) {
			t.Fatalf("cause is %v", err)
		}
	}
	st, err := a.Status(t.Context(), "a1", "b1")
	if err != nil || st.StoredKeyCount != 0 {
		t.Errorf("status for a common SAE: %+v, %v", st, err)
	}
	st, err = a.Status(t.Context(), "a2", "b2")
	if err != nil || st.StoredKeyCount != 5 {
		t.Errorf("status for an IPsec SAE: %+v, %v", st, err)
	}
	mustGet(t, a, "a2", "b2", 5, 256) // IPsec may have it
}

func TestStatus(t *testing.T) {
	a, _ := twoSites(t, 4, nil)
	got, err := a.Status(t.Context(), "a1", "b1")
	want := key.SupplyStatus{
		SourceKME: "a", TargetKME: "b", MasterSAE: "a1", SlaveSAE: "b1",
		KeySize: 256, StoredKeyCount: 4, MaxKeyCount: 10_000_000, MaxKeyPerRequest: 128, MaxKeySize: 4096, MinKeySize: 64,
	}
	if err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	_, err = a.Status(t.Context(), "a1", "b2")
	wantKind(t, err, "unauthorised")
	a.keys.apart = true
	if got, err := a.Status(t.Context(), "a1", "b1"); err != nil || got.StoredKeyCount != 0 {
		t.Errorf("before the peer is synced: %+v, %v", got, err)
	}
}

func TestUsage(t *testing.T) {
	a, _ := twoSites(t, 1, nil)
	good := key.UsageReport{ID: key.ID{1}, Usage: key.Used, Bytes: 5}
	wantKind(t, a.Usage(t.Context(), "a1", "b1", []key.UsageReport{good}), "ok")
	wantKind(t, a.Usage(t.Context(), "a1", "b2", []key.UsageReport{good}), "unauthorised")
	wantKind(t, a.Usage(t.Context(), "a1", "b1", nil), "bad: a report shall name 1 to 128 keys")
	for _, r := range []key.UsageReport{{ID: key.ID{1}, Usage: "lost"}, {Usage: key.Used}} {
		wantKind(t, a.Usage(t.Context(), "a1", "b1", []key.UsageReport{good, r}), "bad: a report needs a key_ID and one of used, unused, failed, retired")
	}
	if len(a.usage) != 1 || a.usage[0] != good {
		t.Errorf("kept: %v", a.usage)
	}
	a.o.Usage = func(context.Context, string, string, []key.UsageReport) error { return errors.New("disk full") }
	wantKind(t, a.Usage(t.Context(), "a1", "b1", []key.UsageReport{good}), "unavailable")
}

func TestTableFaults(t *testing.T) {
	a, _ := twoSites(t, 0, nil)
	ok := []SAE{{ID: "x", Node: "a"}}
	for name, saes := range map[string][]SAE{
		"empty id":        {{Node: "a"}},
		"bad character":   {{ID: "a/b", Node: "a"}},
		"dots":            {{ID: "..", Node: "a"}},
		"twice":           {ok[0], ok[0]},
		"no node":         {{ID: "x"}},
		"unknown peer":    {{ID: "x", Node: "a", Peers: []string{"y"}}},
		"remote rights":   {{ID: "x", Node: "b", IPsec: true}},
		"negative quota":  {{ID: "x", Node: "a", Rate: -1}},
		"65 characters":   {{ID: string(make([]byte, 65)), Node: "a"}},
		"not ASCII":       {{ID: "säe", Node: "a"}},
		"control in name": {{ID: "a\n", Node: "a"}},
	} {
		o := a.o
		o.SAEs = saes
		if _, err := New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	o := a.o
	o.SAEs = ok
	if _, err := New(o); err != nil {
		t.Error(err)
	}
	o.Keys = nil
	if _, err := New(o); err == nil {
		t.Error("accepted without Keys")
	}
}

func TestTooManyNotices(t *testing.T) {
	a, b := twoSites(t, 20, func(o *Options) { o.MaxNotices = 3 })
	mustGet(t, a, "a1", "b1", 11, 256)
	_, err := a.GetKey(t.Context(), "a1", "b1", 2, 256)
	wantKind(t, err, "unavailable")
	if own, _ := a.keys.left(); own != 9 {
		t.Errorf("%d keys left, want 9", own)
	}
	var ns []Notice
	for i := range 4 {
		ns = append(ns, Notice{Pool: uuid.UUID{1}, Position: key.At(1, uint32(i)), KeyID: key.ID{byte(i + 1)}, MasterSAE: "a1", SlaveSAEs: []string{"b1"}, SizeBits: 256, TTL: time.Minute})
	}
	if err := b.Receive(t.Context(), "a", ns); !errors.Is(err, errFull) {
		t.Errorf("a fourth notice: %v", err)
	}
	if got := len(b.KeepOnBurn(uuid.UUID{1}, key.At(9, 0))); got != 3 {
		t.Errorf("%d notices kept", got)
	}
}
