package key

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxMaterial is the largest Material, in bytes: the key data of one QKD-Key
// file of the largest size.
const MaxMaterial = 64 << 20

const (
	minSlot  = 32
	maxSlot  = 4096 // larger ones get a mapping of their own
	slabSize = 256 * 1024
)

// slots is the process's locked memory. It is state of the process like the
// heap, not of the program: the only package variable that changes.
var slots arena

// arena hands out slots of 32, 64, ... 4096 bytes cut from locked mappings.
// A free slot is always zero.
type arena struct {
	mu   sync.Mutex
	idle [8][][]byte // by slot size: 32 << i
}

func class(n int) (i, size int) {
	for size = minSlot; size < n; size <<= 1 {
		i++
	}
	return i, size
}

func (a *arena) alloc(n int) ([]byte, error) {
	if n < 1 || n > MaxMaterial {
		return nil, fmt.Errorf("size is not between 1 and %d", MaxMaterial)
	}
	if n > maxSlot {
		b, err := lockedMapping(n)
		if err != nil {
			return nil, err
		}
		return b[:n:n], nil
	}
	i, size := class(n)
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.idle[i]) == 0 {
		slab, err := lockedMapping(slabSize)
		if err != nil {
			return nil, err
		}
		for off := 0; off+size <= slabSize; off += size {
			a.idle[i] = append(a.idle[i], slab[off:off:off+size])
		}
	}
	last := len(a.idle[i]) - 1
	b := a.idle[i][last]
	a.idle[i] = a.idle[i][:last]
	return b[:n:n], nil
}

// free wipes b, which came from alloc with all its length and no more, and
// takes it back. Nobody had more of the slot than that length, so all of the
// slot is zero again.
func (a *arena) free(b []byte) {
	trace(b)
	clear(b)
	if len(b) > maxSlot {
		_ = unix.Munmap(b) // fails only for what is not a mapping; alloc made it one
		return
	}
	i, size := class(len(b))
	slot := unsafe.Slice(unsafe.SliceData(b), size)
	a.mu.Lock()
	a.idle[i] = append(a.idle[i], slot[:0])
	a.mu.Unlock()
}

// lockedMapping gives zero bytes outside the heap that are neither swapped nor
// dumped.
func lockedMapping(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	err = unix.Mlock(b)
	if err == nil {
		err = unix.Madvise(b, unix.MADV_DONTDUMP)
	}
	if err != nil {
		_ = unix.Munmap(b)
		if errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("mlock: %w (raise RLIMIT_MEMLOCK: LimitMEMLOCK= in the unit)", err)
		}
		return nil, fmt.Errorf("protect locked memory: %w", err)
	}
	return b, nil
}
