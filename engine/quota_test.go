package engine

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/rootfs"
	"github.com/novalet/novalet/internal/hosttest"
)

// onQuota runs a test on each file system that has project quota, in an image file of its own. The kernels of many
// development machines have none.
func onQuota(t *testing.T, f func(t *testing.T)) {
	hosttest.RequireRoot(t)
	if os.Getenv("NOVALET_QUOTA_TESTS") != "1" {
		t.Skip("needs a kernel with project quota of XFS and ext4, and NOVALET_QUOTA_TESTS=1: make test-vm has both")
	}
	for fstype, mkfs := range map[string][]string{"xfs": {"-q"}, "ext4": {"-q", "-F", "-O", "project,quota"}} {
		t.Run(fstype, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "novalet-quota")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			image, at := filepath.Join(dir, "image"), filepath.Join(dir, "m")
			for _, args := range [][]string{{"truncate", "-s", "1G", image}, append(append([]string{"mkfs." + fstype}, mkfs...), image),
				{"mkdir", at}, {"mount", "-o", "loop,prjquota", image, at}} {
				if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v: %s", args[0], err, out)
				}
			}
			t.Cleanup(func() {
				if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
					t.Errorf("umount: %v: %s", err, out)
				}
			})
			if err := os.Chmod(at, 0o711); err != nil {
				t.Fatal(err)
			}
			// Where newEngine makes its directories.
			t.Setenv("TMPDIR", at)
			f(t)
		})
	}
}

// project is an instance's project, and what is known of it.
func (te *testEngine) project(id string) (uint32, rootfs.Usage) {
	te.t.Helper()
	project, err := te.projects.treeProject(te.dir(id))
	if err != nil || project == 0 {
		te.t.Fatalf("project of %s: %d %v", id, project, err)
	}
	u, err := te.projects.quota.Get(project)
	if err != nil {
		te.t.Fatal(err)
	}
	return project, u
}

