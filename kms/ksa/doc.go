// Package ksa is the key supply agent: Type-2 supply of session keys to SAEs.
//
// GetKey takes master keys of our lease from the KMA, derives session keys and
// tells the slave's node in the background, by supply notices, what was made
// of which key. GetKeyWithID there consumes a key only under its notice, which
// it pulls if it is missing. Nothing here is written to disk: what is lost in a
// crash is burned on both sides (docs/architecture.md, "The one idea of the
// inventory").
//
// Rules that hold always:
//   - a master key becomes a session key at most once per side;
//   - every check precedes the first change of state: a refused request
//     consumes nothing, a batch is all or nothing;
//   - no lock is held across a call to a peer.
package ksa
