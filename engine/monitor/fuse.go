package monitor

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/mnt"
)

// abortFUSE ends the file systems that processes inside serve. A process that dies with a file open on a server that does
// not answer any more waits for it, beyond SIGKILL, and with it the end of its pid namespace: a server may even wait for
// itself. The kernel's list of connections (Documentation/filesystems/fuse.rst) shows whose each is by the owner of
// its directory, an id that was mapped into the instance's user namespace: no other's are touched.
func (in *instance) abortFUSE() {
	fd, err := mnt.New("fusectl", "", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return // this kernel has no FUSE
	}
	dir := os.NewFile(uintptr(fd), "fusectl")
	defer dir.Close()
	// The mount's descriptor is not open for reading.
	list, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	conns := os.NewFile(uintptr(list), "connections")
	defer conns.Close()
	names, err := conns.Readdirnames(-1)
	if err != nil {
		return
	}
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(list, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Uid < in.spec.UIDBase || st.Uid-in.spec.UIDBase >= in.spec.UIDSize {
			continue
		}
		abort, err := unix.Openat(list, name+"/abort", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		_, err = unix.Write(abort, []byte("1"))
		unix.Close(abort)
		if err != nil {
			fmt.Fprintf(os.Stderr, "keeper: abort a file system of %s: %v\n", in.name(), err)
		}
	}
}
