package network

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/novalet/novalet/internal/hosttest"
)

// TestMainThreadStaysHome: work in an instance's namespace never leaves the main thread there, which would keep it for as
// long as the agent runs. In a process of its own: here it may be taken already.
func TestMainThreadStaysHome(t *testing.T) {
	hosttest.RequireRoot(t)
	if os.Getenv("NOVALET_TEST_MAIN_THREAD") == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run", "^TestMainThreadStaysHome$", "-test.count", "1", "-test.v")
		cmd.Env = append(os.Environ(), "NOVALET_TEST_MAIN_THREAD=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	ns := newNS(t)
	main := fmt.Sprintf("/proc/%d/task/%[1]d/ns/net", os.Getpid())
	home, err := os.Readlink(main)
	if err != nil {
		t.Fatal(err)
	}
	there := fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	if guest, err := os.Readlink(there); err != nil || guest == home {
		t.Fatalf("the main thread is in the new namespace %s, %v", guest, err)
	}
	for range 200 {
		inside(t, ns, func() error {
			if id, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || id == home {
				t.Errorf("inside: %s, %v", id, err)
			}
			return nil
		})
		if id, err := os.Readlink(main); err != nil || id != home {
			t.Fatalf("the main thread is in %s, %v, was in %s", id, err, home)
		}
	}
}
