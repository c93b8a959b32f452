package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/novalet/novalet"
)

type placementState struct {
	pmu         sync.Mutex
	allocations map[string]bool
}

// Allocate gives an instance an allocation, as the scheduler does.
func (s *placementState) Allocate(uuid string) {
	s.pmu.Lock()
	defer s.pmu.Unlock()
	s.allocations[uuid] = true
}

// Allocated says whether the instance has one.
func (s *placementState) Allocated(uuid string) bool {
	s.pmu.Lock()
	defer s.pmu.Unlock()
	return s.allocations[uuid]
}

// Placement is a fake novalet.Placement.
type Placement struct {
	*placementState
	f *Faults
}

var _ novalet.Placement = (*Placement)(nil)

// DeleteAllocation implements novalet.Placement.
func (p *Placement) DeleteAllocation(ctx context.Context, uuid string) error {
	if err := p.f.enter(ctx, "Placement.DeleteAllocation"); err != nil {
		return err
	}
	p.pmu.Lock()
	delete(p.allocations, uuid)
	p.pmu.Unlock()
	return p.f.leave(ctx, "Placement.DeleteAllocation")
}

type imageState struct {
	imu     sync.Mutex
	images  map[string]*novalet.Image
	leases  map[string]bool
	uploads map[string]string      // image id → instance
	backups map[[2]string][]string // instance and backup_type → image ids, oldest first
	gone    []string               // images deleted in Glance
}

func newImageState() *imageState {
	return &imageState{images: map[string]*novalet.Image{}, leases: map[string]bool{}, uploads: map[string]string{},
		backups: map[[2]string][]string{}}
}

// AddBackup puts a backup of an instance into the fake Glance, newer than those before it, as nova-api does.
func (s *imageState) AddBackup(imageID, uuid, backupType string) {
	s.imu.Lock()
	defer s.imu.Unlock()
	s.images[imageID] = &novalet.Image{ID: imageID}
	kind := [2]string{uuid, backupType}
	s.backups[kind] = append(s.backups[kind], imageID)
}

// HasImage reports whether the fake Glance has an image.
func (s *imageState) HasImage(imageID string) bool {
	s.imu.Lock()
	defer s.imu.Unlock()
	return s.images[imageID] != nil
}

// AddImage puts an image into the fake Glance.
func (s *imageState) AddImage(img *novalet.Image) {
	s.imu.Lock()
	defer s.imu.Unlock()
	s.images[img.ID] = img
}

// Leased lists the instances that lease an image.
func (s *imageState) Leased() []string {
	s.imu.Lock()
	defer s.imu.Unlock()
	return slices.Sorted(maps.Keys(s.leases))
}

// Uploaded returns the instance whose snapshot an image holds, or "".
func (s *imageState) Uploaded(imageID string) string {
	s.imu.Lock()
	defer s.imu.Unlock()
	return s.uploads[imageID]
}

// DeletedImages returns the ids handed to DeleteImage.
func (s *imageState) DeletedImages() []string {
	s.imu.Lock()
	defer s.imu.Unlock()
	return slices.Clone(s.gone)
}

// Images is a fake novalet.ImageStore.
type Images struct {
	*imageState
	f *Faults
}

var _ novalet.ImageStore = (*Images)(nil)

// Prepare implements novalet.ImageStore.
func (s *Images) Prepare(ctx context.Context, r *novalet.ImageRequest) (*novalet.Image, error) {
	if err := s.f.enter(ctx, "ImageStore.Prepare"); err != nil {
		return nil, err
	}
	s.imu.Lock()
	img, ok := s.images[r.ImageID]
	if ok && (r.MaxBytes == 0 || img.Size <= r.MaxBytes) {
		s.leases[r.InstanceUUID] = true
	}
	s.imu.Unlock()
	if !ok {
		return nil, novalet.Faultf(novalet.ErrAbort, "ImageNotFound", "Image %s could not be found.", r.ImageID)
	}
	if r.MaxBytes > 0 && img.Size > r.MaxBytes {
		return nil, novalet.Faultf(novalet.ErrAbort, "FlavorDiskSmallerThanImage", "The image does not fit into the flavor's disk.")
	}
	c := *img
	return &c, s.f.leave(ctx, "ImageStore.Prepare")
}

// Release implements novalet.ImageStore.
func (s *Images) Release(ctx context.Context, uuid string) error {
	if err := s.f.enter(ctx, "ImageStore.Release"); err != nil {
		return err
	}
	s.imu.Lock()
	delete(s.leases, uuid)
	s.imu.Unlock()
	return s.f.leave(ctx, "ImageStore.Release")
}

