//go:build keytrace

package key

import (
	"encoding/hex"
	"os"
	"sync"
)

// The build tag keytrace is for `make test` alone: every Material is written to
// the file named by QIPSEC_KEYTRACE as it is wiped, so that the test run can
// search all its own output for key bytes. No daemon is built with it but those that
// Go tests build for themselves.
var traceTo = sync.OnceValue(func() *os.File {
	name := os.Getenv("QIPSEC_KEYTRACE")
	if name == "" {
		return nil
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic("keytrace: " + err.Error())
	}
	return f
})

func trace(b []byte) {
	if f := traceTo(); f != nil && len(b) >= 16 {
		_, _ = f.WriteString(hex.EncodeToString(b[:16]) + "\n")
	}
}
