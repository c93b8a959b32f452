// Command engine measures the engine against crun and runc, in turn, on one root file system. Ours is what a boot
// asks for: limits applied and read back, a root of limited size, the system call filter, the /proc view, the
// console log, the keeper, and a port on a bridge. Theirs is a bundle with the same namespaces and limits, without the
// rest. Where gcc is, limit.c tells what the kernel alone takes for the namespaces, the cgroups, the root and the port.
//
// All runs in a network namespace of its own.
//
//	go run ./tests/bench/engine -rounds 25 -live 1000
package main

import (
	"context"
	"errors"
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
	"sync/atomic"
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
	rows := flag.String("rows", "", "only rows whose name holds this")
	flag.Parse()
	if err := inNamespace(func() error { return run(*rounds, *live, *rootMiB, *rows) }); err != nil {
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
	net    *bridge
	logs   *writes
	next   atomic.Int64
}

func run(rounds, live int, rootMiB int64, rows string) error {
	dir, err := os.MkdirTemp("/var/tmp", "novalet-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}
	b := &bench{dir: dir, limits: novalet.Limits{MemoryBytes: 256 << 20, PIDs: 100, CPUShares: 1024, RootBytes: rootMiB << 20}}
	b.opts = engine.Options{StateDir: dir + "/state", RunDir: dir + "/run", CgroupRoot: "novalet-bench", ShimPath: dir + "/shim", WarmSlots: -1,
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", b.opts.ShimPath, "./cmd/novalet-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build shim: %w: %s", err, out)
	}
	if err := b.makeRoot(); err != nil {
		return err
	}
	if b.net, err = newBridge(); err != nil {
		return err
	}
	defer b.net.close()
	if b.logs, err = newWrites(); err != nil {
		return err
	}
	defer b.logs.close()
	if b.e, err = engine.Open(b.opts); err != nil {
		return err
	}
	defer func() { b.e.Close() }()
	r := report.New("engine", rounds)
	if l, err := cgroup.Detect(); err == nil {
		r.Options["cgroups"] = l.String()
	}
	r.Options["root_mib"] = strconv.FormatInt(rootMiB, 10)
	try := func(row string, measure func() error) {
		if !strings.Contains(row, rows) {
			return
		}
		if err := measure(); err != nil {
			r.Missing[row] = err.Error()
		}
	}
	for _, peer := range []string{"crun", "runc"} {
		row := "cold_start_vs_" + peer
		try(row, func() error { return b.start(r, row, peer, rounds) })
	}
	try("cold_start_vs_limit", func() error { return b.limit(r, rounds) })
	// From here on as an agent runs: with slots prepared.
	if err := b.e.Close(); err != nil {
		return err
	}
	b.opts.WarmSlots = 0
	if b.e, err = engine.Open(b.opts); err != nil {
		return err
	}
	try("warm_start_vs_crun", func() error { return b.start(r, "warm_start_vs_crun", "crun", rounds) })
	try("throughput8_vs_crun", func() error { return b.throughput(r, "throughput8_vs_crun", 1) })
	// As where a project quota limits the root, which the peers' is not at all: what the disks take is the difference.
	try("throughput8_no_disk", func() error {
		limit := b.limits.RootBytes
		defer func() { b.limits.RootBytes = limit }()
		b.limits.RootBytes = 0
		return b.throughput(r, "throughput8_no_disk", 0)
	})
	if many := fmt.Sprintf("start_%d_vs_10", live); live > 0 {
		try(many, func() error { return b.many(r, live) })
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

// instance is one of ours that runs.
type instance struct {
	id  string
	vif *novalet.VIF
}

// ours boots one instance and tells how long it took until its first output was in the console log.
func (b *bench) ours() (*instance, time.Duration, error) {
	n := int(b.next.Add(1))
	in := &instance{id: fmt.Sprintf("00000000-0000-4000-8000-%012d", n), vif: b.net.vif(n)}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	began := time.Now()
	st, err := b.e.Create(ctx, &novalet.SandboxSpec{ID: in.id, Hostname: "bench", Kind: novalet.KindApplication, Limits: b.limits})
	if err != nil {
		return nil, 0, err
	}
	written, err := b.logs.watch(filepath.Join(b.opts.StateDir, "instances", in.id, "console.log"))
	if err != nil {
		return nil, 0, err
	}
	if err := b.net.plug(ctx, in, st.NetNS); err != nil {
		return nil, 0, err
	}
	if err := b.e.Start(ctx, in.id, &novalet.ContainerSpec{Kind: novalet.KindApplication, Layers: b.layers,
		Process: novalet.ProcessSpec{Args: []string{"/bin/sh", "-c", script}}}); err != nil {
		return nil, 0, err
	}
	if err := written(ctx); err != nil {
		return nil, 0, err
	}
	return in, time.Since(began), nil
}

// stop ends one of ours and tells how long that took; what frees it follows.
func (b *bench) stop(in *instance) (time.Duration, error) {
	ctx := context.Background()
	began := time.Now()
	if err := b.e.Stop(ctx, in.id, novalet.StopOptions{}); err != nil {
		return 0, err
	}
	took := time.Since(began)
	return took, errors.Join(b.net.unplug(ctx, in), b.e.Destroy(ctx, in.id, novalet.DestroyOptions{}))
}

// pause is longer than the engine waits before it replaces what it had made in advance, and what that takes.
const pause = 400 * time.Millisecond

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
			in, d, err := b.ours()
			if err != nil {
				return err
			}
			start[0] = d
			stop[0], err = b.stop(in)
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
			// What a start and a stop leave to the background must not weigh on the next one.
			time.Sleep(pause)
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
func (b *bench) throughput(r *report.Report, row string, target float64) error {
	const n, par, peer = 48, 8, "crun"
	if err := b.config(); err != nil {
		return err
	}
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
		took := time.Since(began).Seconds()
		// What is cleaned up and made in advance afterwards is not the other's.
		time.Sleep(5 * pause)
		return n / took, failed
	}
	var samples [][2]float64
	for round := range 5 {
		us, err := rate(func(int) error {
			in, _, err := b.ours()
			if err != nil {
				return err
			}
			_, err = b.stop(in)
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
	r.Add(row, "1/s", peer, target, samples)
	return nil
}
