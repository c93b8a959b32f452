package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine"
	"github.com/novalet/novalet/engine/rootfs"
)

// finding is one line of `novalet doctor`.
type finding struct {
	what string
	ok   bool
	need bool   // without it nothing boots
	note string // what was found, or what its lack costs
}

func doctorCommand() *command {
	return &command{name: "doctor", summary: "Say what this host can and cannot do for instances",
		long: "Each line is a feature of the kernel, whether it is there, and what its lack costs. Exit code 6 when something is\n" +
			"missing that no instance boots without. The last line names what an agent that does not run left on this host and\n" +
			"no instance needs; --fix removes it.",
		flags: func(fs *pflag.FlagSet) {
			fs.Bool("fix", false, "remove what is left over: devices, processes, cgroups and files that no instance needs")
			fs.StringArray("config-file", nil, "the agent's configuration (default /etc/nova/nova.conf if it is there); may be repeated")
		},
		run: func(ctx context.Context, fs *pflag.FlagSet) error {
			fix, _ := fs.GetBool("fix")
			files, _ := fs.GetStringArray("config-file")
			s, err := stateSettings(files)
			if err != nil {
				return err
			}
			if fix && s == nil {
				return usageError("--fix must know the agent's state: name its --config-file")
			}
			found := append(examine(), rootLimits(s))
			for _, f := range found {
				mark := "ok     "
				switch {
				case !f.ok && f.need:
					mark = "MISSING"
				case !f.ok:
					mark = "absent "
				}
				fmt.Printf("%s  %-28s %s\n", mark, f.what, f.note)
			}
			if err := lacking(found); err != nil || s == nil {
				return err
			}
			left, err := examineState(ctx, s, fix, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
			if err != nil {
				return fmt.Errorf("look for what is left over: %w", err)
			}
			fmt.Println(left.text())
			return nil
		}}
}

// fit says why no instance can run here under this process; nil when nothing speaks against it. try is what to type
// instead without root's rights.
func fit(try string) error {
	if os.Geteuid() != 0 {
		return &exitError{exitUnsupported, fmt.Errorf("must run as root: it makes namespaces, mounts and network links (try %s)", try)}
	}
	return lacking(examine())
}

// lacking names what is missing that no instance boots without; nil when nothing is.
func lacking(found []finding) error {
	var missing []string
	for _, f := range found {
		if !f.ok && f.need {
			missing = append(missing, f.what)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return &exitError{exitUnsupported, fmt.Errorf("no instance can boot here: this host lacks %s (novalet doctor says more)", strings.Join(missing, ", "))}
}

// examine looks and changes nothing.
func examine() []finding {
	var out []finding
	add := func(what string, need, ok bool, note string) { out = append(out, finding{what, ok, need, note}) }
	add("root rights", true, os.Geteuid() == 0, "the agent makes namespaces, mounts and links")
	for _, ns := range []struct{ file, name string }{{"user", "user namespaces"}, {"pid", "pid namespaces"}, {"net", "network namespaces"},
		{"cgroup", "cgroup namespaces"}, {"time", "time namespaces"}} {
		_, err := os.Stat("/proc/self/ns/" + ns.file)
		note := ""
		if ns.file == "time" {
			note = "without: uptime inside an instance is the host's"
		}
		ok := err == nil
		if ns.file == "user" {
			// Hardened hosts often have the feature and allow none.
			if limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); err == nil && strings.TrimSpace(string(limit)) == "0" {
				ok, note = false, "the setting user.max_user_namespaces is 0: sysctl -w user.max_user_namespaces=100000"
			}
		}
		add(ns.name, ns.file != "time", ok, note)
	}
	fs, _ := os.ReadFile("/proc/filesystems")
	has := func(name string) bool {
		for l := range strings.Lines(string(fs)) {
			if f := strings.Fields(l); len(f) > 0 && f[len(f)-1] == name {
				return true
			}
		}
		return false
	}
	add("overlayfs", true, has("overlay"), "roots are layers under a writable one")
	add("id-mapped mounts", true, idmapped(), "one copy of a layer serves every instance's own ids")
	v2 := isCgroup2("/sys/fs/cgroup")
	note := "cgroup v2"
	if !v2 {
		note = "cgroup v1 or hybrid: limits are set outside, v1 hierarchies never appear inside; starts take longer"
	}
	add("cgroups", true, v2 || exists("/sys/fs/cgroup/memory"), note)
	add("loop devices", false, exists("/dev/loop-control"), "without: there are no ephemeral disks, and root_gb needs project quota")
	add("FUSE", false, exists("/dev/fuse"), "")
	add("TUN", false, exists("/dev/net/tun"), "")
	add("bridge netfilter", false, exists("/proc/sys/net/bridge/bridge-nf-call-iptables"), "without: security groups of the Linux bridge and hybrid plugs have no effect")
	add("Open vSwitch", false, exists("/run/openvswitch/db.sock"), "only needed for ports of type ovs")
	lsm, _ := os.ReadFile("/sys/kernel/security/lsm")
	add("Landlock", false, strings.Contains(string(lsm), "landlock"), "without: the image helpers rely on namespaces and seccomp alone")
	add("AppArmor", false, strings.Contains(string(lsm), "apparmor"), "")
	add("seccomp user notification", false, notifies(), "without: sysinfo(2) is host-wide, busybox free and libc's sysconf show the host's memory")
	swap, _ := os.ReadFile("/proc/swaps")
	add("swap", false, strings.Count(string(swap), "\n") > 1, "without: a flavor's swap is shown and counted, but the host has nowhere to put it")
	add("swap accounting", false, exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes") || v2 && anyGroup("memory.swap.max"),
		"without: a flavor's swap is neither limited nor shown (kernel parameter swapaccount=1)")
	return out
}

// rootLimits says what will hold a flavor's root_gb for new instances; s is nil without a configuration.
func rootLimits(s *settings) finding {
	dir, limits := defaultState, engine.LimitAuto
	if s != nil {
		dir, limits = s.stateDir, s.rootLimits
	}
	for at := dir; ; at = filepath.Dir(at) {
		if exists(at) || at == "/" {
			dir = at
			break
		}
	}
	q, err := rootfs.OpenQuota(dir)
	if err == nil {
		q.Close()
	}
	f := finding{what: "project quota", ok: err == nil}
	switch {
	case err == nil && limits == engine.LimitPool:
		f.note = "not used: root_limits is pool, root_gb is held by disks in image files"
	case err == nil:
		f.note = "holds root_gb"
	case limits == engine.LimitQuota:
		f.need, f.note = true, "root_limits is quota: mount the file system of "+dir+" with prjquota"
	default:
		f.note = "without: root_gb is held by disks in image files (XFS and ext4 have it when mounted with prjquota)"
	}
	return f
}

// notifies asks the kernel whether a process can be told of another's system calls.
func notifies() bool {
	action := uint32(unix.SECCOMP_RET_USER_NOTIF)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	return errno == 0
}

// anyGroup tells whether a group right below the root of cgroup2 has a file; the root itself has no limits.
func anyGroup(file string) bool {
	m, _ := filepath.Glob("/sys/fs/cgroup/*/" + file)
	return len(m) > 0
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func isCgroup2(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// idmapped asks the kernel to map by this process's own user namespace, with a descriptor that cannot work. A kernel that
// does not know the flag answers EINVAL; one that does refuses the namespace of the host (EPERM) or the descriptor (EBADF).
func idmapped() bool {
	ns, err := os.Open("/proc/self/ns/user")
	if err != nil {
		return false
	}
	defer ns.Close()
	err = unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.EBADF)
}
