package sad

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/sad/xfrm"
)

// The addresses of throw-away SAs: documentation prefixes (RFC 5737, RFC 3849),
// to which nothing is sent.
var warmupAddresses = map[bool][2]netip.Addr{
	false: {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")},
	true:  {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")},
}

// Warmup adds and deletes a throw-away SA of each suite, over IPv4 and if ipv6
// over IPv6 too, so that the kernel has its algorithms loaded before the first
// CHILD_SA (that took seconds after boot). ErrNoESP names what the kernel
// lacks. The SA has a random key that is wiped and no policy leads to it.
func (s *SAD) Warmup(ctx context.Context, suites []Suite, ipv6 bool) error {
	families := []bool{false}
	if ipv6 {
		families = append(families, true)
	}
	for _, suite := range suites {
		for _, six := range families {
			if err := s.warm(ctx, suite, warmupAddresses[six]); err != nil {
				return fmt.Errorf("sad: try %v: %w", suite, err)
			}
		}
	}
	return nil
}

func (s *SAD) warm(ctx context.Context, suite Suite, ends [2]netip.Addr) error {
	enc, integ, err := suite.KeySizes()
	if err != nil {
		return err
	}
	m, err := key.Random(rand.Reader, enc+integ)
	if err != nil {
		return err
	}
	defer m.Wipe()
	keys, err := split(m, enc)
	if err != nil {
		return err
	}
	defer keys.Wipe()
	var spi [4]byte
	rand.Read(spi[:]) // never fails (crypto/rand)
	sa := SA{
		ID: ID{
			Src: netip.AddrPortFrom(ends[0], 0), Dst: netip.AddrPortFrom(ends[1], 0),
			SPI: binary.BigEndian.Uint32(spi[:])>>1 | 1<<30, Protocol: ProtoESP,
		},
		Mode: Tunnel, Suite: suite, Inbound: true, Window: 32,
		Lifetime: Lifetime{TimeLife: 30}, // should the deletion fail
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	addErr := s.kernel.Add(ctx, &sa, keys.Enc.Bytes(), keys.Integ.Bytes())
	if addErr != nil && !errors.Is(addErr, xfrm.ErrUnknown) {
		return addErr
	}
	ctx, cancel := lasting(ctx)
	defer cancel()
	if err := s.kernel.Delete(ctx, sa.ID); err != nil && !errors.Is(err, xfrm.ErrNotFound) {
		return errors.Join(addErr, err)
	}
	return addErr
}
