// Package operator is the operator API of a node: JSON over HTTP on a unix
// socket that only root and the daemon's own user can use. The qipsec command is
// its client. It shows what the node knows, Key-IDs and fingerprints included,
// and never a key byte; it changes nothing but the state of tunnels.
package operator
