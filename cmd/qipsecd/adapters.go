package main

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/etsi014"
	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/kma"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
	"github.com/q-ipsec/q-ipsec/kms/store"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

// The agents import neither one another nor the store; the types below carry
// what one needs of another across. They hold no state.

// storeForKMA is the store in the KMA's terms.
type storeForKMA struct{ *store.Store }

// Pool tells a pool's state.
func (s storeForKMA) Pool(ctx context.Context, id uuid.UUID) (kma.PoolInfo, error) {
	p, err := s.Store.Pool(ctx, id)
	return kma.PoolInfo(p), err
}

// PutBlock stores a block.
func (s storeForKMA) PutBlock(ctx context.Context, b kma.Block) error {
	return s.Store.PutBlock(ctx, store.Block(b))
}

// Blocks lists a pool's blocks.
func (s storeForKMA) Blocks(ctx context.Context, pool uuid.UUID) ([]kma.BlockInfo, error) {
	list, err := s.Store.Blocks(ctx, pool)
	out := make([]kma.BlockInfo, len(list))
	for i, b := range list {
		out[i] = kma.BlockInfo(b)
	}
	return out, err
}

// Advance raises a mark.
func (s storeForKMA) Advance(ctx context.Context, pool uuid.UUID, side kma.Side, mark key.Position, purpose string, generation uint64) error {
	return s.Store.Advance(ctx, pool, store.Side(side), mark, purpose, generation)
}

// AdoptMark gives keys up.
func (s storeForKMA) AdoptMark(ctx context.Context, pool uuid.UUID, side kma.Side, mark key.Position) (int, error) {
	return s.Store.AdoptMark(ctx, pool, store.Side(side), mark)
}

// Expire gives keys up that are too old or too many.
func (s storeForKMA) Expire(ctx context.Context, pool uuid.UUID, side kma.Side, mark key.Position, generation uint64) (int, error) {
	return s.Store.Expire(ctx, pool, store.Side(side), mark, generation)
}

// Load reads a lease; the caller owns the Materials.
func (s storeForKMA) Load(ctx context.Context, pool uuid.UUID, side kma.Side, from, to key.Position) ([]kma.LeasedKey, error) {
	list, err := s.Store.Load(ctx, pool, store.Side(side), from, to)
	out := make([]kma.LeasedKey, len(list))
	for i, k := range list {
		out[i] = kma.LeasedKey(k)
	}
	return out, err
}

// LoadRaw reads a lease for raw use; the caller owns the Materials.
func (s storeForKMA) LoadRaw(ctx context.Context, pool uuid.UUID, side kma.Side, from, to key.Position) ([]kma.LeasedKey, error) {
	list, err := s.Store.LoadRaw(ctx, pool, store.Side(side), from, to)
	out := make([]kma.LeasedKey, len(list))
	for i, k := range list {
		out[i] = kma.LeasedKey(k)
	}
	return out, err
}

// Bind binds keys to raw uses.
func (s storeForKMA) Bind(ctx context.Context, pool uuid.UUID, side kma.Side, list ...key.Binding) error {
	return s.Store.Bind(ctx, pool, store.Side(side), list...)
}

// Settle ends bindings.
func (s storeForKMA) Settle(ctx context.Context, pool uuid.UUID, side kma.Side, use key.RawUse, end key.RawEnd, why string) error {
	return s.Store.Settle(ctx, pool, store.Side(side), use, end, why)
}

// Record adds rows to the usage history.
func (s storeForKMA) Record(ctx context.Context, list []kma.History) error {
	rows := make([]store.Event, len(list))
	for i, h := range list {
		rows[i] = store.Event{Pool: h.Pool, Side: store.Side(h.Side), First: h.First, Last: h.Last, State: h.State, Count: h.Count, Detail: h.Detail}
	}
	return s.Store.Record(ctx, rows)
}

// keysForKSA is the KMA in the KSA's terms.
type keysForKSA struct{ *kma.Agent }

// Take gives the next key of our lease with peer.
func (a keysForKSA) Take(ctx context.Context, peer string) (ksa.MasterKey, error) {
	k, err := a.Agent.Take(ctx, peer)
	return ksa.MasterKey(k), err
}

// PutBack returns a key that was not supplied.
func (a keysForKSA) PutBack(k ksa.MasterKey) { a.Agent.PutBack(kma.Key(k)) }

// Claim takes a key of the peer's out of memory.
func (a keysForKSA) Claim(peer string, pool uuid.UUID, pos key.Position, id key.ID) (*key.Material, key.Class, error) {
	m, c, err := a.Agent.Claim(peer, pool, pos, id)
	if errors.Is(err, kma.ErrGone) {
		err = errors.Join(ksa.ErrGone, err)
	}
	return m, c, err
}

// Level counts keys.
func (a keysForKSA) Level(peer string) (ksa.Level, error) {
	l, err := a.Agent.Level(peer)
	return ksa.Level(l), err
}

// peersForKSA are the Type-1 clients in the KSA's terms, by node.
type peersForKSA map[string]*type1.Client

// errNoPeer says that no Type-1 address of a node is configured.
var errNoPeer = errors.New("no [[kms.peer]] of that name")

