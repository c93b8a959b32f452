package main

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/novalet/novalet/engine/cgroup"
	"github.com/novalet/novalet/tests/bench/report"
)

//go:embed testdata/limit.c
var limitSource []byte

// limit measures the cold start beside the bare system calls of limit.c.
func (b *bench) limit(r *report.Report, rounds int) error {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		return errors.New("needs gcc")
	}
	src, program, dir := filepath.Join(b.dir, "limit.c"), filepath.Join(b.dir, "limit"), filepath.Join(b.dir, "limit.d")
	if err := errors.Join(os.WriteFile(src, limitSource, 0o644), os.Mkdir(dir, 0o711)); err != nil {
		return err
	}
	if out, err := exec.Command(gcc, "-O2", "-o", program, src).CombinedOutput(); err != nil {
		return fmt.Errorf("build limit.c: %w: %s", err, out)
	}
	l, err := cgroup.Detect()
	if err != nil {
		return err
	}
	groups := slices.Collect(maps.Values(l.V1))
	slices.Sort(groups)
	groups = slices.Compact(groups)
	// A new cpuset group takes no process before it is filled in.
	groups = slices.DeleteFunc(groups, func(g string) bool { return g == l.V1["cpuset"] })
	if len(groups) == 0 {
		groups = []string{"2:" + l.V2}
	}
	var samples [][2]float64
	for i := range rounds + 2 {
		var pair [2]float64
		us := func() error {
			in, d, err := b.ours()
			if err != nil {
				return err
			}
			pair[0] = ms(d)
			_, err = b.stop(in)
			return err
		}
		bare := func() error {
			out, err := exec.Command(program, append([]string{dir, b.layers[0].Path, bridgeName, strconv.Itoa(i)}, groups...)...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
			}
			took, err := strconv.ParseFloat(string(bytes.TrimSpace(out)), 64)
			pair[1] = took / 1000
			return err
		}
		order := []func() error{us, bare}
		if i%2 == 0 {
			slices.Reverse(order)
		}
		for _, f := range order {
			if err := f(); err != nil {
				return err
			}
			time.Sleep(pause)
		}
		if i >= 2 {
			samples = append(samples, pair)
		}
	}
	r.Add("cold_start_vs_limit", "ms", "bare system calls", 0, samples)
	return nil
}
