package main

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The verbs here do no harm when they succeed: they are tried with a defence switched off, too.

// blocks looks for the host's disks.
func blocks([]string) {
	for _, dir := range []string{"/sys/block", "/sys/class/block", "/sys/dev/block"} {
		es, _ := os.ReadDir(dir)
		for _, e := range es {
			fmt.Println("ESCAPE", dir, "has", e.Name())
		}
	}
}

// rewrite opens a file for writing and writes what is in it already.
func rewrite(p string) {
	old, err := os.ReadFile(p)
	if err != nil {
		return
	}
	fd, err := unix.Open(p, unix.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, old); err == nil {
		fmt.Println("ESCAPE wrote", p)
	}
}

// sysctl changes a setting of the host.
func sysctl([]string) { rewrite("/proc/sys/kernel/core_pattern") }

// classes makes one call of each class that no instance needs, with arguments that cannot be right. An answer other than
// ENOSYS comes from the kernel.
func classes([]string) {
	const all = ^uintptr(0)
	for _, c := range []struct {
		name string
		nr   uintptr
	}{
		{"bpf", unix.SYS_BPF}, {"keyctl", unix.SYS_KEYCTL}, {"add_key", unix.SYS_ADD_KEY}, {"request_key", unix.SYS_REQUEST_KEY},
		{"userfaultfd", unix.SYS_USERFAULTFD}, {"io_uring_setup", unix.SYS_IO_URING_SETUP}, {"io_uring_enter", unix.SYS_IO_URING_ENTER},
		{"io_uring_register", unix.SYS_IO_URING_REGISTER}, {"perf_event_open", unix.SYS_PERF_EVENT_OPEN}, {"kexec_load", unix.SYS_KEXEC_LOAD},
		{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT}, {"acct", unix.SYS_ACCT}, {"quotactl", unix.SYS_QUOTACTL},
		{"fanotify_init", unix.SYS_FANOTIFY_INIT}, {"fsopen", unix.SYS_FSOPEN}, {"fsconfig", unix.SYS_FSCONFIG},
		{"fsmount", unix.SYS_FSMOUNT}, {"fspick", unix.SYS_FSPICK},
	} {
		if _, _, errno := unix.RawSyscall6(c.nr, all, all, all, all, all, all); errno != unix.ENOSYS {
			fmt.Println("ESCAPE call", c.name)
		}
	}
}

// euid is run from a file that is its owner's to run as: root's.
func euid([]string) {
	if os.Geteuid() == 0 {
		fmt.Println("ESCAPE became root by a set-user-id program")
	}
}

// netadmin changes an interface, for which an application has no capability.
func netadmin([]string) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil || unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req) != nil {
		return
	}
	if unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req) == nil {
		fmt.Println("ESCAPE set the flags of lo")
	}
}

// hog takes so many MiB of memory.
func hog(args []string) {
	n, _ := strconv.Atoi(args[0])
	m, err := unix.Mmap(-1, 0, n<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return
	}
	for i := 0; i < len(m); i += 4096 {
		m[i] = 1
	}
	fmt.Println("ESCAPE has", n, "MiB", *(*byte)(unsafe.Pointer(&m[0])))
}

// forks starts so many processes.
func forks(args []string) {
	n, _ := strconv.Atoi(args[0])
	var cmds []*exec.Cmd
	defer func() {
		for _, c := range cmds {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	}()
	for range n {
		c := exec.Command("/bin/sleep", "1000")
		if c.Start() != nil {
			return
		}
		cmds = append(cmds, c)
	}
	fmt.Println("ESCAPE started", n)
}

// memtotal and totalram are told what the host has.
func memtotal(args []string) {
	b, _ := os.ReadFile("/proc/meminfo")
	if strings.Contains(string(b), args[0]+" kB") {
		fmt.Println("ESCAPE sees the host's memory")
	}
}

func totalram(args []string) {
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil && fmt.Sprint(uint64(s.Totalram)*uint64(s.Unit)/1024) == args[0] {
		fmt.Println("ESCAPE sees the host's memory")
	}
}

// propagate leaves a mount that the host can look for.
func propagate(args []string) {
	os.MkdirAll("/mnt/propagate", 0o755)
	if err := unix.Mount(args[0], "/mnt/propagate", "tmpfs", 0, ""); err != nil {
		fmt.Println("no mount:", err)
	}
}

// cgroupns tells where the instance is among the host's cgroups.
func cgroupns([]string) {
	b, _ := os.ReadFile("/proc/1/cgroup")
	if strings.Contains(string(b), "novalet") {
		fmt.Println("ESCAPE sees", strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", " "))
	}
}

// fill writes so many MiB into the root.
func fill(args []string) {
	n, _ := strconv.Atoi(args[0])
	f, err := os.Create("/fill")
	if err != nil {
		return
	}
	defer os.Remove("/fill")
	defer f.Close()
	for range n {
		if _, err := f.Write(make([]byte, 1<<20)); err != nil {
			return
		}
	}
	if f.Sync() == nil {
		fmt.Println("ESCAPE wrote", n, "MiB")
	}
}
