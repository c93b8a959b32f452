package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// consoleLogMax bounds the console log that one call reads.
const consoleLogMax = 1 << 20

// Tracked implements novalet.Compute.
func (a *Agent) Tracked() []novalet.TrackedInstance {
	var out []novalet.TrackedInstance
	for _, in := range a.all() {
		in.mu.Lock()
		if in.rec.Resident {
			out = append(out, novalet.TrackedInstance{Instance: in.rec.Instance, Power: in.power})
		}
		in.mu.Unlock()
	}
	return out
}

// Unfinished is how many operations are under way or wait in the journals.
func (a *Agent) Unfinished() int {
	n := 0
	for _, in := range a.all() {
		in.read(func(r *record) { n += len(r.Ops) })
	}
	return n
}

// Diagnostics implements novalet.Compute.
func (a *Agent) Diagnostics(ctx context.Context, instanceUUID string) (*novalet.Diagnostics, error) {
	in, err := a.lookup(instanceUUID)
	if err != nil {
		return nil, err
	}
	inst := in.view()
	st, err := a.runtime.Status(ctx, instanceUUID)
	if err != nil && !errors.Is(err, novalet.ErrNotFound) {
		return nil, fmt.Errorf("read container: %w", err)
	}
	if err != nil || st.State != novalet.ContainerRunning && st.State != novalet.ContainerPaused {
		f := novalet.Faultf(novalet.ErrInvalidState, "InstanceInvalidState", "Instance %s is not running. Cannot get_diagnostics while the instance is in this state.", instanceUUID)
		f.Details = map[string]any{"attr": "power_state", "instance_uuid": instanceUUID, "state": "shutdown", "method": "get_diagnostics"}
		return nil, f
	}
	stats, err := a.runtime.Stats(ctx, instanceUUID)
	if err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	nics, err := a.plugger.Stats(ctx, instanceUUID, inst.NetworkInfo)
	if err != nil {
		return nil, fmt.Errorf("read interface counters: %w", err)
	}
	d := &novalet.Diagnostics{State: string(st.State), Uptime: stats.Uptime, MemoryMB: inst.Flavor.MemoryMB,
		MemoryUsed: stats.MemoryBytes >> 20, CPUTimes: []time.Duration{stats.CPU}, Disk: *stats,
		NICs: map[string]novalet.InterfaceStats{}, ConfigDrive: truth(inst.ConfigDrive)}
	for i := range inst.NetworkInfo {
		if s, ok := nics[inst.NetworkInfo[i].ID]; ok {
			d.NICs[inst.NetworkInfo[i].Address] = s
		}
	}
	return d, nil
}

// ConsoleOutput implements novalet.Compute. Readers expect ASCII: what is not is replaced.
func (a *Agent) ConsoleOutput(ctx context.Context, instanceUUID string, lines int) (string, error) {
	if lines == 0 {
		return "", nil
	}
	data, err := a.runtime.ConsoleLog(ctx, instanceUUID, consoleLogMax)
	if err != nil {
		if !errors.Is(err, novalet.ErrNotFound) {
			return "", fmt.Errorf("read console log: %w", err)
		}
		in, lerr := a.lookup(instanceUUID)
		if lerr != nil {
			return "", lerr
		}
		if in.view().VMState == novalet.VMBuilding {
			f := novalet.Faultf(novalet.ErrBusy, "InstanceNotReady", "Instance %s is not ready", instanceUUID)
			f.Details = map[string]any{"instance_id": instanceUUID}
			return "", f
		}
		return "", nil
	}
	return tail(ascii(data), lines), nil
}

// ascii replaces each character that is not plain ASCII text by "?".
func ascii(data []byte) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r == '\r' || r == 0x1b || r >= 0x20 && r < 0x7f {
			return r
		}
		return '?'
	}, strings.ToValidUTF8(string(data), "?"))
}

// tail returns the last n lines; less than 0 is all. As in Nova, what follows the last newline counts as a line
// (ComputeManager._tail_log).
func tail(s string, n int) string {
	if n < 0 {
		return s
	}
	for i := len(s) - 1; i >= 0; i-- {
		if s[i] == '\n' {
			if n--; n <= 0 {
				return s[i+1:]
			}
		}
	}
	return s
}

