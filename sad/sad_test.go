package sad

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

func TestInstallCommitRemove(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.install(0x1000, true)
	r.has(0x1000)
	if got := r.kernel.sas[testSA(0x1000).Key()].key; len(got) != 36 {
		t.Errorf("kernel got a key of %d bytes", len(got))
	}
	if err := r.sad.Commit(ctx, testSA(0x1000).ID); err != nil {
		t.Errorf("second Commit: %v", err)
	}
	r.sad.Rollback(ctx, testSA(0x1000).ID)
	r.has(0x1000) // committed: not rolled back
	if err := r.sad.Commit(ctx, testSA(0x2000).ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("Commit of an unknown SA: %v", err)
	}
	if err := r.sad.Remove(ctx, testSA(0x1000).ID); err != nil {
		t.Fatal(err)
	}
	r.has()
	r.records()
	if err := r.sad.Remove(ctx, testSA(0x1000).ID); err != nil {
		t.Errorf("second Remove: %v", err)
	}
	r.foreign(0x3000)
	if err := r.sad.Remove(ctx, testSA(0x3000).ID); err != nil {
		t.Error(err)
	}
	r.has(0x3000)
}

func TestRollback(t *testing.T) {
	r := newRig(t)
	r.install(0x1000, false)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.sad.Rollback(ctx, testSA(0x1000).ID) // works although ctx has ended
	r.has()
	r.records()

	r.install(0x1002, false)
	r.kernel.fail["delete"] = xfrm.ErrUnknown
	r.sad.Rollback(t.Context(), testSA(0x1002).ID)
	r.records(0x1002)
	delete(r.kernel.fail, "delete")
	r.reconcile(lists(nil)) // judged at once, although never committed
	r.has()
	r.records()
}

// TestInstallRefuses: nothing may have been tried, not even the journal.
func TestInstallRefuses(t *testing.T) {
	for name, change := range map[string]func(*SA){
		"ipcomp":     func(sa *SA) { sa.IPComp = 2 },
		"offload":    func(sa *SA) { sa.Offload = 1 },
		"label":      func(sa *SA) { sa.Label = true },
		"beet":       func(sa *SA) { sa.Mode = Beet },
		"AH":         func(sa *SA) { sa.Protocol = 51 },
		"encryption": func(sa *SA) { sa.Suite.Encr = 11 },
		"GCM with 8": func(sa *SA) { sa.Suite.Encr = 18 },
	} {
		r := newRig(t)
		sa := testSA(0x1000)
		change(&sa)
		err := r.sad.Install(t.Context(), sa, testKeys(t, 1), testOwner)
		if !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v, want ErrUnsupported", name, err)
		}
		if info, err := os.Stat(r.journal); err != nil || info.Size() != 0 || len(r.kernel.calls) != 0 {
			t.Errorf("%s: something was tried: %v", name, r.kernel.calls)
		}
	}
}

func TestInstallFails(t *testing.T) {
	t.Run("refused by the kernel", func(t *testing.T) {
		r := newRig(t)
		r.kernel.fail["add"] = xfrm.ErrNoESP
		if err := r.sad.Install(t.Context(), testSA(0x1000), testKeys(t, 1), testOwner); !errors.Is(err, ErrNoESP) {
			t.Errorf("%v", err)
		}
		r.records()
	})
	t.Run("answer not seen", func(t *testing.T) {
		r := newRig(t)
		r.kernel.fail["add"] = xfrm.ErrUnknown
		r.foreign(0x1000) // the kernel did it
		if err := r.sad.Install(t.Context(), testSA(0x1000), testKeys(t, 1), testOwner); !errors.Is(err, xfrm.ErrUnknown) {
			t.Errorf("%v", err)
		}
		r.has()
		r.records()
	})
	t.Run("too late", func(t *testing.T) {
		r := newRig(t)
		ctx, cancel := context.WithCancel(t.Context())
		r.kernel.after = cancel
		if err := r.sad.Install(ctx, testSA(0x1000), testKeys(t, 1), testOwner); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		r.has()
		r.records()
	})
	t.Run("there already, ours", func(t *testing.T) {
		r := newRig(t)
		r.install(0x1000, true)
		if err := r.sad.Install(t.Context(), testSA(0x1000), testKeys(t, 9), Owner{Connection: "other"}); !errors.Is(err, ErrExists) {
			t.Errorf("%v", err)
		}
		r.restart()
		all, err := r.sad.State(t.Context())
		if err != nil || len(all) != 1 || all[0].Connection != "net" || !all[0].Committed {
			t.Errorf("the old record is not what it was: %+v, %v", all, err)
		}
	})
	t.Run("there already, not ours", func(t *testing.T) {
		r := newRig(t)
		r.foreign(0x1000)
		if err := r.sad.Install(t.Context(), testSA(0x1000), testKeys(t, 9), testOwner); !errors.Is(err, ErrExists) {
			t.Errorf("%v", err)
		}
		r.reconcile(lists(nil))
		r.has(0x1000)
		r.records()
	})
}

