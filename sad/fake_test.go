package sad

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// errCrash is what fakeKernel panics with to end the "process" at a point.
var errCrash = errors.New("crash")

// fakeKernel is a SAD in memory with the kernel's rules.
type fakeKernel struct {
	sas   map[xfrm.Key]*fakeSA
	calls []string
	fail  map[string]error // by operation; the request is not carried out
	crash string           // "before OP" or "after OP": panic there
	after func()           // called when Add has been carried out

	policies []xfrm.Policy
}

type fakeSA struct {
	info xfrm.Info
	key  []byte
}

func newFakeKernel() *fakeKernel {
	return &fakeKernel{sas: map[xfrm.Key]*fakeSA{}, fail: map[string]error{}}
}

func (f *fakeKernel) do(op string, id xfrm.ID, act func() error) error {
	f.calls = append(f.calls, fmt.Sprintf("%s %08x", op, id.SPI))
	if f.crash == "before "+op {
		panic(errCrash)
	}
	if err := f.fail[op]; err != nil {
		return err
	}
	if err := act(); err != nil {
		return err
	}
	if f.crash == "after "+op {
		panic(errCrash)
	}
	return nil
}

func (f *fakeKernel) Add(_ context.Context, sa *xfrm.SA, enc, integ []byte) error {
	return f.do("add", sa.ID, func() error {
		if old := f.sas[sa.Key()]; old != nil && !(old.info.Larval && sa.Larval) {
			return xfrm.ErrExists
		}
		f.sas[sa.Key()] = &fakeSA{
			info: xfrm.Info{ID: sa.ID, ReqID: sa.ReqID, Mode: sa.Mode, Suite: sa.Suite, Algorithm: sa.Suite.String(), ESN: sa.ESN, Encap: sa.Encap, Added: time.Unix(1, 0)},
			key:  append(bytes.Clone(enc), integ...),
		}
		if f.after != nil {
			f.after()
		}
		return nil
	})
}

func (f *fakeKernel) Delete(_ context.Context, id xfrm.ID) error {
	return f.do("delete", id, func() error {
		if f.sas[id.Key()] == nil {
			return xfrm.ErrNotFound
		}
		delete(f.sas, id.Key())
		return nil
	})
}

func (f *fakeKernel) Counters(_ context.Context, id xfrm.ID) (c xfrm.Counters, err error) {
	return c, f.do("counters", id, func() error {
		sa := f.sas[id.Key()]
		if sa == nil {
			return xfrm.ErrNotFound
		}
		c = xfrm.Counters{Bytes: sa.info.Bytes, Packets: sa.info.Packets}
		return nil
	})
}

func (f *fakeKernel) List(context.Context) (all []xfrm.Info, err error) {
	return all, f.do("list", xfrm.ID{}, func() error {
		for _, sa := range f.sas {
			all = append(all, sa.info)
		}
		return nil
	})
}

func (f *fakeKernel) SetPorts(_ context.Context, id xfrm.ID, src, dst uint16) error {
	return f.do("ports", id, func() error {
		sa := f.sas[id.Key()]
		if sa == nil {
			return xfrm.ErrNotFound
		}
		sa.info.Src = netip.AddrPortFrom(sa.info.Src.Addr(), src)
		sa.info.Dst = netip.AddrPortFrom(sa.info.Dst.Addr(), dst)
		return nil
	})
}

func (f *fakeKernel) Move(_ context.Context, id xfrm.ID, m xfrm.Move) error {
	return f.do("move", id, func() error {
		sa := f.sas[id.Key()]
		if sa == nil {
			return xfrm.ErrNotFound
		}
		delete(f.sas, id.Key())
		sa.info.Src, sa.info.Dst, sa.info.Encap = m.NewSrc, m.NewDst, m.NewEncap
		f.sas[sa.info.Key()] = sa
		return nil
	})
}

func (f *fakeKernel) Policies(context.Context) ([]xfrm.Policy, error) { return f.policies, nil }

