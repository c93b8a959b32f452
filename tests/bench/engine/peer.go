package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/novalet/novalet/engine/cgroup"
)

// config is the peers' bundle: the same namespaces and limits.
func (b *bench) config() error {
	type m map[string]any
	mount := func(dst, typ string, opts ...string) m {
		return m{"destination": dst, "type": typ, "source": typ, "options": opts}
	}
	var ns []m
	for _, n := range []string{"pid", "mount", "uts", "ipc", "network", "user", "cgroup"} {
		ns = append(ns, m{"type": n})
	}
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
	c := m{"ociVersion": "1.0.2", "hostname": "bench", "root": m{"path": "rootfs", "readonly": true},
		"process": m{"terminal": false, "user": m{"uid": 0, "gid": 0}, "cwd": "/", "args": []string{"/bin/sh", "-c", script},
			"env": []string{"PATH=/bin"}, "noNewPrivileges": true, "capabilities": m{"bounding": caps, "effective": caps, "permitted": caps}},
		"mounts": []m{mount("/proc", "proc"), mount("/dev", "tmpfs", "nosuid", "mode=755", "size=65536k"), mount("/dev/pts", "devpts", "newinstance", "ptmxmode=0666"),
			mount("/dev/shm", "tmpfs", "nosuid", "nodev"), mount("/sys", "sysfs", "nosuid", "nodev", "noexec", "ro")},
		"linux": m{"namespaces": ns, "uidMappings": []m{{"containerID": 0, "hostID": 100000, "size": 65536}}, "gidMappings": []m{{"containerID": 0, "hostID": 100000, "size": 65536}},
			"resources":     m{"memory": m{"limit": 256 << 20}, "cpu": m{"shares": 1024}, "pids": m{"limit": 100}, "devices": []m{{"allow": false, "access": "rwm"}}},
			"maskedPaths":   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"},
			"readonlyPaths": []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}}}
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, "bundle", "config.json"), data, 0o644)
}

// peerCommand runs a peer; crun refuses hosts that mount v1 and a cgroup2, so it gets a mount namespace without the
// cgroup2.
func (b *bench) peerCommand(peer string, args ...string) *exec.Cmd {
	full := append([]string{"--root", filepath.Join(b.dir, peer)}, args...)
	if peer == "crun" {
		if l, err := cgroup.Detect(); err == nil && l.String() == "hybrid" {
			return exec.Command("unshare", append([]string{"-m", "sh", "-c", `umount "$0" && exec crun "$@"`, l.V2}, full...)...)
		}
	}
	return exec.Command(peer, full...)
}

// theirs starts one container of a peer and returns how long it took until its first output.
func (b *bench) theirs(peer, id string) (time.Duration, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	cmd := b.peerCommand(peer, "run", "-d", "-b", filepath.Join(b.dir, "bundle"), id)
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = w, &text
	// A file, not a pipe: the container would hold a pipe open.
	errs, err := os.CreateTemp(b.dir, "stderr")
	if err != nil {
		return 0, err
	}
	defer errs.Close()
	cmd.Stderr = errs
	began := time.Now()
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 16)
	_, rerr := r.Read(buf)
	took := time.Since(began)
	if err := cmd.Wait(); err != nil || rerr != nil {
		msg, _ := os.ReadFile(errs.Name())
		return 0, fmt.Errorf("%s run: %w %v: %s", peer, err, rerr, bytes.TrimSpace(msg))
	}
	return took, nil
}

func (b *bench) delete(peer, id string) (time.Duration, error) {
	began := time.Now()
	out, err := b.peerCommand(peer, "delete", "-f", id).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%s delete: %w: %s", peer, err, out)
	}
	return time.Since(began), nil
}