func TestContextWhileWaiting(t *testing.T) {
	r := newRig(t)
	if err := r.sad.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.sad.Query(ctx, testSA(0x1000).ID); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	r.sad.release()
}

func TestQuery(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	r.install(0x1000, true)
	id := testSA(0x1000).ID
	query := func() Counters {
		t.Helper()
		c, err := r.sad.Query(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := query(); c != (Counters{}) {
		t.Errorf("unused: %+v", c)
	}
	r.kernel.sas[id.Key()].info.Bytes, r.kernel.sas[id.Key()].info.Packets = 1000, 10
	used := query()
	if used.Bytes != 1000 || used.Packets != 10 || used.LastUse == 0 {
		t.Errorf("used: %+v", used)
	}
	if again := query(); again != used {
		t.Errorf("not used since: %+v, was %+v", again, used)
	}
	r.kernel.sas[id.Key()].info.Bytes++
	if later := query(); later.LastUse <= used.LastUse {
		t.Errorf("used again: %+v, was %+v", later, used)
	}
	if _, err := r.sad.Query(ctx, testSA(0x2000).ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown SA: %v", err)
	}
}

func TestUpdate(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	sa := testSA(0x1000)
	sa.Encap = true
	if err := r.sad.Install(ctx, sa, testKeys(t, 1), testOwner); err != nil {
		t.Fatal(err)
	}
	if err := r.sad.Commit(ctx, sa.ID); err != nil {
		t.Fatal(err)
	}
	port := netip.AddrPortFrom(sa.Dst.Addr(), 30000)
	moved, err := r.sad.Update(ctx, Change{ID: sa.ID, NewSrc: sa.Src, NewDst: port, NewEncap: true})
	if err != nil || moved || r.kernel.calls[len(r.kernel.calls)-1] != "ports 00001000" {
		t.Errorf("port change: moved=%v, %v, %v", moved, err, r.kernel.calls)
	}
	to := netip.MustParseAddrPort("192.0.2.9:4500")
	r.kernel.fail["move"] = xfrm.ErrSequence
	if moved, err := r.sad.Update(ctx, Change{ID: sa.ID, NewSrc: sa.Src, NewDst: to}); !errors.Is(err, ErrSequence) || moved {
		t.Errorf("sequence used up: %v, %v", moved, err)
	}
	if len(r.sad.live) != 1 || r.sad.live[sa.Key()] == nil {
		t.Errorf("records after a refused move: %v", r.sad.live)
	}
	delete(r.kernel.fail, "move")
	if moved, err := r.sad.Update(ctx, Change{ID: sa.ID, NewSrc: sa.Src, NewDst: to}); err != nil || !moved {
		t.Errorf("address change: %v, %v", moved, err)
	}
	r.restart()
	all, err := r.sad.State(ctx)
	if err != nil || len(all) != 1 || all[0].Dst.Addr() != to.Addr() || all[0].Encap || !all[0].Committed || all[0].KeyID != testOwner.KeyID {
		t.Errorf("after the move: %+v, %v", all, err)
	}
	if len(r.sad.live) != 1 {
		t.Errorf("records after the move: %v", r.sad.live)
	}
	// Only the source changes: the record's key stays the same.
	id := all[0].ID
	if moved, err := r.sad.Update(ctx, Change{ID: id, NewSrc: netip.MustParseAddrPort("192.0.2.77:0"), NewDst: id.Dst}); err != nil || !moved {
		t.Errorf("source change: %v, %v", moved, err)
	}
	r.restart()
	if got := r.sad.live[id.Key()]; got == nil || !got.committed || got.ID.Src.Addr() != netip.MustParseAddr("192.0.2.77") {
		t.Errorf("record after the source change: %+v", got)
	}
	if _, err := r.sad.Update(ctx, Change{ID: testSA(0x5000).ID, NewSrc: sa.Src, NewDst: to}); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown SA: %v", err)
	}
}

func TestState(t *testing.T) {
	r := newRig(t)
	for _, spi := range []uint32{0x1001, 0x1002, 0x1003} {
		r.install(spi, true)
	}
	r.foreign(0x2000)
	fingerprint, err := testKeys(t, 0x02).Fingerprint()
	if err != nil {
		t.Fatal(err)
	}
	all, err := r.sad.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range all {
		got = append(got, fmt.Sprintf("%x %v %s", s.SPI, s.Inbound, s.Algorithm))
	}
	if want := []string{"1002 true AES_GCM_16-256", "1001 false AES_GCM_16-256", "1003 false AES_GCM_16-256"}; !slices.Equal(got, want) {
		t.Errorf("State gives %v, want %v", got, want)
	}
	if all[0].Fingerprint != fingerprint {
		t.Errorf("fingerprint %q, want %q", all[0].Fingerprint, fingerprint)
	}
}

func TestReconcile(t *testing.T) {
	for _, tc := range []struct {
		name    string
		run     func(r *rig) (missing []uint32)
		missing []uint32
		kernel  []uint32
		journal []uint32
	}{
		{"all agree", func(r *rig) []uint32 { return r.reconcile(lists([]uint32{0x1000, 0x1001})) }, nil, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
		{"unknown to charon", func(r *rig) []uint32 { return r.reconcile(lists([]uint32{0x1001})) }, nil, []uint32{0x1001, 0xf000}, []uint32{0x1001}},
		{"missed by one listing", func(r *rig) []uint32 { return r.reconcile(lists([]uint32{0x1001}, []uint32{0x1000, 0x1001})) }, nil, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
		{"missing in the kernel", func(r *rig) []uint32 { return r.reconcile(lists([]uint32{0x1000, 0x1001, 0x3000})) }, []uint32{0x3000}, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
		{"gone from charon between", func(r *rig) []uint32 {
			return r.reconcile(lists([]uint32{0x1000, 0x1001, 0x3000}, []uint32{0x1000, 0x1001}))
		}, nil, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
		{"ends while charon is asked", func(r *rig) []uint32 {
			calls := 0
			return r.reconcile(func(ctx context.Context) ([]ID, error) {
				if calls++; calls == 2 {
					delete(r.kernel.sas, testSA(0x1000).Key())
				}
				return lists([]uint32{0x1000, 0x1001, 0x3000})(ctx)
			})
		}, []uint32{0x3000}, []uint32{0x1001, 0xf000}, []uint32{0x1001}},
		{"comes and ends while charon is asked", func(r *rig) []uint32 {
			return r.reconcile(lists([]uint32{0x1001}, []uint32{0x1000, 0x1001, 0x3000}))
		}, nil, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
		{"deleted by charon", func(r *rig) []uint32 {
			delete(r.kernel.sas, testSA(0x1000).Key())
			return r.reconcile(lists([]uint32{0x1001}))
		}, nil, []uint32{0x1001, 0xf000}, []uint32{0x1001}},
		{"installed anew while charon is asked", func(r *rig) []uint32 {
			return r.reconcile(func(context.Context) ([]ID, error) {
				if r.sad.live[testSA(0x1000).Key()].serial < 3 {
					if err := r.sad.Remove(r.t.Context(), testSA(0x1000).ID); err != nil {
						r.t.Error(err)
					}
					r.install(0x1000, true)
				}
				return []ID{testSA(0x1001).ID}, nil
			})
		}, nil, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
		{"installed while charon is asked", func(r *rig) []uint32 {
			return r.reconcile(func(context.Context) ([]ID, error) {
				if len(r.sad.live) == 2 {
					r.install(0x1002, true)
				}
				return []ID{testSA(0x1001).ID}, nil
			})
		}, nil, []uint32{0x1001, 0x1002, 0xf000}, []uint32{0x1001, 0x1002}},
		{"not committed yet", func(r *rig) []uint32 {
			r.install(0x1002, false)
			return r.reconcile(lists([]uint32{0x1000, 0x1001}))
		}, nil, []uint32{0x1000, 0x1001, 0x1002, 0xf000}, []uint32{0x1000, 0x1001, 0x1002}},
		{"never committed", func(r *rig) []uint32 {
			r.install(0x1002, false)
			r.sad.live[testSA(0x1002).Key()].since = time.Now().Add(-2 * pendingFor)
			return r.reconcile(lists([]uint32{0x1000, 0x1001}))
		}, nil, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
		{"charon has one that is not ours", func(r *rig) []uint32 { return r.reconcile(lists([]uint32{0x1000, 0x1001, 0xf000})) }, nil, []uint32{0x1000, 0x1001, 0xf000}, []uint32{0x1000, 0x1001}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			r.install(0x1000, true)
			r.install(0x1001, true)
			r.foreign(0xf000)
			if got := tc.run(r); !slices.Equal(got, tc.missing) {
				t.Errorf("missing %x, want %x", got, tc.missing)
			}
			r.has(tc.kernel...)
			r.records(tc.journal...)
			r.restart()
			r.records(tc.journal...)
		})
	}
}

func TestReconcileListFails(t *testing.T) {
	for _, good := range []int{0, 1} {
		r := newRig(t)
		r.install(0x1000, true)
		calls := 0
		_, err := r.sad.Reconcile(t.Context(), func(context.Context) ([]ID, error) {
			if calls++; calls > good {
				return nil, errors.New("charon is gone")
			}
			return nil, nil
		})
		if err == nil || !strings.Contains(err.Error(), "charon is gone") {
			t.Errorf("%v", err)
		}
		r.has(0x1000)
	}
}

// TestCrashes ends the process at every point of Install, Rollback and Update,
// and looks whether the next start leaves exactly what charon knows.
func TestCrashes(t *testing.T) {
	move := Change{ID: testSA(0x1000).ID, NewSrc: testSA(0).Src, NewDst: netip.MustParseAddrPort("192.0.2.9:4500")}
	for _, tc := range []struct {
		name, point string
		run         func(r *rig)
		missing     int
	}{
		{"after the journal", "before add", func(r *rig) { r.install(0x2000, true) }, 0},
		{"after netlink", "after add", func(r *rig) { r.install(0x2000, true) }, 0},
		{"rolling back", "before delete", func(r *rig) { r.install(0x2000, false); r.sad.Rollback(t.Context(), testSA(0x2000).ID) }, 0},
		{"rolled back", "after delete", func(r *rig) { r.install(0x2000, false); r.sad.Rollback(t.Context(), testSA(0x2000).ID) }, 0},
		{"before the move", "before move", func(r *rig) { _, _ = r.sad.Update(t.Context(), move) }, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			r.install(0x1000, true)
			r.foreign(0xf000)
			r.crashing(tc.point, func() { tc.run(r) })
			if missing := r.reconcile(lists([]uint32{0x1000})); len(missing) != tc.missing {
				t.Errorf("missing %x", missing)
			}
			r.has(0x1000, 0xf000)
			r.records(0x1000)
		})
	}
	t.Run("before commit", func(t *testing.T) {
		r := newRig(t)
		r.install(0x2000, false)
		r.restart()
		r.has(0x2000)
		r.reconcile(lists(nil))
		r.has()
	})
	t.Run("after the move", func(t *testing.T) {
		r := newRig(t)
		r.install(0x1000, true)
		r.crashing("after move", func() { _, _ = r.sad.Update(t.Context(), move) })
		// charon was told nothing, still has the old address: its child is
		// missing and the moved SA is an orphan.
		if missing := r.reconcile(lists([]uint32{0x1000})); !slices.Equal(missing, []uint32{0x1000}) {
			t.Errorf("missing %x", missing)
		}
		r.has()
	})
}

// TestRandomHistory runs random operations, crashes and torn writes against a
// model of charon. After each restart and comparison the kernel must have
// exactly what charon knows, and foreign SAs as they were.
func TestRandomHistory(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	r := newRig(t)
	r.foreign(0xf000)
	charon := map[uint32]bool{}
	next := uint32(0x1000)
	known := func(context.Context) (ids []ID, err error) {
		for spi := range charon {
			ids = append(ids, testSA(spi).ID)
		}
		return ids, nil
	}
	pick := func() (uint32, bool) {
		for spi := range charon {
			return spi, true
		}
		return 0, false
	}
	for range 300 {
		next++
		switch rng.IntN(8) {
		case 0, 1: // a CHILD_SA is made
			r.install(next, true)
			charon[next] = true
		case 2: // not acknowledged
			r.install(next, false)
			r.sad.Rollback(t.Context(), testSA(next).ID)
		case 3: // crash in Install
			r.crashing([]string{"before add", "after add"}[rng.IntN(2)], func() { r.install(next, true) })
		case 4: // crash before Commit, with a torn line of something after it
			r.install(next, false)
			tear(t, r.journal, rng)
			r.restart()
		case 5: // charon deletes one itself
			if spi, ok := pick(); ok {
				delete(charon, spi)
				delete(r.kernel.sas, testSA(spi).Key())
			}
		case 6: // charon dies and forgets one
			if spi, ok := pick(); ok {
				delete(charon, spi)
			}
		case 7: // the kernel lost one (expired)
			spi, ok := pick()
			if ok {
				delete(r.kernel.sas, testSA(spi).Key())
			}
			missing := r.reconcile(known)
			for _, m := range missing {
				delete(charon, m) // the caller terminates it
			}
			if ok && !slices.Equal(missing, []uint32{spi}) {
				t.Fatalf("missing %x, want %x", missing, spi)
			}
			want := []uint32{0xf000}
			for spi := range charon {
				want = append(want, spi)
			}
			r.has(want...)
			r.records(want[1:]...)
		}
		if t.Failed() {
			return
		}
	}
}

// tear appends a part of a line, as an append that a crash cut short.
func tear(t *testing.T, path string, rng *rand.Rand) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	last := strings.TrimSuffix(string(b), "\n")
	last = last[strings.LastIndexByte(last, '\n')+1:]
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(last[:rng.IntN(len(last))]); err != nil {
		t.Fatal(err)
	}
}

func TestWarmup(t *testing.T) {
	r := newRig(t)
	suites := xfrm.Suites()
	if err := r.sad.Warmup(t.Context(), suites, true); err != nil {
		t.Fatal(err)
	}
	r.has()
	if want := 4 * len(suites); len(r.kernel.calls) != want {
		t.Errorf("%d requests, want %d", len(r.kernel.calls), want)
	}
	r.kernel.fail["add"] = xfrm.ErrNoESP
	if err := r.sad.Warmup(t.Context(), suites, false); !errors.Is(err, ErrNoESP) || !strings.Contains(err.Error(), suites[0].String()) {
		t.Errorf("%v", err)
	}
}

// Steered names the SAs that packets are sent to.
func TestSteered(t *testing.T) {
	r := newRig(t)
	r.kernel.policies = []xfrm.Policy{
		{Dir: xfrm.Out, SPI: 1, Templates: true}, {Dir: xfrm.Out, Templates: true}, {Dir: xfrm.In, SPI: 2, Templates: true}, {Dir: xfrm.Out, Block: true},
	}
	got, err := r.sad.Steered(t.Context())
	if err != nil || len(got) != 1 || !got[1] {
		t.Errorf("%v, %v", got, err)
	}
}
