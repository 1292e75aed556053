// Package key holds what every other package says about a quantum key: its
// Key-ID, its class and state, its position in a pool, and Material, the only
// type of the project that carries key bytes. It imports nothing of ours.
package key
