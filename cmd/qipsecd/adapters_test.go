package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/q-ipsec/q-ipsec/kms/key"
	"github.com/q-ipsec/q-ipsec/kms/kma"
	"github.com/q-ipsec/q-ipsec/kms/ksa"
	"github.com/q-ipsec/q-ipsec/kms/type1"
)

func TestNoticesCrossUnchanged(t *testing.T) {
	n := ksa.Notice{Pool: uuid.New(), Position: key.At(7, 9), KeyID: key.ID(uuid.New()), MasterSAE: "m", SlaveSAEs: []string{"s"}, SizeBits: 512, TTL: 90 * time.Second}
	if got := fromType1(toType1(n)); !reflect.DeepEqual(got, n) {
		t.Errorf("%+v, want %+v", got, n)
	}
	n.TTL = 10 * time.Millisecond
	if got := toType1(n).TTLSeconds; got != 1 {
		t.Errorf("a notice about to expire is sent with a TTL of %d s", got)
	}
}

// The KSA tells a key that is gone from other faults by its own error.
func TestClaimOfAKeyThatIsGone(t *testing.T) {
	a, err := kma.New(t.Context(), kma.Options{Store: storeForKMA{}, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	if m, _, err := (keysForKSA{a}).Claim("b", uuid.New(), key.At(1, 1), key.ID(uuid.New())); !errors.Is(err, ksa.ErrGone) || m != nil {
		t.Errorf("%v", err)
	}
}

func TestUnknownPeer(t *testing.T) {
	p := peersForKSA{}
	if err := p.SendNotices(t.Context(), "b", []ksa.Notice{{}}); !errors.Is(err, errNoPeer) {
		t.Errorf("%v", err)
	}
	if _, err := p.PullSettled(t.Context(), "b", 0, nil); !errors.Is(err, errNoPeer) {
		t.Errorf("%v", err)
	}
	if _, err := p.PullNotices(t.Context(), "b", []key.ID{{}}); !errors.Is(err, errNoPeer) {
		t.Errorf("%v", err)
	}
}

// refuses answers every call with a problem.
type refuses struct {
	status int
	code   type1.Code
}

func (r refuses) RoundTrip(*http.Request) (*http.Response, error) {
	body := fmt.Sprintf(`{"type":"urn:q-ipsec:problem:%s"}`, r.code)
	return &http.Response{StatusCode: r.status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}, nil
}

// The KSA learns which refusals will not pass by themselves.
func TestRefusedNotices(t *testing.T) {
	n := ksa.Notice{Pool: uuid.New(), Position: key.At(1, 0), KeyID: key.ID(uuid.New()), MasterSAE: "m", SlaveSAEs: []string{"s"}, SizeBits: 256, TTL: time.Minute}
	for answer, lasting := range map[refuses]bool{
		{403, type1.NotAuthorised}: true, {400, type1.Malformed}: true, {503, type1.Overloaded}: false, {500, type1.Internal}: false, {502, "?"}: false,
	} {
		c, err := type1.NewClient(type1.ClientOptions{URL: "https://b:1", Transport: answer})
		if err != nil {
			t.Fatal(err)
		}
		err = peersForKSA{"b": c}.SendNotices(t.Context(), "b", []ksa.Notice{n})
		if err == nil || errors.Is(err, ksa.ErrRefused) != lasting {
			t.Errorf("%+v: %v", answer, err)
		}
	}
}

func TestOne(t *testing.T) {
	m, err := key.New(32)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one([]key.SupplyKey{{Material: m}, {}}, nil); err == nil || m.Len() != 0 {
		t.Errorf("two keys passed for one, or were not wiped: %v", err)
	}
	if _, err := one(nil, errNoPeer); err == nil {
		t.Error("an error was lost")
	}
}
