package monitor

import (
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// reaper waits for the keeper's children and tells whoever asked for a pid. Its lock is held over each spawn, so
// that a child that dies at once is not reaped before it is known.
type reaper struct {
	mu sync.Mutex
	// waiters maps a pid to the channel that gets its status.
	waiters map[int]chan unix.WaitStatus
	sig     chan os.Signal
	done    chan struct{}
}

func newReaper() *reaper {
	r := &reaper{waiters: map[int]chan unix.WaitStatus{}, sig: make(chan os.Signal, 1), done: make(chan struct{})}
	signal.Notify(r.sig, unix.SIGCHLD)
	go r.run()
	return r
}

func (r *reaper) run() {
	defer close(r.done)
	for range r.sig {
		r.mu.Lock()
		for {
			var ws unix.WaitStatus
			pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
			if c, ok := r.waiters[pid]; ok {
				delete(r.waiters, pid)
				c <- ws
			}
		}
		r.mu.Unlock()
	}
}

// spawn starts a child and returns its pid, a pidfd, and the channel that gets its wait status.
func (r *reaper) spawn(s *spawnSpec) (int, *os.File, <-chan unix.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := spawn(s)
	if err != nil {
		return 0, nil, nil, err
	}
	c := make(chan unix.WaitStatus, 1)
	pfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		unix.Kill(pid, unix.SIGKILL)
		wait(pid)
		return 0, nil, nil, err
	}
	r.waiters[pid] = c
	return pid, os.NewFile(uintptr(pfd), "pidfd"), c, nil
}

func (r *reaper) stop() {
	signal.Stop(r.sig)
	close(r.sig)
	<-r.done
}

// exitCode turns a wait status into a shell's exit code.
func exitCode(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