// TestQuota: bytes and inodes of a root end where the flavor says, whatever its neighbours do; df shows it; a running
// instance gets other limits; they hold across stops, restarts of the agent and rebuilds, and go with the instance.
func TestQuota(t *testing.T) {
	onQuota(t, func(t *testing.T) {
		te := newEngine(t)
		ctx := te.ctx()
		layers := busybox(t)
		limits := novalet.Limits{RootBytes: 64 << 20, RootInodes: 300}
		spec := app(layers, "sleep 100000")
		te.run("full", limits, spec)
		te.run("other", limits, spec)
		project, _ := te.project("full")
		if n, _ := te.project("other"); n == project {
			t.Fatalf("both have project %d", n)
		}
		kib := func(id string) int {
			t.Helper()
			out, _ := te.sh(id, "df -k / | awk 'NR==2{print $2}'")
			n, err := strconv.Atoi(strings.TrimSpace(out))
			if err != nil {
				t.Fatalf("df of %s: %q", id, out)
			}
			return n
		}
		if n := kib("full"); n != 64<<10 {
			t.Errorf("df shows %d KiB", n)
		}
		// fill writes until nothing more fits, and returns the MiB that did.
		fill := func(id string) int {
			t.Helper()
			out, _ := te.sh(id, "dd if=/dev/zero of=/fill bs=64k count=4000 2>&1; sync -d /fill; du -k /fill | cut -f1")
			lines := strings.Split(strings.TrimSpace(out), "\n")
			n, err := strconv.Atoi(lines[len(lines)-1])
			if err != nil || !strings.Contains(out, "No space left") && !strings.Contains(out, "uota exceeded") {
				t.Errorf("fill %s: %q", id, out)
			}
			return n >> 10
		}
		if n := fill("full"); n < 60 || n > 64 {
			t.Errorf("%d MiB could be written of 64", n)
		}
		st, err := te.Stats(ctx, "full")
		if err != nil || st.RootBytes < 60<<20 || st.RootBytes > 64<<20 || st.RootInodes < 2 {
			t.Errorf("counted: %+v %v", st, err)
		}
		if out, code := te.sh("other", "dd if=/dev/zero of=/fill bs=1M count=32 2>&1 && sync -d /fill && rm /fill"); code != 0 {
			t.Errorf("the other is hurt: %q", out)
		}
		touch := func(id string) string {
			out, _ := te.sh(id, "i=0; while echo 2>/dev/null >/tmp/f$i; do i=$((i+1)); done; rm -f /tmp/f*; echo $i")
			return strings.TrimSpace(out)
		}
		te.sh("full", "rm /fill")
		if n, err := strconv.Atoi(touch("full")); err != nil || n < 250 || n > 300 {
			t.Errorf("%d files could be made of 300, %v", n, err)
		}

		grown := novalet.Limits{RootBytes: 96 << 20, RootInodes: 300}
		if err := te.Update(ctx, "full", grown); err != nil {
			t.Fatal(err)
		}
		if n := kib("full"); n != 96<<10 {
			t.Errorf("after the update df shows %d KiB", n)
		}
		if n := fill("full"); n < 88 || n > 96 {
			t.Errorf("after the update %d MiB could be written of 96", n)
		}
		if err := te.Update(ctx, "full", limits); err != nil {
			t.Fatal(err)
		}
		if out, code := te.sh("full", "echo more >>/fill; sync -d /fill; dd if=/dev/zero of=/more bs=64k count=32 2>&1"); code == 0 {
			t.Errorf("more than the new limit is in use, and it writes: %q", out)
		}

		// Another agent that makes disks: what is there stays as it is, what is new is not.
		te.Close()
		te.opts.RootLimits = LimitPool
		te.open()
		if n, _ := te.project("full"); n != project || kib("full") != 64<<10 {
			t.Errorf("after the restart its project is %d, df shows %d", n, kib("full"))
		}
		te.sh("full", "rm -f /fill /more; echo kept >/kept")
		te.run("disk", novalet.Limits{RootBytes: 32 << 20}, spec)
		if !te.disk("disk").Exists() || te.hasTree("disk") {
			t.Error("a disk was asked for")
		}
		te.Close()
		te.opts.RootLimits = LimitQuota
		te.open()
		if out, _ := te.sh("disk", "stat -f -c %T /; df -k / | awk 'NR==2 && $2<32768 {print \"small\"}'"); !strings.Contains(out, "small") {
			t.Errorf("the instance with a disk: %q", out)
		}
		if err := te.Stop(ctx, "full", novalet.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "full", Limits: grown}); err != nil {
			t.Fatal(err)
		}
		if err := te.Start(ctx, "full", nil); err != nil {
			t.Fatal(err)
		}
		if out, _ := te.sh("full", "cat /kept"); out != "kept\n" || kib("full") != 96<<10 {
			t.Errorf("after a stop: %q, %d KiB", out, kib("full"))
		}
		// What a snapshot reads.
		root, err := te.Root(ctx, "full")
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(root.Upper, "kept")); err != nil || string(b) != "kept\n" {
			t.Errorf("its upper directory: %q %v", b, err)
		}
		rescue := app(layers, "sleep 100000")
		rescue.Rescue = "/mnt"
		if err := te.Stop(ctx, "full", novalet.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "full", Limits: grown}); err != nil {
			t.Fatal(err)
		}
		if err := te.Start(ctx, "full", rescue); err != nil {
			t.Fatal(err)
		}
		if out, _ := te.sh("full", "cat /mnt/kept"); out != "kept\n" {
			t.Errorf("in the rescue: %q", out)
		}

		// A rebuild: the root goes, another one comes.
		if err := te.Destroy(ctx, "full", novalet.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
		te.run("full", limits, spec)
		n, u := te.project("full")
		if u.MaxBytes != 64<<20 || u.Bytes > 1<<20 || u.Inodes > 100 {
			t.Errorf("after a rebuild: project %d, %+v", n, u)
		}
		// The old root is removed in the background: its project may be the new one's already.
		eventually(t, "the project of the removed root is free", func() string {
			if u, err := te.projects.quota.Get(project); n != project && (err != nil || u != (rootfs.Usage{})) {
				return fmt.Sprint(u, err)
			}
			return ""
		})
	})
}

