// Package sha512 is SHA-512 as crypto/sha512 has it, faster on processors with AVX-512: there the hash of an image is what
// its download costs most. It starts no goroutine. docs/decisions/0005-sha512.md says why it exists.
package sha512

import "hash"

//go:generate sh -c "go run ./gen >blocks_amd64.s"

// Size and BlockSize are those of SHA-512, in bytes.
const (
	Size      = 64
	BlockSize = 128
)

// New returns a hash.Hash that computes SHA-512. It cannot be marshaled.
func New() hash.Hash { return newHash() }
