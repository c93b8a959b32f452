package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
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
			"missing that no instance boots without.",
		run: func(context.Context, *pflag.FlagSet) error {
			var missing []string
			for _, f := range examine() {
				mark := "ok     "
				switch {
				case !f.ok && f.need:
					mark = "MISSING"
					missing = append(missing, f.what)
				case !f.ok:
					mark = "absent "
				}
				fmt.Printf("%s  %-28s %s\n", mark, f.what, f.note)
			}
			if len(missing) > 0 {
				return &exitError{exitUnsupported, fmt.Errorf("no instance can boot here: %s", strings.Join(missing, ", "))}
			}
			return nil
		}}
}

// examine looks and changes nothing.
func examine() []finding {
	var out []finding
	add := func(what string, need, ok bool, note string) { out = append(out, finding{what, ok, need, note}) }
	add("root", true, os.Geteuid() == 0, "the agent makes namespaces, mounts and links")
	for _, ns := range []struct{ file, name string }{{"user", "user namespaces"}, {"pid", "pid namespaces"}, {"net", "network namespaces"},
		{"cgroup", "cgroup namespaces"}, {"time", "time namespaces"}} {
		_, err := os.Stat("/proc/self/ns/" + ns.file)
		note := ""
		if ns.file == "time" {
			note = "without: uptime inside an instance is the host's"
		}
		add(ns.name, ns.file != "time", err == nil, note)
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
	add("loop devices", false, exists("/dev/loop-control"), "without: root_gb is no hard limit for what an instance writes")
	add("FUSE", false, exists("/dev/fuse"), "")
	add("TUN", false, exists("/dev/net/tun"), "")
	add("bridge netfilter", false, exists("/proc/sys/net/bridge/bridge-nf-call-iptables"), "without: security groups of the Linux bridge and hybrid plugs have no effect")
	add("Open vSwitch", false, exists("/run/openvswitch/db.sock"), "only needed for ports of type ovs")
	lsm, _ := os.ReadFile("/sys/kernel/security/lsm")
	add("Landlock", false, strings.Contains(string(lsm), "landlock"), "without: the image helpers rely on namespaces and seccomp alone")
	add("AppArmor", false, strings.Contains(string(lsm), "apparmor"), "")
	add("sysinfo(2) per instance", false, false, "busybox free and libc's sysinfo show the host's memory")
	return out
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func isCgroup2(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// idmapped asks the kernel for mount_setattr with a descriptor that cannot work: a kernel that knows the flag says so
// differently from one that does not.
func idmapped() bool {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: 0})
	return err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL)
}
