// Package network joins the VIFs of instances to the host's network: a pair of virtual Ethernet devices, one end in
// the instance's network namespace, the other in a Linux bridge, an Open vSwitch bridge, or alone, as the port's
// binding says (os-vif's semantics, without os-vif).
//
// Everything it makes carries an alias "novalet:<instance>:<port>" (in Open vSwitch, external_ids), and it changes and
// removes only what does. It keeps nothing on disk: the kernel and the switch are the record.
//
// It starts one goroutine, which frees devices: the kernel takes 16 to 31 ms for one and holds its network lock
// meanwhile, so nobody waits for it. Close ends the goroutine and waits.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/network/ovsdb"
)

// Options of a plugger. All may be zero.
type Options struct {
	// OVSDB is the database of Open vSwitch; default unix:/run/openvswitch/db.sock.
	OVSDB string
	// DatapathOffload leaves checksum offload on with the userspace datapath, for hosts whose switch runs with
	// userspace-tso-enable.
	DatapathOffload bool
	// Owner tells several agents of one host apart, as on a developer's machine: Sweep leaves alone what another one
	// plugged. "" is right where there is one.
	Owner string
	// Logger; default slog.Default.
	Logger *slog.Logger
}

// Plugger implements novalet.VIFPlugger in the network namespace in which New was called.
type Plugger struct {
	o    Options
	log  *slog.Logger
	h    *netlink.Handle
	sock map[int]*nl.SocketHandle // for the messages that netlink has no function for
	eth  int                      // a socket for ethtool's ioctl
	ovs  *ovsdb.Client
	reap *reaper
	drop dropProgram
	pci  functions
	// returnTime is how long the end of a namespace may take to give a card's function back.
	returnTime time.Duration
	// isolateOnce and guardOnce log once that the kernel cannot do it.
	isolateOnce, guardOnce sync.Once
	// locks keeps two operations on one device apart; operations on different devices run side by side.
	locks keyedMutex
}

var _ novalet.VIFPlugger = (*Plugger)(nil)

// New opens the kernel's interface and starts the goroutine that frees devices.
func New(o Options) (*Plugger, error) {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.OVSDB == "" {
		o.OVSDB = "unix:/run/openvswitch/db.sock"
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	eth, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		h.Close()
		s.Close()
		return nil, fmt.Errorf("open socket: %w", err)
	}
	p := &Plugger{
		o: o, log: o.Logger, h: h, eth: eth,
		sock: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}},
		ovs:  ovsdb.New(o.OVSDB),
		pci:  newFunctions(h), returnTime: returnTime,
	}
	p.reap = startReaper(p)
	return p, nil
}

// Close frees the devices that are still waiting for it and ends the goroutine.
func (p *Plugger) Close() error {
	p.reap.close()
	p.drop.close()
	p.h.Close()
	for _, s := range p.sock {
		s.Close()
	}
	return unix.Close(p.eth)
}

var (
	uuidRE = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)
)

// names of the devices of a port. All end in the first 11 characters of its id, as in Nova and Neutron: the agents
// find the devices by these names.
func tapName(portID string) string { return "tap" + portID[:11] }
func qbrName(portID string) string { return "qbr" + portID[:11] }
func qvbName(portID string) string { return "qvb" + portID[:11] }
func qvoName(portID string) string { return "qvo" + portID[:11] }
func ifbName(portID string) string { return "ifb" + portID[:11] }

// InnerName is the name inside of the interface with that index.
func InnerName(index int) string { return fmt.Sprintf("eth%d", index) }

// Check implements novalet.VIFPlugger.
func (p *Plugger) Check(vif *novalet.VIF) error {
	if !uuidRE.MatchString(vif.ID) {
		return fmt.Errorf("plug vif %.40q: no uuid", vif.ID)
	}
	if hw, err := net.ParseMAC(vif.Address); err != nil || len(hw) != 6 || hw[0]&1 != 0 {
		return fmt.Errorf("plug vif %s: %.40q is no MAC address", vif.ID, vif.Address)
	}
	if mtu := vif.Network.Meta.MTU; mtu != 0 && (mtu < 68 || mtu > 65535) {
		return fmt.Errorf("plug vif %s: mtu %d", vif.ID, mtu)
	}
	refuse := func(kind error, text string) error {
		f := novalet.Faultf(kind, "PortBindingFailed", "Port %s cannot be plugged: %s", vif.ID, text)
		f.Details = map[string]any{"port_id": vif.ID}
		return f
	}
	if t := vif.VNICType; t != "" && t != "normal" && !(t == "direct" && onFunction(vif)) {
		return refuse(novalet.ErrAbort, fmt.Sprintf("a container cannot use vnic_type %.20q.", t))
	}
	switch vif.Type {
	case "bridge", "ovs":
		if !nameRE.MatchString(vif.Network.Bridge) {
			return refuse(novalet.ErrAbort, "its bridge has no valid name.")
		}
		return nil
	case "tap":
		return nil
	case "macvtap":
		if _, err := macvtapOf(vif); err != nil {
			return refuse(novalet.ErrAbort, err.Error()+".")
		}
		return nil
	case "hw_veb":
		if _, err := wantedOf(vif); err != nil {
			return refuse(novalet.ErrAbort, err.Error()+".")
		}
		return nil
	case "binding_failed", "unbound", "":
		return refuse(novalet.ErrReschedule, "no network agent of this host has bound it.")
	case "vhostuser":
		return refuse(novalet.ErrAbort, "a container cannot use vif_type vhostuser; the switch of the host must not offer dpdkvhostuser interfaces.")
	}
	return refuse(novalet.ErrAbort, fmt.Sprintf("a container cannot use vif_type %.20q.", vif.Type))
}

