package glancebridge

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/confine"
)

// probeMain confines itself as a helper does and tries one thing; "done" is what must not be printed for any but
// "none".
func probeMain(args []string) int {
	policy := confine.Parser()
	if args[0] == "apply" {
		policy = confine.Applier(3)
	}
	if err := confine.Apply(policy); err != nil {
		fmt.Println("confine:", err)
		return 1
	}
	var err error
	switch args[1] {
	case "socket":
		_, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	case "exec":
		err = unix.Exec("/bin/true", []string{"true"}, nil)
	case "open-passwd":
		_, err = unix.Open("/etc/passwd", unix.O_RDONLY, 0)
	case "open-up":
		_, err = unix.Openat(3, "../../../../etc/passwd", unix.O_RDONLY, 0)
	case "mmap-exec":
		_, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	case "unshare":
		err = unix.Unshare(unix.CLONE_NEWNS)
	case "kill-parent":
		err = unix.Kill(-1, unix.SIGKILL)
	case "mknod-device":
		err = unix.Mknodat(3, "null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
	}
	if err != nil {
		fmt.Println("refused:", err)
		return 1
	}
	fmt.Println("done")
	return 0
}

// halfGlance gives the first half of the data, the rest when its gate opens.
type halfGlance struct {
	*FileGlance
	gate chan struct{}
}

func (g *halfGlance) Download(ctx context.Context, rc novalet.RequestContext, id string, off int64) (io.ReadCloser, int64, error) {
	rec, err := g.Get(ctx, rc, id)
	if err != nil {
		return nil, 0, err
	}
	r, start, err := g.FileGlance.Download(ctx, rc, id, off)
	if err != nil {
		return nil, 0, err
	}
	return &halfReader{gatedReader{ctx, g.gate, r}, rec.Size / 2}, start, nil
}

type halfReader struct {
	gatedReader
	free int64
}

func (r *halfReader) Read(p []byte) (int, error) {
	if r.free <= 0 {
		return r.gatedReader.Read(p)
	}
	n, err := r.ReadCloser.Read(p[:min(int64(len(p)), r.free)])
	r.free -= int64(n)
	return n, err
}

// await polls for something that another process does.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited a minute for %s", what)
}

// stallCommand makes the test binary an agent that hangs in the middle of a fetch.
const stallCommand = "stall-store"

func stallMain(args []string) int {
	g := &halfGlance{FileGlance: NewFileGlance(args[1]), gate: make(chan struct{})}
	s, err := Open(Options{Dir: args[0], Glance: g, Arch: "amd64"})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	_, err = s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: args[2], InstanceUUID: "inst-1"})
	fmt.Println(err)
	return 1
}
