// Package cgroup makes the cgroups of instances, on v1, on v2 and on hosts that mount both ("hybrid"), applies
// limits and reads them back, and counts.
//
// It owns one sub-tree of a given name in each hierarchy and leaves every other group and every mount alone:
//
//	<v1 controller>/<name>/<instance>             every process of the instance
//	<v1 controller>/<name>/keepers                the keepers
//	<cgroup2>/<name>/<instance>                   limits, freezer, kill
//	<cgroup2>/<name>/<instance>/payload           the root of the instance's cgroup namespace, its own to divide
//	<cgroup2>/<name>/<instance>/exec              processes that the host started inside
//	<cgroup2>/<name>/keepers
//
// The cgroup2 part exists on hybrid hosts too, where it has no controllers: it freezes, it kills at once, and a
// machine's systemd finds its tree there.
//
// It starts no goroutine.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// controllersV1 are those that are used when they are mounted. The freezer is only needed without cgroup2.
var controllersV1 = []string{"cpu", "cpuacct", "memory", "pids", "devices", "blkio", "cpuset", "freezer"}

// controllersV2 are those that are handed down when they exist.
var controllersV2 = []string{"cpu", "memory", "pids", "io", "cpuset"}

// Layout is which hierarchies the host has.
type Layout struct {
	// V1 maps a controller to its mount point; controllers mounted together share one.
	V1 map[string]string `json:"v1"`
	// V1Named are further v1 hierarchies without a controller, such as name=systemd.
	V1Named []string `json:"v1_named"`
	// V2 is the mount point of cgroup2, "" without one; V2Controllers are the controllers in it.
	V2            string   `json:"v2"`
	V2Controllers []string `json:"v2_controllers"`
}

// Detect reads the mount table.
func Detect() (*Layout, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	l := parseLayout(string(b))
	if l.V2 != "" {
		c, err := os.ReadFile(filepath.Join(l.V2, "cgroup.controllers"))
		if err != nil {
			return nil, fmt.Errorf("read cgroup2 controllers: %w", err)
		}
		l.V2Controllers = strings.Fields(string(c))
	}
	if l.V2 == "" && len(l.V1) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	return l, nil
}

// parseLayout finds the cgroup mounts in a mount table (proc(5)); the first mount of a hierarchy counts.
func parseLayout(text string) *Layout {
	l := &Layout{V1: map[string]string{}}
	for line := range strings.SplitSeq(text, "\n") {
		head, tail, ok := strings.Cut(line, " - ")
		if !ok {
			continue
		}
		h, t := strings.Fields(head), strings.Fields(tail)
		if len(h) < 6 || len(t) < 3 || h[3] != "/" {
			continue
		}
		point := h[4]
		switch t[0] {
		case "cgroup2":
			if l.V2 == "" {
				l.V2 = point
			}
		case "cgroup":
			used := false
			for _, o := range strings.Split(t[2], ",") {
				if slices.Contains(controllersV1, o) && l.V1[o] == "" {
					l.V1[o] = point
					used = true
				}
			}
			if !used && strings.Contains(t[2], "name=") && !slices.Contains(l.V1Named, point) {
				l.V1Named = append(l.V1Named, point)
			}
		}
	}
	return l
}

// HasV2 tells whether cgroup2 has the controller.
func (l *Layout) HasV2(controller string) bool { return slices.Contains(l.V2Controllers, controller) }

// String describes the layout in a word for logs and doctor.
func (l *Layout) String() string {
	switch {
	case len(l.V1) == 0:
		return "v2"
	case l.V2 == "":
		return "v1"
	}
	return "hybrid"
}

// v1Dirs returns the v1 mount points in use, each once, with the first controller of each.
func (l *Layout) v1Dirs() []Ref {
	var out []Ref
	for _, c := range controllersV1 {
		p := l.V1[c]
		if p == "" || c == "freezer" && l.V2 != "" {
			continue
		}
		if i := slices.IndexFunc(out, func(r Ref) bool { return r.Path == p }); i >= 0 {
			if c == "memory" {
				out[i].Controller = c
			}
			continue
		}
		out = append(out, Ref{Kind: "v1", Controller: c, Path: p})
	}
	return out
}
