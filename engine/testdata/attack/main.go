// Go's own runtime keeps the group's cpu.max open otherwise, where it finds one: not a descriptor that leaked.
//
//go:debug containermaxprocs=0

// Command attack is what the attack suite runs inside an instance: each verb tries one way out and prints a line
// beginning with ESCAPE for each that works.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	verbs := map[string]func([]string){
		"exe": exe, "fds": fds, "scan": scan, "mounts": mounts, "devices": devices, "gadgets": gadgets,
		"probe": probe, "call": call, "fuse": fuse, "chroot": chroot, "status": status, "kill": kill, "ids": ids,
		"userns": userns, "burn": burn, "sockets": sockets, "flood": flood, "hang": hang,
		"blocks": blocks, "sysctl": sysctl, "classes": classes, "euid": euid, "netadmin": netadmin, "hog": hog,
		"forks": forks, "memtotal": memtotal, "totalram": totalram, "propagate": propagate, "cgroupns": cgroupns, "fill": fill, "trace": trace,
		"project": project, "inuserns": inuserns, "below": below, "first": first,
	}
	f, ok := verbs[os.Args[1]]
	if !ok {
		os.Exit(2)
	}
	if os.Getenv("ATTACK_SAYS") != "" {
		fmt.Println("trying")
	}
	f(os.Args[2:])
	fmt.Println("done")
}

// exe tries to write to the program files of all processes, the shim's among them, for as long as told.
func exe(args []string) {
	end := deadline(args)
	for time.Now().Before(end) {
		procs, _ := filepath.Glob("/proc/[0-9]*/exe")
		for _, p := range procs {
			link, err := os.Readlink(p)
			if err != nil || !strings.Contains(link, "memfd:") {
				continue
			}
			for _, flags := range []int{unix.O_WRONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_TRUNC, unix.O_WRONLY | unix.O_APPEND} {
				fd, err := unix.Open(p, flags, 0)
				if err != nil {
					continue
				}
				if _, err := unix.Write(fd, []byte("#!/bin/sh\n")); err == nil {
					fmt.Println("ESCAPE wrote to", p, link)
				}
				unix.Close(fd)
			}
			if fd, err := unix.Open(p, unix.O_RDONLY, 0); err == nil {
				if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, 0); err == nil {
					fmt.Println("ESCAPE seals can be added to", p)
				}
				if _, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
					fmt.Println("ESCAPE mapped writable", p)
				}
				unix.Close(fd)
			}
		}
	}
}

func deadline(args []string) time.Time {
	ms, _ := strconv.Atoi(args[0])
	return time.Now().Add(time.Duration(ms) * time.Millisecond)
}

// fds lists the descriptors of this process as they were when it started.
func fds([]string) {
	for fd := range 1024 {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			continue
		}
		link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if fd > 2 && !strings.Contains(link, "anon_inode") {
			fmt.Println("ESCAPE descriptor", fd, link)
		}
	}
}

// scan looks for the canary through every root, working directory and descriptor that any process shows.
func scan(args []string) {
	canary, end := args[1], deadline(args)
	for time.Now().Before(end) {
		links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
		more, _ := filepath.Glob("/proc/[0-9]*/cwd")
		roots, _ := filepath.Glob("/proc/[0-9]*/root")
		for _, l := range append(append(links, more...), roots...) {
			for _, up := range []string{"", "/..", "/../../../../../.."} {
				if b, err := os.ReadFile(l + up + canary); err == nil {
					fmt.Println("ESCAPE read", l, string(b))
				}
			}
		}
		helpers()
	}
}

// helpers tries to trace what the host started inside and is on its way to its program.
func helpers() {
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		pid, _ := strconv.Atoi(strings.Split(p, "/")[2])
		isHelper := func() bool {
			b, _ := os.ReadFile(p)
			name := strings.TrimRight(string(b), "\x00")
			return name == "exec" || name == "init"
		}
		// Asked again after it: by then it may have become its program, which may be traced.
		if isHelper() && unix.PtraceSeize(pid) == nil && isHelper() {
			fmt.Println("ESCAPE traces a helper")
		}
	}
}

