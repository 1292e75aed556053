package xfrm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// advance is added to the outbound sequence number of an SA that is moved: the
// packets sent between reading it and deleting the old entry are surely fewer, so
// no sequence number is used twice and the peer's replay window lets the next
// packet in. The IV of an AEAD is, in Linux, the sequence number XOR a random
// 64-bit number of each entry of the SAD (crypto/seqiv.c): two entries with one
// key share an IV with a chance of at most 2^-32 while both counted below 2^32,
// which is why a moved SA is rekeyed at once.
const advance = 1 << 20

// maxDumps is how often a dump that the kernel calls inconsistent is repeated.
const maxDumps = 5

// Add puts an SA with its keys (enc with its salt for AEAD; integ nil for it)
// into the SAD. The keys are borrowed. A Larval SA replaces the entry of its
// allocated SPI, or is added if that has gone.
//
// Errors: ErrUnsupported, ErrExists, ErrNoESP, ErrUnknown. The kernel would
// take an update of a complete SA and keep its old key without a word; that
// case is ErrExists here.
func (c *Conn) Add(ctx context.Context, sa *SA, enc, integ []byte) error {
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	if sa.Larval {
		err := c.replaceLarval(ctx, sa, enc, integ)
		if !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return c.put(ctx, nl.XFRM_MSG_NEWSA, "add", sa, enc, integ)
}

func (c *Conn) replaceLarval(ctx context.Context, sa *SA, enc, integ []byte) error {
	raw, err := c.get(ctx, sa.ID)
	if err != nil {
		return err
	}
	defer raw.Wipe()
	info, err := parseInfo(raw.Bytes())
	if err != nil {
		return err
	}
	if !info.Larval {
		return fmt.Errorf("xfrm: replace larval SA %v: it is complete: %w", sa.ID, ErrExists)
	}
	return c.put(ctx, nl.XFRM_MSG_UPDSA, "replace larval SA", sa, enc, integ)
}

func (c *Conn) put(ctx context.Context, typ nl.XfrmMsgType, what string, sa *SA, enc, integ []byte) error {
	m := c.request()
	if err := sa.encode(m, typ, enc, integ); err != nil {
		return err
	}
	if _, err := c.exchange(ctx, m, nil); err != nil {
		return explain(what, sa.ID, err)
	}
	return nil
}

// Delete removes an SA, complete or larval. ErrNotFound if there is none.
func (c *Conn) Delete(ctx context.Context, id ID) error {
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	return c.del(ctx, id)
}

func (c *Conn) del(ctx context.Context, id ID) error {
	m := c.request()
	m.named(nl.XFRM_MSG_DELSA, id)
	if _, err := c.exchange(ctx, m, nil); err != nil {
		return explain("delete", id, err)
	}
	return nil
}

// get gives the body of the kernel's XFRM_MSG_NEWSA for id: usersa_info and
// attributes, keys among them, in locked memory that the caller wipes.
func (c *Conn) get(ctx context.Context, id ID) (*key.Material, error) {
	m := c.request()
	m.named(nl.XFRM_MSG_GETSA, id)
	var raw *key.Material
	_, err := c.exchange(ctx, m, func(typ uint16, body []byte) error {
		if typ != nl.XFRM_MSG_NEWSA || raw != nil {
			return nil
		}
		var err error
		if raw, err = key.New(len(body)); err == nil {
			copy(raw.Bytes(), body)
		}
		return err
	})
	if err == nil && raw == nil {
		err = errors.New("the kernel answered nothing")
	}
	if err != nil {
		raw.Wipe()
		return nil, explain("read", id, err)
	}
	return raw, nil
}

// Counters reads an SA's counters without its key. LastUse is left 0.
// ErrNotFound if there is no such SA.
func (c *Conn) Counters(ctx context.Context, id ID) (Counters, error) {
	if err := c.acquire(ctx); err != nil {
		return Counters{}, err
	}
	defer c.release()
	ae, err := c.aevent(ctx, id)
	return ae.Counters, err
}

// aevent is what XFRM_MSG_GETAE tells.
type aevent struct {
	Counters
	lifetime []byte // struct xfrm_lifetime_cur
	replay   []byte // struct xfrm_replay_state or, if esn, xfrm_replay_state_esn
	esn      bool
}

func (c *Conn) aevent(ctx context.Context, id ID) (aevent, error) {
	m := c.request()
	m.getAE(id)
	var ae aevent
	found := false
	_, err := c.exchange(ctx, m, func(typ uint16, body []byte) (err error) {
		if typ == nl.XFRM_MSG_NEWAE {
			found = true
			ae, err = parseAevent(body)
		}
		return err
	})
	if err == nil && !found {
		err = errors.New("the kernel answered nothing")
	}
	if err != nil {
		return aevent{}, explain("query", id, err)
	}
	return ae, nil
}

func parseAevent(body []byte) (aevent, error) {
	var ae aevent
	if len(body) < sizeofAeventID {
		return ae, errors.New("XFRM_MSG_NEWAE is too short")
	}
	err := attributes(body[sizeofAeventID:], func(typ uint16, p []byte) error {
		switch typ {
		case nl.XFRMA_LTIME_VAL:
			if len(p) < nl.SizeofXfrmLifetimeCur {
				return errors.New("XFRMA_LTIME_VAL is too short")
			}
			ae.lifetime = slices.Clone(p)
			ae.Bytes, ae.Packets = native.Uint64(p), native.Uint64(p[8:])
		case nl.XFRMA_REPLAY_VAL:
			if !ae.esn {
				ae.replay = slices.Clone(p)
			}
		case nl.XFRMA_REPLAY_ESN_VAL:
			ae.replay, ae.esn = slices.Clone(p), true
		}
		return nil
	})
	if err == nil && ae.lifetime == nil {
		err = errors.New("XFRM_MSG_NEWAE without XFRMA_LTIME_VAL")
	}
	return ae, err
}

// advanced adds advance to the outbound sequence number in the replay state;
// ErrSequence if that does not fit. esnFlag: the SA counts in 64 bits.
func (ae *aevent) advanced(esnFlag bool) error {
	r := ae.replay
	if !ae.esn {
		if len(r) < nl.SizeofXfrmReplayState {
			return errors.New("replay state is too short")
		}
		oseq := uint64(native.Uint32(r)) + advance
		if oseq >= math.MaxUint32 {
			return ErrSequence
		}
		native.PutUint32(r, uint32(oseq))
		return nil
	}
	if len(r) < nl.SizeofXfrmReplayStateEsn {
		return errors.New("ESN replay state is too short")
	}
	// bmp_len, oseq, seq, oseq_hi, seq_hi, replay_window
	low, high := native.Uint32(r[4:]), native.Uint32(r[12:])
	oseq := uint64(low) + advance
	if oseq >= math.MaxUint32 && (!esnFlag || high == math.MaxUint32) {
		return ErrSequence
	}
	native.PutUint32(r[4:], uint32(oseq))
	native.PutUint32(r[12:], high+uint32(oseq>>32))
	return nil
}

// List gives all SAs of the namespace, without their keys: those pass through
// the locked buffer only.
func (c *Conn) List(ctx context.Context) ([]Info, error) {
	if err := c.acquire(ctx); err != nil {
		return nil, err
	}
	defer c.release()
	for range maxDumps {
		var all []Info
		m := c.request()
		m.start(nl.XFRM_MSG_GETSA, unix.NLM_F_DUMP)
		interrupted, err := c.exchange(ctx, m, func(typ uint16, body []byte) error {
			if typ != nl.XFRM_MSG_NEWSA {
				return nil
			}
			info, err := parseInfo(body)
			all = append(all, info)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("xfrm: list SAs: %w", err)
		}
		if !interrupted {
			return all, nil
		}
	}
	return nil, fmt.Errorf("xfrm: list SAs: the SAD changed during each of %d dumps", maxDumps)
}

// parseInfo reads the body of XFRM_MSG_NEWSA. It copies nothing of a key.
func parseInfo(body []byte) (Info, error) {
	if len(body) < nl.SizeofXfrmUsersaInfo {
		return Info{}, errors.New("XFRM_MSG_NEWSA is too short")
	}
	u := *nl.DeserializeXfrmUsersaInfo(body)
	if u.Family != unix.AF_INET && u.Family != unix.AF_INET6 {
		return Info{}, fmt.Errorf("an SA of address family %d", u.Family)
	}
	src, dst := addrOf(u.Saddr[:], u.Family), addrOf(u.Id.Daddr[:], u.Family)
	info := Info{
		ID:    ID{Src: netip.AddrPortFrom(src, 0), Dst: netip.AddrPortFrom(dst, 0), SPI: be32(u.Id.Spi), Protocol: u.Id.Proto},
		ReqID: u.Reqid, Mode: Transport, Flags: u.Flags, ESN: u.Flags&nl.XFRM_STATE_ESN != 0, Window: uint32(u.ReplayWindow),
		Lifetime: Lifetime{
			TimeLife: u.Lft.HardAddExpiresSeconds, TimeRekey: u.Lft.SoftAddExpiresSeconds,
			BytesLife: unlimit(u.Lft.HardByteLimit), BytesRekey: unlimit(u.Lft.SoftByteLimit),
			PacketsLife: unlimit(u.Lft.HardPacketLimit), PacketsRekey: unlimit(u.Lft.SoftPacketLimit),
		},
		Bytes: u.Curlft.Bytes, Packets: u.Curlft.Packets,
	}
	if u.Mode == 1 {
		info.Mode = Tunnel
	}
	if u.Curlft.AddTime != 0 {
		info.Added = time.Unix(int64(u.Curlft.AddTime), 0)
	}
	return info, info.readAttributes(body[nl.SizeofXfrmUsersaInfo:])
}

func (i *Info) readAttributes(b []byte) error {
	var encName, authName string
	var encBits uint32
	err := attributes(b, func(typ uint16, p []byte) error {
		switch typ {
		case nl.XFRMA_ALG_AEAD, nl.XFRMA_ALG_CRYPT:
			if len(p) < nl.SizeofXfrmAlgo {
				return errors.New("algorithm attribute is too short")
			}
			encName, encBits = algorithmName(p), native.Uint32(p[64:])
		case nl.XFRMA_ALG_AUTH, nl.XFRMA_ALG_AUTH_TRUNC:
			if len(p) < nl.SizeofXfrmAlgo {
				return errors.New("algorithm attribute is too short")
			}
			authName = algorithmName(p)
		case nl.XFRMA_ENCAP:
			if len(p) < nl.SizeofXfrmEncapTmpl {
				return errors.New("XFRMA_ENCAP is too short")
			}
			t := nl.DeserializeXfrmEncapTmpl(p)
			i.Encap = true
			i.Src = netip.AddrPortFrom(i.Src.Addr(), be16(t.EncapSport))
			i.Dst = netip.AddrPortFrom(i.Dst.Addr(), be16(t.EncapDport))
		case nl.XFRMA_MARK:
			if len(p) >= nl.SizeofXfrmMark {
				i.Mark = Mark{native.Uint32(p), native.Uint32(p[4:])}
			}
		case nl.XFRMA_IF_ID:
			if len(p) >= 4 {
				i.IfID = native.Uint32(p)
			}
		case nl.XFRMA_REPLAY_ESN_VAL:
			if len(p) >= nl.SizeofXfrmReplayStateEsn {
				i.Window = native.Uint32(p[20:])
			}
		}
		return nil
	})
	i.Larval = encName == "" && authName == ""
	suite, known := suiteOf(encName, encBits, authName)
	i.Suite, i.Algorithm = suite, suite.String()
	if !known {
		i.Algorithm = strings.Trim(encName+"/"+authName, "/")
	}
	return err
}

func algorithmName(p []byte) string {
	name, _, _ := strings.Cut(string(p[:64]), "\x00")
	return name
}

// SetPorts changes the UDP encapsulation ports of an SA in place: a request
// that names the SA with zeroed keys, of which the kernel takes only the ports.
// ErrNotFound; an error if the SA is not encapsulated.
func (c *Conn) SetPorts(ctx context.Context, id ID, src, dst uint16) error {
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	raw, err := c.get(ctx, id)
	if err != nil {
		return err
	}
	defer raw.Wipe()
	m := c.request()
	if err := portsRequest(m, raw.Bytes(), src, dst); err != nil {
		return explain("change the ports of", id, err)
	}
	runtime.KeepAlive(raw)
	if _, err := c.exchange(ctx, m, nil); err != nil {
		return explain("change the ports of", id, err)
	}
	return nil
}

func portsRequest(m *message, raw []byte, src, dst uint16) error {
	m.start(nl.XFRM_MSG_UPDSA, unix.NLM_F_ACK)
	m.add(raw[:nl.SizeofXfrmUsersaInfo])
	encapsulated := false
	err := copyAttributes(m, raw[nl.SizeofXfrmUsersaInfo:], func(typ uint16, p []byte) bool {
		switch typ {
		case nl.XFRMA_ALG_AEAD, nl.XFRMA_ALG_AUTH_TRUNC:
			clear(p[min(len(p), nl.SizeofXfrmAlgoAEAD):])
		case nl.XFRMA_ALG_CRYPT, nl.XFRMA_ALG_AUTH:
			clear(p[min(len(p), nl.SizeofXfrmAlgo):])
		case nl.XFRMA_ENCAP:
			encapsulated = true
			m.encap(src, dst)
			return false
		case nl.XFRMA_REPLAY_VAL:
			return false
		}
		return true
	})
	if err == nil && !encapsulated {
		err = errors.New("it is not encapsulated in UDP")
	}
	return err
}

// copyAttributes copies to m those attributes of a read SA that a request may
// carry and keep wants. keep may change the payload.
func copyAttributes(m *message, b []byte, keep func(typ uint16, p []byte) bool) error {
	trunc := false
	if err := attributes(b, func(typ uint16, _ []byte) error {
		if typ == nl.XFRMA_OFFLOAD_DEV {
			return fmt.Errorf("hardware offload: %w", ErrUnsupported)
		}
		trunc = trunc || typ == nl.XFRMA_ALG_AUTH_TRUNC
		return nil
	}); err != nil {
		return err
	}
	return attributes(b, func(typ uint16, p []byte) error {
		switch {
		case typ == nl.XFRMA_LASTUSED, typ == nl.XFRMA_PAD:
			// told by the kernel, not taken by it
		case typ == nl.XFRMA_ALG_AUTH && trunc:
			// the same algorithm again, for readers that know no truncation
		case keep(typ, p):
			m.attr(typ, p)
		}
		return nil
	})
}

// Move takes an SA out and adds it anew with other addresses and encapsulation;
// key, counters and replay state stay, the outbound sequence number is advanced
// by 2^20. The key passes through locked memory.
//
// Errors: ErrNotFound and ErrSequence with the SA untouched; any other error
// after the deletion means that the SA is gone, and says so.
func (c *Conn) Move(ctx context.Context, id ID, to Move) error {
	if !to.NewSrc.IsValid() || !to.NewDst.IsValid() || family(to.NewSrc.Addr()) != family(to.NewDst.Addr()) {
		return fmt.Errorf("xfrm: move %v: addresses %v and %v are not of one family", id, to.NewSrc, to.NewDst)
	}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	raw, err := c.get(ctx, id)
	if err != nil {
		return err
	}
	defer raw.Wipe()
	// Also finds what would make the request fail after the deletion.
	if err := moveRequest(c.request(), raw.Bytes(), aevent{}, id, to); err != nil {
		return explain("move", id, err)
	}
	ae, err := c.aevent(ctx, id)
	if err != nil {
		return err
	}
	esn := nl.DeserializeXfrmUsersaInfo(raw.Bytes()).Flags&nl.XFRM_STATE_ESN != 0
	if err := ae.advanced(esn); err != nil {
		return explain("move", id, err)
	}
	if err := c.del(ctx, id); err != nil {
		return err
	}
	// From here to the end nothing may be left undone, whatever becomes of ctx.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), maxWait)
	defer cancel()
	m := c.request()
	if err := moveRequest(m, raw.Bytes(), ae, id, to); err != nil {
		return explain("SA was taken out and could not be put back: move", id, err)
	}
	runtime.KeepAlive(raw)
	if _, err := c.exchange(ctx, m, nil); err != nil {
		return explain("SA was taken out and could not be put back: move", id, err)
	}
	return nil
}

func moveRequest(m *message, raw []byte, ae aevent, id ID, to Move) error {
	m.start(nl.XFRM_MSG_NEWSA, unix.NLM_F_ACK)
	u := *nl.DeserializeXfrmUsersaInfo(raw[:nl.SizeofXfrmUsersaInfo])
	u.Saddr, u.Id.Daddr, u.Family = address(to.NewSrc.Addr()), address(to.NewDst.Addr()), family(to.NewDst.Addr())
	u.Curlft, u.Stats = nl.XfrmLifetimeCur{}, nl.XfrmStats{}
	hostBits := uint8(id.Dst.Addr().Unmap().BitLen())
	if u.Sel.Saddr == address(id.Src.Addr()) && u.Sel.PrefixlenS == hostBits {
		u.Sel.Saddr = u.Saddr
	}
	if u.Sel.Daddr == address(id.Dst.Addr()) && u.Sel.PrefixlenD == hostBits {
		u.Sel.Daddr = u.Id.Daddr
	}
	m.add(u.Serialize())
	err := copyAttributes(m, raw[nl.SizeofXfrmUsersaInfo:], func(typ uint16, _ []byte) bool {
		switch typ {
		case nl.XFRMA_ENCAP, nl.XFRMA_REPLAY_VAL, nl.XFRMA_REPLAY_ESN_VAL, nl.XFRMA_LTIME_VAL:
			return false
		}
		return true
	})
	if err != nil {
		return err
	}
	if to.NewEncap {
		m.encap(to.NewSrc.Port(), to.NewDst.Port())
	}
	if ae.replay != nil {
		typ := uint16(nl.XFRMA_REPLAY_VAL)
		if ae.esn {
			typ = nl.XFRMA_REPLAY_ESN_VAL
		}
		m.attr(typ, ae.replay)
	}
	if ae.lifetime != nil {
		m.attr(nl.XFRMA_LTIME_VAL, ae.lifetime)
	}
	_, err = m.finish(0, 0)
	return err
}
