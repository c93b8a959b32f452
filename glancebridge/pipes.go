package glancebridge

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
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

// readOnly opens a file once more, for reading alone: also one that has no name.
func (o *openFiles) readOnly(f *os.File) (*os.File, error) {
	r, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open spool for reading: %w", err)
	}
	*o = append(*o, r)
	return r, nil
}

// sharedMemory makes what the helpers pass contents by.
func sharedMemory() (*os.File, error) { return memoryFile(layer.SharedBytes, unix.F_SEAL_SEAL) }

// memoryFile makes memory that processes share. None of them can change its size: the others would be killed for reading
// beyond the end. seals are further ones.
func memoryFile(size int64, seals int) (*os.File, error) {
	fd, err := unix.MemfdCreate("novalet image", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make shared memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "shared memory")
	if err = unix.Ftruncate(fd, size); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|seals)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make shared memory: %w", err)
	}
	return f, nil
}

// mapShared maps it, and closes the descriptor.
func mapShared(fd, size, prot int) ([]byte, error) {
	mem, err := unix.Mmap(fd, 0, size, prot, unix.MAP_SHARED|unix.MAP_POPULATE)
	unix.Close(fd)
	if err != nil {
		return nil, fmt.Errorf("map shared memory: %w", err)
	}
	return mem, nil
}

func (o *openFiles) close() {
	for _, f := range *o {
		f.Close()
	}
}
