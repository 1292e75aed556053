package identity

import (
	"reflect"
	"strings"
	"testing"
)

func TestIdentities(t *testing.T) {
	for in, want := range map[string]Identity{
		"b.example":     {Type: 2, Data: []byte("b.example")},
		"@b.example":    {Type: 2, Data: []byte("b.example")},
		"u@b.example":   {Type: 3, Data: []byte("u@b.example")},
		"@@u@b.example": {Type: 3, Data: []byte("u@b.example")},
		"192.0.2.1":     {Type: 1, Data: []byte{192, 0, 2, 1}},
		"2001:db8::1":   {Type: 5, Data: append([]byte{0x20, 1, 0x0d, 0xb8}, append(make([]byte, 11), 1)...)},
		"@#0aff":        {Type: 11, Data: []byte{0x0a, 0xff}},
	} {
		got, err := Parse(in)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "*.example", "%any", "C=DE, CN=b", "@#", "@#xy", "a b", "fe80::1%eth0", "a:b", strings.Repeat("a", 256)} {
		if got, err := Parse(in); err == nil {
			t.Errorf("%q was read as %+v", in, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"b.example", "@#00", "@@a@b", "1.2.3.4", "::1", "a=b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := Parse(s)
		if err == nil && len(id.Data) == 0 {
			t.Errorf("%q has no data", s)
		}
	})
}
