package engine

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

func TestLifeOfAnApplication(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	layers := busybox(t)
	st, err := te.Create(ctx, &novalet.SandboxSpec{ID: "one", Hostname: "first", Limits: novalet.Limits{MemoryBytes: 64 << 20, PIDs: 50, VCPUs: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if st.State != novalet.ContainerCreated || st.PID == 0 || st.NetNS == "" {
		t.Fatalf("after create: %+v", st)
	}
	if _, err := os.Stat(st.NetNS); err != nil {
		t.Fatal(err)
	}
	spec := app(layers, `trap 'echo bye; exit 7' TERM; echo "hello from $(hostname) as $(id -u)"; while :; do sleep 0.05; done`)
	spec.Files = []novalet.File{{Path: "/etc/motd", Data: []byte("welcome\n")}}
	if err := te.Start(ctx, "one", spec); err != nil {
		t.Fatal(err)
	}
	te.waitLog("one", "hello from first as 0")
	if out, code := te.sh("one", "cat /etc/motd; stat -c %u /etc/motd; exit 3"); out != "welcome\n0\n" || code != 3 {
		t.Fatalf("exec: %q %d", out, code)
	}
	before := te.waitState("one", novalet.ContainerRunning)

	// A new agent finds it as it was.
	if err := te.Close(); err != nil {
		t.Fatal(err)
	}
	te.open()
	after := te.waitState("one", novalet.ContainerRunning)
	if after.PID != before.PID || !after.StartedAt.Equal(before.StartedAt) {
		t.Fatalf("after reopening: %+v, before %+v", after, before)
	}
	if err := te.Stop(ctx, "one", novalet.StopOptions{Timeout: time.Minute}); err != nil {
		t.Fatal(err)
	}
	st = te.waitState("one", novalet.ContainerStopped)
	if st.ExitCode != 7 || st.PID != 0 || st.NetNS != "" {
		t.Fatalf("after stop: %+v", st)
	}
	te.waitLog("one", "bye")

	// A second start with what is recorded keeps the root and the log.
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "one", Hostname: "first"}); err != nil {
		t.Fatal(err)
	}
	if err := te.Start(ctx, "one", nil); err != nil {
		t.Fatal(err)
	}
	if out, _ := te.sh("one", "cat /etc/motd"); out != "welcome\n" {
		t.Fatalf("after the second start: %q", out)
	}
	te.waitLog("one", "bye")
	if err := te.Destroy(ctx, "one", novalet.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := te.Destroy(ctx, "one", novalet.DestroyOptions{}); err != nil {
		t.Fatal("second destroy:", err)
	}
	if _, err := te.Status(ctx, "one"); !errors.Is(err, novalet.ErrNotFound) {
		t.Fatal("after destroy:", err)
	}
}

func TestMissingCommandIsTheImagesFault(t *testing.T) {
	te := newEngine(t)
	ctx := te.ctx()
	if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "x"}); err != nil {
		t.Fatal(err)
	}
	err := te.Start(ctx, "x", &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: busybox(t), Process: novalet.ProcessSpec{Args: []string{"nginx"}}})
	if !errors.Is(err, novalet.ErrAbort) || !strings.Contains(novalet.FaultText(err), `no command "nginx"`) || !strings.Contains(novalet.FaultText(err), "os_command_line") {
		t.Fatalf("start: %v", err)
	}
	te.waitState("x", novalet.ContainerStopped)
}
