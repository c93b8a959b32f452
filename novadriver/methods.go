package novadriver

import (
	"context"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/oslomsg"
)

// state says what becomes of a method.
type state string

const (
	stateDone    state = "done"    // carried out
	stateRefused state = "refused" // answered as stock answers what its hypervisor cannot do
)

// request is one request that was read.
type request struct {
	args args
	rc   novalet.RequestContext
	wire oslomsg.Context
	id   string
}

// method describes how one method of the compute RPC API is answered. One of operation, record and answer is set.
type method struct {
	name  string
	since string // RPC version that brought it, or its newest argument
	kind  string // call or cast
	state state
	note  string // for docs/compute-api.md: what is done, or the refusal
	test  string // the test that shows it

	// operation completes the operation that the cast becomes; it is recorded before the ack.
	operation func(d *Driver, r *request, op *novalet.Operation) error
	// record handles a cast before the ack, without waiting for anything.
	record func(ctx context.Context, d *Driver, r *request) error
	// answer carries the request out, in a goroutine of its own; its result answers a call.
	answer func(ctx context.Context, d *Driver, r *request) (any, error)
}

//go:generate go test . -run TestComputeAPIDoc -update

// methods is the compute RPC API 6.0 to 6.5. docs/compute-api.md is made from it.
var methods = concat(buildMethods, lifecycleMethods, interfaceMethods, consoleMethods, eventMethods, hostMethods,
	volumeMethods, migrationMethods)

func concat(groups ...[]method) []method {
	var out []method
	for _, g := range groups {
		out = append(out, g...)
	}
	return out
}
