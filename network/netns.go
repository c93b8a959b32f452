package network

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// inNetNS runs fn on a thread of its own inside the namespace. fn must not start goroutines.
func inNetNS(ns *os.File, fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// onThread runs fn on a thread that is thrown away afterwards, because one that could not be brought back would carry the
// guest's network into other work. It is never the process's main thread: the runtime cannot end that, and lets it sleep for
// ever in the namespace, which then does not end with its instance and keeps what the host moved into it.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err := onThread(fn) // which gets another, while this one is held here
			runtime.UnlockOSThread()
			done <- err
			return
		}
		// Never unlocked: the runtime ends the thread with the goroutine.
		done <- fn()
	}()
	return <-done
}
