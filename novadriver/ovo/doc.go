// Package ovo handles Nova's versioned objects as they travel on the bus:
// lossless bags of JSON. An object received keeps its version and every field,
// known or not; a change touches one field and is noted, so that sending it
// back says just that. This is what lets one binary speak to every release:
// object versions grow by addition, and nobody has to downgrade anything.
//
// [Object] is one such bag, [Minimal] makes a new one, [Release] knows which
// versions each release of Nova has. The package starts no goroutine, keeps
// nothing on disk, and treats all input as hostile.
package ovo
