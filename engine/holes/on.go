//go:build novalet_holes

package holes

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// variable is what an init or exec helper finds it in; the file is two directories above the keeper's socket.
const (
	variable = "NOVALET_HOLES"
	fileName = "holes"
)

var open = os.Getenv(variable)

// Open tells whether a defence is off.
func Open(name string) bool {
	for _, f := range strings.Fields(open) {
		if f == name {
			return true
		}
	}
	return false
}

// Read learns which, from beside the keeper's socket.
func Read(listener int) {
	sa, err := unix.Getsockname(listener)
	if err != nil {
		return
	}
	if u, ok := sa.(*unix.SockaddrUnix); ok {
		b, _ := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(u.Name)), fileName))
		open = string(b)
	}
}

// Env passes it on.
func Env() []string { return []string{variable + "=" + open} }
