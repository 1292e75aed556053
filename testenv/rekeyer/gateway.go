package main

import (
	"context"
	"fmt"

	"github.com/q-ipsec/q-ipsec/ike/vici"
	"github.com/q-ipsec/q-ipsec/kms/operator"
)

// gateway is one end of the connection.
type gateway interface {
	rekey(ctx context.Context) error
	// sas gives what stands for the key of each SA, by "ID SPI". Both SAs of a
	// CHILD_SA have its ID, at both ends.
	sas(ctx context.Context) (map[string]string, error)
}

// qipsecd knows the SAs by Key-ID and fingerprint.
type qipsecd struct {
	operator *operator.Client
	conn     string
}

func (q *qipsecd) rekey(ctx context.Context) error {
	return q.operator.Do(ctx, q.conn, operator.Rekey)
}

func (q *qipsecd) sas(ctx context.Context) (map[string]string, error) {
	all, err := q.operator.SAs(ctx)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, sa := range all {
		if sa.Connection == q.conn && sa.Committed {
			found[sa.KeyID+" "+sa.SPI] = sa.Fingerprint
		}
	}
	return found, nil
}

// charon knows the SAs by their SPIs only.
type charon struct {
	socket string
	conn   string
	client *vici.Client // dialled at first use
	newest uint32       // unique id of the CHILD_SA that was installed last
}

func (c *charon) rekey(ctx context.Context) error {
	n, err := c.client.Rekey(ctx, c.newest)
	if err == nil && n != 1 {
		err = fmt.Errorf("charon at %s has %d CHILD_SAs with the unique id %d", c.socket, n, c.newest)
	}
	return err
}

func (c *charon) sas(ctx context.Context) (map[string]string, error) {
	if c.client == nil {
		client, err := vici.Dial(ctx, vici.Options{Socket: c.socket})
		if err != nil {
			return nil, err
		}
		c.client = client
	}
	ikes, err := c.client.SAs(ctx)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, ike := range ikes {
		if ike.Conn != c.conn {
			continue
		}
		for _, child := range ike.Children {
			if child.State != "INSTALLED" {
				continue
			}
			c.newest = max(c.newest, child.UniqueID)
			low, high := min(child.SPIIn, child.SPIOut), max(child.SPIIn, child.SPIOut)
			for _, spi := range []uint32{low, high} {
				found[fmt.Sprintf("%08x-%08x %08x", low, high, spi)] = "installed"
			}
		}
	}
	return found, nil
}
