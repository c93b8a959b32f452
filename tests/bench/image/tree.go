package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// debian makes a root file system of what Debian's own cloud images are made of: some 600 MB, 220 MB with gzip.
func debian(dir string) error {
	packages := []string{"linux-image-cloud-" + runtime.GOARCH, "grub-efi-" + runtime.GOARCH + "-bin", "cloud-init", "cloud-guest-utils",
		"cloud-initramfs-growroot", "openssh-server", "sudo", "curl", "python3", "locales", "unattended-upgrades", "chrony", "vim", "man-db",
		"tcpdump", "rsync"}
	return command("mmdebstrap", "--quiet", "--mode=root", "--variant=important", "--include="+strings.Join(packages, ","), "bookworm", dir)
}

// describe writes into the result what the tree is made of.
func (b *bench) describe() error {
	var bytes, files, dirs, others int64
	err := filepath.WalkDir(b.tree, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("look at the tree: %w", err)
		}
		switch {
		case d.IsDir():
			dirs++
		case d.Type().IsRegular():
			files++
			if fi, err := d.Info(); err == nil {
				bytes += fi.Size()
			}
		default:
			others++
		}
		return nil
	})
	for name, n := range map[string]int64{"bytes": bytes, "files": files, "directories": dirs, "others": others} {
		b.r.Options[name] = strconv.FormatInt(n, 10)
	}
	return err
}

// forget has the kernel give back the memory that caches the files below dir, which are on disk.
func forget(dir string) {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		fd, err := unix.Open(p, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NOATIME|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil
		}
		return errors.Join(unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED), unix.Close(fd))
	})
}
