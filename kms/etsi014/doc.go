// Package etsi014 speaks ETSI GS QKD 014 V1.1.1, the REST key delivery API
// between an SAE and its KME: a strict handler and server for our KSA, and a
// client for the KME of any maker.
//
// # What the handler accepts
//
//	GET       /api/v1/keys/{slave_SAE_ID}/status
//	GET, POST /api/v1/keys/{slave_SAE_ID}/enc_keys    number, size
//	GET, POST /api/v1/keys/{master_SAE_ID}/dec_keys   key_ID; size (extension)
//	POST      /api/v1/keys/{peer_SAE_ID}/usage        extension: usage report
//
// It answers 200, 400, 401 and 503 as the standard says, and 404 and 405 for
// what is no call of the API. Where the standard leaves room:
//
//   - JSON names match exactly, case included; unknown and repeated names, null
//     and numbers that are not plain non-negative integers are 400, as is a body
//     above 64 KiB or one with a Content-Type other than application/json.
//   - An empty body is the empty request of enc_keys, and 400 elsewhere.
//   - GET takes number and size (key_ID and size), each once, as plain decimals.
//     Any other query parameter is 400; so is any query beside a body.
//   - additional_slave_SAE_IDs must be empty (max_SAE_ID_count is 0), no
//     extension_mandatory is known, extension_optional is ignored.
//   - size in dec_keys (paper, table 11) is only compared with the key's size.
//   - 401 has no body. An SAE without the right to a pair gets it whether or
//     not the other SAE exists.
//   - A key that is not there is 400; 404 for SAEs with the quirk NotFound404.
//   - 503 has Retry-After.
//
// # Key bytes
//
// Keys are written and read without a Go string, and the buffers of this
// package are wiped; crypto/tls and net/http keep copies of what they carry,
// which cannot be.
package etsi014
