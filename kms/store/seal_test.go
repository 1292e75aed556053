package store

import (
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha512"
	"database/sql"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

func testAEAD(t testing.TB, fill byte) cipher.AEAD {
	t.Helper()
	a, err := newAEAD(bytes.Repeat([]byte{fill}, 32))
	must(t, err)
	return a
}

func TestSeal(t *testing.T) {
	a, plain, aad := testAEAD(t, 1), []byte("thirty-two bytes of test secret!"), []byte("here")
	box := seal(a, plain, aad)
	if again := seal(a, plain, aad); bytes.Equal(again[1:13], box[1:13]) || bytes.Equal(again, box) {
		t.Error("a nonce was used twice")
	}
	dst := make([]byte, len(plain))
	if err := unseal(a, box, dst, aad); err != nil || !bytes.Equal(dst, plain) {
		t.Fatalf("%q, %v", dst, err)
	}
	for i := range box {
		bad := bytes.Clone(box)
		bad[i] ^= 0x10
		copy(dst, plain)
		if unseal(a, bad, dst, aad) == nil {
			t.Errorf("a box with byte %d changed was opened", i)
		} else if i > 0 && bytes.Contains(dst, plain[:4]) {
			t.Errorf("byte %d: plaintext left after a failure", i)
		}
	}
	for n := range box {
		if unseal(a, box[:n], dst, aad) == nil || n <= len(dst) && unseal(a, box, dst[:n], aad) == nil && n != len(plain) {
			t.Errorf("a box of %d bytes was opened", n)
		}
	}
	if unseal(a, box, dst, []byte("there")) == nil || unseal(testAEAD(t, 2), box, dst, aad) == nil {
		t.Error("opened elsewhere, or with another key")
	}
}

// Every field of a header changes its associated data.
func TestHeaderAAD(t *testing.T) {
	store := uuid.UUID{1}
	base := header{pool: testPool, seq: 1, state: key.Active, class: key.Direct, count: 4, bytes: 5, algorithm: "ab", generation: 6, epoch: 7}
	changes := map[string]func(*header){
		"pool": func(h *header) { h.pool[0]++ }, "seq": func(h *header) { h.seq++ }, "state": func(h *header) { h.state++ },
		"class": func(h *header) { h.class-- }, "noPad": func(h *header) { h.noPad = true }, "count": func(h *header) { h.count++ },
		"bytes": func(h *header) { h.bytes++ }, "algorithm": func(h *header) { h.algorithm = "a" }, "tagM": func(h *header) { h.tagM[15]++ },
		"tagS": func(h *header) { h.tagS[0]++ }, "digest": func(h *header) { h.digest[31]++ }, "own cut": func(h *header) { h.cut[0]++ },
		"peer cut": func(h *header) { h.cut[1]++ }, "generation": func(h *header) { h.generation++ }, "epoch": func(h *header) { h.epoch++ },
	}
	seen := map[string]string{string(base.aad(store)): "base", string(base.aad(uuid.UUID{2})): "store"}
	for name, change := range changes {
		h := base
		change(&h)
		if other, ok := seen[string(h.aad(store))]; ok {
			t.Errorf("%s is not told from %s", name, other)
		}
		seen[string(h.aad(store))] = name
	}
	parts := map[string]bool{string(base.partAAD(store, 0, []byte("ids"))): true}
	for _, b := range [][]byte{base.partAAD(store, 1, []byte("ids")), base.partAAD(store, 0, []byte("idt")), base.partAAD(uuid.UUID{2}, 0, []byte("ids"))} {
		if parts[string(b)] {
			t.Error("two parts have the same associated data")
		}
		parts[string(b)] = true
	}
	for _, name := range []string{"pool", "seq", "class", "noPad", "count", "generation"} {
		h := base
		changes[name](&h)
		if parts[string(h.partAAD(store, 0, []byte("ids")))] {
			t.Errorf("a part is not bound to its block's %s", name)
		}
	}
}

func TestOwnedCounts(t *testing.T) {
	for _, role := range []key.Role{key.Master, key.Slave} {
		for lo := range 9 {
			for hi := range 9 {
				want := 0
				for i := lo; i < hi; i++ {
					if role.Owns(key.At(1, uint32(i))) {
						want++
					}
				}
				if got := owned(role, lo, hi); got != want {
					t.Errorf("%s owns %d of [%d, %d), want %d", role, got, lo, hi, want)
				}
			}
			if i := firstOwned(role, lo); !role.Owns(key.At(1, uint32(i))) || i-lo > 1 {
				t.Errorf("%s: first from %d is %d", role, lo, i)
			}
		}
	}
}

func FuzzUnseal(f *testing.F) {
	a := testAEAD(f, 1)
	f.Add([]byte{}, 32)
	f.Add(seal(a, make([]byte, 32), nil), 32)
	f.Add(seal(a, nil, nil), 0)
	f.Fuzz(func(t *testing.T, box []byte, n int) {
		if n < 0 || n > 1<<16 {
			return
		}
		dst := bytes.Repeat([]byte{9}, n)
		if unseal(a, box, dst, []byte("aad")) == nil {
			t.Error("bytes that nobody sealed were opened")
		}
	})
}

func FuzzParseRoot(f *testing.F) {
	r, err := newRoot(nil)
	must(f, err)
	good, err := r.encode()
	must(f, err)
	f.Add(bytes.Clone(good.Bytes()))
	f.Add([]byte(rootMagic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRoot(b, nil)
		if err != nil {
			return
		}
		defer r.secret.Wipe()
		again, err := r.encode()
		must(t, err)
		defer again.Wipe()
		if !bytes.Equal(again.Bytes(), b) {
			t.Error("a root file was read that is not as we write it")
		}
	})
}

func TestRootFileDamage(t *testing.T) {
	r, err := newRoot(nil)
	must(t, err)
	m, err := r.encode()
	must(t, err)
	good := bytes.Clone(m.Bytes())
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if _, err := parseRoot(bad, nil); err == nil {
			t.Errorf("a root file with byte %d changed was read", i)
		}
		if _, err := parseRoot(good[:i], nil); err == nil {
			t.Errorf("a root file of %d bytes was read", i)
		}
	}
	if _, err := parseRoot(append(good, 0), nil); err == nil {
		t.Error("a root file with a byte too much was read")
	}
}

