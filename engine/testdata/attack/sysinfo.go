package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func sysinfo(addr uintptr) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_SYSINFO, addr, 0, 0)
	return errno
}

// flood calls sysinfo from many processes, which are killed while they wait for the answer, with addresses that are
// nobody's.
func flood(args []string) {
	page := os.Getpagesize()
	gone, err := unix.Mmap(-1, 0, page, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return
	}
	addr := uintptr(unsafe.Pointer(&gone[0]))
	_ = unix.Munmap(gone)
	for _, a := range []uintptr{0, 1, addr, ^uintptr(0), ^uintptr(0) - 50, 1 << 63, 0xffffffff81000000, 1<<47 - 16} {
		if errno := sysinfo(a); errno != unix.EFAULT {
			fmt.Println("ESCAPE sysinfo at", a, "gives", errno)
		}
	}
	end := deadline(args)
	if len(args) > 1 {
		for time.Now().Before(end) {
			var s unix.Sysinfo_t
			sysinfo(uintptr(unsafe.Pointer(&s)))
		}
		return
	}
	done := make(chan bool)
	for range 8 {
		go func() {
			for time.Now().Before(end) {
				cmd := exec.Command("/proc/self/exe", "flood", "60000", "child")
				if cmd.Start() == nil {
					time.Sleep(30 * time.Millisecond)
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
				}
			}
			done <- true
		}()
	}
	for range 8 {
		<-done
	}
}

// hang serves a file system whose files never give a byte, maps a file of it, and has the answer of sysinfo written there.
// It keeps the file open: when it is killed, the close waits for the server, which is gone.
func hang(args []string) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR, 0)
	if err != nil {
		fmt.Println("no fuse:", err)
		return
	}
	if err := unix.Mount("hang", args[0], "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)); err != nil {
		fmt.Println("no mount:", err)
		return
	}
	go serve(fd)
	f, err := os.OpenFile(filepath.Join(args[0], "f"), os.O_RDWR, 0)
	if err != nil {
		fmt.Println("no file:", err)
		return
	}
	m, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		fmt.Println("no map:", err)
		return
	}
	fmt.Println("hanging")
	fmt.Println("answered", sysinfo(uintptr(unsafe.Pointer(&m[0]))))
	time.Sleep(time.Hour)
}

// serve answers what comes before a read of the file (linux/fuse.h).
func serve(fd int) {
	buf := make([]byte, 1<<17)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil || n < 40 {
			return
		}
		attr := make([]byte, 88)
		node := binary.NativeEndian.Uint64(buf[16:])
		mode := uint32(unix.S_IFDIR | 0o777)
		op := binary.NativeEndian.Uint32(buf[4:])
		if op == 1 || node == 2 {
			node, mode = 2, unix.S_IFREG|0o666
		}
		binary.NativeEndian.PutUint64(attr, node)
		binary.NativeEndian.PutUint64(attr[8:], 1<<16)
		binary.NativeEndian.PutUint32(attr[60:], mode)
		binary.NativeEndian.PutUint32(attr[64:], 1)
		var body []byte
		switch op {
		case 1: // lookup
			body = append(make([]byte, 40), attr...)
			binary.NativeEndian.PutUint64(body, 2)
		case 3: // getattr
			body = append(make([]byte, 16), attr...)
		case 14, 27: // open
			body = make([]byte, 16)
		case 26: // init
			body = make([]byte, 64)
			binary.NativeEndian.PutUint32(body, 7)
			binary.NativeEndian.PutUint32(body[4:], 31)
			binary.NativeEndian.PutUint32(body[20:], 4096)
		case 15: // read
			continue
		}
		out := make([]byte, 16, 16+len(body))
		binary.NativeEndian.PutUint32(out, uint32(16+len(body)))
		copy(out[8:16], buf[8:16])
		if body == nil {
			errno := int32(unix.ENOSYS)
			binary.NativeEndian.PutUint32(out[4:], uint32(-errno))
		}
		_, _ = unix.Write(fd, append(out, body...))
	}
}
