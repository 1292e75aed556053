package etsi014

import (
	"bytes"
	"encoding/json"
	"errors"
	"unicode/utf16"
	"unicode/utf8"
)

// encoding/json matches names without regard to case, takes the last of two
// equal ones and makes a string of every key. So it only checks the grammar
// here, and cursor walks over what is known to be good.

var (
	errJSON   = errors.New("body is not valid JSON")
	errObject = errors.New("a JSON object is needed")
	errArray  = errors.New("a JSON array is needed")
	errString = errors.New("a JSON string is needed")
	errInt    = errors.New("a non-negative integer of at most 18 digits is needed")
)

// cursor walks over one valid JSON text. It changes the text: strings are
// unescaped in place, so that no copy of a key is made.
type cursor struct {
	b []byte
	i int
}

// newCursor fails unless b is one JSON value in UTF-8. b is borrowed.
func newCursor(b []byte) (*cursor, error) {
	if !utf8.Valid(b) || !json.Valid(b) {
		return nil, errJSON
	}
	return &cursor{b: b}, nil
}

// next is the first byte of the next token.
func (c *cursor) next() byte {
	for {
		switch c.b[c.i] {
		case ' ', '\t', '\r', '\n':
			c.i++
		default:
			return c.b[c.i]
		}
	}
}

// object calls f with each name, in order; f consumes the value.
func (c *cursor) object(f func(name []byte) error) error {
	if c.next() != '{' {
		return errObject
	}
	c.i++
	for c.next() != '}' {
		if c.b[c.i] == ',' {
			c.i++
		}
		name, err := c.str()
		if err != nil {
			return err
		}
		c.next()
		c.i++ // the colon
		if err := f(name); err != nil {
			return err
		}
	}
	c.i++
	return nil
}

// array calls f for each element, which f consumes.
func (c *cursor) array(f func() error) error {
	if c.next() != '[' {
		return errArray
	}
	c.i++
	for c.next() != ']' {
		if c.b[c.i] == ',' {
			c.i++
		}
		if err := f(); err != nil {
			return err
		}
	}
	c.i++
	return nil
}

// str is the next value, a string, without quotes and escapes: a part of the
// text itself.
func (c *cursor) str() ([]byte, error) {
	if c.next() != '"' {
		return nil, errString
	}
	c.i++
	start := c.i
	end := c.endOfString()
	raw := c.b[start : end-1]
	if bytes.IndexByte(raw, '\\') < 0 {
		return raw, nil
	}
	return unescape(raw), nil
}

// endOfString moves past the string whose first byte is at c.i, and past its
// closing quote.
func (c *cursor) endOfString() int {
	for c.b[c.i] != '"' {
		if c.b[c.i] == '\\' {
			c.i++
		}
		c.i++
	}
	c.i++
	return c.i
}

// unescape works in place: no escape is shorter than what it stands for.
func unescape(s []byte) []byte {
	w := 0
	for r := 0; r < len(s); {
		if s[r] != '\\' {
			s[w] = s[r]
			r, w = r+1, w+1
			continue
		}
		if s[r+1] != 'u' {
			s[w] = plain(s[r+1])
			r, w = r+2, w+1
			continue
		}
		u := hex4(s[r+2:])
		r += 6
		if utf16.IsSurrogate(u) {
			low := rune(utf8.RuneError)
			if r+6 <= len(s) && s[r] == '\\' && s[r+1] == 'u' {
				low = hex4(s[r+2:])
			}
			if u = utf16.DecodeRune(u, low); u != utf8.RuneError {
				r += 6
			}
		}
		w += utf8.EncodeRune(s[w:], u)
	}
	return s[:w]
}

func plain(c byte) byte {
	switch c {
	case 'b':
		return '\b'
	case 'f':
		return '\f'
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	}
	return c // a quote, a slash, a backslash
}

func hex4(s []byte) rune {
	var u rune
	for _, c := range s[:4] {
		switch {
		case c <= '9':
			c -= '0'
		case c <= 'F':
			c -= 'A' - 10
		default:
			c -= 'a' - 10
		}
		u = u<<4 | rune(c)
	}
	return u
}

// integer is the next value, a plain integer.
func (c *cursor) integer() (int, error) {
	c.next()
	n, start := 0, c.i
	for c.i < len(c.b) && c.b[c.i] >= '0' && c.b[c.i] <= '9' {
		n = n*10 + int(c.b[c.i]-'0')
		if c.i++; c.i-start > 18 {
			return 0, errInt
		}
	}
	if c.i == start {
		return 0, errInt
	}
	if c.i < len(c.b) {
		switch c.b[c.i] {
		case '.', 'e', 'E':
			return 0, errInt
		}
	}
	return n, nil
}

// skip moves past the next value, whatever it is.
func (c *cursor) skip() {
	depth := 0
	for {
		switch c.next() {
		case '"':
			c.i++
			c.endOfString()
		case '{', '[':
			depth++
			c.i++
			continue
		case '}', ']':
			depth--
			c.i++
		case ',', ':':
			c.i++
			continue
		default: // a number or a literal
			for c.i < len(c.b) && bytes.IndexByte([]byte(" \t\r\n,]}"), c.b[c.i]) < 0 {
				c.i++
			}
		}
		if depth == 0 {
			return
		}
	}
}
