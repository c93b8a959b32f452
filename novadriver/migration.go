package novadriver

import (
	"context"
	"errors"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

// movesText is what users read when a server is to be moved or resized.
const movesText = "this compute host runs containers and cannot resize or move servers yet"

var migrationMethods = []method{
	{
		name: "prep_resize", since: "6.0", kind: "cast", state: stateRefused, answer: refuseResize, test: "TestRefuseResize",
		note: "fault; the migration becomes `error`, the allocation goes back, the server stays as it was",
	},
	moveCast("resize_instance"), moveCast("finish_resize"), moveCast("revert_resize"), moveCast("finish_revert_resize"),
	{
		name: "confirm_resize", since: "6.0", kind: "cast or call", state: stateDone, note: "nothing was resized here: nothing to confirm",
		test: "TestIgnored", answer: func(context.Context, *Driver, *request) (any, error) { return nil, nil },
	},
	{
		name: "check_instance_shared_storage", since: "6.0", kind: "call", state: stateDone, note: "false", test: "TestIgnored",
		answer: func(context.Context, *Driver, *request) (any, error) { return false, nil },
	},
	{
		name: "prep_snapshot_based_resize_at_dest", since: "6.0", kind: "call", state: stateRefused, note: "`MigrationPreCheckError`",
		test: "TestRefusedCalls", answer: refuseMove,
	},
	moveCall("prep_snapshot_based_resize_at_source"), moveCall("finish_snapshot_based_resize_at_dest"),
	moveCall("confirm_snapshot_based_resize_at_source"), moveCall("revert_snapshot_based_resize_at_dest"),
	moveCall("finish_revert_snapshot_based_resize_at_source"),
	{
		name: "check_can_live_migrate_destination", since: "6.0", kind: "call", state: stateRefused,
		note: "`MigrationPreCheckError`: the conductor tries the next host, the server stays", test: "TestRefusedCalls", answer: refuseMove,
	},
	{
		name: "check_can_live_migrate_source", since: "6.0", kind: "call", state: stateRefused, note: "`MigrationPreCheckError`",
		test: "TestRefusedCalls", answer: refuseMove,
	},
	moveCall("pre_live_migration"), moveCall("post_live_migration_at_destination"), moveCall("drop_move_claim_at_destination"),
	{
		name: "live_migration", since: "6.0", kind: "cast", state: stateRefused, answer: refuseLiveMigration, test: "TestRefuseResize",
		note: "fault; the migration becomes `error`, the server stays as it was",
	},
	{
		name: "rollback_live_migration_at_destination", since: "6.0", kind: "cast", state: stateDone, note: "nothing to undo",
		test: "TestIgnored", answer: func(context.Context, *Driver, *request) (any, error) { return nil, nil },
	},
	moveCast("live_migration_force_complete"), moveCast("live_migration_abort"),
}

// refuseMove is what the conductor takes for "try another host".
func refuseMove(context.Context, *Driver, *request) (any, error) {
	return nil, novaError("MigrationPreCheckError", "Migration pre-check error: "+movesText, map[string]any{"reason": movesText})
}

func moveCall(name string) method {
	return method{
		name: name, since: "6.0", kind: "call", state: stateRefused, note: "`NotImplementedError`", test: "TestRefusedCalls",
		answer: notImplemented(movesText),
	}
}

func moveCast(name string) method {
	return method{
		name: name, since: "6.0", kind: "cast", state: stateRefused, note: "fault `MigrationError`", test: "TestRefusedCasts",
		answer: refuse(name, wraps{event: true, fault: true, revert: true}, func(*novalet.Instance) *failure { return moveError() }),
	}
}

func moveError() *failure {
	return novaError("MigrationError", "Migration error: "+movesText, map[string]any{"reason": movesText})
}

// giveBack undoes what the conductor prepared for a move of the instance: what the migration holds in Placement goes
// back to the instance, and the migration ends.
func (d *Driver) giveBack(ctx context.Context, r *request, inst *novalet.Instance) error {
	m, err := ovo.Decode(r.args["migration"])
	if err != nil || m == nil {
		return err
	}
	if id := m.String("uuid"); d.o.Placement != nil && isUUID(id) {
		err = d.o.Placement.MoveAllocation(ctx, id, inst.UUID)
	}
	if m.Int("id") > 0 {
		err = errors.Join(err, d.saveMigration(ctx, d.requestContext(r.rc), m.Int("id"), "error"))
	}
	return err
}

// refuseResize ends a resize or cold migration at its first step on this host.
func refuseResize(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "prep_resize", wraps{event: true, fault: true, revert: true}, func(inst *novalet.Instance) (any, error) {
		d.note(r, inst, "prep_resize", d.giveBack(ctx, r, inst))
		if inst.Host == d.o.Host {
			return nil, novaError("UnableToMigrateToSelf", "Unable to migrate instance ("+inst.UUID+") to current host ("+d.o.Host+").",
				map[string]any{"instance_id": inst.UUID, "host": d.o.Host})
		}
		return nil, moveError()
	})
}

func refuseLiveMigration(ctx context.Context, d *Driver, r *request) (any, error) {
	return d.wrap(ctx, r, "live_migration", wraps{event: true, fault: true, revert: true}, func(inst *novalet.Instance) (any, error) {
		d.note(r, inst, "live_migration", d.giveBack(ctx, r, inst))
		return nil, moveError()
	})
}
