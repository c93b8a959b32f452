// Package thread runs work that changes its thread for good: one in another namespace, with another root or priority.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs fn on a thread that is thrown away afterwards, because one that could not be brought back would carry what fn
// made of it into other work, and waits for it. fn must not start goroutines. It is never the process's main thread: the
// runtime cannot end that, and lets it sleep for ever as it is; in an instance's network namespace, that would not end with its
// instance then, and keep what the host moved into it.
func Run(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err := Run(fn) // which gets another, while this one is held here
			runtime.UnlockOSThread()
			done <- err
			return
		}
		// Never unlocked: the runtime ends the thread with the goroutine.
		done <- fn()
	}()
	return <-done
}
