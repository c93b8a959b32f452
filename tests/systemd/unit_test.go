// Package systemd_test installs the packaged unit on a host and sees what systemd, an upgrade and the kernel's memory
// killer do to the agent and to instances. It takes over the host's program, unit, configuration and state, so that it runs in
// the virtual machine of `make test-vm` only.
package systemd_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
	"github.com/novalet/novalet/internal/httpapi"
	"github.com/novalet/novalet/internal/minicloud"
)

const (
	host    = "unit-host"
	program = "/usr/bin/novalet"
	config  = "/etc/nova/nova.conf"
	state   = "/var/lib/novalet"
	// patience is how long anything may take; a machine in software needs most of it.
	patience = 5 * time.Minute
)

// unit is the installed service.
type unit struct {
	t     *testing.T
	cloud *cloud
	api   *httpapi.Client
}

// install writes the configuration. The program and its unit are there, by `make install`.
func install(t *testing.T) *unit {
	t.Helper()
	hosttest.RequireRoot(t)
	if os.Getenv("NOVALET_SYSTEMD_TESTS") != "1" {
		t.Skip("takes over the host's novalet, its configuration and state: NOVALET_SYSTEMD_TESTS=1 allows it (make test-vm)")
	}
	for _, p := range []string{config, state} {
		if _, err := os.Stat(p); err == nil {
			t.Fatalf("%s is there: this host is in use", p)
		}
	}
	u := &unit{t: t, cloud: newCloud(t, os.Getenv("NOVALET_TEST_IMAGE")), api: &httpapi.Client{Path: "/run/novalet/novalet.sock"}}
	if err := os.MkdirAll(filepath.Dir(config), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, []byte(u.cloud.config()), 0o640); err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	_ = exec.Command("systemctl", "reset-failed", "novalet").Run() // fails where nothing failed
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := exec.Command("journalctl", "-b", "--no-pager", "-o", "cat", "-u", "novalet", "-n", "60").CombinedOutput()
			t.Logf("the unit's journal:\n%s", out)
		}
		u.empty()
		_ = exec.Command("systemctl", "stop", "novalet").Run()
		os.Remove(config)
		if err := os.RemoveAll(state); err != nil {
			t.Error(err)
		}
		// Not written over: it may be in use by what outlives the agent.
		if err := errors.Join(os.WriteFile(program+".old", old, 0o755), os.Rename(program+".old", program)); err != nil {
			t.Error(err)
		}
	})
	return u
}

// empty deletes what a test that failed left.
func (u *unit) empty() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	list, err := u.cloud.List()
	for _, s := range list {
		err = errors.Join(err, u.cloud.Delete(ctx, s.UUID))
		_, lost := u.cloud.Wait(ctx, s.UUID, func(s *minicloud.Server) bool { return s.Deleted })
		err = errors.Join(err, lost)
	}
	if err != nil {
		u.t.Errorf("delete the servers that are left: %v", err)
	}
}

