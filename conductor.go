package novalet

import "context"

// EvacuatedInstance is an instance that was rebuilt on another host while this one was thought dead.
type EvacuatedInstance struct {
	InstanceUUID string
	MigrationID  int64
	// Wire is the Migration object, to be marked completed.
	Wire []byte
}

// Conductor is Nova's database as compute may use it. Served by novadriver, called by agent. Calls block until
// the conductor answers; when the broker or the conductor is away they wait until ctx ends, then return
// ErrTryAgain. Saves of one instance must not run side by side.
type Conductor interface {
	// SaveInstance writes the named fields. Errors: ErrTaskState, ErrInstanceGone. Repeating a save that was carried
	// out but not answered is safe where Expected allows for the new state.
	SaveInstance(ctx context.Context, rc RequestContext, u *InstanceUpdate) error
	// DestroyInstance marks the row deleted. Nil when it already is.
	DestroyInstance(ctx context.Context, rc RequestContext, uuid string) error
	// Instance reads one row, also deleted ones. ErrNotFound.
	Instance(ctx context.Context, uuid string) (*Instance, error)
	// InstancesByHost reads all rows that name this host.
	InstancesByHost(ctx context.Context) ([]Instance, error)
	// Instances reads rows by uuid, deleted ones too; missing ones are left out.
	Instances(ctx context.Context, uuids []string) ([]Instance, error)
	// Evacuated lists the evacuations away from this host that are not yet cleaned up here, and EvacuationDone marks
	// one completed.
	Evacuated(ctx context.Context) ([]EvacuatedInstance, error)
	EvacuationDone(ctx context.Context, e *EvacuatedInstance) error
	// EndEvacuation tells how an evacuation to this host ended. A failed one gives back what was taken here.
	EndEvacuation(ctx context.Context, rc RequestContext, uuid string, r *RebuildArgs, ok bool) error
	// SaveNetworkInfo writes the info cache, which is what users see as addresses.
	SaveNetworkInfo(ctx context.Context, rc RequestContext, uuid string, info NetworkInfo) error
	// CreateVIF records a virtual interface row; DeleteVIFs removes all of an instance, DeleteVIF one.
	CreateVIF(ctx context.Context, rc RequestContext, uuid string, vif *VIF, tag string) error
	DeleteVIFs(ctx context.Context, rc RequestContext, uuid string) error
	DeleteVIF(ctx context.Context, rc RequestContext, uuid, vifID string) error
	// VIFTags returns the tags of an instance's interfaces by port; those without one are left out.
	VIFTags(ctx context.Context, rc RequestContext, uuid string) (map[string]string, error)
	// SaveBlockDevice writes the device name of a block device mapping.
	SaveBlockDevice(ctx context.Context, rc RequestContext, bdm *BlockDevice) error
	// StartEvent and FinishEvent write an event of the request's action ("compute_stop_instance"). err nil is success.
	// Without an action of that request they do nothing.
	StartEvent(ctx context.Context, rc RequestContext, uuid, event string) error
	FinishEvent(ctx context.Context, rc RequestContext, uuid, event string, err error) error
	// StartAction opens an action for work that no user's request started (a stop seen from the host).
	StartAction(ctx context.Context, rc RequestContext, uuid, action string) error
	// CreateFault records why an instance is in error, as `server show` displays it.
	CreateFault(ctx context.Context, rc RequestContext, uuid string, err error) error
	// RescheduleBuild hands a build back to the conductor for another host.
	RescheduleBuild(ctx context.Context, op *Operation, cause error) error
	// CleanConsoleTokens removes the instance's console tokens.
	CleanConsoleTokens(ctx context.Context, rc RequestContext, uuid string) error
	// InstanceChanged tells the resource tracker and the schedulers that the instance came, went or changed. It does
	// not block.
	InstanceChanged(inst *Instance, gone bool)
	// NewContext makes an admin context of our own with a fresh request id.
	NewContext() RequestContext
}

// Placement is the part of Nova's Placement that an instance's life needs. Served by novadriver/placement.
type Placement interface {
	// DeleteAllocation frees what the instance holds. Nil when it holds nothing. ErrTryAgain when Placement is away.
	DeleteAllocation(ctx context.Context, instanceUUID string) error
}