// The chain is HKDF as documented, and one-way: root n+1 is not root n's data key.
func TestRootChain(t *testing.T) {
	r, err := newRoot(nil)
	must(t, err)
	want, err := hkdf.Key(sha512.New, r.secret.Bytes(), r.store[:], "Q-IPsec v1 root", 32)
	must(t, err)
	next, err := r.next()
	must(t, err)
	if !bytes.Equal(next.secret.Bytes(), want) || next.epoch != 2 || next.store != r.store {
		t.Error("root 2")
	}
	data, err := hkdf.Key(sha512.New, r.secret.Bytes(), r.store[:], "Q-IPsec v1 data", 32)
	must(t, err)
	a, err := r.dataKey()
	must(t, err)
	b, err := newAEAD(data)
	must(t, err)
	dst := make([]byte, 3)
	if err := unseal(b, seal(a, []byte("abc"), nil), dst, nil); err != nil {
		t.Error("data key 1 is not as documented")
	}
}

// windows is the first 8 bytes of every key, as they are and in hexadecimal.
func windows(seqs []uint64, n int) map[string]bool {
	w := map[string]bool{}
	for _, seq := range seqs {
		for i := range n {
			k := plainKey(seq, i)
			w[string(k[:8])], w[string(k[16:24])] = true, true
			w[hex.EncodeToString(k[:8])] = true
		}
	}
	return w
}

// within reports whether one of w begins at b[i]. Eight digits would be too few: a
// server's log has enough of them for two to be equal by chance.
func within(w map[string]bool, b []byte, i int) bool {
	return i+8 <= len(b) && w[string(b[i:i+8])] || i+16 <= len(b) && w[string(b[i:i+16])]
}

// scanFiles counts windows in all files of dir but the root file.
func scanFiles(t *testing.T, dir string, w map[string]bool) (hits int) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		if e.Name() == "root" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		must(t, err)
		for i := range b {
			if within(w, b, i) {
				hits++
			}
		}
	}
	return hits
}

