package cloud_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// TestDeleteWins: a delete is not kept waiting by what else goes on: a build that fetches its image, a stop that the guest does not
// follow, a Neutron that is away.
func TestDeleteWins(t *testing.T) {
	needAlone(t)
	u := as(t, "demo")
	deaf := upload(t, u, imageSpec{name: "novalet-test-deaf", container: "docker", disk: "raw", props: map[string]string{"os_shutdown_timeout": "3600"}},
		bytes.NewReader(dockerArchive(t, busyboxRoot(t), map[string]any{
			"Cmd": []string{"/bin/sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"}, "Env": []string{"PATH=/bin"}})))
	slow, image := slowImage(t, u), appImage.id(t, u)
	leavesNothing(t)

	t.Run("build", func(t *testing.T) {
		said := agentLog(t)
		id := atWork(t, u, "wins-build", slow, 1)[0]
		remove(t, u, id)
		if strings.Contains(said(), `msg="container started" instance=`+id) {
			t.Errorf("it was started before it was deleted: %s", said())
		}
	})
	t.Run("stop", func(t *testing.T) {
		s := boot(t, u, bootOpts{name: "wins-stop", image: deaf})
		waitLog(t, u, s.ID, "deaf", long)
		must(t, servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
		eventually(t, long, "the server is being stopped", func() error {
			got, err := servers.Get(t.Context(), u.compute, s.ID).Extract()
			if err == nil && (got.TaskState != "powering-off" || got.Status != "ACTIVE") {
				err = fmt.Errorf("status %s, task %q", got.Status, got.TaskState)
			}
			return err
		})
		remove(t, u, s.ID) // an hour before the stop would end
	})
	t.Run("neutron", func(t *testing.T) {
		s := boot(t, u, bootOpts{name: "wins-neutron", image: image})
		without(t, func() {
			must(t, servers.Delete(t.Context(), u.compute, s.ID).ExtractErr())
			waitGone(t, u, s.ID)
		}, "neutron-server")
		// Its port goes when Neutron is back: unchanged looks.
	})
}
