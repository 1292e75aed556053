package vici

import (
	"encoding/binary"
	"fmt"
	"net"
)

// maxPacket is VICI's own limit of one packet, in bytes.
const maxPacket = 512 * 1024

// framed follows the length prefixes of the packets it reads and ends the
// connection at one that is too long, before the reader allocates for it.
// Read is called by one goroutine, as govici does.
type framed struct {
	net.Conn
	head [4]byte // length prefix seen so far
	n    int     // bytes of head
	body uint32  // bytes of the packet still to come
}

// Read reads from the connection and checks every length prefix that passes.
func (f *framed) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	if e := f.scan(p[:n]); e != nil {
		return 0, e
	}
	return n, err
}

func (f *framed) scan(p []byte) error {
	for len(p) > 0 {
		if f.body > 0 {
			k := min(uint64(f.body), uint64(len(p)))
			f.body -= uint32(k)
			p = p[k:]
			continue
		}
		k := copy(f.head[f.n:], p)
		f.n += k
		p = p[k:]
		if f.n == len(f.head) {
			f.n = 0
			f.body = binary.BigEndian.Uint32(f.head[:])
			if f.body > maxPacket {
				return fmt.Errorf("vici: packet of %d bytes, the limit is %d", f.body, maxPacket)
			}
		}
	}
	return nil
}