// SendNotices delivers supply notices.
func (p peersForKSA) SendNotices(ctx context.Context, peer string, list []ksa.Notice) error {
	c := p[peer]
	if c == nil {
		return errNoPeer
	}
	for some := range slices.Chunk(list, type1.MaxNotices) {
		r := type1.NoticeRequest{Notices: make([]type1.Notice, len(some))}
		for i, v := range some {
			r.Notices[i] = toType1(v)
		}
		err := c.SupplyNotice(ctx, r)
		switch type1.CodeOf(err) {
		case type1.NotAuthorised, type1.Malformed:
			err = errors.Join(ksa.ErrRefused, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// PullNotices asks for supply notices.
func (p peersForKSA) PullNotices(ctx context.Context, peer string, ids []key.ID) ([]ksa.Notice, error) {
	c := p[peer]
	if c == nil {
		return nil, errNoPeer
	}
	var out []ksa.Notice
	for some := range slices.Chunk(ids, type1.MaxNotices) {
		r, err := c.PullNotice(ctx, type1.PullRequest{KeyIDs: some})
		if err != nil {
			return nil, err
		}
		for _, n := range r.Notices {
			out = append(out, fromType1(n))
		}
	}
	return out, nil
}

// PullSettled asks which of our keys were settled, and which of due are held.
func (p peersForKSA) PullSettled(ctx context.Context, peer string, upTo uint64, due []key.ID) (ksa.Settled, error) {
	c := p[peer]
	if c == nil {
		return ksa.Settled{}, errNoPeer
	}
	r, err := c.PullSettled(ctx, type1.SettledRequest{UpTo: upTo, Due: due})
	return ksa.Settled{IDs: r.KeyIDs, UpTo: r.UpTo, More: r.More, Held: r.Held}, err
}

// supplyForType1 is the KSA in Type-1's terms.
type supplyForType1 struct{ *ksa.Agent }

// SupplyNotice keeps notices.
func (a supplyForType1) SupplyNotice(ctx context.Context, peer string, r type1.NoticeRequest) error {
	list := make([]ksa.Notice, len(r.Notices))
	for i, n := range r.Notices {
		list[i] = fromType1(n)
	}
	if err := a.Receive(ctx, peer, list); err != nil {
		return &type1.Problem{Code: type1.Overloaded, Detail: err.Error()}
	}
	return nil
}

// PullNotice answers with the notices that the peer has not acknowledged.
func (a supplyForType1) PullNotice(_ context.Context, peer string, r type1.PullRequest) (type1.PullResponse, error) {
	out := type1.PullResponse{Notices: []type1.Notice{}}
	for _, id := range r.KeyIDs {
		if n, ok := a.Issued(peer, id); ok {
			out.Notices = append(out.Notices, toType1(n))
		}
	}
	return out, nil
}

// PullSettled answers with the peer's keys that were settled.
func (a supplyForType1) PullSettled(_ context.Context, peer string, r type1.SettledRequest) (type1.SettledResponse, error) {
	s := a.Settled(peer, r.UpTo, r.Due)
	return type1.SettledResponse{KeyIDs: append([]key.ID{}, s.IDs...), UpTo: s.UpTo, More: s.More, Held: s.Held}, nil
}

func toType1(n ksa.Notice) type1.Notice {
	return type1.Notice{
		Pool: n.Pool, Position: type1.Position(n.Position), KeyID: n.KeyID, MasterSAE: n.MasterSAE, SlaveSAEs: n.SlaveSAEs,
		SizeBits: n.SizeBits, TTLSeconds: max(1, int(n.TTL/time.Second)),
	}
}

func fromType1(n type1.Notice) ksa.Notice {
	return ksa.Notice{
		Pool: n.Pool, Position: key.Position(n.Position), KeyID: n.KeyID, MasterSAE: n.MasterSAE, SlaveSAEs: n.SlaveSAEs,
		SizeBits: n.SizeBits, TTL: time.Duration(n.TTLSeconds) * time.Second,
	}
}

// ipsecKeyBits is the size of the keys that IPsec asks for.
const ipsecKeyBits = 256

// localKSA is this node's KSA as ike's source of keys, called in process.
type localKSA struct{ supplier }

// GetKey gives a fresh key of local for peer.
func (a localKSA) GetKey(ctx context.Context, local, peer string) (key.SupplyKey, error) {
	return one(a.supplier.GetKey(ctx, local, peer, 1, ipsecKeyBits))
}

// GetKeyWithID gives, once, the key that peer got as id.
func (a localKSA) GetKeyWithID(ctx context.Context, local, peer string, id key.ID) (key.SupplyKey, error) {
	return one(a.supplier.GetKeyWithID(ctx, local, peer, []key.ID{id}, ipsecKeyBits))
}

// vendorKME is another maker's KME as ike's source of keys. Which SAE is local
// its certificate says.
type vendorKME struct{ *etsi014.Client }

// GetKey gives a fresh key for peer.
func (c vendorKME) GetKey(ctx context.Context, _, peer string) (key.SupplyKey, error) {
	return one(c.Client.GetKey(ctx, peer, 1, ipsecKeyBits))
}

// GetKeyWithID gives, once, the key that peer got as id.
func (c vendorKME) GetKeyWithID(ctx context.Context, _, peer string, id key.ID) (key.SupplyKey, error) {
	return one(c.Client.GetKeyWithID(ctx, peer, []key.ID{id}, ipsecKeyBits))
}

// one gives the only key of an answer; the caller owns it.
func one(keys []key.SupplyKey, err error) (key.SupplyKey, error) {
	if err != nil {
		return key.SupplyKey{}, err
	}
	if len(keys) != 1 {
		key.WipeAll(keys)
		return key.SupplyKey{}, errors.New("key supply: one key was asked for and not one came")
	}
	return keys[0], nil
}
