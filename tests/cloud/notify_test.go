package cloud_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"testing"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/rabbitmq/amqp091-go"
)

// heard is what is told on the cloud's broker.
type heard struct {
	mu   sync.Mutex
	list []told
}

// told is a notification: its event, and the instance and state in its payload, in the old form or the new one.
type told struct {
	Event    string `json:"event_type"`
	Priority string `json:"priority"`
	From     string `json:"publisher_id"`
	Payload  struct {
		ID    string `json:"instance_id"`
		State string `json:"state"`
		Data  struct {
			UUID  string `json:"uuid"`
			State string `json:"state"`
			Host  string `json:"host"`
		} `json:"nova_object.data"`
	} `json:"payload"`
}

// brokerChannel opens a channel to the cloud's broker.
func brokerChannel(t *testing.T) *amqp091.Channel {
	t.Helper()
	conf, err := os.ReadFile(filepath.Join(state(t), "etc", "nova-compute.conf"))
	if err != nil {
		t.Fatal(err)
	}
	url := regexp.MustCompile(`(?m)^transport_url = rabbit(.*)$`).FindSubmatch(conf)
	if url == nil {
		t.Fatal("the cloud's configuration names no broker")
	}
	conn, err := amqp091.DialConfig("amqp"+string(url[1]), amqp091.Config{})
	if err != nil {
		t.Fatalf("connect to the broker: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

// listen binds a queue of its own to the notifications of the cloud's exchange, as a telemetry service does.
func listen(t *testing.T) *heard {
	t.Helper()
	var reading sync.WaitGroup
	t.Cleanup(reading.Wait)
	ch := brokerChannel(t)
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"notifications.*", "versioned_notifications.*"} {
		if err := ch.QueueBind(q.Name, key, "nova", false, nil); err != nil {
			t.Fatalf("bind %s: %v", key, err)
		}
	}
	// What the agent declares for listeners to come would fill up.
	t.Cleanup(func() {
		for _, n := range []string{"notifications", "versioned_notifications"} {
			for _, p := range []string{"info", "error"} {
				_, _ = ch.QueueDelete(n+"."+p, false, false, false) // it need not be there
			}
		}
	})
	msgs, err := ch.Consume(q.Name, "", true, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	h := new(heard)
	reading.Go(func() {
		for m := range msgs {
			var env struct {
				Message string `json:"oslo.message"`
			}
			var n told
			if json.Unmarshal(m.Body, &env) == nil && json.Unmarshal([]byte(env.Message), &n) == nil {
				h.mu.Lock()
				h.list = append(h.list, n)
				h.mu.Unlock()
			}
		}
	})
	return h
}

// wait waits until these events of an instance were told, in this order.
func (h *heard) wait(t *testing.T, id string, events ...string) {
	t.Helper()
	eventually(t, long, fmt.Sprint("told are ", events), func() error {
		h.mu.Lock()
		defer h.mu.Unlock()
		left := events
		var all []string
		for _, n := range h.list {
			if n.Payload.ID != id && n.Payload.Data.UUID != id {
				continue
			}
			all = append(all, n.Event)
			if len(left) > 0 && n.Event == left[0] {
				left = left[1:]
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("%s is missing in %v", left[0], all)
		}
		return nil
	})
}

// TestNotifications: a listener on the cloud's own broker hears of each action, in both forms.
func TestNotifications(t *testing.T) {
	needAlone(t)
	admin := as(t, "admin")
	ear := listen(t)
	newSecondHost(t, "second", "[notifications]\nnotification_format = both\n[oslo_messaging_notifications]\ndriver = messagingv2\n")
	s := bootOn(t, admin, "second", bootOpts{name: "told", image: appImage.id(t, admin), noNet: true})
	must(t, servers.Stop(t.Context(), admin.compute, s.ID).ExtractErr())
	waitStatus(t, admin, s.ID, "SHUTOFF")
	remove(t, admin, s.ID)
	ear.wait(t, s.ID, "compute.instance.create.start", "compute.instance.create.end", "compute.instance.power_off.start",
		"compute.instance.power_off.end", "compute.instance.delete.start", "compute.instance.delete.end")
	ear.wait(t, s.ID, "instance.create.start", "instance.create.end", "instance.power_off.start", "instance.power_off.end",
		"instance.delete.start", "instance.delete.end")
	ear.mu.Lock()
	defer ear.mu.Unlock()
	for _, n := range ear.list {
		if n.Event == "compute.instance.create.end" && (n.From != "compute.second" || n.Payload.State != "active" || n.Priority != "INFO") {
			t.Errorf("told: %+v", n)
		}
		if n.Event == "instance.create.end" && (n.From != "nova-compute:second" || n.Payload.Data.State != "active" || n.Payload.Data.Host != "second") {
			t.Errorf("told: %+v", n)
		}
	}
}
