package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
	"github.com/novalet/novalet/novadriver/ovo"
)

const (
	binary = "nova-compute"
	// liveFor is how long after its last report a controller counts.
	liveFor = time.Hour
	// ownerNova is the service version from which the scheduler asks for the trait OWNER_NOVA once all computes report it.
	ownerNova = 73
	// traitOwner is that trait.
	traitOwner = "OWNER_NOVA"
)

// negotiated is what the controllers were found to be.
type negotiated struct {
	release *ovo.Release
	// controllers is the service version of the oldest live nova-conductor.
	controllers int
	// report is the service version that this host shows: the controllers' own, never more.
	report int
	// minimum is the lowest version of any nova-compute, 0 if there is none.
	minimum int
	owner   bool // Placement knows OWNER_NOVA
}

// negotiate asks which release the controllers are of. own is the version of our service record, 0 without one.
//
// The version reported counts in the minimum over all computes, by which nova-api opens features and (with
// upgrade_levels auto) chooses RPC versions. Above the controllers' own it would break them, and it cannot be
// lowered again; below the oldest they accept they would not start.
func (d *Driver) negotiate(ctx context.Context, own int) (*negotiated, error) {
	n := &negotiated{}
	if d.o.Release != "" {
		rel, err := ovo.ReleaseNamed(d.o.Release)
		if err != nil {
			return nil, err
		}
		n.release, n.controllers = rel, rel.Service
	} else if err := d.askControllers(ctx, n); err != nil {
		return nil, err
	}
	newest := ovo.Newest().Service
	if n.controllers > newest {
		d.once("newer", "the controllers are newer than any release known here; reporting the newest known",
			"controllers", n.controllers, "known", newest)
	}
	n.report = min(n.controllers, newest, cmpOr(n.report, newest))
	if n.report >= ownerNova {
		// Without the trait a host that reports 73 is never scheduled to, once all do.
		var err error
		if n.owner, err = d.placementKnows(ctx, traitOwner); err != nil {
			return nil, err
		}
		if !n.owner {
			n.report = ownerNova - 1
			d.once("owner", "Placement does not know the trait OWNER_NOVA; reporting an older service version", "version", n.report)
		}
	}
	// Never go down while the controllers still allow the old number.
	n.report = max(n.report, min(own, n.controllers))
	raw, err := d.rpc.class(ctx, d.adminContext(), "Service", "get_minimum_version", []any{binary}, nil)
	if err != nil {
		return nil, fmt.Errorf("ask for the oldest nova-compute: %w", err)
	}
	_ = json.Unmarshal(raw, &n.minimum)
	return n, nil
}

func cmpOr(a, b int) int {
	if a != 0 {
		return a
	}
	return b
}

// askControllers reads the versions of the conductors and schedulers, and finds the release's objects.
func (d *Driver) askControllers(ctx context.Context, n *negotiated) error {
	conductors, err := d.serviceVersions(ctx, "nova-conductor")
	if err != nil {
		return err
	}
	if len(conductors) == 0 {
		return fmt.Errorf("%w: no live nova-conductor has a service record in this cell; set the option release of [novalet]", novalet.ErrNotFound)
	}
	schedulers, err := d.serviceVersions(ctx, "nova-scheduler")
	if err != nil {
		return err
	}
	for _, v := range conductors {
		n.controllers = minVersion(n.controllers, v)
	}
	// Schedulers may live in another cell's database. During a rolling upgrade the oldest decides.
	n.report = n.controllers
	for _, v := range schedulers {
		n.report = minVersion(n.report, v)
	}
	if n.release, err = ovo.ReleaseFor(n.controllers); err != nil {
		return err
	}
	if all := ovo.Candidates(n.release.Service); len(all) > 1 && all[0].Version("Instance") != all[len(all)-1].Version("Instance") {
		return d.probe(ctx, n, all[len(all)-1])
	}
	return nil
}

func minVersion(a, b int) int {
	if a == 0 || b < a {
		return b
	}
	return a
}

