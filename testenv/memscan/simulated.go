package main

import (
	"flag"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/keyfile"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
	"github.com/q-ipsec/q-ipsec/qkdsim"
	"github.com/q-ipsec/q-ipsec/testenv/needle"
)

// simulated are the keys of a qkdsim that runs from a seed. Every file must
// have the same number of keys, because a Key-ID hangs on it.
type simulated struct {
	seed           uint64 // 0: no such keys
	pair           string
	files, perFile int
	saes           [][2]string // master and slave
}

func (s *simulated) flags(fs *flag.FlagSet) {
	fs.Uint64Var(&s.seed, "seed", 0, "`seed` of qkdsim, whose keys to look for")
	fs.StringVar(&s.pair, "pair", "", "`UUID` of its pair")
	fs.IntVar(&s.files, "files", 0, "how `many` files it made, from seq 1")
	fs.IntVar(&s.perFile, "per-file", 1000, "`keys` in each")
	fs.Func("sae", "`MASTER,SLAVE`: session keys for these SAEs, 256 bits; may be repeated", func(v string) error {
		m, sl, ok := strings.Cut(v, ",")
		if !ok || m == "" || sl == "" {
			return fmt.Errorf("%q is not MASTER,SLAVE", v)
		}
		s.saes = append(s.saes, [2]string{m, sl})
		return nil
	})
}

// add puts the keys into set: one-time secrets of the files too.
func (s *simulated) add(set *needle.Set) error {
	if s.seed == 0 {
		return nil
	}
	pair, err := uuid.Parse(s.pair)
	if err != nil {
		return fmt.Errorf("-pair: %w", err)
	}
	if s.files < 1 {
		return fmt.Errorf("-files is %d: qkdsim made no file", s.files)
	}
	for seq := range uint64(s.files) {
		if err := s.file(set, pair, seq+1); err != nil {
			return fmt.Errorf("keys of file %d: %w", seq+1, err)
		}
	}
	return nil
}

func (s *simulated) file(set *needle.Set, pair uuid.UUID, seq uint64) error {
	data, err := qkdsim.KeyData(s.seed, pair, seq, s.perFile*key.MasterSize+keyfile.Trailer)
	if err != nil {
		return err
	}
	defer data.Wipe()
	p, err := keyfile.Split(data.Bytes())
	if err != nil {
		return err
	}
	for _, b := range [][]byte{p.Km, p.Ks, p.Kid} {
		set.Add(b)
	}
	master, err := key.New(key.MasterSize)
	if err != nil {
		return err
	}
	defer master.Wipe()
	for i, id := range key.DeriveIDs(p.Kid, pair, seq, s.perFile) {
		copy(master.Bytes(), p.Keys[i*key.MasterSize:])
		set.Add(master.Bytes())
		for _, sae := range s.saes {
			session, err := ksa.Derive(master, id, sae[0], []string{sae[1]}, 256)
			if err != nil {
				return err
			}
			set.Add(session.Bytes())
			session.Wipe()
		}
	}
	return nil
}
