// Command engine measures the engine against crun and runc, in turn, on one root file system. Ours is what a boot
// asks for: limits applied and read back, a root of limited size, the system call filter, the /proc view, the
// console log and the keeper. Theirs is a bundle with the same namespaces and limits, without the rest.
//
//	go run ./tests/bench/engine -rounds 25 -live 1000
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine"
	"github.com/novalet/novalet/engine/cgroup"
	"github.com/novalet/novalet/tests/bench/report"
)

func main() {
	rounds := flag.Int("rounds", 25, "rounds of each start")
	live := flag.Int("live", 1000, "instances for the rows of many; 0 leaves those rows out")
	rootMiB := flag.Int64("root", 64, "size of ours' root in MiB, 0 for none")
	flag.Parse()
	if err := run(*rounds, *live, *rootMiB); err != nil {
		fmt.Fprintln(os.Stderr, "bench engine:", err)
		os.Exit(1)
	}
}

// bench is one run.
type bench struct {
	dir    string
	opts   engine.Options
	e      *engine.Engine
	layers []novalet.Layer
	limits novalet.Limits
	next   int
}

func run(rounds, live int, rootMiB int64) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("needs root")
	}
	dir, err := os.MkdirTemp("/var/tmp", "novalet-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}
	b := &bench{dir: dir, limits: novalet.Limits{MemoryBytes: 256 << 20, PIDs: 100, CPUShares: 1024, RootBytes: rootMiB << 20}}
	b.opts = engine.Options{StateDir: dir + "/state", RunDir: dir + "/run", CgroupRoot: "novalet-bench", ShimPath: dir + "/shim", DiskPool: 12, WarmSlots: -1,
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", b.opts.ShimPath, "./cmd/novalet-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build shim: %w: %s", err, out)
	}
	if err := b.makeRoot(); err != nil {
		return err
	}
	if b.e, err = engine.Open(b.opts); err != nil {
		return err
	}
	defer func() { b.e.Close() }()
	r := report.New("engine", rounds)
	if l, err := cgroup.Detect(); err == nil {
		r.Options["cgroups"] = l.String()
	}
	r.Options["root_mib"] = strconv.FormatInt(rootMiB, 10)
	for _, peer := range []string{"crun", "runc"} {
		if err := b.start(r, "cold_start_vs_"+peer, peer, rounds); err != nil {
			r.Missing["cold_start_vs_"+peer] = err.Error()
		}
	}
	// From here on as an agent runs: with slots prepared.
	if err := b.e.Close(); err != nil {
		return err
	}
	b.opts.WarmSlots = 8
	if b.e, err = engine.Open(b.opts); err != nil {
		return err
	}
	if err := b.start(r, "warm_start_vs_crun", "crun", rounds); err != nil {
		r.Missing["warm_start_vs_crun"] = err.Error()
	}
	if err := b.throughput(r, "crun"); err != nil {
		r.Missing["throughput8_vs_crun"] = err.Error()
	}
	if live > 0 {
		if err := b.many(r, live); err != nil {
			return err
		}
	}
	return r.Write(os.Stdout, ".")
}

// makeRoot makes a root with busybox and the peers' bundle.
func (b *bench) makeRoot() error {
	root := filepath.Join(b.dir, "bundle", "rootfs")
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("needs busybox-static: %w", err)
	}
	if err := os.WriteFile(root+"/bin/busybox", box, 0o755); err != nil {
		return err
	}
	if err := os.Symlink("busybox", root+"/bin/sh"); err != nil {
		return err
	}
	b.layers = []novalet.Layer{{DiffID: "sha256:bench", Path: root}}
	return nil
}

const script = "echo ready; exec busybox sleep 10000"

// ours starts one instance and returns its id and how long it took until its first output was in the console log.
func (b *bench) ours() (string, time.Duration, error) {
	id := fmt.Sprintf("b%d", b.next)
	b.next++
	d, err := b.boot(id)
	return id, d, err
}

func (b *bench) boot(id string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	began := time.Now()
	if _, err := b.e.Create(ctx, &novalet.SandboxSpec{ID: id, Hostname: id, Kind: novalet.KindApplication, Limits: b.limits}); err != nil {
		return 0, err
	}
	if err := b.e.Start(ctx, id, &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: b.layers,
		Process: novalet.ProcessSpec{Args: []string{"/bin/sh", "-c", script}}}); err != nil {
		return 0, err
	}
	log := filepath.Join(b.opts.StateDir, "instances", id, "console.log")
	for {
		if st, err := os.Stat(log); err == nil && st.Size() > 0 {
			return time.Since(began), nil
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		time.Sleep(20 * time.Microsecond)
	}
}