// serviceVersions returns the versions of the live services of a binary.
func (d *Driver) serviceVersions(ctx context.Context, name string) ([]int, error) {
	raw, err := d.rpc.class(ctx, d.adminContext(), "ServiceList", "get_by_binary", []any{name}, map[string]any{"include_disabled": true})
	if err != nil {
		return nil, fmt.Errorf("list the services %s: %w", name, err)
	}
	l, err := ovo.Decode(raw)
	if err != nil {
		return nil, fmt.Errorf("list the services %s: %w", name, err)
	}
	var out []int
	var newest time.Time
	for _, s := range l.Objects() {
		if t := s.Time("last_seen_up"); t.After(newest) {
			newest = t
		}
	}
	for _, s := range l.Objects() {
		// Their clock is the database's: compare with the latest report among them, not with ours.
		if s.Bool("forced_down") || newest.Sub(s.Time("last_seen_up")) > liveFor || s.Int("version") <= 0 {
			continue
		}
		out = append(out, int(s.Int("version")))
	}
	return out, nil
}

// probe finds out which of two releases with one service version the conductor is of, by asking for an instance
// that does not exist with the newer one's objects.
func (d *Driver) probe(ctx context.Context, n *negotiated, newer *ovo.Release) error {
	older := n.release
	was := d.release.get()
	d.release.set(newer)
	defer d.release.set(was)
	args := map[string]any{
		"objname": "Instance", "objmethod": "get_by_uuid", "object_versions": newer.Manifest("Instance"),
		"args": []any{newUUID()}, "kwargs": map[string]any{},
	}
	_, _, err := d.rpc.call(ctx, d.adminContext(), "Instance.get_by_uuid", "object_class_action_versions", args)
	switch name, supported := tooNew(err); {
	case isClass(err, "InstanceNotFound"), err == nil:
		n.release = newer
	case name == "Instance":
		n.release = older.Lower(name, supported)
	default:
		return fmt.Errorf("find the conductor's version of Instance: %w", err)
	}
	return nil
}

func (d *Driver) placementKnows(ctx context.Context, trait string) (bool, error) {
	if d.o.Placement == nil {
		return true, nil
	}
	for {
		ok, err := d.o.Placement.HasTrait(ctx, trait)
		if !errors.Is(err, novalet.ErrTryAgain) {
			return ok, err
		}
		d.once("placement", "Placement does not answer; waiting for it", "err", err)
		if !sleep(ctx, d.o.pause) {
			return false, err
		}
	}
}

// apply takes over what was negotiated.
func (d *Driver) apply(n *negotiated) {
	was := d.release.get()
	if was.Service != n.release.Service || was.Version("Instance") != n.release.Version("Instance") || !d.greeted.Load() {
		d.greeted.Store(true)
		d.log.Info("controllers found", "release", n.release.Name, "controllers", n.controllers, "reporting", n.report)
		d.release.set(n.release)
	}
	d.owner.Store(n.owner && n.report >= ownerNova)
}

// watchReleases follows the controllers: an upgrade of theirs must be followed within minutes, since the release
// after the next refuses to start beside a compute that still reports the old version.
func (d *Driver) watchReleases(ctx context.Context) {
	for {
		timer := time.NewTimer(jitter(d.o.NegotiateInterval))
		select {
		case <-timer.C:
		case <-d.look:
			timer.Stop()
		case <-ctx.Done():
			timer.Stop()
			return
		}
		n, err := d.negotiate(ctx, d.service.version())
		if err != nil {
			if ctx.Err() == nil {
				d.log.Warn("the controllers' release is not known now", "err", err)
			}
			continue
		}
		d.apply(n)
		if n.report > d.service.version() {
			if err := d.saveVersion(ctx, n.report); err != nil && ctx.Err() == nil {
				d.log.Error("the service version could not be raised", "version", n.report, "err", err)
				continue
			}
			d.tracker.changed()
		}
	}
}

// ping waits for the conductor, as stock does before anything else.
func (d *Driver) ping(ctx context.Context) error {
	to := oslomsg.Target{Exchange: d.o.ControlExchange, Topic: "conductor", Namespace: "baseapi", Version: "1.0"}
	_, _, err := d.rpc.send(ctx, d.adminContext(), to, "ping", "ping", map[string]any{"arg": "novalet"}, 10*time.Second)
	return err
}