// Snapshot implements novalet.ImageStore.
func (s *Images) Snapshot(ctx context.Context, r *novalet.SnapshotRequest) error {
	if err := s.f.enter(ctx, "ImageStore.Snapshot"); err != nil {
		return err
	}
	if r.Freeze != nil {
		thaw, err := r.Freeze(ctx)
		if err != nil {
			return err
		}
		thaw()
	}
	if r.Captured != nil {
		if err := r.Captured(ctx); err != nil {
			return err
		}
	}
	s.imu.Lock()
	s.uploads[r.ImageID] = r.InstanceUUID
	if r.Base != nil {
		img := *r.Base
		img.ID = r.ImageID
		s.images[r.ImageID] = &img
	}
	s.imu.Unlock()
	return s.f.leave(ctx, "ImageStore.Snapshot")
}

// DeleteImage implements novalet.ImageStore.
func (s *Images) DeleteImage(ctx context.Context, _ novalet.RequestContext, imageID string) error {
	if err := s.f.enter(ctx, "ImageStore.DeleteImage"); err != nil {
		return err
	}
	s.imu.Lock()
	_, uploaded := s.uploads[imageID]
	known := uploaded || s.images[imageID] != nil
	s.gone = append(s.gone, imageID)
	delete(s.images, imageID)
	delete(s.uploads, imageID)
	s.imu.Unlock()
	if !known {
		return fmt.Errorf("image %s: %w", imageID, novalet.ErrNotFound)
	}
	return s.f.leave(ctx, "ImageStore.DeleteImage")
}

// RotateBackups implements novalet.ImageStore.
func (s *Images) RotateBackups(ctx context.Context, _ novalet.RequestContext, uuid, backupType string, keep int64) error {
	if err := s.f.enter(ctx, "ImageStore.RotateBackups"); err != nil {
		return err
	}
	s.imu.Lock()
	kind := [2]string{uuid, backupType}
	for list := s.backups[kind]; int64(len(list)) > keep; list = s.backups[kind] {
		s.gone = append(s.gone, list[0])
		delete(s.images, list[0])
		delete(s.uploads, list[0])
		s.backups[kind] = list[1:]
	}
	s.imu.Unlock()
	return s.f.leave(ctx, "ImageStore.RotateBackups")
}

// Cache implements novalet.ImageStore.
func (s *Images) Cache(ctx context.Context, _ novalet.RequestContext, imageID string) (string, error) {
	if err := s.f.enter(ctx, "ImageStore.Cache"); err != nil {
		return "error", err
	}
	s.imu.Lock()
	defer s.imu.Unlock()
	if s.images[imageID] == nil {
		return "error", fmt.Errorf("image %s: %w", imageID, novalet.ErrNotFound)
	}
	return "cached", nil
}

// List implements novalet.ImageStore.
func (s *Images) List(ctx context.Context) ([]novalet.ImageStatus, error) {
	if err := s.f.enter(ctx, "ImageStore.List"); err != nil {
		return nil, err
	}
	s.imu.Lock()
	defer s.imu.Unlock()
	var out []novalet.ImageStatus
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		out = append(out, novalet.ImageStatus{ID: id, Size: s.images[id].Size})
	}
	return out, nil
}

// Verify implements novalet.ImageStore: nothing here can rot.
func (s *Images) Verify(ctx context.Context, _ bool) ([]novalet.LayerCheck, error) {
	if err := s.f.enter(ctx, "ImageStore.Verify"); err != nil {
		return nil, err
	}
	s.imu.Lock()
	defer s.imu.Unlock()
	byLayer := map[string]*novalet.LayerCheck{}
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		for _, l := range s.images[id].Layers {
			if byLayer[l.DiffID] == nil {
				byLayer[l.DiffID] = &novalet.LayerCheck{DiffID: l.DiffID, Size: l.Size}
			}
			byLayer[l.DiffID].Images = append(byLayer[l.DiffID].Images, id)
		}
	}
	var out []novalet.LayerCheck
	for _, id := range slices.Sorted(maps.Keys(byLayer)) {
		out = append(out, *byLayer[id])
	}
	return out, nil
}

// Collect implements novalet.ImageStore.
func (s *Images) Collect(ctx context.Context) (int64, error) {
	return 0, s.f.enter(ctx, "ImageStore.Collect")
}

// Port is a Neutron port.
type Port struct {
	ID, Network, Device, Host string
	Preexisting               bool
	Active                    bool
	Address                   string
	More                      []string // further addresses
}