// SetAdminPassword implements novalet.Compute: the password goes to chpasswd's standard input, never to an argument.
func (a *Agent) SetAdminPassword(ctx context.Context, instanceUUID string, user string, password novalet.Secret) error {
	if _, err := a.lookup(instanceUUID); err != nil {
		return err
	}
	refuse := func(reason string) error {
		f := novalet.Faultf(novalet.ErrUnsupported, "InstancePasswordSetFailed", "Failed to set admin password on %s because %s", instanceUUID, reason)
		f.Details = map[string]any{"instance": instanceUUID, "reason": reason}
		return f
	}
	if user == "" {
		user = "root"
	}
	if strings.ContainsAny(user, ":\n\x00") || strings.ContainsAny(password.Reveal(), "\n\x00") {
		return refuse("the user name or the password holds a character that cannot be set")
	}
	st, err := a.runtime.Status(ctx, instanceUUID)
	if err != nil || st.State != novalet.ContainerRunning {
		return refuse("the instance is not running")
	}
	code, err := a.runtime.Exec(ctx, instanceUUID, &novalet.ExecSpec{
		Process: novalet.ProcessSpec{Args: []string{"chpasswd"}, Cwd: "/", User: "0:0",
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
		Stdin: strings.NewReader(user + ":" + password.Reveal() + "\n"),
	})
	if err != nil || code == 127 {
		a.log.Warn("password is not set", "instance", instanceUUID, "err", err)
		return refuse("the image has no chpasswd")
	}
	if code != 0 {
		return refuse(fmt.Sprintf("chpasswd ended with code %d", code))
	}
	return nil
}

// CacheImages implements novalet.Compute.
func (a *Agent) CacheImages(ctx context.Context, rc novalet.RequestContext, ids []string) (map[string]string, error) {
	out := map[string]string{}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return out, err
		}
		res, err := a.images.Cache(ctx, rc, id)
		if err != nil {
			a.log.Warn("image is not cached", "image", id, "request_id", rc.RequestID, "err", err)
			res = "error"
		}
		out[id] = res
	}
	return out, nil
}

// Resources implements novalet.Compute.
func (a *Agent) Resources(context.Context) (novalet.HostResources, error) {
	r := novalet.HostResources{VCPUs: int64(goruntime.NumCPU()), Arch: novaArch(goruntime.GOARCH)}
	mem, err := fieldOf("/proc/meminfo", "MemTotal")
	if err != nil {
		return r, err
	}
	kb, err := strconv.ParseInt(strings.TrimSuffix(mem, " kB"), 10, 64)
	if err != nil {
		return r, fmt.Errorf("read memory size: %w", err)
	}
	r.MemoryMB = kb >> 10
	var st unix.Statfs_t
	if err := unix.Statfs(a.dir, &st); err != nil {
		return r, fmt.Errorf("read size of the instances' file system: %w", err)
	}
	r.DiskGB = int64(st.Blocks) * int64(st.Bsize) >> 30
	r.DiskFreeGB = int64(st.Bavail) * int64(st.Bsize) >> 30
	r.CPUInfo = map[string]any{"arch": r.Arch, "topology": map[string]any{"cores": r.VCPUs, "sockets": 1, "threads": 1}}
	if model, err := fieldOf("/proc/cpuinfo", "model name"); err == nil {
		r.CPUInfo["model"] = model
	}
	if vendor, err := fieldOf("/proc/cpuinfo", "vendor_id"); err == nil {
		r.CPUInfo["vendor"] = vendor
	}
	if a.pci != nil {
		var err error
		if r.PCIDevices, err = a.pci.PCIDevices(); err != nil {
			return r, fmt.Errorf("read devices: %w", err)
		}
		r.PCI, r.PCIClaims = true, a.pciClaims()
	}
	return r, nil
}

// novaArch is Nova's word for an architecture (nova/objects/fields.py Architecture).
func novaArch(goarch string) string {
	switch goarch {
	case "amd64":
		return "x86_64"
	case "386":
		return "i686"
	case "arm64":
		return "aarch64"
	case "arm":
		return "armv7l"
	}
	return goarch
}

// fieldOf returns the first value of a "key: value" file.
func fieldOf(path, key string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read host: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		k, v, ok := strings.Cut(s.Text(), ":")
		if ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("read host: %s has no %q", path, key)
}
