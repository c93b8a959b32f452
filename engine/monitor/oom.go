package monitor

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/engine/monitor/wire"
)

// oomWatch waits for the kernel to say that the memory limit was hit: an eventfd on v1, a change of memory.events
// on v2. Both say so before the victim is dead, so the count is read again for a while.
type oomWatch struct {
	f    *os.File
	keep []*os.File
	wg   sync.WaitGroup
}

// watchOOM starts the watch; nil when the host limits no memory.
func watchOOM(in *instance) *oomWatch {
	for _, c := range in.cgroups {
		var w *oomWatch
		var err error
		switch {
		case c.Kind == wire.CgroupV1 && c.Controller == "memory":
			w, err = watchV1(c.dir)
		case c.Kind == wire.CgroupBase:
			w, err = watchV2(c.dir)
		default:
			continue
		}
		if err != nil {
			if !os.IsNotExist(err) {
				fmt.Fprintln(os.Stderr, "keeper: watch memory limit:", err)
			}
			continue
		}
		w.wg.Add(1)
		go w.run(in)
		return w
	}
	return nil
}

func watchV1(dir *os.File) (*oomWatch, error) {
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make eventfd: %w", err)
	}
	f := os.NewFile(uintptr(efd), "oom")
	cfd, err := unix.Openat(int(dir.Fd()), "memory.oom_control", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Close()
		return nil, err
	}
	ctl := os.NewFile(uintptr(cfd), "memory.oom_control")
	if err := writeCgroup(dir, "cgroup.event_control", fmt.Sprintf("%d %d", efd, cfd)); err != nil {
		f.Close()
		ctl.Close()
		return nil, err
	}
	return &oomWatch{f: f, keep: []*os.File{ctl}}, nil
}

func watchV2(dir *os.File) (*oomWatch, error) {
	if _, err := readCgroup(dir, "memory.events"); err != nil {
		return nil, err
	}
	ifd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make inotify: %w", err)
	}
	f := os.NewFile(uintptr(ifd), "oom")
	if _, err := unix.InotifyAddWatch(ifd, fmt.Sprintf("/proc/self/fd/%d/memory.events", dir.Fd()), unix.IN_MODIFY); err != nil {
		f.Close()
		return nil, err
	}
	return &oomWatch{f: f}, nil
}

func (w *oomWatch) run(in *instance) {
	defer w.wg.Done()
	buf := make([]byte, 512)
	for {
		if _, err := w.f.Read(buf); err != nil {
			return
		}
		for i := 0; i < 20; i++ {
			if in.oomNow() > 0 {
				in.k.tell(wire.Event{ID: in.name(), Type: wire.EventOOM, At: time.Now()})
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

func (w *oomWatch) stop() {
	w.f.Close()
	w.wg.Wait()
	for _, f := range w.keep {
		f.Close()
	}
}

// oomNow reads the kernel's count and returns how many kills are new.
func (in *instance) oomNow() int64 {
	var n int64
	for _, c := range in.cgroups {
		file := ""
		switch {
		case c.Kind == wire.CgroupV1 && c.Controller == "memory":
			file = "memory.oom_control"
		case c.Kind == wire.CgroupBase:
			file = "memory.events"
		default:
			continue
		}
		text, err := readCgroup(c.dir, file)
		if err != nil {
			continue
		}
		for _, line := range strings.Split(text, "\n") {
			if v, ok := strings.CutPrefix(line, "oom_kill "); ok {
				if k, err := strconv.ParseInt(v, 10, 64); err == nil {
					n = max(n, k)
				}
			}
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	d := n - in.oomKills
	if d > 0 {
		in.oomKills = n
		return d
	}
	return 0
}