// rig is a SAD on a fakeKernel that can be restarted.
type rig struct {
	t       *testing.T
	kernel  *fakeKernel
	journal string
	sad     *SAD
	log     *bytes.Buffer
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, kernel: newFakeKernel(), journal: filepath.Join(t.TempDir(), "journal"), log: &bytes.Buffer{}}
	r.open()
	t.Cleanup(func() {
		if err := r.sad.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) open() {
	r.t.Helper()
	s, err := Open(r.kernel, r.journal, slog.New(slog.NewTextHandler(r.log, nil)))
	if err != nil {
		r.t.Fatal(err)
	}
	r.sad = s
}

// restart ends the SAD as a crash does, without any last words, and opens it
// again.
func (r *rig) restart() {
	r.t.Helper()
	r.kernel.crash = ""
	if err := r.sad.file.close(); err != nil {
		r.t.Fatal(err)
	}
	r.open()
}

// crashing runs f, which is to panic with errCrash, and restarts.
func (r *rig) crashing(point string, f func()) {
	r.t.Helper()
	r.kernel.crash = point
	func() {
		defer func() {
			if got := recover(); got != errCrash {
				r.t.Fatalf("no crash %s: %v", point, got)
			}
		}()
		f()
	}()
	r.restart()
}

func testSA(spi uint32) SA {
	return SA{
		ID: ID{
			Src: netip.MustParseAddrPort("192.0.2.1:4500"), Dst: netip.MustParseAddrPort("192.0.2.2:4500"),
			SPI: spi, Protocol: ProtoESP,
		},
		ReqID: 1, Mode: Tunnel, Suite: Suite{Encr: xfrm.EncrAESGCM16, EncrBits: 256}, Inbound: spi%2 == 0, Window: 32,
	}
}

func testKeys(t *testing.T, seed byte) Keys {
	t.Helper()
	return Keys{Enc: material(t, bytes.Repeat([]byte{seed}, 36))}
}

var testOwner = Owner{Connection: "net", KeyID: key.ID{1, 2, 3}, Mix: MixHybrid}

// install installs and, if commit, commits.
func (r *rig) install(spi uint32, commit bool) {
	r.t.Helper()
	sa := testSA(spi)
	ctx := r.t.Context()
	if err := r.sad.Install(ctx, sa, testKeys(r.t, byte(spi)), testOwner); err != nil {
		r.t.Fatal(err)
	}
	if commit {
		if err := r.sad.Commit(ctx, sa.ID); err != nil {
			r.t.Fatal(err)
		}
	}
}

// foreign puts an SA into the kernel that is not ours.
func (r *rig) foreign(spi uint32) {
	sa := testSA(spi)
	r.kernel.sas[sa.Key()] = &fakeSA{info: xfrm.Info{ID: sa.ID}}
}

// lists gives a listing of charon for each call, the last one for ever.
func lists(all ...[]uint32) func(context.Context) ([]ID, error) {
	call := 0
	return func(context.Context) ([]ID, error) {
		var ids []ID
		for _, spi := range all[min(call, len(all)-1)] {
			ids = append(ids, testSA(spi).ID)
		}
		call++
		return ids, nil
	}
}

func (r *rig) reconcile(list func(context.Context) ([]ID, error)) []uint32 {
	r.t.Helper()
	missing, err := r.sad.Reconcile(r.t.Context(), list)
	if err != nil {
		r.t.Fatal(err)
	}
	var spis []uint32
	for _, id := range missing {
		spis = append(spis, id.SPI)
	}
	return spis
}

// has compares the kernel's SPIs.
func (r *rig) has(spis ...uint32) {
	r.t.Helper()
	want := map[uint32]bool{}
	for _, s := range spis {
		want[s] = true
	}
	for k := range r.kernel.sas {
		if !want[k.SPI] {
			r.t.Errorf("kernel has SPI %#x, which should be gone\n%s", k.SPI, r.log)
		}
		delete(want, k.SPI)
	}
	for s := range want {
		r.t.Errorf("kernel lacks SPI %#x\n%s", s, r.log)
	}
}

// records compares the SPIs in the journal.
func (r *rig) records(spis ...uint32) {
	r.t.Helper()
	want := map[uint32]bool{}
	for _, s := range spis {
		want[s] = true
	}
	for k := range r.sad.live {
		if !want[k.SPI] {
			r.t.Errorf("journal has SPI %#x", k.SPI)
		}
		delete(want, k.SPI)
	}
	for s := range want {
		r.t.Errorf("journal lacks SPI %#x", s)
	}
}
