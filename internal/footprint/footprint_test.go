package footprint

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

func TestProgramPages(t *testing.T) {
	const exe = "/usr/bin/novalet"
	for line, want := range map[string][2]uintptr{
		"00400000-00b90000 r-xp 00000000 fe:00 10027035                           /usr/bin/novalet\n": {0x400000, 0x790000},
		"00b90000-01332000 r--p 00790000 fe:00 10027035   /usr/bin/novalet\n":                         {0xb90000, 0x7a2000},
		"01332000-0163e000 rw-p 00f32000 fe:00 10027035   /usr/bin/novalet\n":                         {},
		"00400000-00b90000 r-xp 00000000 fe:00 10027035   /usr/bin/novalet (deleted)\n":               {},
		"00400000-00b90000 r-xp 00000000 fe:00 10027035   /usr/lib/libc.so\n":                         {},
		"7ffd1000-7ffd3000 r-xp 00000000 00:00 0          [vdso]\n":                                   {},
		"7ffd1000-7ffd3000 r--p 00000000 00:00 0 \n":                                                  {},
		"nonsense\n": {},
		"00b90000-00400000 r-xp 00000000 fe:00 10027035   /usr/bin/novalet\n": {},
	} {
		start, length, ok := programPages(line, exe)
		if start != want[0] || length != want[1] || ok != (want[1] != 0) {
			t.Errorf("%q: %x %x %v", line, start, length, ok)
		}
	}
}

// mappedProgram is how much of the program is resident in this process, in KiB.
func mappedProgram(t *testing.T) (kib int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "RssFile:" {
			for _, c := range f[1] {
				kib = kib*10 + int(c-'0')
			}
			return kib
		}
	}
	t.Fatal("no RssFile in /proc/self/status")
	return 0
}

// Trim takes the program's pages out, and the program goes on as before.
func TestTrim(t *testing.T) {
	// Touch all of the program that there is.
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	touched := 0
	for line := range strings.Lines(string(b)) {
		start, length, ok := programPages(line, exe)
		for off := uintptr(0); ok && off < length; off += 4096 {
			if n, _ := mem.ReadAt(make([]byte, 1), int64(start+off)); n == 1 {
				touched++
			}
		}
	}
	if touched < 100 {
		t.Fatalf("%d pages of the program found", touched)
	}
	before := mappedProgram(t)
	if err := Trim(); err != nil {
		t.Fatal(err)
	}
	if after := mappedProgram(t); after >= before {
		t.Errorf("%d KiB of the program before, %d after", before, after)
	}
}

func TestKeepEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Keep(ctx, 0, time.Hour) }()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
