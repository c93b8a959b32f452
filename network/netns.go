package network

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/thread"
)

// inNetNS runs fn on a thread of its own inside the namespace. fn must not start goroutines.
func inNetNS(ns *os.File, fn func() error) error {
	return thread.Run(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}