// trace tries that for as long as told.
func trace(args []string) {
	for end := deadline(args); time.Now().Before(end); {
		helpers()
	}
}

// mounts tries to mount what would show the host.
func mounts([]string) {
	os.MkdirAll("/tmp/m", 0o755)
	for _, m := range [][3]string{
		{"cgroup", "cgroup", "memory"}, {"cgroup", "cgroup", "devices"}, {"cgroup", "cgroup", "rdma"}, {"none", "cgroup", "none,name=novalet-attack"},
		{"devtmpfs", "devtmpfs", ""}, {"debugfs", "debugfs", ""}, {"tracefs", "tracefs", ""}, {"securityfs", "securityfs", ""},
		{"bpf", "bpf", ""}, {"/dev/vda", "ext4", ""}, {"/dev/loop0", "ext4", ""}, {"pstore", "pstore", ""}, {"efivarfs", "efivarfs", ""},
		{"configfs", "configfs", ""}, {"selinuxfs", "selinuxfs", ""},
	} {
		if err := unix.Mount(m[0], "/tmp/m", m[1], 0, m[2]); err == nil {
			if m[0] == "cgroup" {
				// A cgroup namespace may mount the hierarchies that the host has, from its own group down. What
				// counts is that nothing in it can be changed.
				v1("/tmp/m")
			} else {
				fmt.Println("ESCAPE mounted", m)
			}
			unix.Unmount("/tmp/m", unix.MNT_DETACH)
		}
	}
	if err := os.WriteFile("/sys/fs/cgroup/release_agent", []byte("/bin/sh"), 0); err == nil {
		fmt.Println("ESCAPE wrote release_agent")
	}
	for _, f := range []string{"memory.max", "pids.max", "cpu.max", "cgroup.freeze", "cgroup.kill", "cgroup.type"} {
		if err := os.WriteFile("/sys/fs/cgroup/"+f, []byte("max"), 0); err == nil {
			fmt.Println("ESCAPE wrote", f, "of its own root group")
		}
		if err := os.WriteFile("/sys/fs/cgroup/../"+f, []byte("max"), 0); err == nil {
			fmt.Println("ESCAPE wrote", f)
		}
	}
	pid := []byte(strconv.Itoa(os.Getpid()))
	for _, p := range []string{"/sys/fs/cgroup/../cgroup.procs", "/sys/fs/cgroup/../../cgroup.procs", "/sys/fs/cgroup/../exec/cgroup.procs"} {
		if err := os.WriteFile(p, pid, 0); err == nil {
			fmt.Println("ESCAPE moved itself to", p)
		}
	}
}

// v1 tries to change a v1 hierarchy.
func v1(dir string) {
	pid := strconv.Itoa(os.Getpid())
	for file, val := range map[string]string{
		"release_agent": "/bin/sh", "notify_on_release": "1", "cgroup.procs": pid, "tasks": pid, "memory.limit_in_bytes": "-1",
		"memory.memsw.limit_in_bytes": "-1", "devices.allow": "a", "cgroup.clone_children": "1", "memory.oom_control": "1",
		"cgroup.event_control": "1 1",
	} {
		if err := os.WriteFile(dir+"/"+file, []byte(val), 0); err == nil {
			fmt.Println("ESCAPE wrote", file, "of a v1 hierarchy")
		}
	}
	if err := os.Mkdir(dir+"/sub", 0o755); err == nil {
		fmt.Println("ESCAPE made a group in a v1 hierarchy")
		os.Remove(dir + "/sub")
	}
}

