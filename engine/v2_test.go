package engine

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine/cgroup"
	"github.com/novalet/novalet/internal/hosttest"
)

// TestCgroup2Alone runs the engine as on a host that has cgroup2 only. Which limits can be applied depends on the
// controllers there: on a hybrid host none are, and asking for one is refused by name.
func TestCgroup2Alone(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	l, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if l.V2 == "" {
		t.Skip("this host mounts no cgroup2")
	}
	te.Close()
	te.opts.layout = &cgroup.Layout{V1: map[string]string{}, V2: l.V2, V2Controllers: l.V2Controllers}
	te.open()
	te.run("app", novalet.Limits{}, app(busybox(t), "trap 'exit 0' TERM; while :; do sleep 0.05; done"))
	te.run("deb", novalet.Limits{}, &novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: debian(t), Files: []novalet.File{{Path: "/etc/hostname", Data: []byte("deb\n")}}})
	te.waitLog("deb", "deb login:")
	if out, _ := te.sh("app", "cat /proc/self/cgroup; grep -c ' cgroup2 ro,' /proc/mounts; mkdir /sys/fs/cgroup/x 2>&1"); !strings.Contains(out, "0::/../exec\n1\n") || !strings.Contains(out, "Read-only") {
		t.Errorf("app: %q", out)
	}
	if out, _ := te.sh("deb", "systemctl is-system-running --wait; ls /sys/fs/cgroup/init.scope/cgroup.procs"); out != "running\n/sys/fs/cgroup/init.scope/cgroup.procs\n" {
		t.Errorf("deb: %q", out)
	}
	if err := te.Freeze(ctx, "app"); err != nil {
		t.Fatal(err)
	}
	te.waitState("app", novalet.ContainerPaused)
	for _, id := range []string{"app", "deb"} {
		if err := te.Stop(ctx, id, novalet.StopOptions{Timeout: hosttest.Patience(time.Minute)}); err != nil {
			t.Fatal(err)
		}
		te.waitState(id, novalet.ContainerStopped)
	}
	if !l.HasV2("memory") {
		_, err := te.Create(ctx, &novalet.SandboxSpec{ID: "limited", Limits: novalet.Limits{MemoryBytes: 64 << 20}})
		if !errors.Is(err, novalet.ErrUnsupported) || !strings.Contains(err.Error(), "no memory controller") {
			t.Errorf("a limit without its controller: %v", err)
		}
	}
}

// TestCgroup1Alone runs applications as on a host without cgroup2: the v1 freezer stops them, and the end of their
// init ends them.
func TestCgroup1Alone(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	l, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if l.V1["freezer"] == "" || l.V1["memory"] == "" {
		t.Skip("this host mounts no v1 freezer and memory controller")
	}
	te.Close()
	te.opts.layout = &cgroup.Layout{V1: l.V1, V1Named: l.V1Named}
	te.open()
	te.run("app", novalet.Limits{MemoryBytes: 64 << 20, PIDs: 20}, app(busybox(t), "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done"))
	te.waitLog("app", "ready")
	if err := te.Freeze(ctx, "app"); err != nil {
		t.Fatal(err)
	}
	te.waitState("app", novalet.ContainerPaused)
	if err := te.Thaw(ctx, "app"); err != nil {
		t.Fatal(err)
	}
	if err := te.Stop(ctx, "app", novalet.StopOptions{Timeout: hosttest.Patience(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	if st := te.waitState("app", novalet.ContainerStopped); st.ExitCode != 3 {
		t.Fatalf("%+v", st)
	}
	te.run("stubborn", novalet.Limits{}, app(busybox(t), "trap '' TERM; echo ready; while :; do sleep 0.05; done"))
	te.waitLog("stubborn", "ready")
	if err := te.Stop(ctx, "stubborn", novalet.StopOptions{Timeout: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if st := te.waitState("stubborn", novalet.ContainerStopped); st.ExitCode != 137 {
		t.Fatalf("%+v", st)
	}
}
