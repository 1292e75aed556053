// Package type1 is the Type-1 interface between the KMAs and KSAs of two nodes
// (paper, table 1): wire types, client and handler.
//
// Transport: POST of JSON over TLS 1.3 with certificates both ways; a peer is
// the node that its certificate names. Errors are RFC 9457 problems. No message
// carries key bytes: the most secret thing here is a one-time MAC tag.
//
// Authorised by object: a message names the pools that it is about, and the
// sender must be the other end of each, else 403 and an event.
//
// Any message may be lost, repeated or delayed. Instances make that harmless
// across restarts: every start of a node takes a fresh random instance, and
// every message but sync says which instance speaks to which. What was meant
// for an instance that is gone is refused with NotSynced.
package type1
