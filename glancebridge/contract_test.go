package glancebridge

import (
	"testing"

	"github.com/novalet/novalet/internal/contracttest"
)

// The contract that all stores of images keep.
func TestContract(t *testing.T) {
	contracttest.ImageStore(t, func(t *testing.T) *contracttest.ImageFixture {
		dir := t.TempDir()
		base := makeTar(t, member{name: "bin/busybox", data: "program"})
		id := addImage(t, dir, dockerArchive(t, map[string]any{"Cmd": []string{"/bin/busybox"}}, base), nil)
		return &contracttest.ImageFixture{Store: openStore(t, dir, nil), ImageID: id, Unknown: "0f0c2d8a-0000-4000-8000-00000000ffff"}
	})
}
