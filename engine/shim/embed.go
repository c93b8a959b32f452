//go:build shim

package shim

import _ "embed"

// embedded is cmd/novalet-shim, built by the Makefile before the binary that carries it. A string is among the
// program's read-only pages.
//
//go:embed novalet-shim
var embedded string
