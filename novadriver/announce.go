package novadriver

import (
	"context"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

const (
	// maxAnnouncements bounds what waits for the bus. The schedulers read the database too, and
	// sync_instance_info repairs what they missed.
	maxAnnouncements = 256
	// announceTime is how long one may wait for the bus.
	announceTime = 30 * time.Second
	// syncInterval is scheduler_instance_sync_interval.
	syncInterval = 120 * time.Second
)

// announcement is one cast to all schedulers.
type announcement struct {
	method string
	args   map[string]any
	rctx   oslomsg.Context
}

// announce tells the schedulers, for their affinity filters, that an instance came, changed or went. It does not block.
func (d *Driver) announce(inst *novalet.Instance, gone bool) {
	if !d.o.TrackInstanceChanges {
		return
	}
	select {
	case d.announcements <- d.announcementFor(inst, gone):
	default:
		d.once("announce", "the bus takes no messages for the schedulers; leaving them to the next round")
	}
}

func (d *Driver) announcementFor(inst *novalet.Instance, gone bool) announcement {
	if gone {
		return announcement{"delete_instance_info", map[string]any{"host_name": d.o.Host, "instance_uuid": inst.UUID}, d.adminContext()}
	}
	rel := d.release.get()
	o, err := ovo.Decode(inst.Wire)
	if err != nil || o == nil {
		o = rel.Minimal("Instance", nil).Key("uuid", inst.UUID)
	}
	o.ResetChanges()
	for f, v := range map[string]any{
		"host": inst.Host, "node": inst.Node, "vm_state": inst.VMState, "task_state": saveValue(inst.TaskState), "power_state": inst.PowerState,
	} {
		o.Put(f, v)
	}
	return announcement{"update_instance_info", map[string]any{
		"host_name": d.o.Host, "instance_info": ovo.NewList("InstanceList", rel.Version("InstanceList"), []*ovo.Object{o}),
	}, d.adminContext()}
}

// announcer sends announcements in order, and the whole list from time to time.
func (d *Driver) announcer(ctx context.Context) {
	sync := time.NewTicker(syncInterval)
	defer sync.Stop()
	for {
		var a announcement
		select {
		case <-ctx.Done():
			return
		case a = <-d.announcements:
		case <-sync.C:
			if !d.o.TrackInstanceChanges {
				continue
			}
			uuids := []string{}
			for _, t := range d.agent().Tracked() {
				uuids = append(uuids, t.Instance.UUID)
			}
			a = announcement{"sync_instance_info", map[string]any{"host_name": d.o.Host, "instance_uuids": uuids}, d.adminContext()}
		}
		to := oslomsg.Target{Exchange: d.o.ControlExchange, Topic: "scheduler", Version: "4.2"}
		cctx, cancel := context.WithTimeout(ctx, announceTime)
		if err := d.client.Fanout(cctx, to, a.method, a.args, a.rctx); err != nil && ctx.Err() == nil {
			d.log.Debug("tell the schedulers", "method", a.method, "err", err)
		}
		cancel()
	}
}
