package novadriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/novalet/novalet"
)

var consoleMethods = []method{
	{
		name: "get_console_output", since: "6.0", kind: "call", state: stateDone, answer: consoleOutput,
		note: "the last lines of the console log", test: "TestConsoleOutput",
	},
	{
		name: "get_serial_console", since: "6.0", kind: "call", state: stateDone, answer: serialConsole,
		note: "a token and a TCP end point for nova-serialproxy; `ConsoleTypeUnavailable` when `[serial_console] enabled` is off",
		test: "TestSerialConsole",
	},
	{
		name: "validate_console_port", since: "6.0", kind: "call", state: stateDone, answer: validateConsolePort,
		note: "from the live table", test: "TestSerialConsole",
	},
	noConsole("get_vnc_console"), noConsole("get_spice_console"), noConsole("get_mks_console"),
	{
		name: "get_rdp_console", since: "6.0 (gone in 2024.1)", kind: "call", state: stateRefused,
		answer: notImplemented("RDP consoles are not supported"), note: "`NotImplementedError`", test: "TestRefusedCalls",
	},
	{
		name: "get_diagnostics", since: "6.0", kind: "call", state: stateDone, answer: diagnostics,
		note: "free form, for microversions below 2.48", test: "TestDiagnostics",
	},
	{
		name: "get_instance_diagnostics", since: "6.0", kind: "call", state: stateDone, answer: instanceDiagnostics,
		note: "the Diagnostics object", test: "TestDiagnostics",
	},
	{
		name: "set_admin_password", since: "6.0", kind: "call", state: stateDone, answer: setAdminPassword,
		note: "inside the running instance, of `os_admin_user` of the image or root; kept for os-server-password, encrypted for the key pair, where that is RSA", test: "TestSetAdminPassword",
	},
	{
		name: "quiesce_instance", since: "6.0", kind: "call", state: stateDone, answer: quiesceInstance,
		note: "the guest's files are written to disk and it stops where it is, until it is unquiesced, an operation comes in which it has a part, or some ten minutes are over; `InstanceQuiesceNotSupported` unless it runs",
		test: "TestQuiesce",
	},
	{
		name: "unquiesce_instance", since: "6.0", kind: "cast", state: stateDone, record: unquiesceInstance,
		note: "the guest goes on, at once: there are no volumes whose snapshots it would have to wait for", test: "TestQuiesce",
	},
}

// noConsole refuses a console type. Unlike stock it writes no fault: Horizon tries every type in turn, and a fault
// of an instance in ERROR would hide the one that matters.
func noConsole(name string) method {
	return method{
		name: name, since: "6.0", kind: "call", state: stateRefused, note: "`ConsoleTypeUnavailable`", test: "TestRefusedCalls",
		answer: func(_ context.Context, _ *Driver, r *request) (any, error) {
			return nil, consoleUnavailable(r.args.str("console_type"))
		},
	}
}

func consoleUnavailable(t string) *failure {
	return novaError("ConsoleTypeUnavailable", "Unavailable console type "+shorten(t, 40)+".", map[string]any{"console_type": t})
}

// consoleError gives the exceptions that the API maps for consoles.
func consoleError(err error, uuid string) error {
	if errors.Is(err, novalet.ErrInvalidState) || errors.Is(err, novalet.ErrBusy) {
		return novaError("InstanceNotReady", "Instance "+uuid+" is not ready", map[string]any{"instance_id": uuid})
	}
	return err
}

func consoleOutput(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "get_console_output", wraps{fault: true}, func(inst *novalet.Instance) (any, error) {
		lines, ok := r.args.number("tail_length")
		switch {
		case !ok || lines < 0:
			lines = -1
		case lines == 0:
			return "", nil
		case lines > 1<<30:
			lines = 1 << 30
		}
		text, err := d.agent().ConsoleOutput(ctx, inst.UUID, int(lines))
		if err != nil {
			return nil, consoleError(err, inst.UUID)
		}
		return strings.ToValidUTF8(text, "\uFFFD"), nil
	})
}

func serialConsole(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "get_serial_console", wraps{fault: d.o.SerialConsole}, func(inst *novalet.Instance) (any, error) {
		kind := r.args.str("console_type")
		if kind != "serial" {
			return nil, novaError("ConsoleTypeInvalid", "Invalid console type "+shorten(kind, 40), map[string]any{"console_type": kind})
		}
		if !d.o.SerialConsole {
			return nil, consoleUnavailable(kind)
		}
		at, err := d.agent().SerialConsole(ctx, inst.UUID, d.o.ConsoleTokenTTL)
		if err != nil {
			return nil, consoleError(err, inst.UUID)
		}
		token, err := d.authorize(ctx, r, inst.UUID, kind, d.o.SerialBaseURL, at)
		if err != nil {
			return nil, err
		}
		return map[string]any{
			"host": at.Host, "port": at.Port, "internal_access_path": nil, "token": token,
			"access_url": d.o.SerialBaseURL + "?token=" + token,
		}, nil
	})
}

