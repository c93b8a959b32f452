package glancebridge

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/contracttest"
)

// The contract that all stores of images keep.
func TestContract(t *testing.T) {
	contracttest.ImageStore(t, func(t *testing.T) *contracttest.ImageFixture {
		dir := t.TempDir()
		base := makeTar(t, member{name: "bin/busybox", data: "program"})
		id := addImage(t, dir, dockerArchive(t, map[string]any{"Cmd": []string{"/bin/busybox"}}, base), nil)
		g, n := NewFileGlance(dir), 0
		return &contracttest.ImageFixture{Store: openStore(t, dir, nil), ImageID: id, Unknown: "0f0c2d8a-0000-4000-8000-00000000ffff",
			Backup: func(uuid, kind string) string {
				n++
				r := ImageRecord{CreatedAt: testTime.Add(time.Duration(n) * time.Second)}
				r.ID = fmt.Sprintf("0f0c2d8a-0000-4000-8000-%012d", n)
				r.Properties = map[string]string{"image_type": "backup", "backup_type": kind, "instance_uuid": uuid}
				if err := g.Create(r); err != nil {
					t.Fatal(err)
				}
				return r.ID
			},
			Exists: func(id string) bool {
				_, err := g.Get(context.Background(), novalet.RequestContext{}, id)
				return err == nil
			}}
	})
}
