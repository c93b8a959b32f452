package monitor

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// abandonedLooks is after how many looks in a row, loadEvery apart, a keeper gives up hope of an agent.
const abandonedLooks = 2

// abandoned tells whether nobody can ask this keeper for anything any more: no agent listens to it, and its log, which
// lies beside its socket in a folder that cannot be seen from here, has been removed.
func (k *keeper) abandoned() bool {
	k.mu.Lock()
	listened := len(k.watchers) > 0
	k.mu.Unlock()
	var st unix.Stat_t
	err := unix.Fstat(int(os.Stderr.Fd()), &st)
	return !listened && err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 0
}

// leave ends what waits for a start that cannot come, and the keeper itself when nothing else is left. What runs, or
// is paused, is not touched: its end is waited for.
func (k *keeper) leave() {
	k.mu.Lock()
	var ins []*instance
	for _, in := range k.instances {
		ins = append(ins, in)
	}
	k.mu.Unlock()
	left := false
	for _, in := range ins {
		if !in.over() {
			left = true
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if left || len(k.instances) != len(ins) {
		return
	}
	k.cfg.Capacity = 0
	k.l.Close()
}

// over ends an instance that has not been started and tells whether it has ended.
func (in *instance) over() bool {
	select {
	case <-in.ready:
	default:
		return false
	}
	in.op.Lock()
	defer in.op.Unlock()
	switch in.status().State {
	case wire.StateExited:
		return true
	case wire.StateCreated:
		if err := in.stop(0); err != nil {
			fmt.Fprintf(os.Stderr, "keeper: end %s: %v\n", in.name(), err)
		}
	}
	return false
}
