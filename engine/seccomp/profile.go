// Package seccomp assembles system call filters: classic BPF programs made in plain Go from lists of names.
//
// There are two profiles. Both start from the default profile of the moby project (data of
// github.com/moby/profiles/seccomp: an allow list with conditions on capabilities and arguments), with the
// capabilities that the kind of instance has, and are then corrected by the lists in this file.
//
// It starts no goroutine and touches nothing on disk.
package seccomp

//go:generate ./gen.sh

import (
	"fmt"
	"runtime"
	"slices"
	"syscall"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Kind chooses a profile.
type Kind int

const (
	// Application has no mounts, no namespaces, and what the default container profile of moby leaves.
	Application Kind = iota
	// Machine may mount and unshare, as an init system does.
	Machine
)

// applicationCaps and machineCaps are what the conditions of the base profile are asked with.
var (
	applicationCaps = []string{"CAP_SYS_CHROOT"}
	machineCaps     = []string{"CAP_SYS_CHROOT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_PTRACE", "CAP_SYS_TTY_CONFIG", "CAP_SYS_NICE"}
)

// absent are answered with ENOSYS, as by a kernel built without them: programs then use another way. They are what
// past escapes of user namespaces went through and no instance needs.
var absent = []string{
	"bpf", "keyctl", "add_key", "request_key", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register",
	"perf_event_open", "kexec_load", "kexec_file_load", "lookup_dcookie", "open_by_handle_at", "acct", "quotactl", "quotactl_fd",
	"fanotify_init",
	// File system configuration by string (CVE-2022-0185); mount(2) does the same for a machine.
	"fsopen", "fsconfig", "fsmount", "fspick",
}

// refused are answered with EPERM whatever the base profile says.
var refused = []string{
	"init_module", "finit_module", "delete_module", "create_module", "reboot", "swapon", "swapoff", "settimeofday",
	"clock_settime", "clock_adjtime", "adjtimex", "syslog", "iopl", "ioperm", "nfsservctl", "vhangup", "_sysctl",
}

// machineMay are taken back from refused, machineAlso are allowed beyond the base profile.
var (
	machineMay  = []string{"reboot", "vhangup"}
	machineAlso = []string{"pivot_root"}
)

// rule is what happens to one system call: allowed when any of the alternatives holds, else answered with errno. An
// alternative without conditions always holds.
type rule struct {
	alternatives [][]condition
	errno        uint16
}

// condition compares an argument: op on (argument & mask).
type condition struct {
	arg   uint32
	op    specs.LinuxSeccompOperator
	value uint64
	mask  uint64
}

func (r *rule) always() bool {
	return slices.ContainsFunc(r.alternatives, func(a []condition) bool { return len(a) == 0 })
}

// fixAttributes are the requests of ioctl that change a file's attributes. overlayfs passes them on to its upper layer with
// the rights of who mounted it (ovl_fileattr_set), when it has copied the file up from a layer where it had no project: so
// an owner could put files into project 0, or have a directory no longer pass its project on.
var fixAttributes = []uint64{
	0x40086602, // FS_IOC_SETFLAGS
	0x401c5820, // FS_IOC_FSSETXATTR
}

// rules joins the base profile and the lists: what the map lacks is refused with EPERM if the kernel interface is
// older than these tables, and with ENOSYS if it is newer.
func rules(kind Kind) (map[uint32]*rule, error) {
	caps, arch := applicationCaps, runtime.GOARCH
	if kind == Machine {
		caps = machineCaps
	}
	out := map[uint32]*rule{}
	at := func(nr uint32) *rule {
		if out[nr] == nil {
			out[nr] = &rule{errno: uint16(unix.EPERM)}
		}
		return out[nr]
	}
	for _, s := range moby.DefaultProfile().Syscalls {
		if s.Includes != nil && (!hasAll(caps, s.Includes.Caps) || len(s.Includes.Arches) > 0 && !slices.Contains(s.Includes.Arches, arch)) {
			continue
		}
		if s.Excludes != nil && (hasAny(caps, s.Excludes.Caps) || slices.Contains(s.Excludes.Arches, arch)) {
			continue
		}
		var alt []condition
		for _, a := range s.Args {
			c := condition{arg: uint32(a.Index), op: a.Op, value: a.Value, mask: ^uint64(0)}
			if a.Op == specs.OpMaskedEqual {
				// The profile's value is the mask, its second value what has to be left.
				c.mask, c.value, c.op = a.Value, a.ValueTwo, specs.OpEqualTo
			}
			alt = append(alt, c)
		}
		for _, name := range s.Names {
			nr, ok := numbers[name]
			if !ok {
				continue
			}
			switch s.Action {
			case specs.ActAllow:
				at(nr).alternatives = append(at(nr).alternatives, alt)
			case specs.ActErrno:
				if s.ErrnoRet != nil {
					at(nr).errno = uint16(*s.ErrnoRet)
				}
			default:
				return nil, fmt.Errorf("system call filter: action %s of the base profile is not known", s.Action)
			}
		}
	}
	set := func(names []string, errno syscall.Errno) {
		for _, name := range names {
			if nr, ok := numbers[name]; ok && !(kind == Machine && slices.Contains(machineMay, name)) {
				out[nr] = &rule{errno: uint16(errno)}
			}
		}
	}
	if kind == Machine {
		for _, name := range machineAlso {
			out[numbers[name]] = &rule{alternatives: [][]condition{nil}}
		}
	}
	set(refused, unix.EPERM)
	set(absent, unix.ENOSYS)
	return out, nil
}

func hasAll(have, want []string) bool {
	for _, w := range want {
		if !slices.Contains(have, w) {
			return false
		}
	}
	return true
}

func hasAny(have, want []string) bool {
	for _, w := range want {
		if slices.Contains(have, w) {
			return true
		}
	}
	return false
}

// Program returns the filter of a kind as the bytes of an array of struct sock_filter, in this machine's byte order. With
// fixed, file attributes (chattr) cannot be changed, as on a file system that has none: EOPNOTSUPP.
func Program(kind Kind, fixed bool) ([]byte, error) {
	r, err := rules(kind)
	if err != nil {
		return nil, err
	}
	if fixed {
		var allowed []condition
		for _, request := range fixAttributes {
			// The kernel looks at the low half alone.
			allowed = append(allowed, condition{arg: 1, op: specs.OpNotEqual, value: request, mask: 1<<32 - 1})
		}
		r[numbers["ioctl"]] = &rule{alternatives: [][]condition{allowed}, errno: uint16(unix.EOPNOTSUPP)}
		r[numbers["file_setattr"]] = &rule{errno: uint16(unix.EOPNOTSUPP)}
	}
	return assemble(r)
}

// Refused returns the answers of a profile to calls whose arguments have all bits set, by number up to the last known
// one: the errno, or 0 when the kernel decides. A test compares it with what a process inside meets.
func Refused(kind Kind) (map[int]int, error) {
	r, err := rules(kind)
	if err != nil {
		return nil, err
	}
	last := uint32(0)
	for _, nr := range numbers {
		last = max(last, nr)
	}
	out := map[int]int{}
	for nr := range last + 1 {
		switch x := r[nr]; {
		case x == nil:
			out[int(nr)] = int(unix.EPERM)
		case x.always() || x.holds([6]uint64{^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0)}):
			out[int(nr)] = 0
		default:
			out[int(nr)] = int(x.errno)
		}
	}
	return out, nil
}

// holds evaluates the alternatives of a rule.
func (r *rule) holds(args [6]uint64) bool {
	return slices.ContainsFunc(r.alternatives, func(alt []condition) bool {
		return !slices.ContainsFunc(alt, func(c condition) bool {
			v := args[c.arg] & c.mask
			return !(c.op == specs.OpEqualTo && v == c.value || c.op == specs.OpNotEqual && v != c.value || c.op == specs.OpLessThan && v < c.value)
		})
	})
}
