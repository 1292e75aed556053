package etsi014

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/q-ipsec/q-ipsec/kms/key"
)

// The client reads liberally (names in any case, unknown fields, any order,
// keys with or without padding) and checks strictly what it got.

// is compares a name without regard to case.
func is(name []byte, want string) bool { return bytes.EqualFold(name, []byte(want)) }

// parseContainer reads a "Key container". Every key must have sizeBits bits (if
// that is not 0: whole bytes, at least one) and a Key-ID of its own. It unescapes
// b in place and keeps nothing of it; on error there is nothing to wipe.
func parseContainer(b []byte, sizeBits int) (keys []key.SupplyKey, err error) {
	defer func() {
		if err != nil {
			key.WipeAll(keys)
			keys = nil
		}
	}()
	c, err := newCursor(b)
	if err != nil {
		return nil, fmt.Errorf("etsi014: key container: %w", err)
	}
	seen := make(map[key.ID]bool)
	lists := 0
	err = c.object(func(name []byte) error {
		if !is(name, "keys") {
			c.skip()
			return nil
		}
		if lists++; lists > 1 {
			return errors.New("there are two lists of keys")
		}
		return c.array(func() error {
			k, err := parseKey(c)
			if err != nil {
				return err
			}
			keys = append(keys, k)
			if seen[k.ID] {
				return fmt.Errorf("key %s is there twice", k.ID)
			}
			seen[k.ID] = true
			if n := k.Material.Len() * 8; sizeBits != 0 && n != sizeBits {
				return fmt.Errorf("key %s has %d bits, not %d", k.ID, n, sizeBits)
			}
			if len(keys) > maxNumber {
				return fmt.Errorf("more than %d keys", maxNumber)
			}
			return nil
		})
	})
	if err != nil {
		return keys, fmt.Errorf("etsi014: key container: %w", err)
	}
	return keys, nil
}

func parseKey(c *cursor) (k key.SupplyKey, err error) {
	defer func() {
		if err != nil {
			k.Material.Wipe()
		}
	}()
	err = c.object(func(name []byte) error {
		switch {
		case is(name, "key_ID"):
			s, err := c.str()
			if err != nil {
				return fmt.Errorf("key_ID: %w", err)
			}
			if !k.ID.IsZero() {
				return errors.New("an entry has two key_IDs")
			}
			if k.ID, err = key.ParseID(string(s)); err != nil {
				return err
			}
		case is(name, "key"):
			s, err := c.str()
			if err != nil {
				return fmt.Errorf("key: %w", err)
			}
			if k.Material != nil {
				return errors.New("an entry has two keys")
			}
			if k.Material, err = decodeKey(s); err != nil {
				return err
			}
		default:
			c.skip()
		}
		return nil
	})
	if err == nil && (k.ID.IsZero() || k.Material == nil) {
		err = errors.New("an entry lacks key_ID or key")
	}
	return k, err
}

// decodeKey moves a Base64 text into a Material. Bits that pad the last
// character must be zero.
func decodeKey(s []byte) (*key.Material, error) {
	s = bytes.TrimRight(s, "=")
	enc := base64.RawStdEncoding.Strict()
	buf := make([]byte, enc.DecodedLen(len(s)))
	defer clear(buf)
	n, err := enc.Decode(buf, s)
	if err != nil || n == 0 {
		return nil, errors.New("a key is empty or not Base64") // the decoder's error could say where and hence what
	}
	return key.Take(buf[:n])
}

// order sorts keys like ids, with which they must agree exactly. There are no
// two equal keys.
func order(keys []key.SupplyKey, ids []key.ID) error {
	if len(keys) != len(ids) {
		return fmt.Errorf("etsi014: asked for %d keys, got %d", len(ids), len(keys))
	}
next:
	for i, id := range ids {
		for j := i; j < len(keys); j++ {
			if keys[j].ID == id {
				keys[i], keys[j] = keys[j], keys[i]
				continue next
			}
		}
		return fmt.Errorf("etsi014: asked for key %s, which is not in the answer", id)
	}
	return nil
}

// parseStatus reads a "Status".
func parseStatus(b []byte) (key.SupplyStatus, error) {
	var s key.SupplyStatus
	c, err := newCursor(b)
	if err != nil {
		return s, fmt.Errorf("etsi014: status: %w", err)
	}
	texts := map[string]*string{
		"source_KME_ID": &s.SourceKME, "target_KME_ID": &s.TargetKME,
		"master_SAE_ID": &s.MasterSAE, "slave_SAE_ID": &s.SlaveSAE,
	}
	numbers := map[string]*int{
		"key_size": &s.KeySize, "stored_key_count": &s.StoredKeyCount, "max_key_count": &s.MaxKeyCount,
		"max_key_per_request": &s.MaxKeyPerRequest, "max_key_size": &s.MaxKeySize, "min_key_size": &s.MinKeySize,
		"max_SAE_ID_count": &s.MaxSAEIDCount,
	}
	err = c.object(func(name []byte) error {
		for n, p := range texts {
			if is(name, n) {
				t, err := c.str()
				*p = string(t)
				return err
			}
		}
		for n, p := range numbers {
			if is(name, n) {
				v, err := c.integer()
				*p = v
				return err
			}
		}
		c.skip()
		return nil
	})
	if err != nil {
		return s, fmt.Errorf("etsi014: status: %w", err)
	}
	return s, nil
}

// errorMessage is the message of an "Error", or what else the body says, fit
// to be logged.
func errorMessage(b []byte) string {
	message := "(no message)"
	c, err := newCursor(b)
	if err != nil {
		return message
	}
	_ = c.object(func(name []byte) error { // what is no Error has no message
		if !is(name, "message") {
			c.skip()
			return nil
		}
		s, err := c.str()
		if err == nil {
			message = fmt.Sprintf("%.200q", s)
			message = message[1 : len(message)-1]
		}
		return err
	})
	return message
}
