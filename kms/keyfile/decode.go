package keyfile

import (
	"bytes"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// Decode reads a whole QKD-Key file or refuses it with an *Error; any other
// error is the machine's (no locked memory). It takes text over and wipes it in
// every case. The caller wipes the File.
//
// With an *Error the Header still holds the fields that could be read before
// the fault, for the record of the refused file; nothing in it was agreed.
func Decode(text []byte, maxSize int) (*File, Header, error) {
	defer clear(text)
	var d decoder
	f, err := d.decode(text, maxSize)
	return f, d.h, err
}

// decoder holds what was read so far. keyData and hash point into the text.
type decoder struct {
	h       Header
	keyData []byte
	hash    []byte
	seen    uint16 // bit i: fields[i]
}

// fields are the names of version 1, each with its parser.
var fields = [...]struct {
	name string
	set  func(d *decoder, v []byte) error
}{
	{"version", (*decoder).version},
	{"qkd_pair_id", func(d *decoder, v []byte) error { return setUUID(&d.h.Pair, v) }},
	{"qkd_id", func(d *decoder, v []byte) error { return setUUID(&d.h.QKD, v) }},
	{"peer_qkd_id", func(d *decoder, v []byte) error { return setUUID(&d.h.PeerQKD, v) }},
	{"role", (*decoder).role},
	{"seq", (*decoder).seq},
	{"created", (*decoder).created},
	{"qber", (*decoder).qber},
	{"key_length", (*decoder).length},
	{"hash_algorithm", (*decoder).hashAlgorithm},
	{"hash", func(d *decoder, v []byte) error { return setRaw(&d.hash, v) }},
	{"key_data", func(d *decoder, v []byte) error { return setRaw(&d.keyData, v) }},
}

func (d *decoder) decode(text []byte, maxSize int) (*File, error) {
	if len(text) > maxSize {
		return nil, bad(TooLarge, "", "%d bytes, at most %d", len(text), maxSize)
	}
	// json.Valid makes no copy; after it the scan below need not check syntax.
	if !utf8.Valid(text) || !json.Valid(text) {
		return nil, bad(Syntax, "", "truncated or not JSON in UTF-8")
	}
	if err := d.scan(text); err != nil {
		return nil, err
	}
	for i, f := range fields {
		if d.seen&(1<<i) == 0 {
			return nil, bad(MissingField, f.name, "")
		}
	}
	if err := d.h.check(); err != nil {
		return nil, err
	}
	m, err := d.material()
	if err != nil {
		return nil, err
	}
	return &File{Header: d.h, Data: m}, nil
}

// scan walks the members of the one object that text, valid JSON, holds.
func (d *decoder) scan(text []byte) error {
	const space = " \t\r\n"
	rest := bytes.TrimLeft(text, space)
	if rest[0] != '{' {
		return bad(Syntax, "", "the file is not an object")
	}
	rest = bytes.TrimLeft(rest[1:], space)
	for rest[0] != '}' {
		name := rest[:stringEnd(rest)]
		rest = bytes.TrimLeft(rest[len(name):], space)
		rest = bytes.TrimLeft(rest[1:], space) // the colon
		end := valueEnd(rest)
		if err := d.member(name[1:len(name)-1], rest[:end]); err != nil {
			return err
		}
		rest = bytes.TrimLeft(rest[end:], space)
		if rest[0] == ',' {
			rest = bytes.TrimLeft(rest[1:], space)
		}
	}
	return nil
}

// stringEnd is the length of the JSON string at the start of b.
func stringEnd(b []byte) int {
	for i := 1; ; i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
}

// valueEnd is the length of the value at the start of b. Objects and arrays end
// up as their first character, which no field's parser takes.
func valueEnd(b []byte) int {
	switch b[0] {
	case '"':
		return stringEnd(b)
	case '{', '[':
		return 1
	}
	return bytes.IndexAny(b, " \t\r\n,}")
}

func (d *decoder) member(name, value []byte) error {
	for i, f := range fields {
		if string(name) != f.name {
			continue
		}
		if d.seen&(1<<i) != 0 {
			return bad(DuplicateField, f.name, "")
		}
		d.seen |= 1 << i
		return inField(f.name, f.set(d, value))
	}
	return bad(UnknownField, printable(name), "")
}

// inField names the field in an error that does not.
func inField(name string, err error) error {
	if e, ok := err.(*Error); ok && e.Field == "" {
		e.Field = name
	}
	return err
}

// printable keeps anything but a plausible name of a field out of logs.
func printable(name []byte) string {
	if len(name) > 32 {
		return "(long name)"
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && c != '_' {
			return "(odd name)"
		}
	}
	return string(name)
}

// raw gives the inside of a JSON string. The only escape that the fields' texts
// can need is "\/", which some writers use for every slash: it is undone in
// place, so that no copy of key data comes to be.
func raw(v []byte) ([]byte, error) {
	if v[0] != '"' {
		return nil, bad(BadField, "", "not a string")
	}
	in := v[1 : len(v)-1]
	at := bytes.IndexByte(in, '\\')
	if at < 0 {
		return in, nil
	}
	out := in[:at]
	for i := at; i < len(in); i++ {
		if in[i] == '\\' {
			if i++; in[i] != '/' {
				return nil, bad(BadField, "", `holds an escape other than \/`)
			}
		}
		out = append(out, in[i])
	}
	return out, nil
}

func setRaw(dst *[]byte, v []byte) (err error) {
	*dst, err = raw(v)
	return err
}

func setUUID(dst *uuid.UUID, v []byte) error {
	s, err := raw(v)
	if err != nil {
		return err
	}
	id, err := key.ParseID(string(s[:min(len(s), 64)]))
	if err != nil {
		return bad(BadField, "", "not a UUID of 36 characters")
	}
	*dst = uuid.UUID(id)
	return nil
}

func (d *decoder) version(v []byte) error {
	if string(v) != strconv.Itoa(Version) {
		return bad(UnknownVersion, "version", "only version %d is known", Version)
	}
	return nil
}

func (d *decoder) role(v []byte) error {
	s, err := raw(v)
	if err != nil {
		return err
	}
	switch string(s) {
	case "master":
		d.h.Role = key.Master
	case "slave":
		d.h.Role = key.Slave
	default:
		return bad(BadField, "", "neither master nor slave")
	}
	return nil
}

func (d *decoder) seq(v []byte) error {
	n, err := strconv.ParseUint(string(v[:min(len(v), 32)]), 10, 64)
	if err != nil || n < 1 || n > key.MaxSeq {
		return bad(BadField, "", "not a whole number between 1 and %d", key.MaxSeq)
	}
	d.h.Seq = n
	return nil
}

func (d *decoder) length(v []byte) error {
	n, err := strconv.ParseUint(string(v[:min(len(v), 32)]), 10, 31)
	if err != nil {
		return bad(BadLength, "", "not a whole number of bytes")
	}
	d.h.KeyLength = int(n)
	return checkLength(int(n))
}

func (d *decoder) created(v []byte) error {
	s, err := raw(v)
	if err != nil {
		return err
	}
	t, err := time.Parse(time.RFC3339, string(s[:min(len(s), 64)]))
	if err != nil {
		return bad(BadField, "", "not a time of RFC 3339")
	}
	d.h.Created = t
	return nil
}

func (d *decoder) qber(v []byte) error {
	f, err := strconv.ParseFloat(string(v[:min(len(v), 64)]), 64)
	if err != nil || !(f >= 0 && f <= 1) || v[0] == '"' {
		return bad(BadField, "", "not a number between 0 and 1")
	}
	d.h.QBER = f
	return nil
}

func (d *decoder) hashAlgorithm(v []byte) error {
	s, err := raw(v)
	if err != nil {
		return err
	}
	name := string(s[:min(len(s), 64)])
	if err := checkHash(name); err != nil {
		return err
	}
	d.h.HashAlgorithm = name
	return nil
}

// material decodes key_data, whose length and hash must be those that the file
// states.
func (d *decoder) material() (*key.Material, error) {
	if len(d.hash) != 2*32 {
		return nil, bad(BadField, "hash", "not %d hexadecimal digits", 2*32)
	}
	var want [32]byte
	defer clear(want[:])
	if _, err := hex.Decode(want[:], d.hash); err != nil {
		return nil, bad(BadField, "hash", "not %d hexadecimal digits", 2*32)
	}
	if n := base64.StdEncoding.EncodedLen(d.h.KeyLength); n != len(d.keyData) {
		return nil, bad(BadLength, "key_data", "%d characters, key_length needs %d", len(d.keyData), n)
	}
	m, err := key.New(d.h.KeyLength + 2) // the decoder writes whole groups of three
	if err != nil {
		return nil, err
	}
	defer m.Wipe()
	n, err := base64.StdEncoding.Strict().Decode(m.Bytes(), d.keyData)
	if err != nil { // its text gives an offset only, but says nothing more
		return nil, bad(BadBase64, "key_data", "not the Base64 of RFC 4648 section 4 with zero padding bits")
	}
	if n != d.h.KeyLength {
		return nil, bad(BadLength, "key_data", "%d bytes, key_length says %d", n, d.h.KeyLength)
	}
	got, err := sum(d.h.HashAlgorithm, m.Bytes()[:n])
	defer clear(got[:])
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
		return nil, bad(HashMismatch, "hash", "key_data was damaged or exchanged on the way")
	}
	return exact(m, n)
}

// exact gives a Material of n bytes with the first n of m.
func exact(m *key.Material, n int) (*key.Material, error) {
	out, err := key.New(n)
	if err != nil {
		return nil, err
	}
	copy(out.Bytes(), m.Bytes()[:n])
	return out, nil
}
