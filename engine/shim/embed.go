//go:build shim

package shim

import _ "embed"

// embedded is cmd/novalet-shim, built by the Makefile before the binary that carries it.
//
//go:embed novalet-shim
var embedded []byte
