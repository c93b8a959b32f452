package neutron

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
)

// revisionIfMatch is the alias of Neutron's conditions: a DELETE with `If-Match: revision_number=N` is answered with 412
// when the resource has changed since.
const revisionIfMatch = "revision-if-match"

// maxKnown bounds the instances of which revisions are kept; beyond it all are forgotten, which costs each a look.
const maxKnown = 1024

// known keeps, by instance, the revision that each of its ports had when it was last seen to be the instance's. Neutron
// counts a port's revision up with each change, so a port that still has it needs no other look before it is deleted: it
// serves nobody else by now. It is a saving alone: what is not known, or has changed, is looked for.
type known struct {
	mu        sync.Mutex
	revisions map[string]map[string]int // instance, port
}

// set notes what a look at the instance's ports has shown.
func (k *known) set(uuid string, ports []*port) {
	m := make(map[string]int, len(ports))
	for _, p := range ports {
		if p.Revision > 0 {
			m[p.ID] = p.Revision
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.revisions == nil || len(k.revisions) >= maxKnown {
		k.revisions = map[string]map[string]int{}
	}
	k.revisions[uuid] = m
}

func (k *known) forget(uuid string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.revisions, uuid)
}

// take returns the revisions of the ports of info and forgets them. ok is false unless each of them is known and is to
// be deleted.
func (k *known) take(uuid string, info novalet.NetworkInfo) (revisions map[string]int, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := k.revisions[uuid]
	delete(k.revisions, uuid)
	revisions = make(map[string]int, len(info))
	for _, v := range info {
		r, seen := all[v.ID]
		if !seen || v.PreserveOnDelete {
			return nil, false
		}
		revisions[v.ID] = r
	}
	return revisions, len(revisions) > 0
}

// Remember looks at the instance's ports, so that its delete needs no look before it frees them. It changes nothing and is
// of use once the ports are wired: Neutron changes them for that. One request; none where Neutron has no conditions.
func (a *API) Remember(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance) error {
	ctx = withRequest(ctx, rc)
	admin, err := a.admin(ctx)
	if err != nil {
		return err
	}
	ext, err := a.extensions(ctx, admin)
	if err != nil || !ext[revisionIfMatch] {
		return err
	}
	ports, err := a.instancePorts(ctx, admin, inst)
	if err != nil {
		return fmt.Errorf("look at the ports of %s: %w", inst.UUID, err)
	}
	a.known.set(inst.UUID, ports)
	return nil
}

// deleteUnchanged deletes ports that still have the revision they were seen with.
func deleteUnchanged(ctx context.Context, admin *caller, revisions map[string]int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxParallel)
	for id, r := range revisions {
		g.Go(func() error { return admin.removeUnchanged(ctx, "ports/"+id, r) })
	}
	return g.Wait()
}
