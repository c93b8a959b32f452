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
	if size > 0 {
		_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, size)
	}
	return r, w, nil
}

func (o *openFiles) close() {
	for _, f := range *o {
		f.Close()
	}
}
