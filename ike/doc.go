// Package ike keys IPsec tunnels with quantum keys through charon.
//
// The Broker answers what charon's qipsec plugin asks: which Key-ID goes into
// Ni (paper, section 4: the Key-ID travels in the IKEv2 nonce), whether a
// CHILD_SA may be made with the key that a Key-ID names, and it has the SAs
// put in the kernel's SAD. The Manager holds the connections as desired state:
// it loads them into charon over VICI once the plugin is known to be there,
// initiates them, watches them and takes them out again.
//
// No key byte is ever logged or put in an error; keys are compared by
// fingerprint.
package ike
