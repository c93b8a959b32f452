//go:build !race

package confine

// instrumented: the race detector maps shadow memory that no limit on memory leaves room for.
const instrumented = false
