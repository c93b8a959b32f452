package rootfs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/mnt"
	"github.com/novalet/novalet/internal/hosttest"
)

const (
	base = 3 << 20
	size = 1 << 16
)

// userNamespace is one whose ids start at base.
func userNamespace(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("/bin/sleep", "1000")
	m := []syscall.SysProcIDMap{{ContainerID: 0, HostID: base, Size: size}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: m, GidMappings: m}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func mounts(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestOverlay: both ways of mounting show all layers with the instance's ids, write to upper, and leave no trace in
// the mounts of the host.
func TestOverlay(t *testing.T) {
	hosttest.RequireRoot(t)
	userns := userNamespace(t)
	for name, overlay := range map[string]func(t *testing.T, lowers []int, upper, work string) (int, error){
		"attached": func(_ *testing.T, lowers []int, upper, work string) (int, error) {
			return attached(lowers, upper, work)
		},
		"detached": func(t *testing.T, lowers []int, upper, work string) (int, error) {
			fd, known, err := detached(lowers, upper, work)
			if !known {
				t.Skip("this kernel cannot: ", err)
			}
			return fd, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			// What separates options and layers may be in a path.
			dir, err := os.MkdirTemp("", "novalet, a:b")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			// As many as overlayfs takes (OVL_MAX_STACK).
			const layers = 500
			var lowers []int
			for i := range layers {
				l := filepath.Join(dir, fmt.Sprint("layer", i))
				if err := os.Mkdir(l, 0o755); err != nil {
					t.Fatal(err)
				}
				for _, f := range []string{"top", fmt.Sprint("file", i)} {
					if err := os.WriteFile(filepath.Join(l, f), fmt.Append(nil, i), 0o644); err != nil {
						t.Fatal(err)
					}
					if err := os.Chown(filepath.Join(l, f), 7, 8); err != nil {
						t.Fatal(err)
					}
				}
				fd, err := mnt.Clone(unix.AT_FDCWD, l)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(fd)
				if err := mnt.IDMap(fd, userns); err != nil {
					t.Fatal(err)
				}
				lowers = append(lowers, fd)
			}
			root := filepath.Join(dir, "root")
			if err := os.Mkdir(root, 0o755); err != nil {
				t.Fatal(err)
			}
			upper, work, err := MakeDirs(root, filepath.Join(dir, "layer0"), base, size)
			if err != nil {
				t.Fatal(err)
			}
			before := mounts(t)
			fd, err := overlay(t, lowers, upper, work)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if after := mounts(t); after != before {
				t.Errorf("mounts of the host were\n%s\nare\n%s", before, after)
			}
			see := fmt.Sprintf("/proc/self/fd/%d", fd)
			for i := range layers {
				f := filepath.Join(see, fmt.Sprint("file", i))
				var st unix.Stat_t
				if err := unix.Stat(f, &st); err != nil {
					t.Fatal(err)
				}
				if st.Uid != base+7 || st.Gid != base+8 {
					t.Errorf("file%d belongs to %d:%d", i, st.Uid, st.Gid)
				}
			}
			if b, err := os.ReadFile(filepath.Join(see, "top")); err != nil || string(b) != fmt.Sprint(layers-1) {
				t.Errorf("the top layer's file: %q, %v", b, err)
			}
			if err := os.WriteFile(filepath.Join(see, "top"), []byte("new"), 0); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(upper, "top")); err != nil || string(b) != "new" {
				t.Errorf("what was written is not in upper: %q, %v", b, err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("layer", layers-1), "top")); err != nil || string(b) != fmt.Sprint(layers-1) {
				t.Errorf("what was written is in the layer: %q, %v", b, err)
			}
			var fs unix.Statfs_t
			if err := unix.Fstatfs(fd, &fs); err != nil || fs.Flags&unix.ST_NODEV == 0 {
				t.Errorf("flags of the mount: %#x, %v", fs.Flags, err)
			}
		})
	}
}
