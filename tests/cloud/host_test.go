package cloud_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/ports"
	"github.com/gophercloud/gophercloud/v2/openstack/placement/v1/resourceproviders"
)

// snapshot is what instances may leave behind on the host, in Neutron and in Placement, one line each.
func snapshot(t testing.TB) []string {
	t.Helper()
	ctx := context.Background()
	var lines []string
	add := func(kind string, text string, keep *regexp.Regexp) {
		for l := range strings.Lines(text) {
			if l = strings.TrimSpace(l); l != "" && (keep == nil || keep.MatchString(l)) {
				lines = append(lines, kind+" "+l)
			}
		}
	}
	run := func(name string, args ...string) string {
		out, err := sh(ctx, name, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	// The mount id and the parent's change from mount to mount: what is mounted where is what counts.
	for l := range strings.Lines(string(mounts)) {
		// The pool holds disks for instances to come.
		if f := strings.Fields(l); len(f) > 5 && strings.HasPrefix(f[4], state(t)) && !strings.Contains(f[4], "/pool/") {
			lines = append(lines, "mount "+strings.Join(f[3:6], " "))
		}
	}
	// Neutron's own ends, of routers and DHCP servers, are wired when it comes to it; states change by themselves.
	for l := range strings.Lines(run("ip", "-o", "link")) {
		if f := strings.Fields(l); len(f) > 1 && !regexp.MustCompile(`link-netns (q|ovnmeta-)`).MatchString(l) {
			add("link", f[1], regexp.MustCompile(`^(tap|qvo|qvb|qbr|veth|nvl|eth[0-9]+@)`))
		}
	}
	add("netns", run("ip", "netns", "list"), regexp.MustCompile(`novalet`))
	// Nor are the rules that let the ports of routers and DHCP servers through.
	rules := regexp.MustCompile(`(?m)^.*"Accept all packets when port is trusted\."`).ReplaceAllString(run("iptables-save"), "")
	// An agent of Neutron's that starts numbers the zones of the ports that are there anew.
	rules = regexp.MustCompile(`--zone [0-9]+`).ReplaceAllString(rules, "--zone")
	add("rule", rules, regexp.MustCompile(`tap[0-9a-f]|neutron-linuxbri-[iso][0-9a-f]{4,}`))
	add("loop", run("losetup", "-l", "-n", "-O", "BACK-FILE"), regexp.MustCompile(regexp.QuoteMeta(state(t))+`/.*instances`))
	for _, dir := range []string{filepath.Join(state(t), "novalet")} {
		_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			if d.IsDir() && (d.Name() == "images" || d.Name() == "layers") {
				return fs.SkipDir // images stay: that is what the cache is for
			}
			if uuidRE.MatchString(d.Name()) {
				lines = append(lines, "file "+p)
				if d.IsDir() {
					return fs.SkipDir
				}
			}
			return nil
		})
	}
	admin := as(t, "admin")
	page, err := ports.List(admin.network, ports.ListOpts{}).AllPages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	l, err := ports.ExtractPorts(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range l {
		if strings.HasPrefix(p.DeviceOwner, "compute:") || p.DeviceOwner == "" {
			lines = append(lines, "port "+p.ID)
		}
	}
	for _, c := range allocations(t) {
		lines = append(lines, "allocation "+c)
	}
	lines = append(lines, processes(t)...)
	// What the agent itself sees on the host, also without Nova's knowledge.
	out, err := novalet("ps", "-q")
	if err != nil {
		t.Fatal(err)
	}
	add("container", out, nil)
	sort.Strings(lines)
	return lines
}

var uuidRE = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// allocations lists the consumers on the provider of this host.
func allocations(t testing.TB) []string {
	t.Helper()
	admin := as(t, "admin")
	id := providerID(t)
	a, err := resourceproviders.GetAllocations(context.Background(), admin.placement, id).Extract()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for consumer := range a.Allocations {
		out = append(out, consumer)
	}
	return out
}

func providerID(t testing.TB) string { return providerOf(t, computeHost()) }

func providerOf(t testing.TB, host string) string {
	t.Helper()
	admin := as(t, "admin")
	page, err := resourceproviders.List(admin.placement, resourceproviders.ListOpts{Name: host}).AllPages(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	l, err := resourceproviders.ExtractResourceProviders(page)
	if err != nil || len(l) != 1 {
		t.Fatalf("resource provider %s: %v, %v", host, l, err)
	}
	return l[0].UUID
}

// processes lists what runs inside this cloud's instances: processes in the agent's cgroups whose ids are shifted. The
// init that waits in a prepared sandbox is none yet.
func processes(t testing.TB) []string {
	t.Helper()
	root := fmt.Sprintf("/novalet-%x", sha256.Sum256([]byte(filepath.Join(state(t), "novalet"))))[:len("/novalet-")+8]
	dirs, err := filepath.Glob("/proc/[0-9]*/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range dirs {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it ended meanwhile
		}
		groups, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "cgroup"))
		comm, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "comm"))
		m := strings.Fields(string(b))
		if len(m) == 3 && m[1] != "0" && strings.Contains(string(groups), root) && !strings.HasPrefix(string(comm), "memfd:novalet") {
			out = append(out, "process "+strings.TrimSpace(string(comm))+" ids from "+m[1])
		}
	}
	return out
}

// leavesNothing holds the host and the cloud, at the end of the test, against what they are now.
func leavesNothing(t testing.TB) {
	t.Helper()
	before := snapshot(t)
	t.Cleanup(func() { unchanged(t, before) })
}

// unchanged fails the test unless the host, Neutron and Placement come back to what they were. Neutron's agents and
// the kernel clean up behind the API's back, so it waits.
func unchanged(t testing.TB, before []string) {
	t.Helper()
	eventually(t, 90*time.Second, "the host is as it was before", func() error {
		diff := difference(before, snapshot(t))
		// What only went is what Neutron was still taking down of a test before.
		if !slices.ContainsFunc(diff, func(l string) bool { return strings.HasPrefix(l, "+") }) {
			return nil
		}
		return fmt.Errorf("left behind or gone:\n  %s", strings.Join(diff, "\n  "))
	})
}

// difference lists lines that are in one list only, with their counts in mind.
func difference(before, after []string) []string {
	n := map[string]int{}
	for _, l := range before {
		n[l]--
	}
	for _, l := range after {
		n[l]++
	}
	var out []string
	for l, c := range n {
		switch {
		case c > 0:
			out = append(out, "+ "+l)
		case c < 0:
			out = append(out, "- "+l)
		}
	}
	sort.Strings(out)
	return out
}

// TestDifference: the comparison that other tests rely on sees what it should.
func TestDifference(t *testing.T) {
	got := difference([]string{"a", "b", "b"}, []string{"b", "c"})
	if strings.Join(got, ",") != "+ c,- a,- b" {
		t.Fatalf("difference: %q", got)
	}
}
