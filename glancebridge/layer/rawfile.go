package layer

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls that make a file, without the Go runtime's own part of a system call: it takes the processor away from a
// thread that is in the kernel for 20 µs, which making a file takes, and gives it another to come back with. Over tens
// of thousands of files that costs more than it gives.

// rawCreate makes a file. base ends with a NUL byte.
func rawCreate(dirfd int, base []byte, mode uint32) (int, error) {
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	for {
		fd, _, e := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dirfd), uintptr(unsafe.Pointer(&base[0])), flags|unix.O_LARGEFILE,
			uintptr(mode&0o777), 0, 0)
		switch e {
		case 0:
			return int(fd), nil
		case unix.EINTR:
		default:
			return -1, e
		}
	}
}

// rawWrite writes all of b at byte off.
func rawWrite(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, _, e := unix.RawSyscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(off), 0, 0)
		switch e {
		case 0:
			b, off = b[n:], off+int64(n)
		case unix.EINTR:
		default:
			return e
		}
	}
	return nil
}

func rawClose(fd int) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// futimens sets the times of an open file or directory. Without a path utimensat(2) acts on the descriptor itself.
func futimens(fd int, ts *[2]unix.Timespec) error {
	_, _, e := unix.RawSyscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(ts)), 0, 0, 0)
	if e == unix.EBADF {
		// One that was opened with O_PATH needs a path, the empty one (AT_EMPTY_PATH, Linux 5.8), which is a walk all the same.
		empty := [1]byte{}
		_, _, e = unix.RawSyscall6(unix.SYS_UTIMENSAT, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])),
			uintptr(unsafe.Pointer(ts)), unix.AT_EMPTY_PATH, 0, 0)
	}
	if e != 0 {
		return e
	}
	return nil
}
