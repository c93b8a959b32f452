package fake_test

import (
	"fmt"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/contracttest"
	"github.com/novalet/novalet/internal/fake"
)

const imageID = "3f0c2d8a-0000-4000-8000-0000000000cc"

func TestRuntime(t *testing.T) {
	contracttest.Runtime(t, func(*testing.T) *contracttest.RuntimeFixture {
		w := fake.NewWorld("h")
		return &contracttest.RuntimeFixture{Runtime: w.Open().Runtime, Spec: &novalet.ContainerSpec{}, Prints: "ready", Print: w.Print}
	})
}

func TestImageStore(t *testing.T) {
	contracttest.ImageStore(t, func(*testing.T) *contracttest.ImageFixture {
		w := fake.NewWorld("h")
		w.AddImage(&novalet.Image{ID: imageID, Kind: novalet.KindApplication, Size: 100, Layers: []novalet.Layer{{DiffID: "sha256:a"}}})
		n := 0
		return &contracttest.ImageFixture{Store: w.Open().Images, ImageID: imageID, Unknown: "nothing", Exists: w.HasImage,
			Backup: func(uuid, kind string) string {
				n++
				id := fmt.Sprint("backup-", n)
				w.AddBackup(id, uuid, kind)
				return id
			}}
	})
}

func TestNetworkAPI(t *testing.T) {
	contracttest.NetworkAPI(t, func(*testing.T) *contracttest.NetworkFixture {
		w := fake.NewWorld("h")
		w.AddPort("user-port")
		return &contracttest.NetworkFixture{API: w.Open().Network, Instance: &novalet.Instance{UUID: "i"}, NetworkID: "net", PortID: "user-port"}
	})
}

func TestVIFPlugger(t *testing.T) {
	contracttest.VIFPlugger(t, func(*testing.T) *contracttest.PlugFixture {
		return &contracttest.PlugFixture{Plugger: fake.NewWorld("h").Open().Plugger, VIF: &novalet.VIF{ID: "p", Type: "bridge"}, NetNS: "/proc/1/ns/net", InstanceUUID: "i"}
	})
}

func TestConductor(t *testing.T) {
	contracttest.Conductor(t, func(*testing.T) *contracttest.ConductorFixture {
		w, n := fake.NewWorld("h"), 0
		return &contracttest.ConductorFixture{Conductor: w.Open().Conductor, Host: "h", NewRow: func(task novalet.TaskState) *novalet.Instance {
			n++
			i := novalet.Instance{UUID: fmt.Sprintf("%08d-0000-4000-8000-000000000000", n), VMState: novalet.VMBuilding, TaskState: task}
			w.PutRow(i)
			return &i
		}}
	})
}

func TestPlacement(t *testing.T) {
	contracttest.Placement(t, func(*testing.T) (novalet.Placement, string) {
		w := fake.NewWorld("h")
		w.Allocate("i")
		return w.Open().Placement, "i"
	})
}
