package glancebridge

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// openFiles are the descriptors that a run of helpers holds until it ends.
type openFiles []*os.File

// pipe makes a pipe that holds so many bytes; 0 is the kernel's own size. The kernel may give less.
func (o *openFiles) pipe(size int) (r, w *os.File, err error) {
	if r, w, err = os.Pipe(); err != nil {
		return nil, nil, fmt.Errorf("make pipe: %w", err)
	}
	*o = append(*o, r, w)
	// File.Fd would make the end block in the kernel, which costs the Go runtime more than waiting in its poller.
	if c, err := w.SyscallConn(); err == nil && size > 0 {
		_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, size) })
	}
	return r, w, nil
}

func (o *openFiles) close() {
	for _, f := range *o {
		f.Close()
	}
}
