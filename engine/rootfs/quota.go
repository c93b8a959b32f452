package rootfs

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Quota is the project quota of a file system: trees whose files carry a project id have limits in common. XFS has it
// when mounted with prjquota; ext4 when made with -O project,quota and mounted with prjquota. It is asked by the
// commands that both know (linux/dqblk_xfs.h) and by descriptor, which is Linux 5.14.
//
// overlayfs writes with the rights of who mounted it, less CAP_SYS_RESOURCE (ovl_fill_super): so ext4, which lets the
// holder of that capability pass its limits, holds them against what is written through a mount of Overlay.
type Quota struct{ dir *os.File }

// Usage is what a project has in use, and its hard limits (0 is none).
type Usage struct{ Bytes, Inodes, MaxBytes, MaxInodes int64 }

// Of linux/quota.h and linux/dqblk_xfs.h.
const (
	prjQuota       = 2
	xGetQuota      = 'X'<<8 + 3
	xSetLimits     = 'X'<<8 + 4
	xGetState      = 'X'<<8 + 5
	xGetNext       = 'X'<<8 + 9
	projectEnfd    = 1 << 5 // FS_QUOTA_PDQ_ENFD
	fieldLimits    = 1<<1 | 1<<3
	projectQuota   = 2 // FS_PROJ_QUOTA
	basicBlock     = 512
	fsGetXattr     = 0x801c581f // FS_IOC_FSGETXATTR
	fsSetXattr     = 0x401c5820 // FS_IOC_FSSETXATTR
	projectInherit = 0x200      // FS_XFLAG_PROJINHERIT
)

// diskQuota is struct fs_disk_quota.
type diskQuota struct {
	version, flags       int8
	fieldmask            uint16
	id                   uint32
	bytesHard, bytesSoft uint64 // in basic blocks, as count is
	inosHard, inosSoft   uint64
	count, inos          uint64
	_                    [56]byte // timers, warnings, real-time
}

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	xflags, extsize, nextents, project, cowextsize uint32
	_                                              [8]byte
}

// OpenQuota finds the project quota that is enforced where dir lies. The error says why there is
// none.
func OpenQuota(dir string) (*Quota, error) {
	f, err := openDir(dir)
	if err != nil {
		return nil, fmt.Errorf("find project quota: %w", err)
	}
	q := &Quota{dir: f}
	// A directory in a project cannot take in trees of other projects, and counts for its own already.
	if project, err := ProjectOf(dir); err == nil && project != 0 {
		f.Close()
		return nil, fmt.Errorf("find project quota: %s is in project %d already: %w", dir, project, unix.EXDEV)
	}
	// struct fs_quota_stat: a byte, then the flags.
	var state [128]byte
	err = q.ctl(xGetState, 0, unsafe.Pointer(&state))
	if err == nil && *(*uint16)(unsafe.Pointer(&state[2]))&projectEnfd == 0 {
		err = unix.ENOSYS
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("find project quota of %s: %w", dir, err)
	}
	return q, nil
}

// Close lets go of the file system.
func (q *Quota) Close() error { return q.dir.Close() }

func (q *Quota) ctl(cmd int, project uint32, p unsafe.Pointer) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, q.dir.Fd(), uintptr(cmd<<8|prjQuota), uintptr(project), uintptr(p), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// Get reads what a project uses; zeros when nothing is known of it.
func (q *Quota) Get(project uint32) (Usage, error) {
	var d diskQuota
	if err := q.ctl(xGetQuota, project, unsafe.Pointer(&d)); err != nil && err != unix.ENOENT {
		return Usage{}, fmt.Errorf("read quota of project %d: %w", project, err)
	}
	return d.usage(), nil
}

// Next reads the project with the least id from this one on; false when there is none.
func (q *Quota) Next(project uint32) (uint32, Usage, bool, error) {
	var d diskQuota
	err := q.ctl(xGetNext, project, unsafe.Pointer(&d))
	if errors.Is(err, unix.ENOENT) {
		return 0, Usage{}, false, nil
	}
	if err != nil {
		return 0, Usage{}, false, fmt.Errorf("list quotas: %w", err)
	}
	return d.id, d.usage(), true, nil
}

func (d *diskQuota) usage() Usage {
	return Usage{Bytes: int64(d.count) * basicBlock, Inodes: int64(d.inos), MaxBytes: int64(d.bytesHard) * basicBlock, MaxInodes: int64(d.inosHard)}
}

// Set gives a project hard limits; 0 is none. It may be repeated; below what is in use, nothing more can be written.
func (q *Quota) Set(project uint32, bytes, inodes int64) error {
	d := diskQuota{version: 1, flags: projectQuota, fieldmask: fieldLimits, id: project,
		bytesHard: uint64(bytes) / basicBlock, inosHard: uint64(inodes)}
	if err := q.ctl(xSetLimits, project, unsafe.Pointer(&d)); err != nil {
		return fmt.Errorf("limit project %d: %w", project, err)
	}
	return nil
}

// SetProject makes an empty directory and all that will be made in it a project's.
func SetProject(dir string, project uint32) error {
	return xattr(dir, func(f *os.File, x *fsxattr) error {
		x.project = project
		x.xflags |= projectInherit
		return control(f, fsSetXattr, x)
	})
}

// ProjectOf reads a directory's project.
func ProjectOf(dir string) (uint32, error) {
	var project uint32
	err := xattr(dir, func(_ *os.File, x *fsxattr) error {
		project = x.project
		return nil
	})
	return project, err
}

func xattr(dir string, f func(*os.File, *fsxattr) error) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("project of %s: %w", dir, err)
	}
	d := os.NewFile(uintptr(fd), dir)
	defer d.Close()
	var x fsxattr
	if err = control(d, fsGetXattr, &x); err == nil {
		err = f(d, &x)
	}
	if err != nil {
		return fmt.Errorf("project of %s: %w", dir, err)
	}
	return nil
}

func control(f *os.File, request uintptr, x *fsxattr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(x))); errno != 0 {
		return errno
	}
	return nil
}
