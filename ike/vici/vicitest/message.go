package vicitest

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Message is a VICI message: sections, lists and values in order.
type Message []Element

// Element is one named part of a Message: exactly one of the three others is
// used; a nil List and Section make it a value.
type Element struct {
	Key     string
	Value   string
	List    []string
	Section Message
}

// Element types of the wire format.
const (
	sectionStart = 1
	sectionEnd   = 2
	keyValue     = 3
	listStart    = 4
	listItem     = 5
	listEnd      = 6
)

// V makes a value.
func V(key, value string) Element { return Element{Key: key, Value: value} }

// L makes a list.
func L(key string, items ...string) Element {
	return Element{Key: key, List: append([]string{}, items...)}
}

// S makes a section.
func S(key string, elements ...Element) Element {
	return Element{Key: key, Section: append(Message{}, elements...)}
}

// Get follows path through the sections; nil if it leads nowhere.
func (m Message) Get(path ...string) *Element {
	for i := range m {
		if m[i].Key != path[0] {
			continue
		}
		if len(path) == 1 {
			return &m[i]
		}
		return m[i].Section.Get(path[1:]...)
	}
	return nil
}

// Text is the value at path, "" without one.
func (m Message) Text(path ...string) string {
	if e := m.Get(path...); e != nil {
		return e.Value
	}
	return ""
}

// Items is the list at path.
func (m Message) Items(path ...string) []string {
	if e := m.Get(path...); e != nil {
		return e.List
	}
	return nil
}

func name(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }

func value(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

// encode appends m in the wire format.
func (m Message) encode(b []byte) []byte {
	for _, e := range m {
		switch {
		case e.Section != nil:
			b = name(append(b, sectionStart), e.Key)
			b = append(e.Section.encode(b), sectionEnd)
		case e.List != nil:
			b = name(append(b, listStart), e.Key)
			for _, item := range e.List {
				b = value(append(b, listItem), item)
			}
			b = append(b, listEnd)
		default:
			b = value(name(append(b, keyValue), e.Key), e.Value)
		}
	}
	return b
}

// maxDepth bounds the sections within sections of what Decode takes.
const maxDepth = 16

var errShort = errors.New("vicitest: message ends too early")

// Decode reads a whole message.
func Decode(b []byte) (Message, error) {
	m, rest, err := elements(b, 0)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("vicitest: section end without a section")
	}
	return m, err
}

// elements reads up to the end of a section or of b.
func elements(b []byte, depth int) (m Message, rest []byte, err error) {
	if depth > maxDepth {
		return nil, nil, errors.New("vicitest: too many sections within sections")
	}
	m = Message{}
	for len(b) > 0 {
		kind := b[0]
		if kind == sectionEnd {
			return m, b, nil
		}
		var e Element
		if e.Key, b, err = counted(b[1:], 1); err != nil {
			return nil, nil, err
		}
		switch kind {
		case keyValue:
			e.Value, b, err = counted(b, 2)
		case listStart:
			e.List, b, err = items(b)
		case sectionStart:
			if e.Section, b, err = elements(b, depth+1); err == nil {
				if len(b) == 0 {
					return nil, nil, errShort
				}
				b = b[1:]
			}
		default:
			err = fmt.Errorf("vicitest: element type %d", kind)
		}
		if err != nil {
			return nil, nil, err
		}
		m = append(m, e)
	}
	return m, nil, nil
}

func items(b []byte) (list []string, rest []byte, err error) {
	list = []string{}
	for len(b) > 0 {
		switch b[0] {
		case listEnd:
			return list, b[1:], nil
		case listItem:
			var s string
			if s, b, err = counted(b[1:], 2); err != nil {
				return nil, nil, err
			}
			list = append(list, s)
		default:
			return nil, nil, fmt.Errorf("vicitest: element type %d in a list", b[0])
		}
	}
	return nil, nil, errShort
}

// counted reads a string behind its length in n bytes.
func counted(b []byte, n int) (string, []byte, error) {
	if len(b) < n {
		return "", nil, errShort
	}
	size := int(b[0])
	if n == 2 {
		size = int(binary.BigEndian.Uint16(b))
	}
	if len(b) < n+size {
		return "", nil, errShort
	}
	return string(b[n : n+size]), b[n+size:], nil
}
