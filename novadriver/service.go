package novadriver

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/novalet/novalet/novadriver/ovo"
)

// service is this host's row among Nova's services. disabled, disabled_reason and forced_down are the operator's:
// they are read, never sent.
type service struct {
	disabled atomic.Bool
	forced   atomic.Bool
	beat     atomic.Int64 // time of the last heartbeat that was taken, nanoseconds

	mu      sync.Mutex
	id      int64
	reports int64
	number  int // service version
}

func (s *service) version() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.number
}

func (s *service) row() (id int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id
}

// take reads the row, or the updates of a save, into s.
func (s *service) take(o *ovo.Object) {
	s.mu.Lock()
	if !o.IsNull("id") {
		s.id = o.Int("id")
	}
	if !o.IsNull("version") {
		s.number = int(o.Int("version"))
	}
	s.reports = max(s.reports, o.Int("report_count"))
	s.mu.Unlock()
	if !o.IsNull("disabled") {
		s.disabled.Store(o.Bool("disabled"))
	}
	if !o.IsNull("forced_down") {
		s.forced.Store(o.Bool("forced_down"))
	}
}

// readService looks for our row; ok is false when there is none.
func (d *Driver) readService(ctx context.Context) (ok bool, err error) {
	raw, err := d.rpc.class(ctx, d.adminContext(), "Service", "get_by_host_and_binary", []any{d.o.Host, binary}, nil)
	if err != nil {
		return false, fmt.Errorf("read the service record of %s: %w", d.o.Host, err)
	}
	o, err := ovo.Decode(raw)
	if err != nil {
		return false, fmt.Errorf("read the service record of %s: %w", d.o.Host, err)
	}
	if o == nil {
		return false, nil
	}
	d.service.take(o)
	return true, nil
}

// register makes our row, or brings its version up.
func (d *Driver) register(ctx context.Context, exists bool, version int) error {
	if !exists {
		o := d.release.get().Minimal("Service", map[string]any{
			"host": d.o.Host, "binary": binary, "topic": "compute", "report_count": 0, "version": version,
		})
		a, err := d.rpc.object(ctx, d.adminContext(), o, "create", nil, nil)
		if isClass(err, "ServiceBinaryExists") {
			// Made by an attempt whose answer was lost, or by another process of this host's name.
			exists, err = d.readService(ctx)
			if err == nil && !exists {
				err = fmt.Errorf("the service record of %s exists and cannot be read", d.o.Host)
			}
			if err != nil {
				return err
			}
		} else if err != nil {
			return d.versionError(fmt.Errorf("create the service record of %s: %w", d.o.Host, err), version)
		} else {
			if err := o.Merge(a.updates); err != nil {
				return fmt.Errorf("create the service record of %s: %w", d.o.Host, err)
			}
			d.service.take(o)
			d.log.Info("registered as a compute service", "host", d.o.Host, "version", version)
		}
	}
	if d.service.version() != version {
		return d.saveVersion(ctx, version)
	}
	return nil
}

// saveVersion writes the service version; with host and binary the conductor checks it against the minimum.
func (d *Driver) saveVersion(ctx context.Context, version int) error {
	o := d.release.get().Minimal("Service", map[string]any{"version": version}).
		Key("id", d.service.row()).Key("host", d.o.Host).Key("binary", binary)
	a, err := d.rpc.object(ctx, d.adminContext(), o, "save", nil, nil)
	if err != nil {
		return d.versionError(fmt.Errorf("save service version %d: %w", version, err), version)
	}
	if err := o.Merge(a.updates); err != nil {
		return fmt.Errorf("save service version %d: %w", version, err)
	}
	d.service.take(o)
	d.log.Info("service version saved", "version", version)
	return nil
}

func (d *Driver) versionError(err error, version int) error {
	if isClass(err, "ServiceTooOld") {
		return fmt.Errorf("the other compute services report a newer version than %d: the controllers were upgraded beyond this "+
			"program, or downgraded: %w", version, err)
	}
	return err
}

// heartbeat tells that we live. In minimal form: the row's id and the count, which must grow for the conductor to
// note the time.
func (d *Driver) heartbeat(ctx context.Context) error {
	d.service.mu.Lock()
	d.service.reports++
	id, count := d.service.id, d.service.reports
	d.service.mu.Unlock()
	o := d.release.get().Minimal("Service", map[string]any{"report_count": count}).Key("id", id)
	a, err := d.rpc.object(ctx, d.adminContext(), o, "save", nil, nil)
	if err != nil {
		return err
	}
	was := d.service.disabled.Load()
	if err := o.Merge(a.updates); err != nil {
		return err
	}
	d.service.take(o)
	if d.service.disabled.Load() != was {
		d.tracker.changed() // the trait follows
	}
	return nil
}

// report beats until ctx ends. What goes wrong is said once, not at every beat.
func (d *Driver) report(ctx context.Context) {
	problem := ""
	for first := true; ; first = false {
		wait := d.o.ReportInterval
		if first {
			wait /= 2
		}
		if !sleep(ctx, wait) {
			return
		}
		err := d.heartbeat(ctx)
		if ctx.Err() != nil {
			return
		}
		text := ""
		if err != nil {
			text = err.Error()
		} else {
			d.service.beat.Store(d.o.now().UnixNano())
		}
		switch {
		case text == problem:
		case isClass(err, "ServiceNotFound"):
			// Deleted by the operator. Making it again silently would undo that.
			d.log.Error("the service record was deleted: this host gets no more work; restart it to register again", "host", d.o.Host)
		case err != nil:
			d.log.Warn("report to the conductor", "err", err)
		default:
			d.log.Info("reports to the conductor are taken again")
		}
		problem = text
	}
}
