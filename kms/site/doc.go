// Package site is the channel between the machines of one node, its members, of
// which one has the inventory and leads (docs/decisions/0011). A member that stands
// by has its SAEs' calls answered by the leader.
//
// Transport: POST over TLS 1.3 with certificates both ways, at the Type-1 address.
// Only a member may call: its certificate names the node itself. Which SAE asks, a
// member says; it knows from that SAE's own certificate.
//
// Requests and refusals are JSON without key bytes. Keys come in a form of their own
// that is read and written without copies that could not be wiped (container.go).
// As everywhere, crypto/tls and net/http keep copies of what they carry.
//
// A call is made once. It goes to another member only if the one before certainly
// did nothing: it did not accept the connection, or said that it stands by.
package site
