package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// A box is version (1 byte) | nonce (12) | AES-256-GCM ciphertext | tag (16).
const (
	boxVersion  = 1
	nonceSize   = 12
	boxOverhead = 1 + nonceSize + 16
)

// errBox says that a box does not open; it never says why in more detail.
var errBox = errors.New("sealed bytes do not open: damaged, moved, or sealed under another key")

// newAEAD makes AES-256-GCM of a 32-byte key, borrowed.
func newAEAD(k []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(k)
	if err != nil {
		return nil, fmt.Errorf("store: make cipher: %w", err)
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		return nil, fmt.Errorf("store: make cipher: %w", err)
	}
	return a, nil
}

// seal gives the box of plain (borrowed) under a fresh random nonce.
func seal(a cipher.AEAD, plain, aad []byte) []byte {
	box := make([]byte, 1+nonceSize, boxOverhead+len(plain))
	box[0] = boxVersion
	_, _ = rand.Read(box[1:]) // never fails (crypto/rand)
	return a.Seal(box, box[1:1+nonceSize], plain, aad)
}

// unseal opens box into dst, whose length the plaintext must have. dst is
// cleared if it does not open.
func unseal(a cipher.AEAD, box, dst, aad []byte) error {
	if len(box) != boxOverhead+len(dst) || box[0] != boxVersion {
		return errBox
	}
	if _, err := a.Open(dst[:0], box[1:1+nonceSize], box[1+nonceSize:], aad); err != nil {
		clear(dst)
		return errBox
	}
	return nil
}

// header is a block's row but for its keys.
type header struct {
	pool       uuid.UUID
	seq        uint64
	state      key.State
	class      key.Class
	noPad      bool
	count      int // keys, those read among them
	bytes      int
	algorithm  string
	tagM, tagS [16]byte
	digest     [32]byte
	cut        [2]key.Position // by side: keys up to here are no longer in the boxes
	generation uint64          // of the start that sealed the boxes
	epoch      uint64          // of the data key around the block key
	wrap       []byte          // box of the block key; its associated data is all of the above
	takenIn    int64           // by the store's clock
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// fixed begins every associated data: what it is and where it belongs.
func fixed(label string, store uuid.UUID) []byte {
	b := make([]byte, 0, 256)
	b = append(b, byte(len(label)))
	b = append(b, label...)
	return append(b, store[:]...)
}

// aad binds the block key to the block's place and to its whole header.
func (h *header) aad(store uuid.UUID) []byte {
	b := fixed("block", store)
	b = append(b, h.pool[:]...)
	be := binary.BigEndian
	for _, n := range []uint64{h.seq, h.generation, h.epoch, uint64(h.count), uint64(h.bytes), uint64(h.cut[0]), uint64(h.cut[1])} {
		b = be.AppendUint64(b, n)
	}
	b = append(b, byte(h.state), byte(h.class), flag(h.noPad), byte(len(h.algorithm)))
	b = append(b, h.algorithm...)
	b = append(b, h.tagM[:]...)
	b = append(b, h.tagS[:]...)
	return append(b, h.digest[:]...)
}

// partAAD binds the keys of one part to their block, sealing and Key-IDs. The
// epoch is not in it: a new epoch seals the block key only.
func (h *header) partAAD(store uuid.UUID, part int, ids []byte) []byte {
	b := fixed("part", store)
	b = append(b, h.pool[:]...)
	be := binary.BigEndian
	for _, n := range []uint64{h.seq, h.generation, uint64(h.count), uint64(part)} {
		b = be.AppendUint64(b, n)
	}
	b = append(b, byte(h.class), flag(h.noPad))
	sum := sha256.Sum256(ids)
	return append(b, sum[:]...)
}

// rowAAD is the associated data of a pool's proof. An empty ledger adds nothing
// to it: proofs from before there was one hold.
func (p *PoolInfo) rowAAD(store uuid.UUID, epoch uint64, ledger string) []byte {
	b := fixed("pool", store)
	b = append(b, p.ID[:]...)
	b = append(b, byte(p.Role), byte(p.Class), byte(len(p.Peer)))
	b = append(b, p.Peer...)
	be := binary.BigEndian
	for _, n := range []uint64{p.NewestSeq, uint64(p.Mark), uint64(p.PeerMark), p.PeerGeneration, epoch} {
		b = be.AppendUint64(b, n)
	}
	return append(b, ledger...)
}

// nodeAAD is the associated data of the node row's proof. Of a row that names
// neither server nor holder it is that of version 1.
func nodeAAD(store uuid.UUID, n *nodeRow) []byte {
	b := fixed("node", store)
	b = binary.BigEndian.AppendUint64(b, n.generation)
	b = binary.BigEndian.AppendUint64(b, n.epoch)
	if n.server == "" && n.holder == "" {
		return b
	}
	b = append(b, byte(len(n.server)))
	b = append(b, n.server...)
	return append(b, n.holder...)
}
