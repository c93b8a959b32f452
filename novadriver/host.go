package novadriver

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/novalet/novalet"
)

// traitDisabled is on the provider while the service is disabled; the scheduler looks at it.
const traitDisabled = "COMPUTE_STATUS_DISABLED"

var hostMethods = []method{
	{
		name: "get_host_uptime", since: "6.0", kind: "call", state: stateDone, note: "as `uptime` prints it", test: "TestHostCalls",
		answer: func(_ context.Context, d *Driver, _ *request) (any, error) { return d.o.uptime(), nil },
	},
	{
		name: "set_host_enabled", since: "6.0", kind: "call", state: stateDone, answer: setHostEnabled,
		note: "sets or removes the trait `COMPUTE_STATUS_DISABLED`", test: "TestHostCalls",
	},
	{
		name: "cache_images", since: "6.0", kind: "call", state: stateDone, answer: cacheImages,
		note: "fetches images ahead of use; heartbeats while it lasts", test: "TestHostCalls",
	},
	{
		name: "host_power_action", since: "6.0", kind: "call", state: stateRefused, note: "`NotImplementedError`", test: "TestRefusedCalls",
		answer: notImplemented("the power of this host is not Nova's to switch"),
	},
	{
		name: "host_maintenance_mode", since: "6.0", kind: "call", state: stateRefused, note: "`NotImplementedError`", test: "TestRefusedCalls",
		answer: notImplemented("this host has no maintenance mode"),
	},
}

// setHostEnabled follows the service's disabled flag. A Placement that is away is made up for by the next resource
// update, so that it does not fail the operator's command.
func setHostEnabled(ctx context.Context, d *Driver, r *request) (any, error) {
	enabled := r.args.flag("enabled", true)
	d.service.disabled.Store(!enabled)
	if p, uuid := d.o.Placement, d.nodeUUID(); p != nil && uuid != "" {
		if err := p.SetTrait(ctx, uuid, traitDisabled, !enabled); err != nil {
			d.log.Warn("the provider's status trait is late", "enabled", enabled, "err", err)
			d.tracker.changed()
		}
	}
	if enabled {
		return "enabled", nil
	}
	return "disabled", nil
}

func cacheImages(ctx context.Context, d *Driver, r *request) (any, error) {
	var ids []string
	if err := json.Unmarshal(r.args["image_ids"], &ids); err != nil {
		return nil, novaError("InvalidInput", "Invalid input received: image_ids is no list of texts", nil)
	}
	out, err := d.agent().CacheImages(ctx, r.rc, ids)
	if err != nil {
		return nil, fmt.Errorf("cache images: %w", err)
	}
	if out == nil {
		out = map[string]string{}
	}
	return out, nil
}

// hostUptime prints what uptime(1) prints, from a proc directory.
func hostUptime(proc string, now time.Time) string {
	up := "unknown"
	if b, err := os.ReadFile(filepath.Join(proc, "uptime")); err == nil {
		if f := strings.Fields(string(b)); len(f) > 0 {
			if s, err := strconv.ParseFloat(f[0], 64); err == nil {
				up = formatUptime(time.Duration(s) * time.Second)
			}
		}
	}
	load := "0.00, 0.00, 0.00"
	if b, err := os.ReadFile(filepath.Join(proc, "loadavg")); err == nil {
		if f := strings.Fields(string(b)); len(f) >= 3 {
			load = strings.Join(f[:3], ", ")
		}
	}
	return fmt.Sprintf(" %s up %s,  0 users,  load average: %s", now.Format("15:04:05"), up, load)
}

func formatUptime(d time.Duration) string {
	days, d := d/(24*time.Hour), d%(24*time.Hour)
	text := ""
	if days == 1 {
		text = "1 day, "
	} else if days > 1 {
		text = fmt.Sprintf("%d days, ", days)
	}
	if h := d / time.Hour; h > 0 {
		return text + fmt.Sprintf("%2d:%02d", h, d%time.Hour/time.Minute)
	}
	return text + fmt.Sprintf("%d min", d/time.Minute)
}

func (d *Driver) agent() novalet.Compute { return *d.compute.Load() }
