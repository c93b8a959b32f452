package glancebridge

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/glancebridge/layer"
)

// TestSharedMemoryKeepsItsSize: whoever could cut it off would have the other helper killed.
func TestSharedMemoryKeepsItsSize(t *testing.T) {
	f, err := sharedMemory()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int64{0, layer.SharedBytes - 1, layer.SharedBytes + 1} {
		if err := f.Truncate(size); err == nil {
			t.Errorf("its size can be made %d", size)
		}
	}
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := mapShared(fd, layer.SharedBytes, unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Munmap(mem); err != nil {
		t.Fatal(err)
	}
}
