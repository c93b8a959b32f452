package monitor

import (
	"fmt"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// reaper waits for the keeper's children and tells whoever asked for a pid.
type reaper struct {
	mu sync.Mutex
	// waiters maps a pid to the channel that gets its status.
	waiters map[int]chan unix.WaitStatus
	// spawning counts spawns under way. Meanwhile a status that nobody waits for is kept: its pid may be known to
	// the spawn only later.
	spawning int
	strays   map[int]unix.WaitStatus
	sig      chan os.Signal
	done     chan struct{}
}

func newReaper() *reaper {
	r := &reaper{waiters: map[int]chan unix.WaitStatus{}, strays: map[int]unix.WaitStatus{}, sig: make(chan os.Signal, 1), done: make(chan struct{})}
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
			} else if r.spawning > 0 {
				r.strays[pid] = ws
			}
		}
		r.mu.Unlock()
	}
}

// claim returns the channel that gets a child's status.
func (r *reaper) claim(pid int) <-chan unix.WaitStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := make(chan unix.WaitStatus, 1)
	if ws, ok := r.strays[pid]; ok {
		delete(r.strays, pid)
		c <- ws
		return c
	}
	r.waiters[pid] = c
	return c
}

// spawn starts a child and returns its pid, a pidfd, and the channel that gets its wait status.
func (r *reaper) spawn(s *spawnSpec) (int, *os.File, <-chan unix.WaitStatus, error) {
	r.mu.Lock()
	r.spawning++
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.spawning--; r.spawning == 0 {
			clear(r.strays)
		}
	}()
	pid, done, err := spawn(s, r.claim)
	if err != nil {
		return 0, nil, nil, err
	}
	// The child cannot be gone from the table of processes unless it has been reaped; then there is no pidfd, and
	// its status is in the channel.
	pfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		unix.Kill(pid, unix.SIGKILL)
		<-done
		return 0, nil, nil, fmt.Errorf("spawn: the child died at once: %w", err)
	}
	return pid, os.NewFile(uintptr(pfd), "pidfd"), done, nil
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
