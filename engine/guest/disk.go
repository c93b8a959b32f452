package guest

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/holes"
	"github.com/novalet/novalet/engine/mnt"
)

// blockDirs are where /sys lists block devices. The host's are hidden; the instance's own disks take their place, as
// far as lsblk looks. They are no devices: there is nothing to open but the file system.
var blockDirs = []string{"block", "class/block", "dev/block"}

// showDisks attaches the further disks in the root.
func (r *root) showDisks() error {
	for i, d := range r.cfg.Disks {
		at, err := r.place(strings.Trim(d.Path, "/"), 0o755)
		if err != nil {
			return err
		}
		err = mnt.Attach(r.disks[i], at)
		unix.Close(at)
		unix.Close(r.disks[i])
		if err != nil {
			return fmt.Errorf("%s: %w", d.Path, err)
		}
	}
	return nil
}

// showBlocks covers the lists of block devices.
func (r *root) showBlocks() error {
	if holes.Open(holes.Masks) {
		return nil
	}
	for _, dir := range blockDirs {
		if len(r.disks) == 0 {
			if err := r.over(r.sys, dir, 0, "", 0); err != nil {
				return err
			}
			continue
		}
		at, err := mnt.OpenBeneath(r.sys, dir, unix.O_PATH)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		err = r.coverBlocks(dir, at)
		unix.Close(at)
		if err != nil {
			return fmt.Errorf("/sys/%s: %w", dir, err)
		}
	}
	return nil
}

func (r *root) coverBlocks(dir string, at int) error {
	m, err := mnt.New("tmpfs", "size=512k,nr_inodes=1k,mode=0755", noExec)
	if err != nil {
		return err
	}
	defer unix.Close(m)
	for i, d := range r.cfg.Disks {
		var st unix.Stat_t
		if err := unix.Fstat(r.disks[i], &st); err != nil {
			return fmt.Errorf("look at disk: %w", err)
		}
		number := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
		switch dir {
		case "block":
			err = describeBlock(m, d.Name, number, d.Size)
		case "class/block":
			err = unix.Symlinkat("../../block/"+d.Name, m, d.Name)
		default:
			err = unix.Symlinkat("../../block/"+d.Name, m, number)
		}
		if err != nil {
			return err
		}
	}
	if err := mnt.SetAttr(m, unix.MOUNT_ATTR_RDONLY); err != nil {
		return err
	}
	return mnt.Attach(m, at)
}

// describeBlock makes the files of one device (Documentation/ABI/stable/sysfs-block); sizes are in 512-byte sectors.
func describeBlock(dir int, name, number string, size int64) error {
	for _, d := range []string{name, name + "/queue"} {
		if err := unix.Mkdirat(dir, d, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", d, err)
		}
	}
	for _, f := range [][2]string{{"dev", number}, {"size", fmt.Sprint(size / 512)}, {"ro", "0"}, {"removable", "0"}, {"hidden", "0"},
		{"queue/rotational", "0"}, {"queue/logical_block_size", "512"}, {"queue/physical_block_size", "512"}} {
		fd, err := unix.Openat(dir, name+"/"+f[0], unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o444)
		if err == nil {
			_, err = unix.Write(fd, []byte(f[1]+"\n"))
			unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("make %s: %w", f[0], err)
		}
	}
	return nil
}
