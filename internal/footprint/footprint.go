// Package footprint keeps the resident memory of a process that lives long to what it uses.
package footprint

import (
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Keep trims the process after first, then once every interval, until ctx ends. It blocks. Why the first trim failed is
// returned at once: the next ones would fail, too.
func Keep(ctx context.Context, first, interval time.Duration) error {
	for wait := first; ; wait = interval {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		if err := Trim(); err != nil {
			return err
		}
	}
}

// Trim gives back the heap's free pages, and takes the pages of the program itself out of the process's memory. They
// stay in the kernel's page cache, from where each one comes back when it is used again, in less than a microsecond:
// what the start alone needed (the kernel maps 64 KiB around each place that is touched, so nearly the whole program)
// does not count for ever. It may be called at any time, from any goroutine.
func Trim() error {
	debug.FreeOSMemory()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return fmt.Errorf("read own mappings: %w", err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("look at own program: %w", err)
	}
	for line := range strings.Lines(string(maps)) {
		start, length, ok := programPages(line, exe)
		if !ok {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, start, length, unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("give back the program's pages: %w", errno)
		}
	}
	return nil
}

// programPages reads a line of /proc/self/maps: a mapping of the program that nothing can be written to. The pages of a
// writable one may differ from the file's.
func programPages(line, exe string) (start, length uintptr, ok bool) {
	f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 6)
	if len(f) < 6 || strings.TrimLeft(f[5], " ") != exe || len(f[1]) != 4 || f[1][1] != '-' {
		return 0, 0, false
	}
	from, to, ok := strings.Cut(f[0], "-")
	first, err := strconv.ParseUint(from, 16, 64)
	end, err2 := strconv.ParseUint(to, 16, 64)
	if !ok || err != nil || err2 != nil || end <= first {
		return 0, 0, false
	}
	return uintptr(first), uintptr(end - first), true
}
