package etsi014

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"sync"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// maxAnswers bounds what is kept for retries; beyond it answers are not kept,
// which is what the standard asks for anyway.
const maxAnswers = 1024

// retries keeps the answers to dec_keys calls for a while.
type retries struct {
	window time.Duration
	mu     sync.Mutex
	closed bool
	m      map[[32]byte]*answer
}

// answer is one dec_keys call, under way until done is closed.
type answer struct {
	done  chan struct{}
	body  *key.Material // nil if the call failed or its time is over
	timer *time.Timer
}

func newRetries(window time.Duration) *retries {
	return &retries{window: window, m: make(map[[32]byte]*answer)}
}

// sameCall is equal for two calls only if certificate, master SAE, key ids with
// their order, and size are.
func sameCall(cert []byte, peer string, req keyIDs) [32]byte {
	c := sha256.Sum256(cert)
	b := append(make([]byte, 0, 128), c[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(req.size))
	b = binary.BigEndian.AppendUint64(b, uint64(len(req.ids)))
	for _, id := range req.ids {
		b = append(b, id[:]...)
	}
	return sha256.Sum256(append(b, peer...))
}

// do gives the kept answer of call k, or that of fetch, which it keeps. A call
// that comes while the same one is under way waits for it. The caller wipes
// what it gets.
func (c *retries) do(ctx context.Context, k [32]byte, fetch func() ([]byte, error)) ([]byte, error) {
	for {
		c.mu.Lock()
		a := c.m[k]
		if a == nil {
			if c.closed || len(c.m) >= maxAnswers {
				c.mu.Unlock()
				return fetch()
			}
			a = &answer{done: make(chan struct{})}
			c.m[k] = a
			c.mu.Unlock()
			return c.first(k, a, fetch)
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, &key.Unavailable{Err: ctx.Err()}
		case <-a.done:
		}
		if b := c.copyOf(a); b != nil {
			return b, nil
		}
		// It failed, or its window has just closed: it is out of the map.
	}
}

// first makes the call and keeps its answer.
func (c *retries) first(k [32]byte, a *answer, fetch func() ([]byte, error)) (b []byte, err error) {
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if b != nil && err == nil && !c.closed {
			// Without locked memory to keep it in, it is not kept.
			a.body, _ = key.Take(append(make([]byte, 0, len(b)), b...))
		}
		if a.body == nil {
			delete(c.m, k)
		} else {
			a.timer = time.AfterFunc(c.window, func() { c.drop(k, a) })
		}
		close(a.done)
	}()
	return fetch()
}

func (c *retries) copyOf(a *answer) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.body.Len() == 0 {
		return nil
	}
	return append([]byte(nil), a.body.Bytes()...)
}

func (c *retries) drop(k [32]byte, a *answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a.body.Wipe()
	a.body = nil
	if c.m[k] == a {
		delete(c.m, k)
	}
}

// close wipes all answers. It may be called on nil.
func (c *retries) close() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for k, a := range c.m {
		if a.body == nil {
			continue // under way: closed keeps its answer from being kept
		}
		a.timer.Stop()
		a.body.Wipe()
		a.body = nil
		delete(c.m, k)
	}
}
