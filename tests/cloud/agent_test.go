package cloud_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// novalet runs the program's own commands against the cloud's agent.
func novalet(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return sh(ctx, "env", append([]string{"NOVALET_SOCKET=" + socketPath(), novaletBin()}, args...)...)
}

// novaletBin is the program under test.
func novaletBin() string {
	if bin := os.Getenv("NOVALET_BIN"); bin != "" {
		return bin
	}
	return filepath.Join("..", "..", "bin", "novalet")
}

func socketPath() string { return filepath.Join(os.Getenv("NOVALET_CLOUD"), "novalet", "novalet.sock") }

// kill9 kills the agent and starts it again; during is run in between.
func kill9(t testing.TB, during func()) {
	t.Helper()
	devstack(t, "compute.sh", "kill9", "novalet")
	if during != nil {
		during()
	}
	devstack(t, "compute.sh", "start", "novalet")
	answersAgain(t)
}

// answersAgain waits for an agent that was started anew.
func answersAgain(t testing.TB) {
	t.Helper()
	eventually(t, long, "the agent answers again", func() error {
		out, err := novalet("health")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// initPID is the pid of an instance's init on the host, and its start time: both stay the same while it lives.
func initPID(t testing.TB, id string) string {
	t.Helper()
	out, err := novalet("ps", "--json")
	if err != nil {
		t.Fatal(err)
	}
	pid := jsonField(t, out, id)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatalf("init of %s: %v", id, err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	return fmt.Sprintf("%d@%s", pid, f[19])
}
