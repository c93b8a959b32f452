package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/novalet/novalet"
)

// crashCommand makes the test binary a process that kills itself in the middle of a fetch.
const crashCommand = "crash-store"

// crashMain fetches an image and dies at the n-th call of a stage: args are the store, the images, the image, the stage.
func crashMain(args []string) int {
	atStage = func(name string) {
		if name == args[3] {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	s, err := Open(Options{Dir: args[0], Glance: NewFileGlance(args[1]), Arch: "amd64", Unconfined: true})
	if err == nil {
		_, err = s.Prepare(context.Background(), &novalet.ImageRequest{ImageID: args[2], InstanceUUID: "inst-1"})
		err = errors.Join(err, s.Close())
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// TestCrashAnywhere kills the process at each stage of a fetch. The next start must find a store that is whole, and a
// second fetch must succeed.
func TestCrashAnywhere(t *testing.T) {
	ctx := context.Background()
	images := t.TempDir()
	id := addImage(t, images, dockerArchive(t, map[string]any{"Cmd": []string{"/x"}}, makeTar(t, member{name: "x", data: "1"}),
		makeTar(t, member{name: "y", data: "2"})), nil)
	for _, stage := range []string{"unpacked", "layer complete", "layer published", "before record", "record written", "layer durable"} {
		t.Run(stage, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "store")
			out, err := exec.Command(os.Args[0], crashCommand, dir, images, id, stage).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("the process was to be killed: %v\n%s", err, out)
			}
			s := openStore(t, images, func(o *Options) { o.Dir = dir })
			if l, err := os.ReadDir(s.path("ingest")); err != nil || len(l) != 0 {
				t.Errorf("ingest holds %v, %v", l, err)
			}
			list, err := s.List(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if known := stage == "record written" || stage == "layer durable"; known != (len(list) == 1) {
				t.Errorf("list is %+v", list)
			}
			img, err := s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "inst-1"})
			if err != nil {
				t.Fatal(err)
			}
			for i, name := range []string{"x", "y"} {
				b, err := os.ReadFile(filepath.Join(img.Layers[i].Path, name))
				if err != nil || string(b) != fmt.Sprint(i+1) {
					t.Errorf("%s is %q, %v", name, b, err)
				}
			}
		})
	}
}