func TestNoKeyByteOnDisk(t *testing.T) {
	const n = 3000
	dir := filepath.Join(t.TempDir(), "s")
	s, ctx := filled(t, testOptions(dir), n), testContext(t)
	w := windows([]uint64{1}, n)
	ids := map[string]bool{}
	for i := range n {
		id := testID(1, i)
		ids[string(id[:8])] = true
	}
	check := func(when string) {
		t.Helper()
		if hits := scanFiles(t, dir, ids); hits < n*9/10 { // a few lie across two pages
			t.Fatalf("%s: %d of %d Key-IDs seen on disk: the search does not see what is there", when, hits, n)
		}
		if hits := scanFiles(t, dir, w); hits != 0 {
			t.Errorf("%s: %d pieces of keys on disk", when, hits)
		}
	}
	check("stored")
	lease(t, s, Own, 0, key.At(1, 700))
	must(t, s.Record(ctx, []Event{{Pool: testPool, State: key.Supplied, ID: testID(1, 2)}}))
	check("leased")
	must(t, s.Ratchet(ctx))
	check("ratcheted")
	must(t, s.Close())
	check("closed")
}

// After a ratchet nothing, not the old database with the new root file, not a
// search through every byte of all files of all times with every key the new
// root reaches, opens what was read before.
func TestRatchetForgets(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	s, ctx := filled(t, testOptions(dir), 500), testContext(t)
	must(t, s.PutBlock(ctx, testBlock(t, 2, 10))) // destroyed below
	headers := []header{*s.pools[testPool].blocks[0], *s.pools[testPool].blocks[1]}
	lease(t, s, Own, 0, key.At(1, 100))
	old := copyStore(t, dir)
	must(t, s.Destroy(ctx, testPool, 2, key.Expired, "age"))
	must(t, s.Ratchet(ctx))

	oldRoot, err := readRoot(filepath.Join(old, "root"), nil)
	must(t, err)
	newRoot, err := readRoot(filepath.Join(dir, "root"), nil)
	must(t, err)
	if oldRoot.epoch+1 != newRoot.epoch || oldRoot.secret.Equal(newRoot.secret) {
		t.Fatal("the root file was not replaced")
	}
	raw := func(dir string) (all []byte) {
		for _, name := range []string{"store.db", "store.db-wal"} {
			b, err := os.ReadFile(filepath.Join(dir, name))
			must(t, err)
			all = append(all, b...)
		}
		return all
	}
	everything := append(raw(old), raw(dir)...)
	opened := func(r *root) (n int) {
		dst := make([]byte, 32)
		for range 4 { // the epochs that r reaches
			a, err := r.dataKey()
			must(t, err)
			for i := 0; i+boxOverhead+32 <= len(everything); i++ {
				for _, h := range headers {
					if everything[i] == boxVersion && unseal(a, everything[i:i+boxOverhead+32], dst, h.aad(s.uuid)) == nil {
						n++
					}
				}
			}
			if r, err = r.next(); err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	if opened(oldRoot) < 2 {
		t.Fatal("the search finds no block key even with the old root: it would prove nothing")
	}
	if n := opened(newRoot); n != 0 {
		t.Errorf("the new root opens %d old block keys", n)
	}

	// The block's new key does not open its old boxes.
	h := s.pools[testPool].blocks[0]
	c, err := (&sqliteEngine{path: filepath.Join(old, "store.db")}).connector(true)
	must(t, err)
	db := sql.OpenDB(c)
	defer db.Close()
	var ids, box []byte
	must(t, db.QueryRow(`SELECT ids, box FROM part WHERE seq = 1 AND part = 0`).Scan(&ids, &box))
	was := &Store{uuid: s.uuid, root: oldRoot, data: map[uint64]cipher.AEAD{}}
	for who, tc := range map[string]struct {
		s    *Store
		h    *header
		want bool
	}{"the old root": {was, &headers[0], true}, "the new root": {s, h, false}} {
		a, err := tc.s.blockAEAD(tc.h)
		must(t, err)
		if opens := unseal(a, box, make([]byte, 500*32), headers[0].partAAD(s.uuid, 0, ids)) == nil; opens != tc.want {
			t.Errorf("%s opens the keys of the old copy: %v", who, opens)
		}
	}

	// What survives holds zeros where keys were read.
	seen := 0
	must(t, s.openParts(ctx, s.r, h, 0, h.parts()-1, func(_ int, _, keys []byte) error {
		for i := range h.count {
			k := keys[i*32 : i*32+32]
			if gone := i <= 100 && i%2 == 0; gone != isZero(k) || !gone && !bytes.Equal(k, plainKey(1, i)) {
				t.Errorf("key %d after the ratchet: cut out %v", i, isZero(k))
			}
			seen++
		}
		return nil
	}))
	if seen != 500 {
		t.Errorf("%d keys looked at", seen)
	}
}
