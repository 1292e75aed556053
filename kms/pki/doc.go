// Package pki makes and uses the certificates of Q-IPsec: of nodes, of KMEs, of
// SAEs and of IKE gateways.
//
// There is one certificate authority per channel (paper 4.1), so that whoever
// holds one can speak on no other: the km CA signs nodes for Type-1, the sae CA
// signs SAEs and the servers they call (Type-2), the ike CA signs what charon
// shows in IKE_AUTH. Within a channel the SAN URI says what the holder is and
// what its name is: urn:q-ipsec:node:NAME or urn:q-ipsec:sae:ID. Nothing else of
// a certificate, and nothing of a request, names a peer.
package pki
