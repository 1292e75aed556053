package operator

import "sync"

// Ring keeps the latest events in memory, for Node.Events. Add never blocks for
// long and never fails: agents report from their hot paths.
type Ring struct {
	mu   sync.Mutex
	buf  []Event
	next int // where the next event goes; the oldest one once buf is full
}

// NewRing makes a ring of n events, n > 0.
func NewRing(n int) *Ring { return &Ring{buf: make([]Event, 0, n)} }

// Add appends e; the oldest event falls out when the ring is full.
func (r *Ring) Add(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.buf) < cap(r.buf) {
		r.buf = append(r.buf, e)
		return
	}
	r.buf[r.next] = e
	r.next = (r.next + 1) % len(r.buf)
}

// Latest gives up to limit events that match, newest first.
func (r *Ring) Latest(limit int, match func(Event) bool) []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Event
	for i := range r.buf {
		e := r.buf[(r.next+len(r.buf)-1-i)%len(r.buf)]
		if len(out) == limit {
			break
		}
		if match(e) {
			out = append(out, e)
		}
	}
	return out
}
