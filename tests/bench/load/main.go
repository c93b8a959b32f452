// Command load drives operations through one agent on the embedded controller, the whole of it but for containers, ports and
// images, which are fakes: does it stay as small and as quick as it was at the beginning? Each server is built, stopped, started,
// rebooted, paused, unpaused and deleted, with twenty servers side by side and every operation in the journal on disk.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/novalet/novalet/tests/bench/report"
)

func main() {
	ops := flag.Int("ops", 10000, "operations that are measured; as many before them warm up what is bounded")
	windows := flag.Int("windows", 10, "parts that are compared")
	parallel := flag.Int("parallel", 20, "servers side by side")
	out := flag.String("out", ".", "directory in which build/bench is")
	flag.Parse()
	if err := run(*ops, *windows, *parallel, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench load:", err)
		os.Exit(1)
	}
}

func run(ops, windows, parallel int, out string) (err error) {
	dir, err := os.MkdirTemp("", "novalet-load-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	r, err := newRig(dir)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := r.close(); err == nil {
			err = cerr
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	windows = max(windows/2*2, 2)
	operations := 1 + len(life) // the boot and what follows it
	lives := max((ops+operations*windows-1)/(operations*windows), 1)
	rep := report.New("load", windows)
	rep.Options = map[string]string{"operations": strconv.Itoa(lives * windows * operations), "servers": strconv.Itoa(lives * windows), "parallel": strconv.Itoa(parallel)}
	// The ids of past operations that are remembered have a bound; it is reached before anything is compared.
	if _, err := r.run(ctx, lives*windows, parallel); err != nil {
		return fmt.Errorf("warm up: %w", err)
	}
	var seen []window
	for i := range windows {
		w, err := r.run(ctx, lives, parallel)
		if err != nil {
			return fmt.Errorf("window %d: %w", i, err)
		}
		fmt.Printf("%2d: %6.0f operations/s, median %7.2f ms, heap %6.2f MiB, %d goroutines\n", i, w.perSecond, ms(w.latency), w.heap, w.goroutines)
		seen = append(seen, w)
	}
	early, late := seen[:windows/2], seen[windows/2:]
	row := func(id, unit string, target float64, f func(window) float64) {
		var samples [][2]float64
		for i := range late {
			samples = append(samples, [2]float64{f(late[i]), f(early[i])})
		}
		rep.Add(id, unit, "the first half", target, samples)
	}
	row("load_heap", "MiB", 1.05, func(w window) float64 { return w.heap })
	row("load_goroutines", "", 1.05, func(w window) float64 { return float64(w.goroutines) })
	row("load_latency", "ms", 1.25, func(w window) float64 { return ms(w.latency) })
	row("load_throughput", "1/s", 0.8, func(w window) float64 { return w.perSecond })
	return rep.Write(os.Stdout, out)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median(v []time.Duration) time.Duration {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}