// devices makes nodes of the host's devices and opens them.
func devices([]string) {
	for _, d := range []struct {
		mode         uint32
		major, minor uint32
	}{{unix.S_IFBLK, 254, 0}, {unix.S_IFBLK, 7, 0}, {unix.S_IFBLK, 8, 0}, {unix.S_IFBLK, 259, 0}, {unix.S_IFCHR, 1, 1}, {unix.S_IFCHR, 1, 2}, {unix.S_IFCHR, 1, 4},
		{unix.S_IFCHR, 1, 11}, {unix.S_IFCHR, 10, 237}, {unix.S_IFCHR, 10, 232}, {unix.S_IFCHR, 4, 0}, {unix.S_IFCHR, 4, 64}, {unix.S_IFCHR, 5, 1}} {
		for _, dir := range []string{"/", "/dev", "/tmp", "/dev/shm"} {
			p := filepath.Join(dir, "attack-node")
			if err := unix.Mknod(p, d.mode|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
				continue
			}
			fmt.Println("ESCAPE made node", p, d.major, d.minor)
			if fd, err := unix.Open(p, unix.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
				fmt.Println("ESCAPE opened node", p, d.major, d.minor)
				unix.Close(fd)
			}
			os.Remove(p)
		}
	}
	es, _ := os.ReadDir("/dev")
	for _, e := range es {
		switch e.Name() {
		case "null", "zero", "full", "random", "urandom", "tty", "console", "tty1", "fuse", "ptmx", "pts", "shm", "mqueue", "fd", "stdin", "stdout", "stderr":
		default:
			fmt.Println("ESCAPE /dev has", e.Name())
			_ = filepath.WalkDir(filepath.Join("/dev", e.Name()), func(p string, d os.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return nil
				}
				if fd, err := unix.Open(p, unix.O_RDWR|unix.O_NONBLOCK, 0); err == nil {
					fmt.Println("ESCAPE opened", p)
					unix.Close(fd)
				}
				return nil
			})
		}
	}
}

// gadgets writes to the files through which the kernel would act for the host's root.
func gadgets([]string) {
	for _, p := range []string{
		"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug", "/proc/sys/kernel/poweroff_cmd",
		"/proc/sys/vm/overcommit_memory", "/proc/sys/vm/drop_caches", "/proc/sys/kernel/panic", "/proc/sys/kernel/sysrq",
		"/proc/sys/fs/file-max", "/proc/sys/kernel/randomize_va_space", "/proc/sysrq-trigger", "/proc/sys/fs/suid_dumpable",
		"/sys/kernel/uevent_helper", "/sys/power/state", "/sys/kernel/mm/ksm/run", "/sys/kernel/mm/transparent_hugepage/enabled",
		"/sys/module/loop/parameters/max_loop", "/sys/block/vda/queue/nr_requests", "/sys/devices/system/cpu/cpu1/online", "/proc/acpi/wakeup",
	} {
		if fd, err := unix.Open(p, unix.O_WRONLY, 0); err == nil {
			if _, err := unix.Write(fd, []byte("0")); err == nil {
				fmt.Println("ESCAPE wrote", p)
			}
			unix.Close(fd)
		}
	}
	for _, p := range []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware", "/dev/mem", "/dev/kmsg", "/proc/kmsg", "/proc/kpagecount"} {
		fd, err := unix.Open(p, unix.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		buf := make([]byte, 4096)
		if n, _ := unix.Read(fd, buf); n > 0 {
			fmt.Println("ESCAPE read", p)
		}
		if n, _ := unix.Getdents(fd, buf); n > 64 {
			fmt.Println("ESCAPE listed", p)
		}
		unix.Close(fd)
	}
}

// probe makes system calls, "first-last" or one each, in a process of its own each, and prints its errno, or that it
// blocks: that nothing came back for as many milliseconds as told.
func probe(args []string) {
	ms, _ := strconv.Atoi(args[0])
	for _, a := range args[1:] {
		from, to, isRange := strings.Cut(a, "-")
		nr, _ := strconv.Atoi(from)
		last := nr
		if isRange {
			last, _ = strconv.Atoi(to)
		}
		for ; nr <= last; nr++ {
			// sync waits for everybody's dirty pages, and cannot be killed meanwhile.
			if nr != unix.SYS_SYNC {
				fmt.Println("call", nr, probeOne(nr, time.Duration(ms)*time.Millisecond))
			}
		}
	}
}