// Plug implements novalet.VIFPlugger.
func (p *Plugger) Plug(ctx context.Context, r *novalet.PlugRequest) error {
	if err := p.Check(r.VIF); err != nil {
		return err
	}
	if !uuidRE.MatchString(r.InstanceUUID) || r.Index < 0 || r.Index > 999 {
		return fmt.Errorf("plug vif %s: instance %.40q, index %d", r.VIF.ID, r.InstanceUUID, r.Index)
	}
	defer p.locks.lock(r.VIF.ID)()
	if err := p.plug(ctx, r); err != nil {
		return fmt.Errorf("plug vif %s: %w", r.VIF.ID, err)
	}
	return nil
}

func (p *Plugger) plug(ctx context.Context, r *novalet.PlugRequest) error {
	ns, err := openNetNS(r.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	switch {
	case onFunction(r.VIF):
		return p.plugFunction(ctx, r, ns)
	case r.VIF.Type == "tap":
		if err := p.plugPair(r, ns, 0, 0); err != nil {
			return err
		}
	case r.VIF.Type == "bridge":
		bridge, err := p.ensureBridge(r.VIF.Network.Bridge, mtu(r.VIF), bridgeOptions{})
		if err != nil {
			return err
		}
		if err := p.plugPair(r, ns, bridge, 0); err != nil {
			return err
		}
	case r.VIF.Type == "macvtap":
		if err := p.plugMacvtap(r, ns); err != nil {
			return err
		}
	case hybrid(r.VIF):
		if err := p.plugHybrid(ctx, r, ns); err != nil {
			return err
		}
	default:
		if err := p.plugOVS(ctx, r, ns); err != nil {
			return err
		}
	}
	if err := p.configure(r, ns); err != nil {
		return err
	}
	return p.shape(r)
}

// Configure implements novalet.VIFPlugger.
func (p *Plugger) Configure(_ context.Context, r *novalet.PlugRequest) error {
	if err := p.Check(r.VIF); err != nil {
		return err
	}
	defer p.locks.lock(r.VIF.ID)()
	ns, err := openNetNS(r.NetNS)
	if err != nil {
		return fmt.Errorf("configure vif %s: %w", r.VIF.ID, err)
	}
	defer ns.Close()
	if onFunction(r.VIF) {
		if r.Static && r.VIF.Device != nil {
			err = p.configureLink(r, ns, func(*netlink.Handle) (netlink.Link, error) { return p.thisFunction(r.VIF.Device.Address) })
		}
	} else if err = p.reguard(r.VIF); err == nil && r.Static {
		err = p.configure(r, ns)
	}
	if err != nil {
		return fmt.Errorf("configure vif %s: %w", r.VIF.ID, err)
	}
	return nil
}

// Cut implements novalet.VIFPlugger: the host's end of the pair goes down, which no guest can undo from its own.
func (p *Plugger) Cut(_ context.Context, instanceUUID string, vif *novalet.VIF) error {
	if !uuidRE.MatchString(vif.ID) {
		return fmt.Errorf("cut vif %.40q: no uuid", vif.ID)
	}
	defer p.locks.lock(vif.ID)()
	link, err := p.link(tapName(vif.ID))
	if err == nil && link != nil && mine(link.Attrs().Alias, instanceUUID, vif.ID) {
		err = p.h.LinkSetDown(link)
	}
	if err != nil && !gone(err) {
		return fmt.Errorf("cut vif %s: %w", vif.ID, err)
	}
	return nil
}

// Unplug implements novalet.VIFPlugger.
func (p *Plugger) Unplug(ctx context.Context, instanceUUID string, vif *novalet.VIF) error {
	if !uuidRE.MatchString(vif.ID) {
		return fmt.Errorf("unplug vif %.40q: no uuid", vif.ID)
	}
	defer p.locks.lock(vif.ID)()
	if onFunction(vif) {
		if vif.Device == nil {
			return nil // it was given none, or has given it back
		}
		if err := p.resetFunction(ctx, vif.Device); err != nil {
			return fmt.Errorf("unplug vif %s: %w", vif.ID, err)
		}
		return nil
	}
	err := p.unplug(ctx, instanceUUID, vif.ID, vif.Type == "ovs")
	if err == nil && trunkBridge(vif) {
		err = p.ovs.DelBridge(ctx, vif.Network.Bridge, owned(instanceUUID, vif.ID))
	}
	if err != nil {
		return fmt.Errorf("unplug vif %s: %w", vif.ID, err)
	}
	return nil
}

// unplug takes everything of a port away. The switch first: a port without a device would be an error in its log.
func (p *Plugger) unplug(ctx context.Context, instanceUUID, portID string, ovs bool) error {
	var errs []error
	if ovs {
		for _, name := range []string{qvoName(portID), tapName(portID)} {
			if err := p.ovs.DelPort(ctx, name, owned(instanceUUID, portID)); err != nil {
				errs = append(errs, err)
				break
			}
		}
	}
	for _, name := range []string{macvtapName(portID), tapName(portID), ifbName(portID), qvbName(portID), qbrName(portID)} {
		link, err := p.link(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if link == nil || !mine(link.Attrs().Alias, instanceUUID, portID) {
			continue
		}
		if err := p.discard(link); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// mtu of the port's network; Neutron may know none.
func mtu(v *novalet.VIF) int {
	if v.Network.Meta.MTU == 0 {
		return 1500
	}
	return v.Network.Meta.MTU
}

// aliasPrefix marks the devices that are ours.
const aliasPrefix = "novalet:"

// goneAlias marks a device that waits to be freed.
const goneAlias = aliasPrefix + "gone"

func alias(instanceUUID, portID string) string { return aliasPrefix + instanceUUID + ":" + portID }

// mark is the alias of a device of this agent: another one on the same host must not sweep it away.
func (p *Plugger) mark(instanceUUID, portID string) string {
	if p.o.Owner == "" {
		return alias(instanceUUID, portID)
	}
	return alias(instanceUUID, portID) + ":" + p.o.Owner
}

// ownerOf returns the agent that a mark names; "" is the host's only one.
func ownerOf(text string) string {
	if f := strings.SplitN(strings.TrimPrefix(text, aliasPrefix), ":", 3); len(f) == 3 {
		return f[2]
	}
	return ""
}

// mine: the device was made for this port, and for this instance if one is named.
func mine(text, instanceUUID, portID string) bool {
	inst, port, ok := parseAlias(text)
	return ok && port == portID && (instanceUUID == "" || inst == instanceUUID)
}

func parseAlias(text string) (instanceUUID, portID string, ok bool) {
	rest, ok := strings.CutPrefix(text, aliasPrefix)
	if !ok {
		return "", "", false
	}
	instanceUUID, portID, ok = strings.Cut(rest, ":")
	portID, _, _ = strings.Cut(portID, ":") // the owner follows
	return instanceUUID, portID, ok && uuidRE.MatchString(instanceUUID) && uuidRE.MatchString(portID)
}

// link returns the device of that name, or nil. Most names that are asked for are of no device: to find that out by an ioctl
// takes a tenth of what a netlink message does.
func (p *Plugger) link(name string) (netlink.Link, error) {
	if ifr, err := unix.NewIfreq(name); err == nil && unix.IoctlIfreq(p.eth, unix.SIOCGIFINDEX, ifr) == unix.ENODEV {
		return nil, nil
	}
	l, err := p.h.LinkByName(name)
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up device %s: %w", name, err)
	}
	return l, nil
}

// openNetNS opens a network namespace and makes sure that it is one: the path leads into another's /proc.
func openNetNS(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("open network namespace: %s is none", path)
	}
	return f, nil
}

// keyedMutex is a mutex per key.
type keyedMutex struct {
	mu   sync.Mutex
	keys map[string]*keyLock
}

type keyLock struct {
	mu sync.Mutex
	n  int
}

// lock locks the key and returns its unlock.
func (k *keyedMutex) lock(key string) func() {
	k.mu.Lock()
	if k.keys == nil {
		k.keys = map[string]*keyLock{}
	}
	l := k.keys[key]
	if l == nil {
		l = &keyLock{}
		k.keys[key] = l
	}
	l.n++
	k.mu.Unlock()
	l.mu.Lock()
	return func() {
		l.mu.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.n--; l.n == 0 {
			delete(k.keys, key)
		}
	}
}
