package novadriver

import (
	"context"
	"fmt"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

var eventMethods = []method{{
	name: "external_instance_event", since: "6.0", kind: "cast", state: stateDone, record: externalEvents,
	note: "handed on at once, past every queue", test: "TestExternalEvents",
}}

// externalEvents hands events on in the order they came. Those for an instance that the message does not name are
// dropped, as stock does.
func externalEvents(ctx context.Context, d *Driver, r *request) error {
	named := map[string]bool{}
	instances, err := objects(r.args, "instances")
	if err != nil {
		return err
	}
	for _, o := range instances {
		named[o.String("uuid")] = true
	}
	list, err := objects(r.args, "events")
	if err != nil {
		return err
	}
	var events []novalet.ExternalEvent
	for _, o := range list {
		e := novalet.ExternalEvent{InstanceUUID: o.String("instance_uuid"), Name: o.String("name"), Status: o.String("status"), Tag: o.String("tag")}
		if named[e.InstanceUUID] && isUUID(e.InstanceUUID) {
			events = append(events, e)
		}
	}
	if len(events) > 0 {
		d.agent().ExternalEvents(ctx, r.rc, events)
	}
	return nil
}

// objects reads an argument that is an array of objects.
func objects(a args, name string) ([]*ovo.Object, error) {
	o := &ovo.Object{Name: "args", Data: a}
	if l := o.List(name); l != nil {
		return l, nil
	}
	return nil, fmt.Errorf("read %s: no list of objects", name)
}
