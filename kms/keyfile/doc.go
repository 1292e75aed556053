// Package keyfile reads and writes the QKD-Key file: how a QKD device hands its
// key stream to the KMA (paper, figure 7 with the supplements of table 11).
//
// A QKD-Key file is one flat JSON object in UTF-8, in a file named by Name:
//
//	version         1
//	qkd_pair_id     UUID of the pair, alike at both ends
//	qkd_id          UUID of the device that wrote this file
//	peer_qkd_id     UUID of the device at the other end
//	role            "master" or "slave": of the device that wrote this file
//	seq             1 to key.MaxSeq, per pair, strictly increasing
//	created         time, RFC 3339
//	qber            quantum bit error rate, 0 to 1
//	key_length      bytes in key_data: a multiple of 32 above 96
//	hash_algorithm  "sha-256" or "sha3-256"
//	hash            of the decoded key_data, hexadecimal
//	key_data        Base64 (RFC 4648 section 4, padded, no line breaks)
//
// Both ends' files of one seq carry the same key_data. Every field is there
// exactly once and no other. The codec is strict: what it does not know it
// refuses, with a Reason that events and tests can name.
//
// Text and key data stay in key.Material, off the Go heap; there is no string
// copy of either.
package keyfile
