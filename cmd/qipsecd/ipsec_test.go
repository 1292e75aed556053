package main

import (
	"testing"
	"time"

	"github.com/q-ipsec/q-ipsec/conf"
)

// The broker must not send a key that the peer can no longer fetch.
func TestKeysLiveAsLongAsTheirNotice(t *testing.T) {
	n := &conf.Node{Name: "a", KMS: &conf.KMS{NoticeTTL: 20 * time.Second}, IPsec: &conf.IPsec{}}
	kmes, err := keySources(n, &kms{}, &stages{}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if got := kmes[conf.Local].KeyLife; got != n.KMS.NoticeTTL {
		t.Errorf("keys of our own KSA are held as if they lived %v, their notices live %v", got, n.KMS.NoticeTTL)
	}
}