// config is the peers' bundle: the same namespaces and limits.
func (b *bench) config() error {
	type m map[string]any
	mount := func(dst, typ string, opts ...string) m {
		return m{"destination": dst, "type": typ, "source": typ, "options": opts}
	}
	var ns []m
	for _, n := range []string{"pid", "mount", "uts", "ipc", "network", "user", "cgroup"} {
		ns = append(ns, m{"type": n})
	}
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
	c := m{"ociVersion": "1.0.2", "hostname": "bench", "root": m{"path": "rootfs", "readonly": true},
		"process": m{"terminal": false, "user": m{"uid": 0, "gid": 0}, "cwd": "/", "args": []string{"/bin/sh", "-c", script},
			"env": []string{"PATH=/bin"}, "noNewPrivileges": true, "capabilities": m{"bounding": caps, "effective": caps, "permitted": caps}},
		"mounts": []m{mount("/proc", "proc"), mount("/dev", "tmpfs", "nosuid", "mode=755", "size=65536k"), mount("/dev/pts", "devpts", "newinstance", "ptmxmode=0666"),
			mount("/dev/shm", "tmpfs", "nosuid", "nodev"), mount("/sys", "sysfs", "nosuid", "nodev", "noexec", "ro")},
		"linux": m{"namespaces": ns, "uidMappings": []m{{"containerID": 0, "hostID": 100000, "size": 65536}}, "gidMappings": []m{{"containerID": 0, "hostID": 100000, "size": 65536}},
			"resources":     m{"memory": m{"limit": 256 << 20}, "cpu": m{"shares": 1024}, "pids": m{"limit": 100}, "devices": []m{{"allow": false, "access": "rwm"}}},
			"maskedPaths":   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"},
			"readonlyPaths": []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}}}
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, "bundle", "config.json"), data, 0o644)
}

// peerCommand runs a peer; crun refuses hosts that mount v1 and a cgroup2, so it gets a mount namespace without the
// cgroup2.
func (b *bench) peerCommand(peer string, args ...string) *exec.Cmd {
	full := append([]string{"--root", filepath.Join(b.dir, peer)}, args...)
	if peer == "crun" {
		if l, err := cgroup.Detect(); err == nil && l.String() == "hybrid" {
			return exec.Command("unshare", append([]string{"-m", "sh", "-c", `umount "$0" && exec crun "$@"`, l.V2}, full...)...)
		}
	}
	return exec.Command(peer, full...)
}

// theirs starts one container of a peer and returns how long it took until its first output.
func (b *bench) theirs(peer, id string) (time.Duration, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	cmd := b.peerCommand(peer, "run", "-d", "-b", filepath.Join(b.dir, "bundle"), id)
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = w, &text
	// A file, not a pipe: the container would hold a pipe open.
	errs, err := os.CreateTemp(b.dir, "stderr")
	if err != nil {
		return 0, err
	}
	defer errs.Close()
	cmd.Stderr = errs
	began := time.Now()
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 16)
	_, rerr := r.Read(buf)
	took := time.Since(began)
	if err := cmd.Wait(); err != nil || rerr != nil {
		msg, _ := os.ReadFile(errs.Name())
		return 0, fmt.Errorf("%s run: %w %v: %s", peer, err, rerr, bytes.TrimSpace(msg))
	}
	return took, nil
}

func (b *bench) delete(peer, id string) (time.Duration, error) {
	began := time.Now()
	out, err := b.peerCommand(peer, "delete", "-f", id).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%s delete: %w: %s", peer, err, out)
	}
	return time.Since(began), nil
}

