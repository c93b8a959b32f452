package contracttest

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// RuntimeFixture is a runtime and something to run on it.
type RuntimeFixture struct {
	Runtime novalet.Runtime
	// Spec runs until its stop signal.
	Spec *novalet.ContainerSpec
	// Missing names a command that its image does not have; nil skips the test.
	Missing *novalet.ContainerSpec
	// Prints is what Spec's process prints at its start; "" skips the test of the console.
	Prints string
	// Print makes a fake's process print.
	Print func(id, text string)
}

const containerID = "0f0c2d8a-0000-4000-8000-00000000c0de"

// Runtime runs the suite of novalet.Runtime.
func Runtime(t *testing.T, fixture func(t *testing.T) *RuntimeFixture) {
	sandbox := &novalet.SandboxSpec{ID: containerID, Hostname: "contract", Limits: novalet.Limits{MemoryBytes: 128 << 20, VCPUs: 1, PIDs: 64}}
	setup := func(t *testing.T) (context.Context, *RuntimeFixture) {
		f := fixture(t)
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := f.Runtime.Destroy(ctx, containerID, novalet.DestroyOptions{}); err != nil {
				t.Errorf("destroy: %v", err)
			}
		})
		return testContext(t), f
	}
	start := func(t *testing.T, ctx context.Context, f *RuntimeFixture) *novalet.ContainerStatus {
		t.Helper()
		if _, err := f.Runtime.Create(ctx, sandbox); err != nil {
			t.Fatalf("create: %v", err)
		}
		if err := f.Runtime.Start(ctx, containerID, f.Spec); err != nil {
			t.Fatalf("start: %v", err)
		}
		st, err := f.Runtime.Status(ctx, containerID)
		if err != nil {
			t.Fatalf("status: %v", err)
		}
		return st
	}
	state := func(t *testing.T, ctx context.Context, f *RuntimeFixture, want novalet.ContainerState) *novalet.ContainerStatus {
		t.Helper()
		st, err := f.Runtime.Status(ctx, containerID)
		if err != nil || st.State != want {
			t.Fatalf("status %+v, %v; want %s", st, err, want)
		}
		return st
	}

	t.Run("unknown", func(t *testing.T) {
		ctx, f := setup(t)
		r := f.Runtime
		twice(t, "stop", func() error { return r.Stop(ctx, containerID, novalet.StopOptions{}) })
		twice(t, "destroy", func() error { return r.Destroy(ctx, containerID, novalet.DestroyOptions{}) })
		_, err := r.Status(ctx, containerID)
		is(t, "status", err, novalet.ErrNotFound)
		is(t, "start", r.Start(ctx, containerID, f.Spec), novalet.ErrNotFound)
		is(t, "freeze", r.Freeze(ctx, containerID), novalet.ErrNotFound)
		is(t, "thaw", r.Thaw(ctx, containerID), novalet.ErrNotFound)
		is(t, "sync", r.Sync(ctx, containerID), novalet.ErrNotFound)
		is(t, "update", r.Update(ctx, containerID, sandbox.Limits), novalet.ErrNotFound)
		_, err = r.Stats(ctx, containerID)
		is(t, "stats", err, novalet.ErrNotFound)
		_, err = r.ConsoleLog(ctx, containerID, 100)
		is(t, "console log", err, novalet.ErrNotFound)
		_, err = r.Console(ctx, containerID)
		is(t, "console", err, novalet.ErrNotFound)
		_, err = r.Root(ctx, containerID)
		is(t, "root", err, novalet.ErrNotFound)
	})

	t.Run("life", func(t *testing.T) {
		ctx, f := setup(t)
		r := f.Runtime
		created, err := r.Create(ctx, sandbox)
		if err != nil {
			t.Fatal(err)
		}
		if created.State != novalet.ContainerCreated || created.PID == 0 || created.NetNS == "" {
			t.Errorf("created %+v", created)
		}
		again, err := r.Create(ctx, sandbox)
		if err != nil || again.PID != created.PID {
			t.Errorf("a second create made %+v, %v", again, err)
		}
		running := start(t, ctx, f)
		if running.State != novalet.ContainerRunning || running.NetNS == "" {
			t.Errorf("running %+v", running)
		}
		if again, err = r.Create(ctx, sandbox); err != nil || again.State != novalet.ContainerRunning || again.PID != running.PID {
			t.Errorf("create of what runs: %+v, %v", again, err)
		}
		twice(t, "freeze", func() error { return r.Freeze(ctx, containerID) })
		state(t, ctx, f, novalet.ContainerPaused)
		twice(t, "sync of what is frozen", func() error { return r.Sync(ctx, containerID) })
		twice(t, "thaw", func() error { return r.Thaw(ctx, containerID) })
		state(t, ctx, f, novalet.ContainerRunning)
		twice(t, "sync", func() error { return r.Sync(ctx, containerID) })
		if _, err := r.Stats(ctx, containerID); err != nil {
			t.Errorf("stats: %v", err)
		}
		if err := r.Update(ctx, containerID, sandbox.Limits); err != nil {
			t.Errorf("update: %v", err)
		}
		twice(t, "stop", func() error { return r.Stop(ctx, containerID, novalet.StopOptions{Timeout: 10 * time.Second}) })
		if st := state(t, ctx, f, novalet.ContainerStopped); st.PID != 0 || st.NetNS != "" {
			t.Errorf("stopped %+v holds something", st)
		}
		_, err = r.Stats(ctx, containerID)
		is(t, "stats of a stopped container", err, novalet.ErrInvalidState)
		is(t, "freeze of a stopped container", r.Freeze(ctx, containerID), novalet.ErrInvalidState)
		is(t, "sync of a stopped container", r.Sync(ctx, containerID), novalet.ErrInvalidState)
		twice(t, "destroy", func() error { return r.Destroy(ctx, containerID, novalet.DestroyOptions{}) })
		_, err = r.Status(ctx, containerID)
		is(t, "status of a destroyed container", err, novalet.ErrNotFound)
	})

	t.Run("start again with the recorded spec", func(t *testing.T) {
		ctx, f := setup(t)
		start(t, ctx, f)
		if err := f.Runtime.Stop(ctx, containerID, novalet.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Runtime.Create(ctx, sandbox); err != nil {
			t.Fatal(err)
		}
		if err := f.Runtime.Start(ctx, containerID, nil); err != nil {
			t.Fatal(err)
		}
		state(t, ctx, f, novalet.ContainerRunning)
	})

	t.Run("stop of what is frozen", func(t *testing.T) {
		ctx, f := setup(t)
		start(t, ctx, f)
		if err := f.Runtime.Freeze(ctx, containerID); err != nil {
			t.Fatal(err)
		}
		if err := f.Runtime.Stop(ctx, containerID, novalet.StopOptions{Timeout: time.Second}); err != nil {
			t.Fatal(err)
		}
		state(t, ctx, f, novalet.ContainerStopped)
	})

	t.Run("destroy of what is frozen", func(t *testing.T) {
		ctx, f := setup(t)
		start(t, ctx, f)
		if err := f.Runtime.Freeze(ctx, containerID); err != nil {
			t.Fatal(err)
		}
		if err := f.Runtime.Destroy(ctx, containerID, novalet.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("destroy of what was only created", func(t *testing.T) {
		ctx, f := setup(t)
		if _, err := f.Runtime.Create(ctx, sandbox); err != nil {
			t.Fatal(err)
		}
		if err := f.Runtime.Destroy(ctx, containerID, novalet.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
		_, err := f.Runtime.Status(ctx, containerID)
		is(t, "status", err, novalet.ErrNotFound)
	})

	t.Run("list", func(t *testing.T) {
		ctx, f := setup(t)
		st := start(t, ctx, f)
		list, err := f.Runtime.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, c := range list {
			found = found || c.ID == containerID && c.PID == st.PID && c.State == novalet.ContainerRunning
		}
		if !found {
			t.Errorf("list %+v lacks the container", list)
		}
	})

	t.Run("missing command", func(t *testing.T) {
		ctx, f := setup(t)
		if f.Missing == nil {
			t.Skip("this runtime does not look at the image")
		}
		if _, err := f.Runtime.Create(ctx, sandbox); err != nil {
			t.Fatal(err)
		}
		aborts(t, "start", f.Runtime.Start(ctx, containerID, f.Missing))
	})

	t.Run("console", func(t *testing.T) {
		ctx, f := setup(t)
		if f.Prints == "" {
			t.Skip("nothing is printed")
		}
		start(t, ctx, f)
		if f.Print != nil {
			f.Print(containerID, f.Prints)
		}
		logged := func() bool {
			data, err := f.Runtime.ConsoleLog(ctx, containerID, 1<<20)
			return err == nil && strings.Contains(string(data), f.Prints)
		}
		eventually(t, "the console log has what was printed", logged)
		if data, err := f.Runtime.ConsoleLog(ctx, containerID, 1); err != nil || len(data) > 1 {
			t.Errorf("one byte of log: %q, %v", data, err)
		}
		term, err := f.Runtime.Console(ctx, containerID)
		if err != nil {
			t.Fatal(err)
		}
		var seen strings.Builder
		buf := make([]byte, 256)
		for !strings.Contains(seen.String(), f.Prints) {
			n, err := term.Read(buf)
			seen.Write(buf[:n])
			if err != nil {
				t.Fatalf("a viewer saw %q, then %v", seen.String(), err)
			}
		}
		if err := term.Close(); err != nil {
			t.Errorf("close console: %v", err)
		}
		if err := f.Runtime.Stop(ctx, containerID, novalet.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if !logged() {
			t.Error("the console log did not survive the stop")
		}
		_, err = f.Runtime.Console(ctx, containerID)
		is(t, "console of a stopped container", err, novalet.ErrInvalidState)
	})
}