// authorize makes a console token. The conductor stores only its hash.
func (d *Driver) authorize(ctx context.Context, r *request, uuid, kind, base string, at *novalet.ConsoleAccess) (string, error) {
	o := d.release.get().Minimal("ConsoleAuthToken", map[string]any{
		"console_type": kind, "host": at.Host, "port": at.Port, "internal_access_path": nil, "instance_uuid": uuid, "access_url_base": base,
	})
	d.notes.opened(uuid)
	a, err := d.rpc.object(ctx, d.requestContext(r.rc), o, "authorize", []any{int(d.o.ConsoleTokenTTL.Seconds())}, nil)
	if err != nil {
		return "", fmt.Errorf("authorize a console of %s: %w", uuid, err)
	}
	var token string
	if json.Unmarshal(a.result, &token) != nil || token == "" {
		return "", fmt.Errorf("authorize a console of %s: the conductor gave no token", uuid)
	}
	return token, nil
}

func validateConsolePort(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "validate_console_port", wraps{}, func(inst *novalet.Instance) (any, error) {
		port, ok := r.args.number("port")
		if !ok || r.args.str("console_type") != "serial" {
			return false, nil
		}
		valid, err := d.agent().ConsolePort(ctx, inst.UUID, int(port))
		if errors.Is(err, novalet.ErrNotFound) {
			return false, nil
		}
		return valid, err
	})
}

// diagnose reads the counters; what does not run has none.
func (d *Driver) diagnose(ctx context.Context, inst *novalet.Instance, method string) (*novalet.Diagnostics, error) {
	g, err := d.agent().Diagnostics(ctx, inst.UUID)
	if errors.Is(err, novalet.ErrInvalidState) {
		return nil, novaError("InstanceInvalidState",
			fmt.Sprintf("Instance %s in power state. Cannot %s while the instance is in this state.", inst.UUID, method),
			map[string]any{"attr": "power state", "instance_uuid": inst.UUID, "state": "not running", "method": method})
	}
	return g, err
}

func diagnostics(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "get_diagnostics", wraps{fault: true}, func(inst *novalet.Instance) (any, error) {
		g, err := d.diagnose(ctx, inst, "get_diagnostics")
		if err != nil {
			return nil, err
		}
		out := map[string]any{
			"memory": g.MemoryMB * 1024, "memory-rss": g.MemoryUsed * 1024,
			"disk_read": g.Disk.DiskReadBytes, "disk_read_req": g.Disk.DiskReadOps,
			"disk_write": g.Disk.DiskWriteBytes, "disk_write_req": g.Disk.DiskWriteOps,
		}
		for i, t := range g.CPUTimes {
			out["cpu"+strconv.Itoa(i)+"_time"] = t.Nanoseconds()
		}
		for mac, s := range g.NICs {
			for k, v := range map[string]uint64{
				"rx": s.RxBytes, "rx_packets": s.RxPackets, "rx_errors": s.RxErrors, "rx_drop": s.RxDrop,
				"tx": s.TxBytes, "tx_packets": s.TxPackets, "tx_errors": s.TxErrors, "tx_drop": s.TxDrop,
			} {
				out[mac+"_"+k] = v
			}
		}
		return out, nil
	})
}

func instanceDiagnostics(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "get_instance_diagnostics", wraps{fault: true}, func(inst *novalet.Instance) (any, error) {
		g, err := d.diagnose(ctx, inst, "get_instance_diagnostics")
		if err != nil {
			return nil, err
		}
		return d.diagnosticsObject(g), nil
	})
}

// quiesceInstance is quiesce_instance, which nova-api calls before the snapshot of a server's volumes. Any of Nova's exceptions has
// it go on without, unless the image says os_require_quiesce (nova/compute/api.py, snapshot_volume_backed).
func quiesceInstance(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "quiesce_instance", wraps{}, func(inst *novalet.Instance) (any, error) {
		err := d.agent().Quiesce(ctx, inst.UUID)
		if err == nil || errors.Is(err, novalet.ErrNotFound) || errors.Is(err, novalet.ErrInstanceGone) {
			return nil, err
		}
		why := "its files could not be written to disk"
		switch {
		case errors.Is(err, novalet.ErrInvalidState):
			why = "it is not running"
		case errors.Is(err, novalet.ErrBusy):
			why = "it is busy, try again later"
		default:
			d.log.Error("quiesce", "instance", inst.UUID, "request_id", r.rc.RequestID, "err", err)
		}
		return nil, novaError("InstanceQuiesceNotSupported", "Quiescing is not supported in instance "+inst.UUID+": "+why+".", map[string]any{"instance_id": inst.UUID})
	})
}

// unquiesceInstance is unquiesce_instance.
func unquiesceInstance(_ context.Context, d *Driver, r *request) error {
	inst, err := d.argInstance(r.args)
	if err != nil {
		return err
	}
	d.agent().Unquiesce(inst.UUID)
	return nil
}