func (b *bench) stop(id string) (time.Duration, error) {
	ctx := context.Background()
	began := time.Now()
	if err := b.e.Stop(ctx, id, novalet.StopOptions{}); err != nil {
		return 0, err
	}
	took := time.Since(began)
	return took, b.e.Destroy(ctx, id, novalet.DestroyOptions{})
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// start measures start and stop in turn, in random order; the first two rounds warm up.
func (b *bench) start(r *report.Report, row, peer string, rounds int) error {
	if err := b.config(); err != nil {
		return err
	}
	version, err := exec.Command(peer, "--version").Output()
	if err != nil {
		return err
	}
	name := strings.TrimSpace(strings.SplitN(string(version), "\n", 2)[0])
	var starts, stops [][2]float64
	for i := range rounds + 2 {
		var start, stop [2]time.Duration
		us := func() error {
			id, d, err := b.ours()
			if err != nil {
				return err
			}
			start[0] = d
			stop[0], err = b.stop(id)
			return err
		}
		them := func() (err error) {
			id := fmt.Sprintf("bench-%d-%d", os.Getpid(), i)
			if start[1], err = b.theirs(peer, id); err != nil {
				return err
			}
			stop[1], err = b.delete(peer, id)
			return err
		}
		order := []func() error{us, them}
		if rand.IntN(2) == 0 {
			order[0], order[1] = them, us
		}
		for _, f := range order {
			if err := f(); err != nil {
				return err
			}
			// What a stop leaves to the background must not weigh on the next one.
			time.Sleep(60 * time.Millisecond)
		}
		if i >= 2 {
			starts = append(starts, [2]float64{ms(start[0]), ms(start[1])})
			stops = append(stops, [2]float64{ms(stop[0]), ms(stop[1])})
		}
	}
	r.Add(row, "ms", name, map[string]float64{"cold_start_vs_crun": 1.3, "cold_start_vs_runc": 0.5, "warm_start_vs_crun": 0.3}[row], starts)
	if row == "cold_start_vs_crun" {
		r.Add("stop_vs_crun", "ms", name+" delete -f", 0.5, stops)
	}
	return nil
}

// throughput starts and stops by eight at a time.
func (b *bench) throughput(r *report.Report, peer string) error {
	const n, par = 48, 8
	rate := func(one func(i int) error) (float64, error) {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var failed error
		sem := make(chan struct{}, par)
		began := time.Now()
		for i := range n {
			sem <- struct{}{}
			wg.Go(func() {
				defer func() { <-sem }()
				if err := one(i); err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		return n / time.Since(began).Seconds(), failed
	}
	var samples [][2]float64
	for round := range 3 {
		us, err := rate(func(i int) error {
			id := fmt.Sprintf("p%d-%d", round, i)
			if _, err := b.boot(id); err != nil {
				return err
			}
			_, err := b.stop(id)
			return err
		})
		if err != nil {
			return err
		}
		them, err := rate(func(i int) error {
			id := fmt.Sprintf("bench-p%d-%d-%d", os.Getpid(), round, i)
			if _, err := b.theirs(peer, id); err != nil {
				return err
			}
			_, err := b.delete(peer, id)
			return err
		})
		if err != nil {
			return err
		}
		samples = append(samples, [2]float64{us, them})
	}
	r.Add("throughput8_vs_crun", "1/s", peer, 1.0, samples)
	return nil
}

// many measures with many instances: memory of an idle one, starts beside them, and taking them over.
func (b *bench) many(r *report.Report, live int) error {
	b.limits.RootBytes = 0
	free := func() int64 {
		data, _ := os.ReadFile("/proc/meminfo")
		var avail int64
		for line := range strings.SplitSeq(string(data), "\n") {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "MemAvailable:" {
				avail, _ = strconv.ParseInt(f[1], 10, 64)
			}
		}
		return avail
	}
	var few, lots []float64
	before := free()
	for i := range live {
		_, d, err := b.ours()
		if err != nil {
			return err
		}
		switch {
		case i >= 10 && i < 35:
			few = append(few, ms(d))
		case i >= live-25:
			lots = append(lots, ms(d))
		}
	}
	r.Add("idle_instance_mib", "MiB", "", 2, [][2]float64{{float64(before-free()) / 1024 / float64(live), 0}})
	var pairs [][2]float64
	for i := range min(len(few), len(lots)) {
		pairs = append(pairs, [2]float64{lots[i], few[i]})
	}
	r.Add(fmt.Sprintf("start_%d_vs_10", live), "ms", "ours beside 10", 1.3, pairs)
	if err := b.e.Close(); err != nil {
		return err
	}
	began := time.Now()
	var err error
	if b.e, err = engine.Open(b.opts); err != nil {
		return err
	}
	list, err := b.e.List(context.Background())
	if err != nil {
		return err
	}
	took := time.Since(began)
	running := 0
	for _, s := range list {
		if s.State == novalet.ContainerRunning {
			running++
		}
	}
	if running != live {
		return fmt.Errorf("%d of %d taken over", running, live)
	}
	r.Add(fmt.Sprintf("adopt_%d_s", live), "s", "", 2, [][2]float64{{took.Seconds(), 0}})
	sem := make(chan struct{}, 8)
	var wg sync.WaitGroup
	for _, s := range list {
		sem <- struct{}{}
		wg.Go(func() {
			defer func() { <-sem }()
			_ = b.e.Destroy(context.Background(), s.ID, novalet.DestroyOptions{})
		})
	}
	wg.Wait()
	return nil
}
