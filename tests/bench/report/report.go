// Package report writes the results of a benchmark: a table for people, and build/bench/<name>.json for programs.
package report

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Report is one run of a benchmark.
type Report struct {
	Bench   string            `json:"bench"`
	Host    map[string]any    `json:"host"`
	Rounds  int               `json:"rounds"`
	Commit  string            `json:"commit"`
	Started time.Time         `json:"started"`
	Options map[string]string `json:"options"`
	Rows    []Row             `json:"rows"`
	// Missing names the rows that could not be measured, with the reason.
	Missing map[string]string `json:"missing,omitempty"`
}

// Row compares ours with a peer. Samples are pairs, ours first, taken in turn; Ours and Peer are their medians.
type Row struct {
	ID       string       `json:"id"`
	Ours     float64      `json:"ours"`
	Peer     float64      `json:"peer"`
	Unit     string       `json:"unit"`
	PeerName string       `json:"peer_name"`
	Ratio    float64      `json:"ratio"`
	Target   float64      `json:"target"`
	Samples  [][2]float64 `json:"samples"`
}

// New begins a report with what is known of the host.
func New(bench string, rounds int) *Report {
	r := &Report{Bench: bench, Rounds: rounds, Started: time.Now().UTC().Truncate(time.Second), Options: map[string]string{}, Missing: map[string]string{}}
	var u unix.Utsname
	_ = unix.Uname(&u)
	load, _ := os.ReadFile("/proc/loadavg")
	r.Host = map[string]any{"kernel": unix.ByteSliceToString(u.Release[:]), "arch": runtime.GOARCH, "cpus": runtime.NumCPU(),
		"load": strings.TrimSpace(string(load))}
	if out, err := exec.Command("git", "rev-parse", "HEAD").Output(); err == nil {
		r.Commit = strings.TrimSpace(string(out))
	}
	return r
}

// Add computes a row from its samples. A target is a bound from below when higher is better, else from above.
func (r *Report) Add(id, unit, peerName string, target float64, samples [][2]float64) {
	var ours, peer []float64
	for _, s := range samples {
		ours, peer = append(ours, s[0]), append(peer, s[1])
	}
	row := Row{ID: id, Ours: Median(ours), Peer: Median(peer), Unit: unit, PeerName: peerName, Target: target, Samples: samples}
	if row.Peer != 0 {
		row.Ratio = row.Ours / row.Peer
	}
	r.Rows = append(r.Rows, row)
}

// Median of the values; 0 of none.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Write prints the table and saves the report.
func (r *Report) Write(w io.Writer, dir string) error {
	fmt.Fprintf(w, "%-22s %12s %12s %-8s %7s %7s  %s\n", "row", "ours", "peer", "unit", "ratio", "target", "peer is")
	for _, row := range r.Rows {
		fmt.Fprintf(w, "%-22s %12.3f %12.3f %-8s %7.3f %7.3f  %s\n", row.ID, row.Ours, row.Peer, row.Unit, row.Ratio, row.Target, row.PeerName)
	}
	for id, why := range r.Missing {
		fmt.Fprintf(w, "%-22s missing: %s\n", id, why)
	}
	path, err := r.Save(dir)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "written to %s\n", path)
	return nil
}

// Save writes build/bench/<bench>.json below dir, whole or not at all. A long run saves what it has from time to time: what
// is measured is not lost when the rest fails.
func (r *Report) Save(dir string) (path string, err error) {
	path = filepath.Join(dir, "build", "bench", r.Bench+".json")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("write report: %w", err)
	}
	data, err := json.MarshalIndent(r, "", " ")
	if err == nil {
		err = os.WriteFile(path+".new", append(data, '\n'), 0o644)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return "", fmt.Errorf("write report: %w", err)
	}
	return path, nil
}
