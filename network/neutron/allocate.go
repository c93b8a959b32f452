package neutron

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/cleanup"
)

// Allocate implements novalet.NetworkAPI.
func (a *API) Allocate(ctx context.Context, r *novalet.AllocateRequest) (novalet.NetworkInfo, error) {
	info, err := a.allocate(withRequest(ctx, r.Context), r)
	if err != nil {
		return nil, fmt.Errorf("allocate network of %s: %w", r.Instance.UUID, err)
	}
	return info, nil
}

func (a *API) allocate(ctx context.Context, r *novalet.AllocateRequest) (novalet.NetworkInfo, error) {
	if r.Instance.ProjectID == "" || r.Instance.UUID == "" {
		return nil, errors.New("the instance has no uuid or project")
	}
	if noNetworks(r.Networks) {
		return novalet.NetworkInfo{}, nil
	}
	admin, err := a.admin(ctx)
	if err != nil {
		return nil, err
	}
	user, err := a.asUser(ctx, r.Context)
	if err != nil {
		return nil, err
	}
	var ext map[string]bool
	var groups []string
	var want []wanted
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) { ext, err = a.extensions(gctx, admin); return err })
	g.Go(func() (err error) { want, err = a.resolve(gctx, user, admin, r); return err })
	if slices.ContainsFunc(r.Networks, func(n novalet.NetworkRequest) bool { return n.PortID == "" }) || len(r.Networks) == 0 {
		g.Go(func() (err error) {
			groups, err = a.securityGroups(gctx, user, admin, r.Instance.ProjectID, r.SecurityGroups)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if len(want) == 0 {
		return novalet.NetworkInfo{}, nil
	}
	for _, w := range want {
		if w.port == nil {
			if err := groupsFit(w.net, groups); err != nil {
				return nil, err
			}
		}
	}

	var undo cleanup.Stack
	b := &binder{a: a, r: r, user: user, admin: admin, ext: ext, groups: groups, undo: &undo}
	info, err := b.run(ctx, want)
	if err != nil {
		// What ended the request must not end its undoing.
		undoCtx, cancel := unbroken(ctx)
		defer cancel()
		if _, uerr := undo.Unwind(undoCtx); uerr != nil {
			a.log.Warn("ports left behind after a failed allocation", "instance", r.Instance.UUID, "error", uerr)
		}
		return nil, err
	}
	return info, nil
}

// binder makes and binds the ports of one request.
type binder struct {
	a           *API
	r           *novalet.AllocateRequest
	user, admin *caller
	ext         map[string]bool
	groups      []string
	undo        *cleanup.Stack

	mu   sync.Mutex
	made []string // ports that this request made
	// unsure: a request that makes ports ended without an answer.
	unsure bool
}

func (b *binder) run(ctx context.Context, want []wanted) (novalet.NetworkInfo, error) {
	ports := make([]*port, len(want))
	var ids, floating []string
	var create []int
	g, gctx := errgroup.WithContext(ctx)
	for i, w := range want {
		ids = append(ids, w.net.ID)
		if w.port == nil {
			create = append(create, i)
			continue
		}
		floating = append(floating, w.port.ID)
		b.undo.Add("unbind port "+w.port.ID, func(ctx context.Context) error { return b.giveBack(ctx, w.port) })
		g.Go(func() (err error) {
			ports[i], err = b.bind(gctx, w, w.port)
			return err
		})
	}
	var f *facts
	g.Go(func() (err error) { f, err = b.a.gather(gctx, b.admin, ids, floating); return err })
	if len(create) > 0 {
		b.undo.Add("delete new ports", func(ctx context.Context) error { return b.deleteNew(ctx, want) })
		g.Go(func() error { return b.create(gctx, want, create, ports) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	f.visible = map[string]*network{}
	info := make(novalet.NetworkInfo, len(want))
	for i, w := range want {
		f.visible[w.net.ID] = w.net
		if err := bound(ports[i]); err != nil {
			return nil, err
		}
	}
	if err := b.a.freshen(ctx, b.admin, f, ports); err != nil {
		return nil, err
	}
	for i, w := range want {
		var err error
		if info[i], err = b.a.vif(f, ports[i], w.port != nil); err != nil {
			return nil, err
		}
	}
	return info, nil
}

// bound refuses a port that is bound to nothing.
func bound(p *port) error {
	switch p.VIFType {
	case "binding_failed", "unbound":
		return bindingFailed(p.ID)
	case "":
		return fault("PortBindingFailed", map[string]any{"port_id": p.ID},
			errors.New("the [neutron] user sees no binding:vif_type: it needs the admin or service role"),
			"Binding failed for port %s.", p.ID)
	}
	return nil
}

// body is what is asked of a port that has to be bound to this host.
func (b *binder) body(n *network) map[string]any {
	m := map[string]any{
		"device_id":       b.r.Instance.UUID,
		"device_owner":    deviceOwner(b.r.Instance),
		"binding:host_id": b.a.o.Host,
	}
	if hasDNS(b.ext) && n.DNSDomain == "" && b.r.Instance.Hostname != "" {
		m["dns_name"] = b.r.Instance.Hostname
	}
	return m
}

func deviceOwner(inst *novalet.Instance) string { return "compute:" + inst.AvailabilityZone }

// bind takes over a port that exists.
func (b *binder) bind(ctx context.Context, w wanted, p *port) (*port, error) {
	m := b.body(w.net)
	switch {
	case w.req.Device != nil:
		m["binding:profile"] = deviceProfile(p.Profile, w.req.Device)
	case len(p.Profile) > 0:
		m["binding:profile"] = p.Profile
	}
	var out struct{ Port *port }
	ctx, cancel := unbroken(ctx)
	defer cancel()
	if err := b.admin.put(ctx, "ports/"+p.ID, map[string]any{"port": m}, &out); err != nil {
		req := w.req
		req.PortID = p.ID
		return nil, portFault(err, b.r.Instance, p.NetworkID, req)
	}
	if out.Port == nil {
		return nil, fmt.Errorf("%w: update port %s: the answer holds no port", novalet.ErrTryAgain, p.ID)
	}
	return out.Port, b.name(ctx, w.net, out.Port)
}

// giveBack frees a pre-existing port, if it is this instance's by now.
func (b *binder) giveBack(ctx context.Context, p *port) error {
	var body struct{ Port *port }
	err := b.admin.get(ctx, "ports/"+p.ID, nil, &body)
	if errors.Is(err, novalet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if body.Port == nil || body.Port.DeviceID != b.r.Instance.UUID {
		return nil
	}
	return b.a.unbind(ctx, b.admin, b.user, p.ID, p.NetworkID, p.Profile)
}

// unbroken is for a request that changes something: it is not cut off in the middle, when nobody could tell whether it
// was carried out, and so whether the undo has to find a port that comes into being only later.
func unbroken(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), changeTimeout)
}

// changeTimeout bounds a request that changes something, retries included.
const changeTimeout = 2 * time.Minute

// name sets the DNS name of a port on a network with a DNS domain of its own. The record goes to the user's
// zone, so the user's token must ask.
func (b *binder) name(ctx context.Context, n *network, p *port) error {
	if !hasDNS(b.ext) || n.DNSDomain == "" || b.r.Instance.Hostname == "" {
		return nil
	}
	by := b.user
	if by == nil {
		by = b.admin
	}
	return by.put(ctx, "ports/"+p.ID, map[string]any{"port": map[string]any{"dns_name": b.r.Instance.Hostname}}, nil)
}

// create makes the ports want[i] for i in idx. One request makes and binds all where the policy allows; a chosen
// address is asked for with the user's token, because only the network's owner may choose (Neutron's
// create_port:fixed_ips:ip_address), and bound afterwards.
func (b *binder) create(ctx context.Context, want []wanted, idx []int, ports []*port) error {
	var together, apart []int
	for _, i := range idx {
		if want[i].req.Address != "" && b.user != nil {
			apart = append(apart, i)
		} else {
			together = append(together, i)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if len(together) == 0 {
			return nil
		}
		if b.a.bindInPost.Load() != bindForbidden {
			err := b.post(ctx, b.admin, want, together, ports, true)
			if status(err) != http.StatusForbidden {
				if err == nil {
					b.a.bindInPost.Store(bindAllowed)
				}
				return b.fault(err, want, together)
			}
		}
		if err := b.createThenBind(ctx, want, together, ports); err != nil {
			return err
		}
		if b.a.bindInPost.Swap(bindForbidden) != bindForbidden {
			b.a.log.Info("neutron does not let the [neutron] user create bound ports: binding takes a second request")
		}
		return nil
	})
	g.Go(func() error { return b.createThenBind(ctx, want, apart, ports) })
	return g.Wait()
}

func (b *binder) createThenBind(ctx context.Context, want []wanted, idx []int, ports []*port) error {
	if len(idx) == 0 {
		return nil
	}
	by := b.user
	if by == nil {
		by = b.admin
	}
	err := b.post(ctx, by, want, idx, ports, false)
	chosen := slices.ContainsFunc(idx, func(i int) bool { return want[i].req.Address != "" })
	if by.user && status(err) == http.StatusUnauthorized && !chosen {
		err = b.post(ctx, b.admin, want, idx, ports, false) // the token has expired, and nothing here needs it
	}
	if err != nil {
		return b.fault(err, want, idx)
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, i := range idx {
		g.Go(func() (err error) {
			ports[i], err = b.bind(ctx, want[i], ports[i])
			return err
		})
	}
	return g.Wait()
}

// fault names the network the error is about, where it is about one.
func (b *binder) fault(err error, want []wanted, idx []int) error {
	w := want[idx[0]]
	return portFault(err, b.r.Instance, w.net.ID, w.req)
}

// post creates the ports in one request.
func (b *binder) post(ctx context.Context, by *caller, want []wanted, idx []int, ports []*port, bind bool) error {
	ctx, cancel := unbroken(ctx)
	defer cancel()
	bodies := make([]map[string]any, len(idx))
	for j, i := range idx {
		m := map[string]any{"device_id": b.r.Instance.UUID}
		if bind {
			m = b.body(want[i].net)
		}
		m["network_id"], m["admin_state_up"], m["tenant_id"] = want[i].net.ID, true, b.r.Instance.ProjectID
		if len(b.groups) > 0 {
			m["security_groups"] = b.groups
		}
		if want[i].req.Address != "" {
			m["fixed_ips"] = []map[string]string{{"ip_address": want[i].req.Address}}
		}
		bodies[j] = m
	}
	var got []*port
	if len(bodies) == 1 {
		var out struct{ Port *port }
		if err := by.post(ctx, "ports", map[string]any{"port": bodies[0]}, &out); err != nil {
			return b.note(nil, err)
		}
		got = []*port{out.Port}
	} else {
		var out struct{ Ports []*port }
		if err := by.post(ctx, "ports", map[string]any{"ports": bodies}, &out); err != nil {
			return b.note(nil, err)
		}
		got = out.Ports
	}
	_ = b.note(got, nil)
	if len(got) != len(idx) {
		return fmt.Errorf("%w: create ports: %d asked for, %d made", novalet.ErrTryAgain, len(idx), len(got))
	}
	for j, i := range idx {
		p := got[j]
		if p == nil || p.NetworkID != want[i].net.ID {
			return fmt.Errorf("%w: create ports: the answer is not what was asked for", novalet.ErrTryAgain)
		}
		if err := p.check(); err != nil {
			return err
		}
		if hasResources(p) {
			return fault("NetworksWithQoSPolicyNotSupported", map[string]any{"instance_uuid": b.r.Instance.UUID, "network_id": p.NetworkID}, nil,
				"Using networks with QoS policy is not supported for instance %s. (Network ID is %s)", b.r.Instance.UUID, p.NetworkID)
		}
		ports[i] = p
		if bind {
			if err := b.name(ctx, want[i].net, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// note remembers what a request made, or that nobody can tell.
func (b *binder) note(ports []*port, err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range ports {
		if p != nil && uuidRE.MatchString(p.ID) {
			b.made = append(b.made, p.ID)
		}
	}
	if err != nil && (status(err) == 0 || status(err) >= http.StatusInternalServerError) {
		b.unsure = true
	}
	return err
}

// deleteNew deletes the ports that were made. Where that is not known, these are the instance's ports that are neither in
// its network info nor brought along: ports of an earlier try go too, which is what is wanted of them.
func (b *binder) deleteNew(ctx context.Context, want []wanted) error {
	b.mu.Lock()
	ids, unsure := b.made, b.unsure
	b.mu.Unlock()
	if !unsure {
		return deletePorts(ctx, b.admin, ids)
	}
	have, err := b.a.instancePorts(ctx, b.admin, b.r.Instance)
	if err != nil {
		return errors.Join(deletePorts(ctx, b.admin, ids), err)
	}
	keep := map[string]bool{}
	for _, v := range b.r.Instance.NetworkInfo {
		keep[v.ID] = true
	}
	for _, w := range want {
		if w.port != nil {
			keep[w.port.ID] = true
		}
	}
	for _, p := range have {
		if !keep[p.ID] && !slices.Contains(ids, p.ID) {
			ids = append(ids, p.ID)
		}
	}
	return deletePorts(ctx, b.admin, ids)
}

// freshen reads the subnets again of a network that has got one since they were read.
func (a *API) freshen(ctx context.Context, admin *caller, f *facts, ports []*port) error {
	var stale []string
	for _, p := range ports {
		for _, ip := range p.FixedIPs {
			i := f.ipam[p.NetworkID]
			if i == nil || !slices.ContainsFunc(i.subnets, func(s subnet) bool { return s.ID == ip.SubnetID }) {
				a.ipam.forget(p.NetworkID)
				stale = append(stale, p.NetworkID)
				break
			}
		}
	}
	if len(stale) == 0 {
		return nil
	}
	slices.Sort(stale)
	again, err := a.addresses(ctx, admin, slices.Compact(stale))
	if err != nil {
		return err
	}
	for id, i := range again {
		f.ipam[id] = i
	}
	return nil
}
