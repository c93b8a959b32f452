package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

type capHeader struct {
	version uint32
	pid     int32
}

// capData is struct __user_cap_data_struct; what is inheritable stays empty.
type capData struct{ effective, permitted, _ uint32 }

func capset(hdr *capHeader, data *[2]capData) error {
	err := onAllThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(hdr)), uintptr(unsafe.Pointer(data)), 0)
	runtime.KeepAlive(hdr)
	runtime.KeepAlive(data)
	if err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

// rulesetAttr is struct landlock_ruleset_attr (linux/landlock.h); its size tells the kernel which members are meant.
type rulesetAttr struct {
	fs, net, scoped uint64
}

// pathAttr is struct landlock_path_beneath_attr, which is packed.
type pathAttr struct {
	access uint64
	fd     int32
}

// The rights of the file system by the ABI that knows them.
const (
	fsABI1 = 1<<13 - 1
	fsABI2 = fsABI1 | unix.LANDLOCK_ACCESS_FS_REFER
	fsABI3 = fsABI2 | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	fsABI5 = fsABI3 | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV

	netABI4 = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	scoped6 = 3 // abstract unix sockets, signals
)

// writeAccess is what the applier does below its folder: nothing is ever read or run there. MAKE_CHAR is for
// overlayfs's deletion marks; other devices need a right of the host's.
const writeAccess = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR |
	unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_MAKE_CHAR |
	unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO |
	unix.LANDLOCK_ACCESS_FS_MAKE_SYM | unix.LANDLOCK_ACCESS_FS_REFER | unix.LANDLOCK_ACCESS_FS_TRUNCATE

// restrictFiles leaves no file but those below dir, and no network.
func restrictFiles(dir int) error {
	abi, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	// EPERM is what the filter of a container around the agent answers to calls that it does not know.
	if e == unix.ENOSYS || e == unix.EOPNOTSUPP || e == unix.EPERM {
		return nil
	}
	if e != 0 {
		return fmt.Errorf("ask for Landlock: %w", e)
	}
	attr, size := rulesetAttr{fs: fsABI1}, uintptr(8)
	switch {
	case abi >= 6:
		attr, size = rulesetAttr{fsABI5, netABI4, scoped6}, 24
	case abi >= 5:
		attr, size = rulesetAttr{fsABI5, netABI4, 0}, 16
	case abi >= 4:
		attr, size = rulesetAttr{fsABI3, netABI4, 0}, 16
	case abi == 3:
		attr.fs = fsABI3
	case abi == 2:
		attr.fs = fsABI2
	}
	if dir >= 0 && abi < 2 {
		return nil // the first ABI forbids all links between directories
	}
	fd, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if e != 0 {
		return fmt.Errorf("make Landlock ruleset: %w", e)
	}
	defer unix.Close(int(fd))
	if dir >= 0 {
		rule := pathAttr{access: writeAccess & attr.fs, fd: int32(dir)}
		if _, _, e := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, unix.LANDLOCK_RULE_PATH_BENEATH,
			uintptr(unsafe.Pointer(&rule)), 0, 0, 0); e != 0 {
			return fmt.Errorf("add Landlock rule: %w", e)
		}
	}
	if err := onAllThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); err != nil {
		return fmt.Errorf("enforce Landlock: %w", err)
	}
	return nil
}
