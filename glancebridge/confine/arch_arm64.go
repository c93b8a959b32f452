package confine

import "golang.org/x/sys/unix"

const (
	auditArch  = unix.AUDIT_ARCH_AARCH64
	x32Bit     = 0
	sysFstatat = unix.SYS_FSTATAT
)

// archCalls exist on this architecture only.
var archCalls []uintptr