// TestQuotaKilledAgent: agents that are killed while they make and remove limited roots leave no limit, and none out.
func TestQuotaKilledAgent(t *testing.T) {
	onQuota(t, func(t *testing.T) {
		te := newEngine(t)
		killAgents(t, te, 32<<20)
		stays, u := te.project("stays")
		if u.MaxBytes != 32<<20 {
			t.Errorf("the limit of what stayed: %+v", u)
		}
		// As left by one that was killed between the limit and the tree.
		if err := te.projects.quota.Set(te.projects.first+7, 1<<20, 1); err != nil {
			t.Fatal(err)
		}
		te.Close()
		te.open()
		eventually(t, "no other limit is left", func() string {
			for at := te.projects.first; ; at++ {
				p, u, ok, err := te.projects.quota.Next(at)
				if err != nil || !ok {
					return ""
				}
				if at = p; p != stays && u != (rootfs.Usage{}) {
					return fmt.Sprintf("project %d: %+v", p, u)
				}
			}
		})
	})
}

// TestAttackQuota: no file of an instance gets out of its project, by the attributes of files that are the instance's own
// or still a layer's, in the instance or in a user namespace of its own.
func TestAttackQuota(t *testing.T) {
	onQuota(t, func(t *testing.T) {
		te := newEngine(t)
		layers := attacker(t)
		for _, d := range []string{"opt/lower", "opt/flags"} {
			if err := os.MkdirAll(filepath.Join(layers[0].Path, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range []string{"opt/a", "opt/b"} {
			if err := os.WriteFile(filepath.Join(layers[0].Path, f), []byte("layer\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		try := func(id string, c *novalet.ContainerSpec) (out []string) {
			t.Helper()
			te.run(id, novalet.Limits{RootBytes: 64 << 20}, c)
			te.sh(id, "mkdir /own; echo x >/own/file")
			te.try(t, id, "project")
			if c.Kind == novalet.KindMachine {
				te.try(t, id, "inuserns project")
			}
			te.sh(id, "echo more >>/opt/a; echo more >>/opt/b; for d in /opt/lower /opt/flags /own; do mkdir $d/sub; echo x >$d/new; echo y >$d/sub/new; done")
			project, _ := te.project(id)
			root, err := te.Root(te.ctx(), id)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			err = filepath.WalkDir(root.Upper, func(p string, d fs.DirEntry, err error) error {
				if err != nil || !d.IsDir() && !d.Type().IsRegular() {
					return err
				}
				n++
				x, err := attributes(p)
				if err == nil && (x.project != project || d.IsDir() && x.flags&0x200 == 0) {
					out = append(out, fmt.Sprintf("%s: project %d, flags %#x", p[len(root.Upper):], x.project, x.flags))
				}
				return err
			})
			if err != nil || n < 12 {
				t.Errorf("%d files, %v", n, err)
			}
			return out
		}
		if out := try("app", app(layers, "sleep 100000")); len(out) > 0 {
			t.Errorf("app: %q", out)
		}
		if out := try("machine", machineOf(layers)); len(out) > 0 {
			t.Errorf("machine: %q", out)
		}
		// Without what stops it, it works: it is an attack.
		te.trees = te.shut
		out := try("open", app(layers, "sleep 100000"))
		if len(out) == 0 {
			t.Error("it fails with the defence off: it shows nothing")
		}
		t.Logf("with the defence off: %q", out)
	})
}

// fileAttributes is struct fsxattr of linux/fs.h.
type fileAttributes struct {
	flags, _, _, project, _ uint32
	_                       [8]byte
}

func attributes(path string) (x fileAttributes, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return x, err
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x801c581f, uintptr(unsafe.Pointer(&x))); errno != 0 {
		err = errno
	}
	return x, err
}
