//go:build !shim

package shim

// embedded is empty: the engine is told where the program is.
var embedded string
