// Package holes switches single defences off in a program that the tests build with the tag novalet_holes, so that they
// can show of each attack that it works without its defence. In every other program Open is constantly false, and the
// compiler leaves nothing of it.
//
// It starts no goroutine and keeps nothing on disk.
package holes

// The defences that can be switched off.
const (
	Masks       = "novalet-hole-masks"       // hidden and read-only entries of /proc and /sys
	UserNS      = "novalet-hole-userns"      // the range of ids
	Seccomp     = "novalet-hole-seccomp"     // the system call filter
	Devices     = "novalet-hole-devices"     // the choice of device nodes and the devices controller
	NoNewPrivs  = "novalet-hole-nonewprivs"  // no_new_privs
	Caps        = "novalet-hole-caps"        // the drop of capabilities
	Memory      = "novalet-hole-memory"      // the memory controller
	PIDs        = "novalet-hole-pids"        // the pids controller
	View        = "novalet-hole-view"        // the /proc view
	Sysinfo     = "novalet-hole-sysinfo"     // the answers to sysinfo(2)
	Descriptors = "novalet-hole-descriptors" // close-on-exec
	Trace       = "novalet-hole-trace"       // helpers that cannot be traced
	Propagation = "novalet-hole-propagation" // private mounts
	CgroupNS    = "novalet-hole-cgroupns"    // the cgroup namespace
)
