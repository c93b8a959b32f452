package monitor

import (
	"encoding/json"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// exitRecord is what is left on disk for an agent that finds no keeper.
type exitRecord struct {
	ExitCode  int       `json:"exit_code"`
	ExitedAt  time.Time `json:"exited_at"`
	StartedAt time.Time `json:"started_at"`
	OOMKills  int64     `json:"oom_kills"`
}

// record writes the exit record.
func (in *instance) record() {
	in.mu.Lock()
	if in.dir == nil {
		in.mu.Unlock()
		return
	}
	b, err := json.Marshal(&exitRecord{ExitCode: in.code, ExitedAt: in.exitAt, StartedAt: in.startAt, OOMKills: in.oomKills})
	in.mu.Unlock()
	if err == nil {
		err = writeAt(int(in.dir.Fd()), "exit.json", b)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "keeper: write exit record:", err)
	}
}

// writeAt replaces a file in a directory.
func writeAt(dirfd int, name string, data []byte) error {
	tmp := name + ".new"
	fd, err := unix.Openat(dirfd, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return unix.Renameat(dirfd, tmp, dirfd, name)
}
