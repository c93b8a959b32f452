package novadriver

import (
	"encoding/json"
	"fmt"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

var buildMethods = []method{
	{
		name: "build_and_run_instance", since: "6.0", kind: "cast", state: stateDone, operation: decodeBuild,
		note: "boots the instance; a failure of this host goes back to the conductor (`build_instances`)", test: "TestBuild",
	},
	{
		name: "terminate_instance", since: "6.0", kind: "cast", state: stateDone, operation: decodePlain,
		note: "ends and removes the instance; wins over whatever else is under way", test: "TestLifecycleCasts",
	},
	{
		name: "rebuild_instance", since: "6.2 (target_state)", kind: "cast", state: stateDone, operation: decodeRebuild,
		note: "in place, also from another image; an evacuation to this host makes the instance anew from its image, with its ports",
		test: "TestRebuild",
	},
	{
		name: "shelve_instance", since: "6.0", kind: "cast", state: stateDone, operation: decodeImageID,
		note: "snapshot, then offloaded by `shelved_offload_time`", test: "TestLifecycleCasts",
	},
	{
		name: "shelve_offload_instance", since: "6.0", kind: "cast", state: stateDone, operation: decodePlain,
		note: "frees the host, keeps the ports", test: "TestLifecycleCasts",
	},
	{
		name: "unshelve_instance", since: "6.0", kind: "cast", state: stateDone, operation: decodeBuild,
		note: "boots from the shelved image", test: "TestUnshelve",
	},
}

// decodePlain reads what most casts have: nothing but clean_shutdown.
func decodePlain(_ *Driver, r *request, op *novalet.Operation) error {
	op.Args.CleanShutdown = r.args.flag("clean_shutdown", true)
	return nil
}

// decodeImageID reads the casts that name an image.
func decodeImageID(d *Driver, r *request, op *novalet.Operation) error {
	op.Args.ImageID = r.args.str("image_id")
	op.Args.BackupType = r.args.str("backup_type")
	op.Args.Rotation, _ = r.args.number("rotation")
	return decodePlain(d, r, op)
}

// decodeBuild reads the arguments of a build, or of an unshelve, which has some of them.
func decodeBuild(d *Driver, r *request, op *novalet.Operation) error {
	b := &novalet.BuildArgs{
		Image: decodeImage(r.args["image"]), AdminPassword: novalet.Secret(r.args.str("admin_password")),
		InjectedFiles: decodeFiles(r.args["injected_files"]), Node: r.args.str("node"),
	}
	_ = json.Unmarshal(r.args["security_groups"], &b.SecurityGroups)
	var err error
	if b.RequestedNetworks, err = decodeNetworks(r.args["requested_networks"]); err != nil {
		return err
	}
	if b.BlockDevices, err = decodeBDMs(r.args["block_device_mapping"]); err != nil {
		return err
	}
	var filter struct {
		Retry map[string]json.RawMessage `json:"retry"`
	}
	_ = json.Unmarshal(r.args["filter_properties"], &filter)
	// Without a further host the conductor would only put its own words over the reason of the failure.
	var hosts []json.RawMessage
	exhausted := json.Unmarshal(r.args["host_list"], &hosts) == nil && hosts != nil && len(hosts) == 0
	if b.MayReschedule = op.Method == novalet.MethodBuild && filter.Retry != nil && !exhausted; b.MayReschedule {
		// What the conductor needs again; the instance is in op.Instance.
		keep := args{}
		for _, k := range []string{
			"image", "filter_properties", "admin_password", "injected_files", "requested_networks", "security_groups", "request_spec", "host_list",
		} {
			if v, ok := r.args[k]; ok {
				keep[k] = v
			}
		}
		if op.Args.Raw, err = marshalPlain(keep); err != nil {
			return fmt.Errorf("keep the arguments: %w", err)
		}
	}
	op.Args.Build = b
	if op.Method == novalet.MethodBuild {
		d.notes.build(op.Instance.UUID, d.o.now())
	}
	return nil
}

func decodeRebuild(d *Driver, r *request, op *novalet.Operation) error {
	rb := &novalet.RebuildArgs{
		OrigImageRef: r.args.str("orig_image_ref"), ImageRef: r.args.str("image_ref"), NewPassword: novalet.Secret(r.args.str("new_pass")),
		InjectedFiles: decodeFiles(r.args["injected_files"]), Recreate: r.args.flag("recreate", false),
		PreserveEphemeral: r.args.flag("preserve_ephemeral", false), ReimageBootVolume: r.args.flag("reimage_boot_volume", false),
		TargetState: r.args.str("target_state"),
	}
	_ = json.Unmarshal(r.args["orig_sys_metadata"], &rb.OrigSystemMeta)
	if rb.Recreate {
		rb.SharedStorage = r.args.flag("on_shared_storage", false)
		if rb.Node = r.args.str("scheduled_node"); rb.Node == "" {
			rb.Node = d.o.Node
		}
		rb.SourceHost, rb.SourceNode = op.Instance.Host, op.Instance.Node
		m, _ := ovo.Decode(r.args["migration"]) // the instance is evacuated without its record too
		rb.MigrationID = m.Int("id")
	}
	op.Args.Rebuild = rb
	return nil
}
