package sad

import (
	"context"
	"log/slog"
	"net/netip"

	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// kernel is what SAD needs of sad/xfrm.
type kernel interface {
	Add(ctx context.Context, sa *xfrm.SA, enc, integ []byte) error
	Delete(ctx context.Context, id xfrm.ID) error
	Counters(ctx context.Context, id xfrm.ID) (xfrm.Counters, error)
	List(ctx context.Context) ([]xfrm.Info, error)
	SetPorts(ctx context.Context, id xfrm.ID, src, dst uint16) error
	Move(ctx context.Context, id xfrm.ID, m xfrm.Move) error
}

// SAD is the one owner of the SAs that qipsecd put in the kernel. Its methods
// may be called at the same time; each waits for its turn until ctx ends.
type SAD struct{}

// Open reads the journal (a file of mode 0600, created when absent, best below
// /run: the kernel's SAD does not survive a reboot either) and locks it. The
// kernel, *xfrm.Conn outside tests, is borrowed. It changes no SA: call
// Reconcile once charon can be asked.
func Open(k kernel, journal string, log *slog.Logger) (*SAD, error) { return &SAD{}, nil }

// Close ends the use of the journal. SAs stay.
func (s *SAD) Close() error { return nil }

// Install journals the intent and puts the SA with its keys in the kernel: a
// larval entry is replaced, else a new one is added. keys are borrowed. On nil
// the caller must call Commit or Rollback; on any error nothing is left. Of
// outbound SAs the replay window is set as charon does (0, or 1 with ESN).
// Errors: ErrUnsupported (nothing was tried), ErrNoESP, ErrExists.
func (s *SAD) Install(ctx context.Context, sa SA, keys Keys, owner Owner) error { return nil }

// Commit says that charon knows of the installed SA. ErrNotFound if it was not
// installed or rolled back.
func (s *SAD) Commit(ctx context.Context, id ID) error { return nil }

// Rollback removes an installed SA that charon did not acknowledge. It does
// its work, bounded, even if ctx has ended; what it could not remove is left
// to Reconcile.
func (s *SAD) Rollback(ctx context.Context, id ID) error { return nil }

// Remove takes an SA of ours out of the kernel and the journal; no error if it
// is gone already (charon deletes SAs itself).
func (s *SAD) Remove(ctx context.Context, id ID) error { return nil }

// Query gives an SA's counters without reading its key (XFRM_MSG_GETAE).
// ErrNotFound if the kernel has no such SA. It works for SAs that are not ours.
func (s *SAD) Query(ctx context.Context, id ID) (Counters, error) { return Counters{}, nil }

// Change moves an SA to new addresses or ports (MOBIKE, NAT mapping change).
type Change struct {
	ID             ID
	NewSrc, NewDst netip.AddrPort
	NewEncap       bool
}

// Update carries out c. moved tells that the SA was taken out and added anew,
// with its outbound sequence advanced by 2^20: packets may have been lost and
// the CHILD_SA should be rekeyed soon. A change of ports alone is done in place.
func (s *SAD) Update(ctx context.Context, c Change) (moved bool, err error) { return false, nil }

// Reconcile compares journal, kernel and charon. list asks charon for all SAs
// of CHILD_SAs that it has installed (both directions; only Dst's address, SPI
// and Protocol are looked at); it must wait for busy IKE_SAs (no "noblock").
// What is ours and unknown to charon is deleted; what charon has and the SAD
// has not is returned, for the caller to terminate. An SA counts as unknown or
// missing only if it was so before and after: list is called a second time when
// the first call shows a difference. SAs that are not ours are never touched.
func (s *SAD) Reconcile(ctx context.Context, list func(context.Context) ([]ID, error)) (missing []ID, err error) {
	return nil, nil
}

// Warmup adds and deletes a throw-away SA of each suite, so that the kernel has
// its algorithms loaded before the first CHILD_SA (seconds after boot). ErrNoESP
// names the first suite that the kernel lacks.
func (s *SAD) Warmup(ctx context.Context, suites []Suite, ipv6 bool) error { return nil }

// State is one SA of ours as it is in the kernel; it holds no key.
type State struct {
	ID
	Owner
	ReqID          uint32
	Mode           Mode
	Inbound        bool
	Encap          bool
	ESN            bool
	Algorithm      string
	Fingerprint    string // of the key as installed: Keys.Fingerprint
	Committed      bool
	Bytes, Packets uint64
}

// State lists the SAs of ours that the kernel has, ordered by connection, then
// SPI.
func (s *SAD) State(ctx context.Context) ([]State, error) { return nil, nil }
