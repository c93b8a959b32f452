package monitor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// isEOF says that the peer is gone: a closed socket, or one closed with unread bytes.
func isEOF(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// ended runs when an init has been reaped. A guest that rebooted gets its init again; everything else is the end.
//
// The kernel tells the two apart by the signal that init is said to have died of (reboot_pid_ns): SIGHUP for a
// restart, SIGINT for halt and power off. An init cannot die of these otherwise: pid namespaces ignore
// signals that init has no handler for.
func (in *instance) ended(pid int, ws unix.WaitStatus) {
	in.mu.Lock()
	again := ws.Signaled() && ws.Signal() == unix.SIGHUP && in.state == wire.StateRunning && !in.stopping && in.pid == pid
	in.pidfd.Close()
	if in.handing == in.ctl {
		// What init said before it went is still to be read; then the socket says that it is gone.
		in.orphan = in.ctl
	} else {
		in.ctl.Close()
	}
	if in.devpts != nil {
		in.devpts.Close()
		in.devpts = nil
	}
	in.mu.Unlock()
	if con := in.screen(); con != nil {
		con.detach()
	}
	if again {
		in.reboot(ws)
		return
	}
	in.finish(ws)
}

// reboot starts init again in the same user and network namespace.
func (in *instance) reboot(ws unix.WaitStatus) {
	in.op.Lock()
	in.mu.Lock()
	stopping, m := in.stopping, in.started
	in.mu.Unlock()
	if stopping {
		in.op.Unlock()
		in.finish(ws)
		return
	}
	if err := in.spawnInit(true); err != nil {
		fmt.Fprintf(os.Stderr, "keeper: restart %s: %v\n", in.name(), err)
		_ = in.signal(unix.SIGKILL) // one that could not be made whole
		in.op.Unlock()
		in.finish(ws)
		return
	}
	err := in.handOver(m)
	if err != nil {
		// The new init's end is reported by its own ended.
		fmt.Fprintf(os.Stderr, "keeper: restart %s: %v\n", in.name(), err)
		in.signal(unix.SIGKILL)
		in.op.Unlock()
		return
	}
	in.mu.Lock()
	in.reboots++
	in.mu.Unlock()
	in.op.Unlock()
	in.k.tell(wire.Event{ID: in.name(), Type: wire.EventRebooted, At: time.Now()})
}

// finish records the end and lets everything go.
func (in *instance) finish(ws unix.WaitStatus) {
	in.oomNow()
	in.mu.Lock()
	if in.state == wire.StateExited {
		in.mu.Unlock()
		return
	}
	wasRunning := in.state == wire.StateRunning
	in.state, in.exitAt, in.code = wire.StateExited, time.Now(), exitCode(ws)
	if ws.Signaled() && wasRunning && (ws.Signal() == unix.SIGINT || ws.Signal() == unix.SIGHUP && in.stopping) {
		in.code = 0 // the guest powered itself off, or shut down to start anew when it was to stop
	}
	code, at, stopping := in.code, in.exitAt, in.stopping
	closeFd(&in.userns)
	closeFd(&in.netns)
	mounted, view := in.mounted, in.view
	in.mounted, in.view = nil, nil
	if view != nil {
		mounted = append(mounted, in.viewPath())
	}
	in.mu.Unlock()
	in.record()
	if con := in.screen(); con != nil {
		con.close()
	}
	in.cleaned.Add(1)
	go func() {
		defer in.cleaned.Done()
		for _, p := range mounted {
			err := unix.Unmount(p, 0)
			if err == unix.EBUSY {
				// A clone for an init that failed is being closed.
				err = unix.Unmount(p, unix.MNT_DETACH)
			}
			if err != nil {
				fmt.Fprintf(os.Stderr, "keeper: unmount %s: %v\n", p, err)
			}
			unix.Rmdir(p)
		}
		if view != nil {
			view.Close()
		}
	}()
	close(in.exited)
	if wasRunning && !stopping {
		in.k.tell(wire.Event{ID: in.name(), Type: wire.EventExited, ExitCode: code, At: at})
	}
}

// fail undoes a creation.
func (in *instance) fail() {
	in.mu.Lock()
	pidfd := in.pidfd
	in.mu.Unlock()
	if pidfd != nil {
		in.kill()
	} else {
		if in.console != nil {
			in.console.close()
		}
		closeFd(&in.userns)
		closeFd(&in.netns)
	}
	in.closeDirs()
}

// released waits for what finish left to the background and closes what an exited instance still holds.
func (in *instance) released() {
	in.cleaned.Wait()
	in.closeDirs()
}

func (in *instance) closeDirs() {
	if in.oom != nil {
		in.oom.stop()
	}
	if in.dir != nil {
		in.dir.Close()
	}
	for _, c := range in.cgroups {
		c.dir.Close()
	}
}

// screen is the console, nil while the instance has no identity.
func (in *instance) screen() *console {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.console
}

// signal sends a signal to init.
func (in *instance) signal(sig unix.Signal) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.state == wire.StateExited {
		return nil
	}
	rc, err := in.pidfd.SyscallConn()
	if err != nil {
		return nil // reaped just now
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return nil
	}
	if serr == unix.ESRCH {
		return nil
	}
	return serr
}

// kill ends the instance and waits until nothing of it runs: init is the last of its pid namespace to be reaped.
func (in *instance) kill() {
	in.mu.Lock()
	in.stopping = true
	in.mu.Unlock()
	in.killCgroup()
	for {
		in.signal(unix.SIGKILL)
		select {
		case <-in.exited:
			return
		case <-time.After(200 * time.Millisecond):
			// A reboot may have put a new init in the place of the one that was signalled.
			in.abortFUSE()
		}
	}
}

// stop ends the instance: its stop signal, then, after the timeout, a kill.
func (in *instance) stop(timeout time.Duration) error {
	in.mu.Lock()
	in.stopping = true
	running, sig := in.state == wire.StateRunning, in.stopSig
	in.mu.Unlock()
	if running && timeout > 0 {
		if sig <= 0 {
			sig = unix.SIGTERM
		}
		if err := in.ask(sig, timeout); err != nil {
			return fmt.Errorf("signal init: %w", err)
		}
		select {
		case <-in.exited:
			return nil
		default:
		}
	}
	in.kill()
	return nil
}

// ask sends init the signal and waits for the end or the timeout. A machine's init is asked again and again, ever more
// rarely: the kernel drops a signal to the first process of a pid namespace that does not listen to it yet, as one that
// began a moment ago, and being asked twice to shut down is nothing to any of them. To a program it may mean "at once".
func (in *instance) ask(sig unix.Signal, timeout time.Duration) error {
	t := time.NewTimer(timeout)
	defer t.Stop()
	for pause := 250 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		if err := in.signal(sig); err != nil {
			return err
		}
		var next <-chan time.Time
		if in.machine() {
			next = time.After(pause)
		}
		select {
		case <-in.exited:
			return nil
		case <-t.C:
			return nil
		case <-next:
		}
	}
}

// machine says that init is the image's own.
func (in *instance) machine() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.started != nil && in.started.Machine
}
