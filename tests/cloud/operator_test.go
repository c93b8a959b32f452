package cloud_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/aggregates"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/placement/v1/resourceproviders"
	"github.com/rabbitmq/amqp091-go"
)

// What operators set up and ask for.

// TestSoftDelete: with reclaim_instance_interval a deleted server is only put away: it does not run, can be restored, and goes at
// once when that is asked for, or by itself after that time.
func TestSoftDelete(t *testing.T) {
	needAlone(t)
	u, admin := as(t, "demo"), as(t, "admin")
	image := appImage.id(t, u)
	leavesNothing(t)
	const option = "reclaim_instance_interval = 25"
	// nova-api asks for the soft delete, the agent ends it.
	path := filepath.Join(state(t), "etc", "nova.conf")
	conf, err := os.ReadFile(path)
	must(t, err)
	restartAPI := func(conf []byte) {
		must(t, os.WriteFile(path, conf, 0o600))
		const script = `. ../../devstack/vars.sh; . ../../devstack/lib.sh; . ../../devstack/apis.sh; stop nova-api; api nova; wait_tcp nova-api 8774`
		if out, err := sh(context.Background(), "bash", "-c", script); err != nil {
			t.Errorf("restart nova-api: %v: %s", err, out)
		}
	}
	t.Cleanup(func() { restartAPI(conf) })
	restartAPI(bytes.Replace(conf, []byte("[DEFAULT]\n"), []byte("[DEFAULT]\n"+option+"\n"), 1))
	withOptions(t, "DEFAULT", option)

	put := func(name string) string {
		s := boot(t, u, bootOpts{name: name, image: image})
		must(t, servers.Delete(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, admin, s.ID, "SOFT_DELETED")
		if out, err := novalet("exec", s.ID, "/bin/true"); err == nil {
			t.Errorf("%s runs: %s", name, out)
		}
		return s.ID
	}
	action := func(id, name string) {
		_, err := admin.compute.Post(t.Context(), admin.compute.ServiceURL("servers", id, "action"), map[string]any{name: nil}, nil,
			&gophercloud.RequestOpts{OkCodes: []int{http.StatusAccepted, http.StatusNoContent}})
		must(t, err)
	}
	restored, forced := put("soft-restored"), put("soft-forced")
	action(restored, "restore")
	waitStatus(t, u, restored, "ACTIVE")
	if _, err := novalet("exec", restored, "/bin/true"); err != nil {
		t.Errorf("the restored one does not run: %v", err)
	}
	action(forced, "forceDelete")
	waitGone(t, admin, forced)
	left := put("soft-left")
	waitGone(t, admin, left)
	// What was restored is not reclaimed.
	time.Sleep(30 * time.Second)
	waitStatus(t, u, restored, "ACTIVE")
	action(restored, "forceDelete")
	waitGone(t, admin, restored)
}

// TestDeletedWhileAway: what Nova deletes by itself while the agent is away ends here when the agent is back.
func TestDeletedWhileAway(t *testing.T) {
	needAlone(t)
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	s := boot(t, u, bootOpts{image: image})
	own := &secondHost{t: t, name: computeHost()}
	kill9(t, func() {
		own.forceDown(true)
		remove(t, u, s.ID)
		own.forceDown(false)
	})
	eventually(t, long, "its container ends", func() error {
		out, err := novalet("ps", "-q")
		if err == nil && strings.Contains(out, s.ID) {
			err = fmt.Errorf("there is %s", out)
		}
		return err
	})
}

// TestCacheImages: an image that an administrator sends ahead to the hosts of an aggregate is there before a server needs it.
func TestCacheImages(t *testing.T) {
	admin := as(t, "admin")
	image := slowImage(t, admin)
	a, err := aggregates.Create(t.Context(), admin.compute, aggregates.CreateOpts{Name: "novalet-test-cache"}).Extract()
	must(t, err)
	t.Cleanup(func() {
		ctx := context.Background()
		_, _ = aggregates.RemoveHost(ctx, admin.compute, a.ID, aggregates.RemoveHostOpts{Host: computeHost()}).Extract()
		must(t, aggregates.Delete(ctx, admin.compute, a.ID).ExtractErr())
	})
	_, err = aggregates.AddHost(t.Context(), admin.compute, a.ID, aggregates.AddHostOpts{Host: computeHost()}).Extract()
	must(t, err)
	c := *admin.compute
	c.Microversion = "2.81"
	_, err = c.Post(t.Context(), c.ServiceURL("os-aggregates", fmt.Sprint(a.ID), "images"),
		map[string]any{"cache": []map[string]string{{"id": image}}}, nil, &gophercloud.RequestOpts{OkCodes: []int{http.StatusAccepted}})
	must(t, err)
	eventually(t, long, "the image is on the host", func() error {
		out, err := novalet("images", "--json")
		if err == nil && !strings.Contains(out, image) {
			err = fmt.Errorf("there are %s", out)
		}
		return err
	})
	said := agentLog(t)
	remove(t, admin, boot(t, admin, bootOpts{image: image, noNet: true}).ID)
	if strings.Contains(said(), "fetching image") {
		t.Errorf("it was fetched once more: %s", said())
	}
}

// TestProviderConfig: a provider config file adds inventories and traits to the host's provider. The inventories go with it; the
// traits stay, as with Nova, which does not know any more who made them.
func TestProviderConfig(t *testing.T) {
	needAlone(t)
	admin := as(t, "admin")
	dir := t.TempDir()
	file := filepath.Join(dir, "more.yaml")
	must(t, os.WriteFile(file, []byte(`meta:
  schema_version: '1.0'
providers:
  - identification:
      uuid: $COMPUTE_NODE
    inventories:
      additional:
        - CUSTOM_NOVALET_CARDS:
            total: 4
            reserved: 1
    traits:
      additional:
        - CUSTOM_NOVALET_SHELF
`), 0o644))
	h := newSecondHost(t, "novalet-more", "\n[compute]\nprovider_config_location = "+dir+"\n")
	id := providerOf(t, h.name)
	check := func(want bool) {
		t.Helper()
		eventually(t, long, "the provider has what the file says", func() error {
			inv, err := resourceproviders.GetInventories(t.Context(), admin.placement, id).Extract()
			if err != nil {
				return err
			}
			traits, err := resourceproviders.GetTraits(t.Context(), admin.placement, id).Extract()
			if err != nil {
				return err
			}
			cards := inv.Inventories["CUSTOM_NOVALET_CARDS"]
			has := cards.Total == 4 && cards.Reserved == 1
			if has != want || !slices.Contains(traits.Traits, "CUSTOM_NOVALET_SHELF") || inv.Inventories["VCPU"].Total == 0 {
				return fmt.Errorf("inventories %v, traits %v", inv.Inventories, traits.Traits)
			}
			return nil
		})
	}
	check(true)
	h.end(os.Interrupt)
	must(t, os.Remove(file))
	h.start()
	check(false)
}

// TestHostileBus: whoever may write to the broker cannot stop the agent: what is no message, calls nothing there is, or is too much
// is dropped with one line of the log each, and takes no memory.
func TestHostileBus(t *testing.T) {
	needAlone(t)
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	said := agentLog(t)
	ch := brokerChannel(t)
	queue := "compute." + computeHost()
	send := func(body []byte) {
		t.Helper()
		must(t, ch.PublishWithContext(t.Context(), "", queue, false, false, amqp091.Publishing{ContentType: "application/json", Body: body}))
	}
	call := func(method, version, args string) []byte {
		return fmt.Appendf(nil, `{"oslo.version": "2.0", "oslo.message": %q}`,
			fmt.Sprintf(`{"method": %q, "version": %q, "args": %s, "_unique_id": "%d"}`, method, version, args, time.Now().UnixNano()))
	}
	var count int
	for _, body := range [][]byte{
		[]byte("PING"), {0, 0xff, 0x80}, []byte("null"), []byte(`[1, 2]`), []byte(`{"oslo.version": "9.0", "oslo.message": "{}"}`),
		[]byte(strings.Repeat("[", 1<<20)),
		call("no_such_method", "6.0", `{}`), call("build_and_run_instance", "7.0", `{}`), call("build_and_run_instance", "6.0", `{"instance": 5}`),
		call("terminate_instance", "6.0", `{"instance": {"nova_object.name": "Instance"}}`),
		call("stop_instance", "6.0", `{"instance": {"nova_object.name": "Instance", "nova_object.version": "2.7", "nova_object.data": {"uuid": "../../etc"}}}`),
		call("external_instance_event", "6.0", `{"instances": "x", "events": [[]]}`),
		call("get_console_output", "6.0", `{"tail_length": -1}`),
		call("no_such_method", "6.0", fmt.Sprintf(`{"fill": %q}`, strings.Repeat("x", 10<<20))),
	} {
		send(body)
		count++
	}
	for range 100 {
		send(bytes.Repeat([]byte("x"), 1<<20))
		count++
	}
	eventually(t, long, "the queue is empty", func() error {
		q, err := ch.QueueDeclarePassive(queue, false, false, false, false, nil)
		if err == nil && q.Messages > 0 {
			err = fmt.Errorf("%d messages", q.Messages)
		}
		return err
	})
	remove(t, u, boot(t, u, bootOpts{image: image, noNet: true}).ID)
	if state, _ := serviceState(t); state != "up" {
		t.Errorf("the service is %s", state)
	}
	if n := strings.Count(said(), "level=WARN") + strings.Count(said(), "level=ERROR"); n == 0 || n > count {
		t.Errorf("%d messages made %d lines of the log:\n%s", count, n, tail(said(), 3000))
	}
	if kib := residentKiB(t); kib > 200<<10 {
		t.Errorf("the agent has %d KiB in memory", kib)
	}
}

// residentKiB is the memory that the agent has now.
func residentKiB(t *testing.T) (kib int) {
	t.Helper()
	pid, err := os.ReadFile(filepath.Join(state(t), "run", "novalet.pid"))
	must(t, err)
	status, err := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(pid)), "status"))
	must(t, err)
	_, line, _ := strings.Cut(string(status), "\nVmRSS:")
	_, err = fmt.Sscanf(line, "%d kB", &kib)
	must(t, err)
	return kib
}
