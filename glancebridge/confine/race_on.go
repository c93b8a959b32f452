//go:build race

package confine

const instrumented = true
