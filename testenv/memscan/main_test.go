package main

import (
	"crypto/rand"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

// The scan finds what is in memory, here of this very process.
func TestScanSelf(t *testing.T) {
	here := make([]byte, 32)
	if _, err := rand.Read(here); err != nil {
		t.Fatal(err)
	}
	hits, size, err := scan(strconv.Itoa(os.Getpid()), [][]byte{here})
	if err != nil || hits != 1 || size == 0 {
		t.Errorf("%d hits, %d bytes, %v", hits, size, err)
	}
	runtime.KeepAlive(here)
	if _, _, err := scan("0", [][]byte{here}); err == nil {
		t.Error("scanned a process that is none")
	}
}

func TestReadNeedles(t *testing.T) {
	n, err := readNeedles(strings.NewReader("0x" + strings.Repeat("ab", 20) + "\n" + strings.Repeat("cd", 16) + "\n"))
	if err != nil || len(n) != 2 || len(n[0]) != 20 {
		t.Errorf("%v, %v", n, err)
	}
	for _, s := range []string{"xyz\n", "abcd\n"} {
		if _, err := readNeedles(strings.NewReader(s)); err == nil {
			t.Errorf("%q taken", s)
		}
	}
}
