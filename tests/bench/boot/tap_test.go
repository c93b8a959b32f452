package main

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"
)

// TestSenders: a message is its service's whose answers go to the same queue, one without a queue names its host, and one
// that neither tells is counted as unknown; what goes to computes is none of theirs. A heartbeat may name nothing but the row
// of its service.
func TestSenders(t *testing.T) {
	message := func(key, text string) event {
		body, err := json.Marshal(map[string]string{"oslo.version": "2.0", "oslo.message": text})
		if err != nil {
			t.Fatal(err)
		}
		return parse(key, body)
	}
	save := func(queue, object, host string) event {
		return message("conductor", fmt.Sprintf(`{"method":"object_action","_reply_q":%q,"args":{"objmethod":"save","objinst":{"nova_object.name":%q,"nova_object.data":{"host":%q}}}}`, queue, object, host))
	}
	early := save("reply_a", "Service", "ours")
	early.at = early.at.Add(-time.Hour)
	other := save("reply_b", "Instance", "")
	tap := &tap{seen: []event{early, save("reply_a", "ComputeNode", "ours"), other, save("reply_b", "Service", "peer"),
		message("conductor", `{"method":"object_class_action_versions","_reply_q":"reply_a","args":{"objname":"InstanceList","objmethod":"get_by_host"}}`),
		message("", `{"method":"sync_instance_info","args":{"host_name":"peer"}}`),
		message("conductor", `{"method":"object_action","_reply_q":"reply_c","args":{}}`),
		message("conductor", `{"method":"object_action","_reply_q":"reply_d","args":{"objmethod":"save","objinst":{"nova_object.name":"Service","nova_object.data":{"id":7}}}}`),
		message("conductor", `{"method":"object_action","_reply_q":"reply_d","args":{"objmethod":"save","objinst":{"nova_object.name":"ComputeNode","nova_object.data":{"id":8}}}}`),
		message("compute.ours", `{"method":"build_and_run_instance","_reply_q":"reply_a","args":{}}`)}}
	by, unknown := tap.senders(time.Now().Add(-time.Minute), map[int64]string{7: "small", 8: "another"})
	if by["ours"].messages != 2 || by["peer"].messages != 3 || by["small"].messages != 2 || len(by) != 3 {
		t.Errorf("%+v", by)
	}
	if len(unknown) != 1 || unknown[`object_action of reply_c to "conductor"`] != 1 {
		t.Errorf("%v unknown", unknown)
	}
	if by["peer"].bytes <= other.size {
		t.Errorf("%d bytes", by["peer"].bytes)
	}
}

// TestWait: what came before the moment asked about, what is another's, and a save of another vm_state are not waited for.
func TestWait(t *testing.T) {
	from := time.Now()
	save := func(uuid, vmState string, at time.Time) event {
		return event{at: at, key: "conductor", method: "Instance.save", uuid: uuid, vmState: vmState}
	}
	tap := &tap{seen: []event{save("a", "active", from.Add(-time.Second)), save("b", "active", from), save("a", "building", from)}}
	if tap.saw(from, "a", "Instance.save", "active") {
		t.Error("saw what is not there")
	}
	if !tap.saw(from, "a", "Instance.save", "") || !tap.saw(from, "b", "Instance.save", "active") {
		t.Error("did not see what is there")
	}
	tap.wait(from, "a", "Instance.save", "active", 0) // without it: returns all the same
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		tap.wait(from, "a", "Instance.save", "active", time.Hour)
	}()
	tap.mu.Lock()
	tap.seen = append(tap.seen, save("a", "active", from.Add(time.Second)))
	tap.mu.Unlock()
	<-seen
}