func probeOne(nr int, patience time.Duration) string {
	cmd := exec.Command("/proc/self/exe", "call", strconv.Itoa(nr))
	// A call that forks leaves a copy that may hold the pipe open.
	cmd.WaitDelay = 100 * time.Millisecond
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		return err.Error()
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-done:
		return strings.TrimSuffix(strings.TrimSpace(out.String()), "\ndone")
	case <-time.After(patience):
		cmd.Process.Kill()
		<-done
		return "blocks"
	}
}

func call(args []string) {
	nr, _ := strconv.Atoi(args[0])
	const all = ^uintptr(0)
	_, _, errno := unix.RawSyscall6(uintptr(nr), all, all, all, all, all, all)
	fmt.Println(int(errno))
}

// fuse mounts a file system that never answers.
func fuse(args []string) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR, 0)
	if err != nil {
		fmt.Println("no fuse:", err)
		return
	}
	if err := unix.Mount("hang", args[0], "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)); err != nil {
		fmt.Println("no mount:", err)
		return
	}
	fmt.Println("hanging")
	time.Sleep(time.Hour)
}

// chroot walks out of a chroot, which ends at the root of the mount namespace, not at the host's.
func chroot(args []string) {
	os.MkdirAll("/tmp/jail", 0o755)
	dir, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return
	}
	if unix.Chroot("/tmp/jail") != nil {
		return
	}
	unix.Fchdir(dir)
	for range 64 {
		unix.Chdir("..")
	}
	unix.Chroot(".")
	if b, err := os.ReadFile(args[0]); err == nil {
		fmt.Println("ESCAPE read the host's", args[0], string(b))
	}
}

// status prints what the kernel says of this process's rights.
func status([]string) {
	b, _ := os.ReadFile("/proc/self/status")
	for _, l := range strings.Split(string(b), "\n") {
		if strings.HasPrefix(l, "Cap") || strings.HasPrefix(l, "NoNewPrivs") || strings.HasPrefix(l, "Seccomp:") || strings.HasPrefix(l, "Groups") {
			fmt.Println(l)
		}
	}
}

// kill signals pids as the host numbers them.
func kill(args []string) {
	for _, a := range args {
		pid, _ := strconv.Atoi(a)
		if err := unix.Kill(pid, unix.SIGKILL); err == nil {
			fmt.Println("ESCAPE signalled", pid)
		}
		if err := unix.PtraceSeize(pid); err == nil {
			fmt.Println("ESCAPE traces", pid)
		}
	}
}

// ids tries to become an id outside the range.
func ids([]string) {
	for _, id := range []int{65536, 1 << 20, 4294967294} {
		if err := syscall.Setuid(id); err == nil {
			fmt.Println("ESCAPE became", id)
		}
		if err := os.Chown("/tmp", id, id); err == nil {
			fmt.Println("ESCAPE gave to", id)
		}
	}
}

// userns tries to get a user namespace with every right in it.
func userns([]string) {
	cmd := exec.Command("/proc/self/exe", "status")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS}
	if err := cmd.Run(); err == nil {
		fmt.Println("ESCAPE nested user namespace")
	}
}

// burn keeps processors busy.
func burn(args []string) {
	n, _ := strconv.Atoi(args[1])
	end := deadline(args)
	done := make(chan bool)
	for range n {
		go func() {
			for time.Now().Before(end) {
			}
			done <- true
		}()
	}
	for range n {
		<-done
	}
}

// sockets lists the unix sockets and kernel-wide objects that it sees.
func sockets([]string) {
	b, _ := os.ReadFile("/proc/net/unix")
	for i, l := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if f := strings.Fields(l); i > 0 && len(f) > 7 {
			fmt.Println("ESCAPE socket", f[7])
		}
	}
	for _, p := range []string{"/proc/sysvipc/shm", "/proc/sysvipc/msg", "/proc/sysvipc/sem"} {
		b, _ := os.ReadFile(p)
		if strings.Count(string(b), "\n") > 1 {
			fmt.Println("ESCAPE", p, "has entries")
		}
	}
	es, _ := os.ReadDir("/dev/mqueue")
	for _, e := range es {
		fmt.Println("ESCAPE queue", e.Name())
	}
}