type networkState struct {
	nmu    sync.Mutex
	nhost  string
	ports  map[string]*Port
	nextID int
	// AutoActive makes a port active as soon as it is plugged.
	autoActive bool
	onActive   func(port *Port)
}

func newNetworkState(host string) *networkState {
	return &networkState{nhost: host, ports: map[string]*Port{}, autoActive: true}
}

// SetAutoActive says whether plugging makes a port active (the default).
func (s *networkState) SetAutoActive(on bool) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.autoActive = on
}

// OnActive is called, without a lock, when a port becomes active: Neutron's event.
func (s *networkState) OnActive(f func(*Port)) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.onActive = f
}

// AddPort makes a port that no instance has yet.
func (s *networkState) AddPort(id string) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.nextID++
	s.ports[id] = &Port{ID: id, Network: "net", Preexisting: true, Address: fmt.Sprintf("10.0.0.%d", s.nextID%250+2)}
}

// Activate makes a port active, as an L2 agent does.
func (s *networkState) Activate(id string) {
	s.nmu.Lock()
	p := s.ports[id]
	var f func(*Port)
	if p != nil && !p.Active {
		p.Active = true
		f = s.onActive
	}
	s.nmu.Unlock()
	if f != nil {
		c := *p
		f(&c)
	}
}

// SetAddress changes a port's address, as a port update does.
func (s *networkState) SetAddress(id, address string) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	s.ports[id].Address = address
}

// SetPort changes a port in place.
func (s *networkState) SetPort(id string, f func(*Port)) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	f(s.ports[id])
}

// VIF is how Nova's info cache shows a port.
func VIF(p *Port) novalet.VIF { return p.vif() }

// DropPort deletes a port behind the agent's back.
func (s *networkState) DropPort(id string) {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	delete(s.ports, id)
}

// Ports lists an instance's ports; "" lists those of none.
func (s *networkState) Ports(device string) []Port {
	s.nmu.Lock()
	defer s.nmu.Unlock()
	var out []Port
	for _, id := range slices.Sorted(maps.Keys(s.ports)) {
		if s.ports[id].Device == device {
			out = append(out, *s.ports[id])
		}
	}
	return out
}

func (p *Port) vif() novalet.VIF {
	four := 4
	gw := "10.0.0.1"
	id := p.ID
	ips := []novalet.FixedIP{{Address: p.Address, Type: "fixed", Version: 4}}
	for _, a := range p.More {
		ips = append(ips, novalet.FixedIP{Address: a, Type: "fixed", Version: 4})
	}
	return novalet.VIF{
		ID: p.ID, Address: "fa:16:3e:00:00:01", Type: "bridge", VNICType: "normal",
		DevName: ("tap" + id)[:min(14, 3+len(id))], Active: p.Active, PreserveOnDelete: p.Preexisting,
		Network: novalet.VIFNetwork{ID: p.Network, Bridge: "brq", Label: "private", Meta: novalet.NetworkMeta{MTU: 1450},
			Subnets: []novalet.Subnet{{CIDR: "10.0.0.0/24", Version: 4,
				Gateway: novalet.IP{Address: &gw, Type: "gateway", Version: &four},
				IPs:     ips,
				Meta:    novalet.SubnetMeta{DHCPServer: "10.0.0.2"}}}},
	}
}

// Network is a fake novalet.NetworkAPI.
type Network struct {
	*networkState
	f *Faults
}

var _ novalet.NetworkAPI = (*Network)(nil)

// Allocate implements novalet.NetworkAPI. A request for "none" gives no port.
func (n *Network) Allocate(ctx context.Context, r *novalet.AllocateRequest) (novalet.NetworkInfo, error) {
	if err := n.f.enter(ctx, "NetworkAPI.Allocate"); err != nil {
		return nil, err
	}
	n.nmu.Lock()
	var info novalet.NetworkInfo
	for _, req := range r.Networks {
		var p *Port
		switch {
		case req.NetworkID == "none":
			continue
		case req.PortID != "":
			p = n.ports[req.PortID]
			if p == nil || p.Device != "" && p.Device != r.Instance.UUID {
				n.nmu.Unlock()
				return nil, novalet.Faultf(novalet.ErrAbort, "PortInUse", "Port %s is in use or does not exist.", req.PortID)
			}
		default:
			n.nextID++
			p = &Port{ID: fmt.Sprintf("%08x-0000-4000-8000-000000000000", n.nextID), Network: req.NetworkID,
				Address: fmt.Sprintf("10.0.%d.%d", n.nextID/250%250, n.nextID%250+2)}
			n.ports[p.ID] = p
		}
		p.Device, p.Host, p.Active = r.Instance.UUID, n.nhost, false
		info = append(info, p.vif())
	}
	n.nmu.Unlock()
	return info, n.f.leave(ctx, "NetworkAPI.Allocate")
}

