// Package archtest holds the architecture against the code: who may import
// whom (the table of docs/architecture.md), which libraries stay behind which
// door, what is documented, and what must never be written. It has tests only.
package archtest
