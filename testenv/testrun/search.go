package main

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/q-ipsec/q-ipsec/testenv/needle"
)

// search looks in every file below dir for the beginnings of keys that trace
// lists, one in hex per line.
func search(trace, dir string) (leaks []string, err error) {
	keys, err := readTrace(trace)
	if err != nil {
		return nil, err
	}
	fmt.Printf("     searched all output for %d keys\n", keys.Len())
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		found := needle.Found{}
		keys.Search(b, found)
		keys.SearchDumps(b, found)
		if len(found) > 0 {
			leaks = append(leaks, path)
		}
		return nil
	})
	return leaks, err
}

func readTrace(name string) (*needle.Set, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	set := needle.NewSet()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if b, err := hex.DecodeString(sc.Text()); err == nil {
			set.Add(b)
		}
	}
	return set, sc.Err()
}
