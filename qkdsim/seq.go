package qkdsim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// readSeq reads the last seq given out; 0 if there is no file yet.
func readSeq(file string) (uint64, error) {
	if file == "" {
		return 0, nil
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("qkdsim: state: %w", err)
	}
	seq, err := parseSeq(b)
	if err != nil {
		return 0, fmt.Errorf("qkdsim: state file %s holds no seq: remove it to start again at 1, with a new pair id", file)
	}
	return seq, nil
}

func parseSeq(b []byte) (uint64, error) {
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

func formatSeq(seq uint64) []byte { return []byte(strconv.FormatUint(seq, 10) + "\n") }

// writeSeq records seq before its file leaves, so that no seq is used twice.
func writeSeq(file string, seq uint64) error {
	if file == "" {
		return nil
	}
	if err := writeFile(filepath.Dir(file), filepath.Base(file), formatSeq(seq)); err != nil {
		return fmt.Errorf("qkdsim: state: %w", err)
	}
	return nil
}
