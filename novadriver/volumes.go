package novadriver

import (
	"context"

	"github.com/novalet/novalet"
)

// volumesText is what users read when they attach a volume.
const volumesText = "Invalid volume: this compute host runs containers and cannot attach volumes"

var volumeMethods = []method{
	{
		// The first step of every attach: refused here, nothing was changed in Cinder but a reservation that
		// nova-api takes back.
		name: "reserve_block_device_name", since: "6.0", kind: "call", state: stateRefused, note: "`InvalidVolume` (400)", test: "TestRefusedCalls",
		answer: refuse("reserve_block_device_name", wraps{fault: true, revert: true}, func(*novalet.Instance) *failure { return invalidVolume() }),
	},
	volumeCast("attach_volume", wraps{event: true, fault: true}),
	volumeCast("detach_volume", wraps{event: true, fault: true}),
	volumeCast("swap_volume", wraps{event: true, fault: true}),
	volumeCast("volume_snapshot_create", wraps{}),
	volumeCast("volume_snapshot_delete", wraps{}),
	{
		name: "remove_volume_connection", since: "6.3 (delete_attachment)", kind: "call", state: stateDone, note: "there is none: nothing to do",
		test: "TestIgnored", answer: func(context.Context, *Driver, *request) (any, error) { return nil, nil },
	},
	{
		name: "allow_share", since: "6.4", kind: "cast", state: stateRefused, note: "the share mapping becomes `error`", test: "TestShares", answer: refuseShare,
	},
	{
		name: "deny_share", since: "6.4", kind: "cast", state: stateRefused, note: "the share mapping becomes `error`", test: "TestShares", answer: refuseShare,
	},
}

func invalidVolume() *failure {
	return novaError("InvalidVolume", volumesText, map[string]any{"reason": "this compute host runs containers and cannot attach volumes"})
}

func volumeCast(name string, w wraps) method {
	return method{
		name: name, since: "6.0", kind: "cast", state: stateRefused, note: "fault `InvalidVolume`", test: "TestRefusedCasts",
		answer: refuse(name, w, func(*novalet.Instance) *failure { return invalidVolume() }),
	}
}

func refuseShare(ctx context.Context, d *Driver, r *request) (any, error) {
	l, err := objects(args{"share_mapping": append(append([]byte("["), orNull(r.args["share_mapping"])...), ']')}, "share_mapping")
	if err != nil || len(l) != 1 || l[0].Require("id") != nil {
		return nil, novalet.Faultf(novalet.ErrUnsupported, "NotImplementedError", "shares are not supported")
	}
	o := l[0]
	o.ResetChanges()
	o.Set("status", "error")
	if _, err := d.rpc.object(ctx, d.requestContext(r.rc), o.ForSave("id"), "save", nil, nil); err != nil {
		return nil, err
	}
	return nil, novalet.Faultf(novalet.ErrUnsupported, "NotImplementedError", "shares are not supported")
}
