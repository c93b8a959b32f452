package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/novalet/novalet/internal/hosttest"
)

// TestDeviceFilter attaches the program to a cgroup2 group, as on a host without the v1 controller, and opens devices
// from inside.
func TestDeviceFilter(t *testing.T) {
	hosttest.RequireRoot(t)
	l, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if l.V2 == "" {
		t.Skip("this host mounts no cgroup2")
	}
	dir := filepath.Join(l.V2, "novalet-test-devices-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dir)
	for range 2 { // twice: it replaces itself
		if err := attachDeviceFilter(dir, allowedDevices); err != nil {
			t.Fatal(err)
		}
	}
	run := func(script string) error {
		return exec.Command("/bin/sh", "-c", "echo $$ >"+dir+"/cgroup.procs && exec /bin/sh -c '"+script+"'").Run()
	}
	if err := run(": </dev/null && : </dev/zero && : </dev/urandom && : >/dev/null"); err != nil {
		t.Errorf("allowed devices: %v", err)
	}
	for _, dev := range []string{"/dev/loop-control", "/dev/kmsg", "/dev/mem", "/dev/loop0"} {
		if _, err := os.Stat(dev); err != nil {
			continue
		}
		if exec.Command("/bin/sh", "-c", ": <"+dev).Run() != nil {
			continue // not to be opened outside either
		}
		if run(": <"+dev) == nil {
			t.Errorf("%s can be opened", dev)
		}
	}
}