// Deallocate implements novalet.NetworkAPI: like the real one it asks for what the instance has, and deletes a port
// unless the given info says that it is to be kept.
func (n *Network) Deallocate(ctx context.Context, _ novalet.RequestContext, inst *novalet.Instance, info novalet.NetworkInfo) error {
	if err := n.f.enter(ctx, "NetworkAPI.Deallocate"); err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, v := range info {
		keep[v.ID] = v.PreserveOnDelete
	}
	n.nmu.Lock()
	for id, p := range n.ports {
		if p.Device != inst.UUID {
			continue
		}
		if keep[id] {
			p.Device, p.Host, p.Active = "", "", false
		} else {
			delete(n.ports, id)
		}
	}
	n.nmu.Unlock()
	return n.f.leave(ctx, "NetworkAPI.Deallocate")
}

// Deallocation is Deallocate in two halves: looking for the ports, and freeing them.
func (n *Network) Deallocation(ctx context.Context, rc novalet.RequestContext, inst *novalet.Instance) (func(context.Context, novalet.NetworkInfo) error, error) {
	if err := n.f.enter(ctx, "NetworkAPI.Deallocation"); err != nil {
		return nil, err
	}
	free := func(ctx context.Context, info novalet.NetworkInfo) error { return n.Deallocate(ctx, rc, inst, info) }
	return free, n.f.leave(ctx, "NetworkAPI.Deallocation")
}

// Release implements novalet.NetworkAPI.
func (n *Network) Release(ctx context.Context, _ novalet.RequestContext, _ *novalet.Instance, vif *novalet.VIF) error {
	if err := n.f.enter(ctx, "NetworkAPI.Release"); err != nil {
		return err
	}
	n.nmu.Lock()
	if p := n.ports[vif.ID]; p != nil && vif.PreserveOnDelete {
		p.Device, p.Host, p.Active = "", "", false
	} else {
		delete(n.ports, vif.ID)
	}
	n.nmu.Unlock()
	return n.f.leave(ctx, "NetworkAPI.Release")
}

// Unbind implements novalet.NetworkAPI.
func (n *Network) Unbind(ctx context.Context, _ novalet.RequestContext, _ *novalet.Instance, info novalet.NetworkInfo) error {
	if err := n.f.enter(ctx, "NetworkAPI.Unbind"); err != nil {
		return err
	}
	n.eachOf(info, func(p *Port) { p.Host, p.Active = "", false })
	return n.f.leave(ctx, "NetworkAPI.Unbind")
}

// Bind implements novalet.NetworkAPI.
func (n *Network) Bind(ctx context.Context, _ novalet.RequestContext, _ *novalet.Instance, info novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	if err := n.f.enter(ctx, "NetworkAPI.Bind"); err != nil {
		return nil, err
	}
	var out novalet.NetworkInfo
	n.eachOf(info, func(p *Port) { p.Host = n.nhost; out = append(out, p.vif()) })
	return out, n.f.leave(ctx, "NetworkAPI.Bind")
}

// Refresh implements novalet.NetworkAPI.
func (n *Network) Refresh(ctx context.Context, _ novalet.RequestContext, inst *novalet.Instance, cached novalet.NetworkInfo) (novalet.NetworkInfo, error) {
	if err := n.f.enter(ctx, "NetworkAPI.Refresh"); err != nil {
		return nil, err
	}
	var out novalet.NetworkInfo
	n.eachOf(cached, func(p *Port) {
		if p.Device == inst.UUID {
			out = append(out, p.vif())
		}
	})
	return out, n.f.leave(ctx, "NetworkAPI.Refresh")
}

func (n *Network) eachOf(info novalet.NetworkInfo, f func(*Port)) {
	n.nmu.Lock()
	defer n.nmu.Unlock()
	for _, v := range info {
		if p := n.ports[v.ID]; p != nil {
			f(p)
		}
	}
}

// PortActive implements novalet.NetworkAPI.
func (n *Network) PortActive(ctx context.Context, id string) (bool, error) {
	if err := n.f.enter(ctx, "NetworkAPI.PortActive"); err != nil {
		return false, err
	}
	n.nmu.Lock()
	defer n.nmu.Unlock()
	p, ok := n.ports[id]
	if !ok {
		return false, fmt.Errorf("port %s: %w", id, novalet.ErrNotFound)
	}
	return p.Active, nil
}
