// Command image measures the first and the next use of an image against the tools people unpack with: GNU tar for root
// tars, umoci for container archives, and ourselves for a disk of the same tree. It needs root, works in a folder of its
// own below -dir and leaves nothing.
package main

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge"
	"github.com/novalet/novalet/tests/bench/report"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == glancebridge.HelperCommand {
		os.Exit(glancebridge.HelperMain(os.Args[2:]))
	}
	rounds := flag.Int("rounds", 7, "rounds of each comparison")
	tree := flag.String("tree", "", "a root file system to take instead of a Debian that mmdebstrap makes")
	dir := flag.String("dir", "/var/tmp", "file system to unpack to")
	out := flag.String("out", ".", "directory in which build/bench is")
	flag.Parse()
	if err := run(*rounds, *tree, *dir, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench image:", err)
		os.Exit(1)
	}
}

type bench struct {
	work, tree, images string
	last               string // what was unpacked before
	rounds, made       int
	r                  *report.Report
	peak               int64 // bytes of a helper
}

func run(rounds int, tree, dir, out string) (err error) {
	work, err := os.MkdirTemp(dir, "novalet-image-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	b := &bench{work: work, tree: tree, images: filepath.Join(work, "images"), rounds: rounds, r: report.New("image", rounds)}
	if err := os.Mkdir(b.images, 0o700); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "making the tree and its images")
	if tree == "" {
		b.tree = filepath.Join(work, "tree")
		if err := debian(b.tree); err != nil {
			return err
		}
	}
	tar := filepath.Join(work, "root.tar")
	if err := command("tar", "-C", b.tree, "--numeric-owner", "-cf", tar, "."); err != nil {
		return err
	}
	if err := b.describe(); err != nil {
		return err
	}
	for _, step := range []struct {
		ids []string
		fn  func(tar string) error
	}{
		{[]string{"gzip_vs_tar", "cached_vs_tar", "zstd_vs_tar"}, b.roots}, {[]string{"docker_vs_umoci"}, b.docker},
		{[]string{"qcow2_vs_rawtar"}, b.qcow2}, {[]string{"delta_bytes"}, b.delta},
	} {
		touch(free() - leftFree)
		fmt.Fprintln(os.Stderr, "measuring", strings.Join(step.ids, ", "))
		if err := step.fn(tar); err != nil {
			for _, id := range step.ids {
				b.r.Missing[id] = err.Error()
			}
		}
	}
	if b.peak > 0 {
		b.r.Add("helper_mib", "MiB", "64 MiB", 1, [][2]float64{{float64(b.peak) / (1 << 20), 64}})
	}
	if err := b.r.Write(os.Stdout, out); err != nil {
		return err
	}
	if len(b.r.Missing) > 0 {
		return errors.New("some rows are missing")
	}
	return nil
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// shell runs a line; $IN and $OUT are the file and what it becomes.
func shell(line, in, out string) error {
	cmd := exec.Command("sh", "-c", line)
	cmd.Env = append(os.Environ(), "IN="+in, "OUT="+out)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", line, err, strings.TrimSpace(string(msg)))
	}
	return nil
}

// add puts a file into the image folder.
func (b *bench) add(id, file, format string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha512.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return err
	}
	rec, err := json.Marshal(map[string]any{"id": id, "name": id, "status": "active", "size": n, "disk_format": format, "container_format": containerFormat(id),
		"os_hash_algo": "sha512", "os_hash_value": hex.EncodeToString(h.Sum(nil)), "file": id})
	if err != nil {
		return err
	}
	if err := os.Rename(file, filepath.Join(b.images, id)); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.images, id+".json"), rec, 0o600)
}

// ours fetches an image into an empty store and, the second time, from what is there then.
func (b *bench) ours(id string) (first, next float64, err error) {
	dir := b.fresh("store")
	s, err := glancebridge.Open(glancebridge.Options{Dir: dir, Glance: glancebridge.NewFileGlance(b.images)})
	if err != nil {
		return 0, 0, err
	}
	stop := b.watch()
	ctx := context.Background()
	start := time.Now()
	_, err = s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "bench-1"})
	first = ms(start)
	stop()
	if err == nil {
		start = time.Now()
		_, err = s.Prepare(ctx, &novalet.ImageRequest{ImageID: id, InstanceUUID: "bench-2"})
		next = ms(start)
	}
	return first, next, errors.Join(err, s.Close())
}

// fresh names a folder that is still to be made, once all that was written is on disk. What is in it stays until the end:
// an ext4 without a journal passes over every inode that was freed in the last minute when it looks for a free one, so that
// who comes after the removal of a tree would pay for it.
//
// What was unpacked before leaves the cache, or that would fill the machine's memory after some rounds. The memory that either
// is about to take is touched before: a virtual machine may have never had what is free, or given it back, and to get it costs
// more than to write a file into it.
func (b *bench) fresh(name string) string {
	b.made++
	unix.Sync()
	forget(b.last)
	touch(warmBytes)
	b.last = filepath.Join(b.work, fmt.Sprintf("%s-%d", name, b.made))
	return b.last
}

// warmBytes is more than an unpacking takes: the tree, its spool and what is read of the image. Before each comparison all that
// is free is touched but for leftFree, since the kernel need not give out what was touched last.
const warmBytes, leftFree = 1 << 30, 256 << 20

// touch takes so many bytes of memory, writes to them and gives them back.
func touch(n int64) {
	if n <= 0 {
		return
	}
	if mem, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err == nil {
		_ = unix.Munmap(mem)
	}
}

