package agent

import (
	"context"
	"fmt"

	"github.com/novalet/novalet"
)

// allocate makes and binds the ports, unless an earlier run of this boot has them.
func (b *boot) allocate(ctx context.Context) error {
	defer b.time.start("ports")()
	var allocated, again bool
	b.in.read(func(r *record) { allocated, again = r.Allocated, b.in.replayed })
	if allocated {
		return nil
	}
	if again {
		// An earlier run may have ended while it made ports; those are not known here.
		if err := b.a.network.Deallocate(ctx, b.op.Context, b.inst, b.in.portsToFree(b.info)); err != nil {
			return fmt.Errorf("free ports of an interrupted boot: %w", err)
		}
	}
	var info novalet.NetworkInfo
	err := patiently(ctx, func(ctx context.Context) (err error) {
		info, err = b.a.network.Allocate(ctx, &novalet.AllocateRequest{Context: b.op.Context, Instance: b.in.view(),
			Networks: b.in.withDevices(b.args.RequestedNetworks), SecurityGroups: b.args.SecurityGroups})
		return err
	})
	if err != nil {
		return fmt.Errorf("allocate ports: %w", err)
	}
	b.info = info
	tags := map[string]string{}
	for i := range info {
		if t := b.tagOf(i); t != "" {
			tags[info[i].ID] = t
		}
	}
	got := func(r *record) { r.Instance.NetworkInfo, r.Tags, r.Allocated = info, tags, true }
	if len(info) == 0 {
		b.in.set(got) // nothing that a crash could lose
		return nil
	}
	return b.in.update(got)
}

// tagOf is the device tag of the i-th interface.
func (b *boot) tagOf(i int) string {
	n := 0
	for _, r := range b.args.RequestedNetworks {
		if r.NetworkID == "none" {
			continue
		}
		if n == i {
			return r.Tag
		}
		n++
	}
	return ""
}

// plugAndWait plugs the interfaces and waits until Neutron has wired them.
func (b *boot) plugAndWait(ctx context.Context, netns string, imageReady <-chan struct{}) error {
	// The waiters stand before the plug: an event that comes in between would be lost.
	waiters := b.a.expectPlugged(b.in.uuid, b.info)
	defer b.a.events.drop(waiters)
	done := b.time.start("plug")
	static, known := b.static(imageReady)
	if err := b.a.plugAll(ctx, b.in, b.info, netns, static); err != nil {
		return err
	}
	done()
	done = b.time.start("wired")
	err := b.a.awaitPlugged(ctx, b.in, waiters)
	done()
	if err != nil || known {
		return err
	}
	select {
	case <-imageReady:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// Plugged before the image told its kind: an application's addresses are still to be set.
	if static, _ = b.static(imageReady); static {
		return b.a.plugAll(ctx, b.in, b.info, netns, true)
	}
	return nil
}

// static says whether the host sets the addresses, and whether that is known yet.
func (b *boot) static(imageReady <-chan struct{}) (static, known bool) {
	if k := kindAsked(b.inst); k != "" {
		return k == novalet.KindApplication, true
	}
	select {
	case <-imageReady:
		return b.kind == novalet.KindApplication, true
	default:
		return false, false
	}
}

// rememberPorts has the ports looked at, now that Neutron has changed them for the last time, so that a delete need not
// wait for a look. Nobody waits for this one.
func (b *boot) rememberPorts() {
	f, ok := b.a.network.(portFinder)
	if !ok || len(b.info) == 0 {
		return
	}
	rc, inst := b.op.Context, b.in.view()
	b.a.goRun(func() {
		if err := f.Remember(b.a.ctx, rc, inst); err != nil {
			b.in.log.Debug("ports are not looked at", "err", err)
		}
	})
}
