package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/novalet/novalet/glancebridge/disk/internal/disktest"
	"github.com/novalet/novalet/internal/hosttest"
)

// TestDistributionImage compares what is read of a whole cloud image with what the kernel shows of its root. The image is one
// that tests/images/cloudimage.sh made; tests/images/bothways.sh runs this.
func TestDistributionImage(t *testing.T) {
	img := os.Getenv("NOVALET_DISK_IMAGE")
	if img == "" {
		t.Skip("runs in make test-cloudimage, which sets NOVALET_DISK_IMAGE to a disk image")
	}
	hosttest.RequireRoot(t)
	disktest.Tool(t, "qemu-utils fdisk", "qemu-img", "sfdisk")
	raw := filepath.Join(t.TempDir(), "raw")
	disktest.Run(t, "qemu-img", "convert", "-O", "raw", img, raw)
	var start, size int64
	for _, line := range strings.Split(disktest.Run(t, "sfdisk", "-d", raw), "\n") {
		if name, rest, ok := strings.Cut(line, " : "); ok && strings.HasSuffix(name, "raw1") {
			if _, err := fmt.Sscanf(strings.ReplaceAll(rest, " ", ""), "start=%d,size=%d", &start, &size); err != nil {
				t.Fatalf("partition %q: %v", line, err)
			}
		}
	}
	dir, end := mount(t, raw, fmt.Sprintf("ro,offset=%d,sizelimit=%d", start*512, size*512))
	want := disktest.FromDir(t, dir)
	end()
	i := mustOpen(t, img, Options{})
	got := disktest.FromWalk(t, i.Walk)
	if len(want) < 1000 || i.Info().Partition != 1 {
		t.Fatalf("%d files on partition %d", len(want), i.Info().Partition)
	}
	t.Logf("%d entries on %s", len(got), i.Info().Filesystem)
	disktest.Compare(t, want, got, disktest.Ignore{Xattrs: func(_, key string) bool {
		return strings.HasPrefix(key, "trusted.SGI_ACL_") // the kernel shows access lists twice
	}})
	labels := 0
	for _, n := range got {
		if n.Xattrs["security.selinux"] != "" {
			labels++
		}
	}
	if i.Info().Filesystem == "xfs" && labels < len(got)*9/10 {
		t.Errorf("%d of %d entries have a label", labels, len(got))
	}
}