// free is the memory in bytes that is not used for anything.
func free() int64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0
	}
	return int64(si.Freeram) * int64(si.Unit)
}

func ms(start time.Time) float64 { return float64(time.Since(start).Microseconds()) / 1000 }

// watch notes the largest memory of a helper until it is stopped.
func (b *bench) watch() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
			}
			kids, _ := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
			tasks, _ := filepath.Glob("/proc/self/task/*/children")
			for _, t := range tasks {
				k, _ := os.ReadFile(t)
				kids = append(append(kids, ' '), k...)
			}
			for _, pid := range strings.Fields(string(kids)) {
				status, _ := os.ReadFile("/proc/" + pid + "/status")
				for line := range strings.Lines(string(status)) {
					if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
						kb, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
						b.peak = max(b.peak, kb<<10)
					}
				}
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// peer times a command that unpacks into a new folder.
func (b *bench) peer(name string, args func(dir string) []string) (float64, error) {
	dir := b.fresh("peer")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return 0, err
	}
	start := time.Now()
	err := command(name, args(dir)...)
	return ms(start), err
}

// compare takes both in turn.
func (b *bench) compare(id, peerName string, target float64, ours, peer func() (float64, error)) error {
	var samples [][2]float64
	for range b.rounds {
		o, err := ours()
		if err != nil {
			return err
		}
		p, err := peer()
		if err != nil {
			return err
		}
		samples = append(samples, [2]float64{o, p})
	}
	b.r.Add(id, "ms", peerName, target, samples)
	return nil
}

func (b *bench) first(id string) func() (float64, error) {
	return func() (float64, error) { t, _, err := b.ours(id); return t, err }
}

// roots compares the tars of a root file system, all with the same runs of tar: the first use of one with gzip and of one
// with zstd, and the next use of what is stored.
func (b *bench) roots(tar string) error {
	for _, z := range []struct{ line, suffix, id string }{
		{`gzip -c "$IN" > "$OUT"`, ".gz", "bench-gzip"}, {`zstd -q -c "$IN" > "$OUT"`, ".zst", "bench-zstd"},
	} {
		if err := shell(z.line, tar, tar+z.suffix); err != nil {
			return err
		}
		st, err := os.Stat(tar + z.suffix)
		if err != nil {
			return err
		}
		b.r.Options[z.id+"_bytes"] = strconv.FormatInt(st.Size(), 10)
		if err := b.add(z.id, tar+z.suffix, "raw"); err != nil {
			return err
		}
	}
	var gzip, cached, zstd [][2]float64
	for range b.rounds {
		first, next, err := b.ours("bench-gzip")
		if err != nil {
			return err
		}
		peer, err := b.peer("tar", func(dir string) []string {
			return []string{"-C", dir, "-z", "-xf", filepath.Join(b.images, "bench-gzip")}
		})
		if err != nil {
			return err
		}
		other, _, err := b.ours("bench-zstd")
		if err != nil {
			return err
		}
		gzip, cached, zstd = append(gzip, [2]float64{first, peer}), append(cached, [2]float64{next, peer}), append(zstd, [2]float64{other, peer})
	}
	b.r.Add("gzip_vs_tar", "ms", "tar -xzf", 0.75, gzip)
	b.r.Add("zstd_vs_tar", "ms", "tar -xzf", 0.45, zstd)
	b.r.Add("cached_vs_tar", "ms", "tar -xzf", 0.02, cached)
	return nil
}

func (b *bench) docker(tar string) error {
	oci, archive := filepath.Join(b.work, "oci"), filepath.Join(b.work, "docker.tar")
	for _, args := range [][]string{{"init", "--layout", oci}, {"new", "--image", oci + ":bench"},
		{"raw", "add-layer", "--image", oci + ":bench", tar},
		{"config", "--image", oci + ":bench", "--config.cmd", "/sbin/init"}} {
		if err := command("umoci", args...); err != nil {
			return err
		}
	}
	if err := command("skopeo", "--insecure-policy", "copy", "oci:"+oci+":bench", "docker-archive:"+archive+":bench:latest"); err != nil {
		return err
	}
	if err := b.add("bench-docker", archive, "raw"); err != nil {
		return err
	}
	return b.compare("docker_vs_umoci", "umoci unpack", 0.5, b.first("bench-docker"), func() (float64, error) {
		return b.peer("umoci", func(dir string) []string {
			return []string{"unpack", "--image", oci + ":bench", filepath.Join(dir, "bundle")}
		})
	})
}

func (b *bench) qcow2(tar string) error {
	raw, out := filepath.Join(b.work, "disk.raw"), filepath.Join(b.work, "disk.qcow2")
	st, err := os.Stat(tar)
	if err != nil {
		return err
	}
	if err := command("mkfs.ext4", "-q", "-d", b.tree, raw, strconv.FormatInt(st.Size()/1024*2, 10)+"k"); err != nil {
		return err
	}
	if err := command("qemu-img", "convert", "-O", "qcow2", raw, out); err != nil {
		return err
	}
	if err := errors.Join(os.Remove(raw), b.add("bench-qcow2", out, "qcow2")); err != nil {
		return err
	}
	copied := tar + ".copy"
	if err := shell(`cp "$IN" "$OUT"`, tar, copied); err != nil {
		return err
	}
	if err := b.add("bench-tar", copied, "raw"); err != nil {
		return err
	}
	return b.compare("qcow2_vs_rawtar", "our raw tar", 1.5, b.first("bench-qcow2"), b.first("bench-tar"))
}
