package glancebridge

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

// borrow completes a layer whose hard links lead to files of the layers below: the file's content comes along,
// as it does when overlayfs copies up. The tree then depends on what is below, so its name does too.
func (s *Store) borrow(m *layerMeta, tree string, links []layer.Link, below []string) error {
	h := sha256.New()
	fmt.Fprintf(h, "novalet borrowed\n%s\n%s", m.ID, strings.Join(below, "\n"))
	m.ID = "sha256:" + hex.EncodeToString(h.Sum(nil))
	m.Below = slices.Clone(below)
	if s.has(m.ID) {
		return nil
	}
	root, err := unix.Open(tree, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer unix.Close(root)
	done := map[string]string{} // target → the first name that got it
	left := links
	for len(left) > 0 {
		var next []layer.Link
		for _, l := range left {
			name, target := string(l.Name), string(l.Target)
			var err error
			if first, ok := done[target]; ok {
				err = linkBeneath(root, first, root, name)
			} else if err = s.copyUp(root, name, target, below); err == nil {
				done[target] = name
			}
			switch {
			case errors.Is(err, unix.ENOENT):
				// Perhaps a link to another borrowed one.
				if first, ok := done[target]; ok || slices.ContainsFunc(left, func(o layer.Link) bool { return string(o.Name) == target }) {
					_ = first
					next = append(next, l)
					continue
				}
				return layer.Refuse("the image has a hard link to a file it does not hold: %q", cut(target))
			case err != nil:
				return err
			}
			m.Entries++
		}
		if len(next) == len(left) {
			return layer.Refuse("the image has a hard link to a file it does not hold: %q", cut(string(next[0].Target)))
		}
		left = next
	}
	return nil
}

// copyUp copies a file of the layers below, the topmost that has it, to name.
func (s *Store) copyUp(root int, name, target string, below []string) error {
	// A target that has been borrowed already is in the layer itself.
	if err := linkBeneath(root, target, root, name); !errors.Is(err, unix.ENOENT) {
		return err
	}
	for _, id := range slices.Backward(below) {
		lower, err := unix.Open(s.layerDir(id)+"/fs", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open layer below: %w", err)
		}
		src, err := openBeneath(lower, target, unix.O_PATH)
		unix.Close(lower)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return unix.ENOENT // a symlink or no directory on the way: nothing that a hard link leads to
		}
		err = copyFile(src, root, name)
		unix.Close(src)
		return err
	}
	return unix.ENOENT
}

// copyFile copies a regular file with everything that belongs to it.
func copyFile(src, root int, name string) error {
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.ENOENT
	}
	in, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", src))
	if err != nil {
		return err
	}
	defer in.Close()
	dir, base := path.Split(name)
	parent := root
	if dir != "" {
		if parent, err = openBeneath(root, strings.TrimSuffix(dir, "/"), unix.O_PATH|unix.O_DIRECTORY); err != nil {
			return layer.Refuse("the image has a hard link below something that is no directory: %q", cut(name))
		}
		defer unix.Close(parent)
	}
	fd, err := unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(fd), base)
	defer out.Close()
	if _, err := out.ReadFrom(in); err != nil {
		return err
	}
	if err := out.Chown(int(st.Uid), int(st.Gid)); err != nil && os.Geteuid() == 0 {
		return err
	}
	if err := unix.Fchmod(fd, st.Mode&07777); err != nil {
		return err
	}
	if err := copyXattrs(int(in.Fd()), fd); err != nil {
		return err
	}
	ts := []unix.Timespec{st.Atim, st.Mtim}
	return unix.UtimesNanoAt(parent, base, ts, unix.AT_SYMLINK_NOFOLLOW)
}

func copyXattrs(from, to int) error {
	names, err := listXattrs(from)
	if err != nil {
		return err
	}
	for _, n := range names {
		v, err := getXattr(from, n)
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(to, n, v, 0); err != nil {
			return fmt.Errorf("copy xattr %s: %w", n, err)
		}
	}
	return nil
}

func listXattrs(fd int) ([]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Flistxattr(fd, buf)
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs: %w", err)
	}
	var names []string
	for _, s := range strings.Split(string(buf[:n]), "\x00") {
		if s != "" {
			names = append(names, s)
		}
	}
	return names, nil
}

func getXattr(fd int, name string) ([]byte, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Fgetxattr(fd, name, buf)
	if err != nil {
		return nil, fmt.Errorf("read xattr %s: %w", name, err)
	}
	return buf[:n], nil
}

// linkBeneath makes a hard link between two paths that are followed nowhere.
func linkBeneath(fromRoot int, from string, toRoot int, to string) error {
	fdir, fbase := path.Split(from)
	tdir, tbase := path.Split(to)
	open := func(root int, dir string) (int, error) {
		if dir == "" {
			dir = "."
		}
		return openBeneath(root, dir, unix.O_PATH|unix.O_DIRECTORY)
	}
	f, err := open(fromRoot, strings.TrimSuffix(fdir, "/"))
	if err != nil {
		return err
	}
	defer unix.Close(f)
	t, err := open(toRoot, strings.TrimSuffix(tdir, "/"))
	if err != nil {
		return err
	}
	defer unix.Close(t)
	return unix.Linkat(f, fbase, t, tbase, 0)
}

// cut shortens a name for a text.
func cut(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
