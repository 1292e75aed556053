// Package version says which build of the programs this is.
package version

import (
	"runtime/debug"
	"strings"
)

const shortCommit = 12

// String is the module's version and commit as the Go tool recorded them.
func String() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if c := s.Value; s.Key == "vcs.revision" && len(c) >= shortCommit && !strings.Contains(v, c[:shortCommit]) {
			v += " " + c[:shortCommit]
		}
	}
	return v
}
