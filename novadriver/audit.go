package novadriver

import (
	"context"
	"fmt"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/notify"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

// auditEvery is how often it is looked whether a period of instance_usage_audit is over.
const auditEvery = time.Minute

// auditTask is the name of the task in Nova's task_log.
const auditTask = "instance_usage_audit"

// startNotifier makes the notifier when anything is told to anybody.
func (d *Driver) startNotifier() {
	if !d.o.Notify.Enabled() {
		return
	}
	t := d.o.NotifyTransport
	if t == nil {
		t = d.o.Transport
	}
	d.notifier = notify.New(notify.Setup{
		Options: d.o.Notify, Host: d.o.Host, Exchange: d.o.ControlExchange, Transport: t, Logger: d.log, Now: d.o.now,
		SharesKnown: func() bool { return d.release.get().Nova >= 31 },
		Describe: func(err error, uuid string) notify.Failure {
			f := failureOf(err, uuid)
			return notify.Failure{Module: f.Module, Class: f.Class, Message: shorten(f.Message, maxFaultText), Code: f.code()}
		},
		Context: d.adminContext,
	})
}

// Notifier returns what sends notifications, nil when nothing is told to anybody.
func (d *Driver) Notifier() novalet.Notifier {
	if d.notifier == nil {
		return nil
	}
	return d.notifier
}

// audit tells once each period which instances were here in it, as stock's _instance_usage_audit.
func (d *Driver) audit(ctx context.Context) {
	if d.notifier == nil || !d.o.Notify.Audit {
		return
	}
	var done time.Time
	for sleep(ctx, jitter(auditEvery)) {
		begin, end := d.o.Notify.Period.Last(d.o.now())
		if end.Equal(done) {
			continue
		}
		if err := d.auditPeriod(ctx, begin, end); err != nil {
			if ctx.Err() == nil {
				d.log.Warn("audit the use of instances", "err", err)
			}
			continue
		}
		done = end
	}
}

// auditPeriod tells about one period unless the task log says that it was told.
func (d *Driver) auditPeriod(ctx context.Context, begin, end time.Time) error {
	rctx := d.adminContext()
	span := []any{begin.Format("2006-01-02T15:04:05.000000"), end.Format("2006-01-02T15:04:05.000000")}
	raw, err := d.rpc.class(ctx, rctx, "TaskLog", "get", []any{auditTask, span[0], span[1], d.o.Host}, nil)
	if err != nil {
		return fmt.Errorf("read the task log: %w", err)
	}
	if !isNull(raw) {
		return nil
	}
	instances, err := d.activeInstances(ctx, rctx, begin, end)
	if err != nil {
		return err
	}
	entry := func(more map[string]any) *ovo.Object {
		fields := map[string]any{"task_name": auditTask, "host": d.o.Host, "period_beginning": ovo.FormatTime(begin), "period_ending": ovo.FormatTime(end)}
		for k, v := range more {
			fields[k] = v
		}
		return d.release.get().Minimal("TaskLog", fields)
	}
	started := entry(map[string]any{"task_items": len(instances), "message": "Instance usage audit started..."})
	if _, err := d.rpc.object(ctx, rctx, started, "begin_task", nil, nil); err != nil {
		if isClass(err, "TaskAlreadyRunning") {
			return nil
		}
		return fmt.Errorf("open the task log: %w", err)
	}
	rc := novalet.RequestContext{RequestID: rctx.RequestID(), Wire: rctx}
	for i := range instances {
		d.notifier.Audit(&novalet.Notification{Context: rc, Action: novalet.ActionExists, Instance: &instances[i]}, begin, end)
	}
	ended := entry(map[string]any{"task_items": len(instances), "errors": 0,
		"message": fmt.Sprintf("Instance usage audit ran for host %s, %d instances.", d.o.Host, len(instances))})
	if _, err := d.rpc.object(ctx, rctx, ended, "end_task", nil, nil); err != nil {
		return fmt.Errorf("close the task log: %w", err)
	}
	d.log.Info("use of instances was audited", "from", begin, "to", end, "instances", len(instances))
	return nil
}

// activeInstances lists what was on this host in a period, deleted instances too.
func (d *Driver) activeInstances(ctx context.Context, rctx oslomsg.Context, begin, end time.Time) ([]novalet.Instance, error) {
	raw, err := d.rpc.class(ctx, rctx, "InstanceList", "_get_active_by_window_joined",
		[]any{ovo.FormatTime(begin), ovo.FormatTime(end), nil, d.o.Host, []string{"system_metadata", "info_cache", "metadata", "flavor"}},
		map[string]any{"use_slave": true, "limit": nil, "marker": nil})
	if err != nil {
		return nil, fmt.Errorf("list the instances of the period: %w", err)
	}
	return d.decodeInstances(raw)
}
