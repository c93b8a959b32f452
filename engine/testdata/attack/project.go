package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	xflags, extsize, nextents, project, cowextsize uint32
	_                                              [8]byte
}

// project tries to take files out of the project that their blocks count for: /opt/a, /opt/b, /opt/lower and /opt/flags are
// a layer's still, what is in /own is not. What came of it is read on the host.
func project([]string) {
	for _, p := range []string{"/opt/a", "/opt/lower", "/own/file", "/own"} {
		f, err := os.Open(p)
		if err != nil {
			fmt.Println(err)
			continue
		}
		get := func() (x fsxattr) {
			_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x801c581f, uintptr(unsafe.Pointer(&x)))
			return x
		}
		set := func(x fsxattr) {
			for _, request := range []uintptr{0x401c5820, 1<<32 | 0x401c5820} {
				_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&x)))
			}
			// file_setattr of Linux 6.17: struct file_attr has the flags as 64 bits, then the rest.
			attr := [6]uint32{x.xflags, 0, x.extsize, 0, x.project, 0}
			_, _, _ = unix.Syscall6(469, f.Fd(), uintptr(unsafe.Pointer(&[]byte{0}[0])), uintptr(unsafe.Pointer(&attr)), 24, unix.AT_EMPTY_PATH, 0)
		}
		was := get()
		set(was)
		for _, n := range []uint32{0, 1, 1 << 30} {
			x := was
			x.project, x.xflags = n, 0
			set(x)
			if now := get(); now.project != was.project && now.project == n {
				fmt.Println("ESCAPE", p, "of project", was.project, "has project", n)
			}
		}
		f.Close()
	}
	for _, p := range []string{"/opt/b", "/opt/flags", "/own"} {
		f, err := os.Open(p)
		if err != nil {
			fmt.Println(err)
			continue
		}
		for _, flags := range []int{0, 0x40, 0x80} { // none, nodump, noatime
			for _, request := range []uintptr{0x40086602, 1<<32 | 0x40086602} {
				_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&flags)))
			}
		}
		f.Close()
	}
}

// inuserns does another verb in a user namespace of its own, where it is root.
func inuserns(args []string) {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{Size: 1000}}, GidMappings: []syscall.SysProcIDMap{{Size: 1000}}}
	out, err := cmd.CombinedOutput()
	fmt.Println(string(out), err)
}