func (u *unit) systemctl(args ...string) {
	u.t.Helper()
	if out, err := exec.Command("systemctl", args...).CombinedOutput(); err != nil {
		u.t.Fatalf("systemctl %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// property is one of the unit's, as systemd tells it.
func (u *unit) property(name string) string {
	u.t.Helper()
	out, err := exec.Command("systemctl", "show", "-p", name, "--value", "novalet").Output()
	if err != nil {
		u.t.Fatalf("systemctl show %s: %v", name, err)
	}
	return strings.TrimSpace(string(out))
}

// eventually waits for a condition.
func (u *unit) eventually(what string, ok func() bool) {
	u.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			u.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// ready waits for an agent other than the one with pid last that serves, and returns its pid. Before it has its queue,
// what is sent to it is lost.
func (u *unit) ready(last string) string {
	u.t.Helper()
	var pid string
	u.eventually("the agent serves", func() bool {
		pid = u.property("MainPID")
		h, err := u.api.Health(u.t.Context())
		_, listens := u.cloud.broker.bus.Queues()["compute."+host]
		return pid != "0" && pid != last && err == nil && h.Status == "ok" && listens
	})
	return pid
}

// boot starts a server and waits until it is active.
func (u *unit) boot(name string, image novalet.ImageMeta) string {
	u.t.Helper()
	id, err := u.cloud.Boot(u.t.Context(), minicloud.BootRequest{Name: name, Image: image, Network: "none",
		Flavor: novalet.Flavor{Name: "unit", FlavorID: "1", MemoryMB: 64, VCPUs: 1, RootGB: 1}})
	if err != nil {
		u.t.Fatal(err)
	}
	if s := u.wait(id, minicloud.Settled); s.VMState != novalet.VMActive {
		u.t.Fatalf("%s is %s: %s", name, s.VMState, s.Fault)
	}
	return id
}

func (u *unit) wait(id string, done func(*minicloud.Server) bool) *minicloud.Server {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.t.Context(), patience)
	defer cancel()
	s, err := u.cloud.Wait(ctx, id, done)
	if err != nil {
		u.t.Fatal(err)
	}
	return s
}

// process names one process for good: its number and when it began (field 22 of proc_pid_stat(5)).
func process(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, ok := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if err != nil || !ok || len(f) < 20 || f[0] == "Z" {
		return fmt.Sprintf("%d is gone", pid)
	}
	return fmt.Sprintf("%d since %s", pid, f[19])
}

// inits are the first processes of the instances, as the agent lists them.
func (u *unit) inits(ids ...string) map[string]int {
	u.t.Helper()
	list, err := u.api.Instances(u.t.Context())
	if err != nil {
		u.t.Fatal(err)
	}
	out := map[string]int{}
	for _, v := range list {
		if slices.Contains(ids, v.UUID) && v.State == string(novalet.ContainerRunning) {
			out[v.UUID] = v.PID
		}
	}
	if len(out) != len(ids) {
		u.t.Fatalf("the agent lists %v, and not all of %v as running", list, ids)
	}
	return out
}

// keepers are the processes that hold consoles and logs.
func (u *unit) keepers() []int {
	u.t.Helper()
	b, err := os.ReadFile("/sys/fs/cgroup/novalet/keepers/cgroup.procs")
	if err != nil {
		u.t.Fatal(err)
	}
	var out []int
	for _, f := range strings.Fields(string(b)) {
		n, err := strconv.Atoi(f)
		if err != nil {
			u.t.Fatal(err)
		}
		out = append(out, n)
	}
	if len(out) == 0 {
		u.t.Fatal("no process keeps the instances")
	}
	return out
}

var tick = regexp.MustCompile(`(?m)^tick (\d+)\r?$`)

// ticks reads the console log over the bus, checks that no line of it is missing or there twice, and returns the last.
func (u *unit) ticks(id string) int {
	u.t.Helper()
	log, err := u.cloud.ConsoleOutput(u.t.Context(), id, -1)
	if err != nil {
		u.t.Fatal(err)
	}
	last := 0
	for _, m := range tick.FindAllStringSubmatch(log, -1) {
		n, _ := strconv.Atoi(m[1])
		if n != last+1 {
			u.t.Errorf("the console log of %s has line %d after line %d", id, n, last)
		}
		last = n
	}
	return last
}

// memoryLimit reads the limit of the cgroup that a process is in.
func (u *unit) memoryLimit(pid int) string {
	u.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		u.t.Fatal(err)
	}
	_, dir, _ := strings.Cut(strings.TrimSpace(string(b)), "0::")
	for ; strings.HasPrefix(dir, "/novalet/"); dir = filepath.Dir(dir) {
		if b, err := os.ReadFile("/sys/fs/cgroup" + dir + "/memory.max"); err == nil && strings.TrimSpace(string(b)) != "max" {
			return strings.TrimSpace(string(b))
		}
	}
	u.t.Fatalf("process %d is in %q, and has no limit", pid, b)
	return ""
}

// ticker counts on its console.
const ticker = `sh -c 'n=0; while :; do n=$((n+1)); echo tick $n; sleep 1; done'`

// TestUnit: whatever happens to the agent, the instances' processes, console logs and states are unbroken.
func TestUnit(t *testing.T) {
	u := install(t)
	image := u.cloud.image("00000000-0000-4000-8000-0000000000a1", ticker)
	u.systemctl("daemon-reload")
	u.systemctl("start", "novalet")
	main := u.ready("0")
	ids := []string{u.boot("one", image), u.boot("two", image)}

	inits, keepers := u.inits(ids...), u.keepers()
	identity := func() (out []string) {
		for _, id := range ids {
			out = append(out, process(inits[id]))
		}
		for _, k := range keepers {
			out = append(out, process(k))
		}
		return out
	}
	before := identity()
	limit := u.memoryLimit(inits[ids[0]])
	t.Logf("agent %s; inits and keepers %q", main, before)

	// same checks that nothing of the instances changed, that their logs go on, and that the agent can do its work.
	same := func(t *testing.T) {
		t.Helper()
		if now := identity(); !slices.Equal(now, before) {
			t.Errorf("processes %q, before %q", now, before)
		}
		if now := u.inits(ids...); now[ids[0]] != inits[ids[0]] || now[ids[1]] != inits[ids[1]] {
			t.Errorf("the agent takes %v for the inits, which are %v", now, inits)
		}
		for _, id := range ids {
			s := u.wait(id, minicloud.Settled)
			if s.VMState != novalet.VMActive || s.PowerState != novalet.PowerRunning || s.Fault != "" {
				t.Errorf("%s is %s, power state %v, fault %q", s.Name, s.VMState, s.PowerState, s.Fault)
			}
			at := u.ticks(id)
			u.eventually("the console log goes on", func() bool { return u.ticks(id) > at })
			out, err := exec.Command(program, "exec", id, "echo", "inside").CombinedOutput()
			if err != nil || strings.TrimSpace(string(out)) != "inside" {
				t.Errorf("exec in %s: %v: %s", s.Name, err, out)
			}
		}
		if now := u.memoryLimit(inits[ids[0]]); now != limit {
			t.Errorf("memory limit %s, before %s", now, limit)
		}
	}
	run := func(name string, f func(t *testing.T)) {
		if t.Failed() {
			return
		}
		t.Run(name, func(t *testing.T) {
			defer func(outer *testing.T) { u.t = outer }(u.t)
			u.t = t
			f(t)
		})
	}
	same(t)

	run("restart", func(t *testing.T) {
		u.systemctl("restart", "novalet")
		main = u.ready(main)
		same(t)
	})
	run("kill", func(t *testing.T) {
		restarts := u.property("NRestarts")
		u.systemctl("kill", "-s", "KILL", "novalet")
		main = u.ready(main)
		if now := u.property("NRestarts"); now == restarts {
			t.Errorf("systemd started it %s times, as before", now)
		}
		same(t)
	})
	run("upgrade", func(t *testing.T) {
		h, err := u.api.Health(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("install", "-m", "755", os.Getenv("NOVALET_UPGRADE"), program).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		u.systemctl("restart", "novalet")
		main = u.ready(main)
		now, err := u.api.Health(t.Context())
		if err != nil || now.Version == h.Version {
			t.Errorf("version %s, before %s (%v)", now.Version, h.Version, err)
		}
		same(t)
		// The new program boots with the keeper that the old one started.
		id := u.boot("three", image)
		u.eventually("it writes to its console", func() bool { return u.ticks(id) > 0 })
		u.delete(id)
		same(t)
	})
	run("stop", func(t *testing.T) {
		u.systemctl("stop", "novalet")
		if s := u.property("ActiveState"); s != "inactive" {
			t.Errorf("the unit is %s after the stop", s)
		}
		if now := identity(); !slices.Equal(now, before) {
			t.Errorf("processes without an agent %q, before %q", now, before)
		}
		u.systemctl("start", "novalet")
		main = u.ready(main)
		same(t)
	})
	run("reload", func(t *testing.T) {
		u.systemctl("reload", "novalet")
		u.systemctl("daemon-reload")
		// A unit that wants controllers, and is gone again: systemd looks anew at which the root group has to have.
		if out, err := exec.Command("systemd-run", "--wait", "-p", "CPUQuota=50%", "-p", "MemoryMax=64M", "-p", "IOWeight=50", "-p", "AllowedCPUs=0", "true").CombinedOutput(); err != nil {
			t.Errorf("systemd-run: %v: %s", err, out)
		}
		if now := u.property("MainPID"); now != main {
			t.Errorf("the agent is process %s, before %s", now, main)
		}
		same(t)
	})
	run("memory", func(t *testing.T) {
		restarts := u.property("NRestarts")
		hog := u.boot("hog", u.cloud.image("00000000-0000-4000-8000-0000000000a2", `sh -c 'echo up; sleep 3; exec tail /dev/zero'`))
		s := u.wait(hog, func(s *minicloud.Server) bool { return s.VMState == novalet.VMStopped && minicloud.Settled(s) })
		if s.PowerState != novalet.PowerShutdown {
			t.Errorf("the instance that ran out of memory has the power state %v", s.PowerState)
		}
		list, err := u.api.Instances(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range list {
			if (v.OOMKills > 0) != (v.UUID == hog) {
				t.Errorf("%s: %d processes killed for memory", v.Name, v.OOMKills)
			}
		}
		if a, b := u.property("MainPID"), u.property("NRestarts"); a != main || b != restarts {
			t.Errorf("the agent is process %s after %s restarts, before %s after %s", a, b, main, restarts)
		}
		same(t)
		u.delete(hog)
	})
	run("delete", func(t *testing.T) {
		for _, id := range ids {
			u.delete(id)
		}
		for _, id := range ids {
			if p := process(inits[id]); !strings.HasSuffix(p, "gone") {
				t.Errorf("process %s is still there", p)
			}
		}
		// The controller knows first.
		u.eventually("the agent has forgotten them", func() bool {
			list, err := u.api.Instances(t.Context())
			return err == nil && len(list) == 0
		})
	})
}

// delete deletes a server and waits until it is gone.
func (u *unit) delete(id string) {
	u.t.Helper()
	if err := u.cloud.Delete(u.t.Context(), id); err != nil {
		u.t.Fatal(err)
	}
	u.wait(id, func(s *minicloud.Server) bool { return s.Deleted })
}
