// Package twonodes tests two real nodes: it builds qipsecd and qipsec, runs two
// key management nodes on loopback addresses, feeds them with QKD-Key files and
// plays their SAEs over mutual TLS. It keeps a ledger of every answer, so that a
// Key-ID supplied twice, or with different bytes, cannot pass unseen.
//
// The flags -load, -kills, -site-..., -seed and -race-daemons give the counts; those of
// `make soak` are in scripts/soak.sh.
package twonodes
