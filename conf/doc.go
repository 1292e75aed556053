// Package conf reads the TOML files of the daemons: strictly (an unknown key is
// a fault), whole (every fault is reported, with the path of its field) and once
// (what comes out holds addresses, durations and UUIDs, no text to parse later).
//
// A relative path is taken relative to the file it stands in, so that a
// directory with a config and its certificates can be copied anywhere.
package conf
