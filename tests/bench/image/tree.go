package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
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
func (b *bench) describe(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	var files, dirs, others int
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			files++
		case tar.TypeDir:
			dirs++
		default:
			others++
		}
	}
	b.r.Options["tar_bytes"] = strconv.FormatInt(st.Size(), 10)
	b.r.Options["files"], b.r.Options["directories"], b.r.Options["others"] = strconv.Itoa(files), strconv.Itoa(dirs), strconv.Itoa(others)
	return nil
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
