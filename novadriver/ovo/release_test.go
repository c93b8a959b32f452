package ovo

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write testdata/releases.txt anew")

// The fingerprint of the table: what each release changed. A new release is
// one more paragraph here.
func TestReleasesFingerprint(t *testing.T) {
	var b strings.Builder
	var prev *Release
	for _, r := range Releases() {
		fmt.Fprintf(&b, "%s (Nova %d): service version %d, computes from %d, compute RPC %s, compute_task %s\n",
			r.Name, r.Nova, r.Service, r.Oldest, r.ComputeRPC, r.ComputeTask)
		objects := r.Objects()
		for _, n := range slices.Sorted(maps.Keys(objects)) {
			switch {
			case prev == nil, prev.Version(n) == objects[n]:
			case prev.Version(n) == "":
				fmt.Fprintf(&b, "    %s %s is new\n", n, objects[n])
			default:
				fmt.Fprintf(&b, "    %s %s → %s\n", n, prev.Version(n), objects[n])
			}
		}
		prev = r
	}
	b.WriteString("\nall objects of " + prev.Name + "\n")
	objects := prev.Objects()
	for _, n := range slices.Sorted(maps.Keys(objects)) {
		fmt.Fprintf(&b, "    %s %s\n", n, objects[n])
	}
	const file = "testdata/releases.txt"
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("the table changed; if that is meant, run with -update (-file +table):\n%s", diff)
	}
}

func TestReleaseFor(t *testing.T) {
	for s, want := range map[int]string{
		64: "zed", 65: "zed", 66: "2023.1", 67: "2024.1", 68: "2025.1", 69: "2025.1", 70: "2025.2", 72: "2026.1", 73: "2026.1", 74: "2026.2", 99: "2026.2",
	} {
		if r, err := ReleaseFor(s); err != nil || r.Name != want {
			t.Errorf("%d: %v, %v, want %s", s, r, err, want)
		}
	}
	if _, err := ReleaseFor(63); err == nil {
		t.Error("63 is older than Zed")
	}
	names := func(rs []*Release) (out []string) {
		for _, r := range rs {
			out = append(out, r.Name)
		}
		return out
	}
	if diff := cmp.Diff([]string{"2023.1", "2023.2"}, names(Candidates(66))); diff != "" {
		t.Errorf("66: %s", diff)
	}
	if n := Candidates(65); len(n) != 0 {
		t.Errorf("65: %v", names(n))
	}
	r, err := ReleaseNamed("2023.2")
	if err != nil || r.Version("Instance") != "2.8" {
		t.Errorf("2023.2: %+v, %v", r, err)
	}
	if low := r.Lower("Instance", "2.7"); low.Version("Instance") != "2.7" || r.Version("Instance") != "2.8" {
		t.Error("Lower changes the release it is called on, or nothing")
	}
	if _, err := ReleaseNamed("yoga"); err == nil {
		t.Error("yoga is known")
	}
	if Newest().Name != "2026.2" {
		t.Errorf("newest is %s", Newest().Name)
	}
	if o := r.Minimal("Instance", map[string]any{"host": "h"}); o.Version != "2.8" || !o.Changed("host") {
		t.Errorf("minimal %+v", o)
	}
}

// The manifests that stock nova-compute sends, as recorded; for classes that
// are not in the recording, as its registry has them.
func TestManifest(t *testing.T) {
	raw, err := os.ReadFile("testdata/manifests.json")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]map[string]map[string]string // release → class → manifest
	if err := json.Unmarshal(raw, &want); err != nil {
		t.Fatal(err)
	}
	for name, classes := range want {
		r, err := ReleaseNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		for class, manifest := range classes {
			if diff := cmp.Diff(manifest, r.Manifest(class)); diff != "" {
				t.Errorf("%s %s (-recorded +ours):\n%s", name, class, diff)
			}
		}
	}
	if m := Newest().Manifest("Nonsense"); len(m) != 0 {
		t.Errorf("an unknown class has %v", m)
	}
	for n, children := range contains {
		for _, c := range append(children, n) {
			if Newest().Version(c) == "" {
				t.Errorf("%s (in %s) has no version", c, n)
			}
		}
	}
}

// No sample of a release holds an object newer than the table says.
func TestSamplesFitTheTable(t *testing.T) {
	for _, name := range []string{"zed", "2025.1", "2026.1"} {
		r, err := ReleaseNamed(name)
		if err != nil {
			t.Fatal(err)
		}
		for file, raw := range samples(t) {
			if !strings.Contains(file, "/"+name+"/") {
				continue
			}
			err := Walk(raw, func(o *Object) bool {
				if v := r.Version(o.Name); v != o.Version && v != "" {
					t.Errorf("%s: %s %s, the table of %s says %s", file, o.Name, o.Version, name, v)
				}
				return true
			})
			if err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}
