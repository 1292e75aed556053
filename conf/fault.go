package conf

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Fault is one thing wrong with a config.
type Fault struct {
	Field string // path of the field, such as kms.pair[1].role; empty: the whole file
	Text  string
}

// Faults is all that is wrong with one file, as one error.
type Faults struct {
	File string
	List []Fault
}

// Error gives one fault a line.
func (f *Faults) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d fault(s)", f.File, len(f.List))
	for _, v := range f.List {
		b.WriteString("\n  ")
		if v.Field != "" {
			b.WriteString(v.Field + ": ")
		}
		b.WriteString(v.Text)
	}
	return b.String()
}

// reader collects the faults of one file while its fields are turned into live
// values.
type reader struct {
	dir    string // of the file; relative paths start here
	faults []Fault
	dirs   map[string]bool // looked at already
}

func (r *reader) fault(field, format string, args ...any) {
	r.faults = append(r.faults, Fault{field, fmt.Sprintf(format, args...)})
}

// decode parses text into raw, a pointer to a struct of toml fields. A false
// result means that the text is not TOML of that shape; nothing else can be
// said of it then.
func (r *reader) decode(text []byte, raw any) bool {
	md, err := toml.Decode(string(text), raw)
	if err != nil {
		r.fault("", "%s", strings.TrimPrefix(err.Error(), "toml: "))
		return false
	}
	for _, k := range md.Undecoded() {
		r.fault(k.String(), "no such key (misspelt, or of another version?)")
	}
	return true
}

// parse turns one field's text into a value: def where the field is absent or
// at fault, so that one fault does not cause more.
func parse[T any](r *reader, field, text string, def T, f func(string) (T, error)) T {
	if text == "" {
		return def
	}
	v, err := f(text)
	if err != nil {
		r.fault(field, "%q: %v", text, err)
		return def
	}
	return v
}

// need is parse for a field that must be there.
func need[T any](r *reader, field, text string, f func(string) (T, error)) T {
	var zero T
	if text == "" {
		r.fault(field, "is missing")
		return zero
	}
	return parse(r, field, text, zero, f)
}

// checked makes a parser of a check.
func checked(check func(string) error) func(string) (string, error) {
	return func(s string) (string, error) { return s, check(s) }
}

// oneOf makes a parser that takes these words only.
func oneOf[T ~string](words ...T) func(string) (T, error) {
	return func(s string) (T, error) {
		for _, w := range words {
			if s == string(w) {
				return w, nil
			}
		}
		return "", fmt.Errorf("want one of %q", words)
	}
}

// span makes a parser of a duration between lo and hi.
func span(lo, hi time.Duration) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		if err != nil {
			return 0, fmt.Errorf("want a duration such as 90s or 10m")
		}
		if d < lo || d > hi {
			return 0, fmt.Errorf("want %v to %v", lo, hi)
		}
		return d, nil
	}
}

// spanOrNone is span that also takes 0, for none.
func spanOrNone(lo, hi time.Duration) func(string) (time.Duration, error) {
	parse := span(lo, hi)
	return func(s string) (time.Duration, error) {
		if d, err := time.ParseDuration(s); err == nil && d == 0 {
			return 0, nil
		}
		d, err := parse(s)
		if err != nil {
			err = fmt.Errorf("%w, or 0s for none", err)
		}
		return d, err
	}
}

// seconds is span for what charon, the kernel or a peer counts in whole seconds: a
// fraction would be cut without a word.
func seconds(lo, hi time.Duration) func(string) (time.Duration, error) {
	parse := span(lo, hi)
	return func(s string) (time.Duration, error) {
		d, err := parse(s)
		if err == nil && d%time.Second != 0 {
			return 0, fmt.Errorf("want whole seconds")
		}
		return d, err
	}
}

// number gives the value of an integer field between lo and hi, def if absent
// or at fault.
func (r *reader) number(field string, v *int64, def, lo, hi int64) int64 {
	if v == nil {
		return def
	}
	if *v < lo || *v > hi {
		r.fault(field, "%d: want %d to %d", *v, lo, hi)
		return def
	}
	return *v
}

// path makes a field's path absolute.
func (r *reader) path(field, text, def string) string {
	if text == "" {
		text = def
	}
	if text == "" {
		r.fault(field, "is missing")
		return ""
	}
	if !filepath.IsAbs(text) {
		text = filepath.Join(r.dir, text)
	}
	return filepath.Clean(text)
}

// unique notes a fault if value was seen before.
func (r *reader) unique(field, value string, seen map[string]string) {
	if value == "" {
		return
	}
	if first, ok := seen[value]; ok {
		r.fault(field, "%q is already that of %s", value, first)
		return
	}
	seen[value] = field
}

func (r *reader) err(file string) error {
	if len(r.faults) == 0 {
		return nil
	}
	return &Faults{File: file, List: r.faults}
}

// maxConfig bounds a config file, in bytes.
const maxConfig = 1 << 20

func readConfig(name string) ([]byte, string, error) {
	abs, err := filepath.Abs(name)
	if err != nil {
		return nil, "", fmt.Errorf("conf: %w", err)
	}
	fi, err := os.Stat(abs)
	if err != nil {
		return nil, "", fmt.Errorf("conf: %w", err)
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxConfig {
		return nil, "", fmt.Errorf("conf: %s is not a regular file of at most %d bytes", abs, maxConfig)
	}
	b, err := os.ReadFile(abs)
	if err != nil {
		return nil, "", fmt.Errorf("conf: %w", err)
	}
	return b, filepath.Dir(abs), nil
}
