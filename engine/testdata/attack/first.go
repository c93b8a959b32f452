package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// first tries to get hold of an application's first process: to trace it, to read it, to take what it has open.
func first([]string) {
	if unix.PtraceSeize(1) == nil {
		fmt.Println("ESCAPE traces the first process")
	}
	for _, f := range []string{"mem", "exe", "environ", "maps", "auxv", "syscall", "stack"} {
		fd, err := unix.Open("/proc/1/"+f, unix.O_RDONLY, 0)
		if err != nil {
			continue
		}
		// What is mapped nowhere cannot be read, whoever may.
		if n, err := unix.Read(fd, make([]byte, 64)); n > 0 || f == "mem" && err == unix.EIO {
			fmt.Println("ESCAPE reads the first process:", f)
		}
		unix.Close(fd)
	}
	if fd, err := unix.Open("/proc/1/mem", unix.O_WRONLY, 0); err == nil {
		fmt.Println("ESCAPE opens the first process's memory")
		unix.Close(fd)
	}
	for _, d := range []string{"fd", "map_files"} {
		if es, err := os.ReadDir("/proc/1/" + d); err == nil && len(es) > 0 {
			fmt.Println("ESCAPE lists the first process:", d)
		}
	}
	pidfd, err := unix.PidfdOpen(1, 0)
	if err != nil {
		return
	}
	for fd := range 16 {
		if _, err := unix.PidfdGetfd(pidfd, fd, 0); err == nil {
			fmt.Println("ESCAPE takes a descriptor of the first process")
		}
	}
}
