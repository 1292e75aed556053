package xfrm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Blackhole routes of ours are known by all of these: they are in the main
// table, of this origin (rtm_protocol) and of a metric so high that any other
// route to the same network wins.
const (
	routeOrigin = 'Q'
	routeMetric = math.MaxInt32
)

func blackhole(to netip.Prefix) *netlink.Route {
	return &netlink.Route{
		Dst:  &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())},
		Type: unix.RTN_BLACKHOLE, Table: unix.RT_TABLE_MAIN, Protocol: routeOrigin, Priority: routeMetric,
	}
}

// AddBlackhole adds a route that drops what goes to a network, unless there is
// another route to it. ErrExists if it is there.
func (c *Conn) AddBlackhole(ctx context.Context, to netip.Prefix) error {
	return c.route(ctx, "add", to, (*netlink.Handle).RouteAdd)
}

// DeleteBlackhole deletes a route of AddBlackhole. ErrNotFound if it is gone.
func (c *Conn) DeleteBlackhole(ctx context.Context, to netip.Prefix) error {
	return c.route(ctx, "delete", to, (*netlink.Handle).RouteDel)
}

func (c *Conn) route(ctx context.Context, what string, to netip.Prefix, do func(*netlink.Handle, *netlink.Route) error) error {
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	err := do(c.routes, blackhole(to))
	if errors.Is(err, syscall.EEXIST) {
		err = ErrExists
	} else if errors.Is(err, syscall.ESRCH) {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("xfrm: %s blackhole route to %v: %w", what, to, err)
	}
	return nil
}

// Blackholes lists the networks with a route of AddBlackhole.
func (c *Conn) Blackholes(ctx context.Context) ([]netip.Prefix, error) {
	if err := c.acquire(ctx); err != nil {
		return nil, err
	}
	defer c.release()
	of := &netlink.Route{Type: unix.RTN_BLACKHOLE, Protocol: routeOrigin}
	var all []netip.Prefix
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		var list []netlink.Route
		err := error(netlink.ErrDumpInterrupted)
		for n := 0; n < maxDumps && errors.Is(err, netlink.ErrDumpInterrupted); n++ {
			list, err = c.routes.RouteListFiltered(family, of, netlink.RT_FILTER_TYPE|netlink.RT_FILTER_PROTOCOL)
		}
		if err != nil {
			return nil, fmt.Errorf("xfrm: list routes: %w", err)
		}
		for _, r := range list {
			if a, ok := netip.AddrFromSlice(r.Dst.IP); ok && r.Priority == routeMetric {
				bits, _ := r.Dst.Mask.Size()
				all = append(all, netip.PrefixFrom(a, bits))
			}
		}
	}
	return all, nil
}
