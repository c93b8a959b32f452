package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/engine"
	"github.com/novalet/novalet/engine/cgroup"
	"github.com/novalet/novalet/tests/bench/report"
)

// memory is what is in use, in KiB.
type memory struct{ pss, slab, available int64 }

// memory sums up the proportional set sizes of all processes of the engine's cgroups, keepers included, and reads what
// the kernel has.
func (b *bench) memory() (m memory, err error) {
	l, err := cgroup.Detect()
	if err != nil {
		return m, err
	}
	root := l.V1["pids"]
	if root == "" {
		root = l.V2
	}
	err = filepath.WalkDir(filepath.Join(root, b.opts.CgroupRoot), func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return err
		}
		pids, err := os.ReadFile(p)
		for _, pid := range strings.Fields(string(pids)) {
			n, rerr := field("/proc/"+pid+"/smaps_rollup", "Pss:")
			if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) && !errors.Is(rerr, unix.ESRCH) {
				return rerr
			}
			m.pss += n
		}
		return err
	})
	var serr, aerr error
	m.slab, serr = field("/proc/meminfo", "Slab:")
	m.available, aerr = field("/proc/meminfo", "MemAvailable:")
	return m, errors.Join(err, serr, aerr)
}

// field reads a number of a file of /proc.
func field(path, name string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			return strconv.ParseInt(f[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}

// many measures with many instances: memory of an idle one, starts beside them, and taking them over. Their roots are
// without a limit: so many loop devices are the host's business. The two times lie minutes apart: each start is taken in
// units of one of crun's right after it, so that what else the machine does in between does not count.
func (b *bench) many(r *report.Report, live int) error {
	if err := b.config(); err != nil {
		return err
	}
	b.limits.RootBytes = 0
	var few, lots []float64
	var all []*instance
	before, err := b.memory()
	if err != nil {
		return err
	}
	const samples = 25
	if live < 2*samples+10 {
		return fmt.Errorf("needs %d instances", 2*samples+10)
	}
	for i := range live {
		into := &few
		switch {
		case i >= 10 && i < 10+samples:
		case i >= live-samples:
			into = &lots
		default:
			into = nil
		}
		if into != nil {
			time.Sleep(pause)
		}
		in, d, err := b.ours()
		if err != nil {
			return err
		}
		all = append(all, in)
		if into == nil {
			continue
		}
		id := fmt.Sprintf("bench-%d-%d", os.Getpid(), i)
		time.Sleep(pause)
		peer, err := b.theirs("crun", id)
		if err != nil {
			return err
		}
		if _, err := b.delete("crun", id); err != nil {
			return err
		}
		*into = append(*into, ms(d)/ms(peer))
	}
	after, err := b.memory()
	if err != nil {
		return err
	}
	each := func(kib int64) [][2]float64 { return [][2]float64{{float64(kib) / 1024 / float64(live), 0}} }
	r.Add("idle_instance_mib", "MiB", "", 2, each(after.pss-before.pss+after.slab-before.slab))
	// With what else the kernel keeps: page tables, stacks, counters of each processor.
	r.Add("idle_instance_available_mib", "MiB", "", 0, each(before.available-after.available))
	var pairs [][2]float64
	for i := range min(len(few), len(lots)) {
		pairs = append(pairs, [2]float64{lots[i], few[i]})
	}
	r.Add(fmt.Sprintf("start_%d_vs_10", live), "crun", "ours beside 10", 1.3, pairs)
	if err := b.e.Close(); err != nil {
		return err
	}
	began := time.Now()
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
	for _, in := range all {
		sem <- struct{}{}
		wg.Go(func() {
			defer func() { <-sem }()
			_, _ = b.stop(in)
		})
	}
	wg.Wait()
	return nil
}
