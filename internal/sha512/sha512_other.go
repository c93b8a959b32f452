//go:build !amd64

package sha512

import (
	"crypto/sha512"
	"hash"
)

func newHash() hash.Hash { return sha512.New() }
