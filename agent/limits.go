package agent

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/novalet/novalet"
)

// limits turns a flavor into what the container may use, by Nova's own keys.
func limits(cfg *Config, inst *novalet.Instance) (novalet.Limits, error) {
	f := &inst.Flavor
	l := novalet.Limits{
		MemoryBytes: f.MemoryMB << 20, VCPUs: f.VCPUs,
		CPUShares: min(max(f.VCPUs, 1)*1024, 262144), PIDs: cfg.PIDsLimit, RootBytes: f.RootGB << 30,
	}
	var err error
	number := func(key string, lo, hi int64) (int64, bool) {
		s, ok := f.ExtraSpecs["quota:"+key]
		if !ok || err != nil {
			return 0, false
		}
		n, perr := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
		if perr != nil || n < lo || n > hi {
			err = novalet.Faultf(novalet.ErrAbort, "", "The flavor's quota:%s is not a number from %d to %d. Choose another flavor, or ask the operator to correct this one.", key, lo, hi)
			return 0, false
		}
		return n, true
	}
	const big = 1 << 50
	if n, ok := number("cpu_shares", 2, 262144); ok {
		l.CPUShares = n
	}
	if n, ok := number("cpu_period", 1000, 1000000); ok {
		l.CPUPeriod = n
	}
	if n, ok := number("cpu_quota", -1, big); ok && n > 0 {
		if n < 1000 {
			n = 1000 // the kernel's least
		}
		l.CPUQuota = n
		if l.CPUPeriod == 0 {
			l.CPUPeriod = 100000
		}
	}
	if n, ok := number("pids", 1, 4194304); ok {
		l.PIDs = n
	}
	for _, d := range []struct {
		read, write, total string
		r, w               *int64
	}{
		{"disk_read_bytes_sec", "disk_write_bytes_sec", "disk_total_bytes_sec", &l.ReadBPS, &l.WriteBPS},
		{"disk_read_iops_sec", "disk_write_iops_sec", "disk_total_iops_sec", &l.ReadIOPS, &l.WriteIOPS},
	} {
		if n, ok := number(d.total, 0, big); ok {
			*d.r, *d.w = n, n
		}
		// As in Nova, the separate keys win over the total.
		if n, ok := number(d.read, 0, big); ok {
			*d.r = n
		}
		if n, ok := number(d.write, 0, big); ok {
			*d.w = n
		}
	}
	return l, err
}

// wantsCPUs returns how many host CPUs of its own the flavor or image asks for.
func wantsCPUs(inst *novalet.Instance) (int, error) {
	policy := inst.Flavor.ExtraSpecs["hw:cpu_policy"]
	if policy == "" {
		policy = inst.ImageProperty("hw_cpu_policy")
	}
	switch policy {
	case "", "shared":
		return 0, nil
	case "dedicated":
		return int(inst.Flavor.VCPUs), nil
	}
	return 0, novalet.Faultf(novalet.ErrAbort, "", "The CPU policy %q is not supported for containers. Choose a flavor with the policy shared or dedicated.", policy)
}

// claimCPUs gives an instance host CPUs for itself, or keeps those it has. "" when it asked for none.
func (a *Agent) claimCPUs(in *instance) (string, error) {
	n, err := wantsCPUs(in.view())
	if err != nil || n == 0 {
		return "", err
	}
	free, err := parseCPUList(a.cfg.CPUDedicatedSet)
	if err != nil {
		return "", err
	}
	a.cpuMu.Lock()
	defer a.cpuMu.Unlock()
	var own string
	for _, other := range a.all() {
		var set string
		other.read(func(r *record) { set = r.CPUSet })
		if other == in {
			own = set
			continue
		}
		taken, err := parseCPUList(set)
		if err != nil {
			return "", err
		}
		free = slices.DeleteFunc(free, func(c int) bool { return slices.Contains(taken, c) })
	}
	if cpus, err := parseCPUList(own); err == nil && len(cpus) == n {
		return own, nil
	}
	if len(free) < n {
		f := novalet.Faultf(novalet.ErrReschedule, "ComputeResourcesUnavailable", "The host has no %d dedicated CPUs left. Try again later, or choose a flavor without hw:cpu_policy=dedicated.", n)
		f.Details = map[string]any{"reason": "no dedicated CPUs left"}
		return "", f
	}
	set := formatCPUList(free[:n])
	in.set(func(r *record) { r.CPUSet = set })
	return set, nil
}

// maxCPU bounds the numbers of a CPU list; the kernel's own bound is 8192.
const maxCPU = 8191

// parseCPUList reads "0-3,8,^2" as Nova writes it.
func parseCPUList(s string) ([]int, error) {
	in, out := map[int]bool{}, map[int]bool{}
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		set := in
		if rest, ok := strings.CutPrefix(part, "^"); ok {
			part, set = rest, out
		}
		first, last, ranged := strings.Cut(part, "-")
		lo, err := strconv.Atoi(strings.TrimSpace(first))
		if err != nil {
			return nil, fmt.Errorf("read cpu list %q: %q is not a number", s, first)
		}
		hi := lo
		if ranged {
			if hi, err = strconv.Atoi(strings.TrimSpace(last)); err != nil {
				return nil, fmt.Errorf("read cpu list %q: %q is not a number", s, last)
			}
		}
		if lo < 0 || hi < lo || hi > maxCPU {
			return nil, fmt.Errorf("read cpu list %q: %q is out of range", s, part)
		}
		for c := lo; c <= hi; c++ {
			set[c] = true
		}
	}
	var cpus []int
	for c := range in {
		if !out[c] {
			cpus = append(cpus, c)
		}
	}
	slices.Sort(cpus)
	return cpus, nil
}

func formatCPUList(cpus []int) string {
	words := make([]string, len(cpus))
	for i, c := range cpus {
		words[i] = strconv.Itoa(c)
	}
	return strings.Join(words, ",")
}
