package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// A port of Neutron's SR-IOV mechanism (vif_type hw_veb) is a virtual function of an interface of the host: its own
// interface moves into the instance's namespace, and the switch in the card does the rest. Inside, the guest may try to
// give it what address it likes; what the card lets through is set at the physical function, which stays on the host: MAC
// address, VLAN, and the check that no other address speaks.
//
// The interface is known by its PCI address, never by a name, which the guest may change. It is taken back before its
// namespace ends where that is known; else the kernel gives it back to the host when the namespace ends.

// vfSettings are what a physical function holds a virtual one to.
type vfSettings struct {
	MAC   string `json:"mac"`
	VLAN  int    `json:"vlan"` // 0: none
	Spoof bool   `json:"spoof"`
	Trust bool   `json:"trust"`
}

// functions is what a plug needs of the card.
type functions interface {
	// address is that of the device behind an interface of the calling thread's namespace, "" where there is none.
	address(link netlink.Link) string
	// settings reads what the function is held to. novalet.ErrNotFound when the card or the function is gone.
	settings(parent string, vf int) (vfSettings, error)
	// set makes it have what is wanted, and touches only what differs: a change of the address resets the function.
	set(parent string, vf int, have, want vfSettings) error
}

// noMAC gives a function back its own choice of address.
const noMAC = "00:00:00:00:00:00"

// returnTime is how long the end of a namespace may take to give an interface back.
const returnTime = 15 * time.Second

// SpoofKey in a VIF's details, false, says that its port may speak under any address.
const SpoofKey = "novalet_spoof_check"

// wantedOf is what the card has to hold the port's function to. The error is for the tenant's eyes.
func wantedOf(v *novalet.VIF) (vfSettings, error) {
	mac, err := net.ParseMAC(v.Address)
	if err != nil {
		return vfSettings{}, errors.New("its MAC address is none")
	}
	s := vfSettings{MAC: mac.String(), Spoof: true}
	if raw, ok := v.Details["vlan"]; ok && string(raw) != "null" {
		n, err := strconv.Atoi(strings.Trim(string(raw), `"`))
		if err != nil || n < 0 || n > 4094 {
			return vfSettings{}, errors.New("its VLAN has no valid number")
		}
		s.VLAN = n
	}
	if string(v.Details[SpoofKey]) == "false" {
		s.Spoof = false
	}
	// The port asks for it in its profile, which only an administrator may write, and the operator grants it with a tag of the
	// device. Nova's scheduler has compared both; a device without the tag is not trusted whatever a port says.
	var asked any
	_ = json.Unmarshal(v.Profile["trusted"], &asked)
	s.Trust = isTrue(fmt.Sprint(asked)) && v.Device != nil && isTrue(v.Device.Tags["trusted"])
	return s, nil
}

func isTrue(s string) bool {
	b, err := strconv.ParseBool(strings.ToLower(s))
	return err == nil && b
}

// onFunction says whether the VIF is a function of a card.
func onFunction(v *novalet.VIF) bool { return v.Type == "hw_veb" }

// plugFunction moves the port's function into the namespace.
func (p *Plugger) plugFunction(ctx context.Context, r *novalet.PlugRequest, ns *os.File) error {
	d := r.VIF.Device
	if d == nil {
		f := novalet.Faultf(novalet.ErrReschedule, "PortBindingFailed", "Port %s cannot be plugged: the host has set aside no device for it.", r.VIF.ID)
		f.Details = map[string]any{"port_id": r.VIF.ID}
		return f
	}
	want, err := wantedOf(r.VIF)
	if err != nil {
		return err
	}
	have, err := p.pci.settings(d.ParentName, d.VF)
	if err != nil {
		return fmt.Errorf("read settings of device %s: %w", d.Address, err)
	}
	inside, err := p.functionIn(ns, d.Address)
	if err != nil {
		return err
	}
	if inside == nil {
		link, err := p.awaitFunction(ctx, d.Address)
		if err != nil {
			return err
		}
		if err := p.h.LinkSetDown(link); err != nil {
			return fmt.Errorf("take down %s: %w", link.Attrs().Name, err)
		}
		// A card does not tell whether the host gave the function its address or the driver in an instance did, as one may that
		// the host gave none: only what the host gives is kept.
		have.MAC = ""
		if err := p.pci.set(d.ParentName, d.VF, have, want); err != nil {
			return fmt.Errorf("set up device %s: %w", d.Address, err)
		}
		if err := clearInner(ns, InnerName(r.Index)); err != nil {
			return err
		}
		// Its address and MTU are set inside: the function may need a moment to take over what the card was told.
		if err := moveLink(link, ns, InnerName(r.Index), nil, 0); err != nil {
			return err
		}
		// A driver that its card does not listen to any more, since that was reset, takes the address and never works.
		if err := inNetNS(ns, func() error { return p.cycle(d.Address) }); err != nil {
			return err
		}
	} else if err := p.pci.set(d.ParentName, d.VF, have, want); err != nil {
		return fmt.Errorf("set up device %s: %w", d.Address, err)
	}
	if err := inNetNS(ns, func() error { return p.takeAddress(ctx, d.Address, want.MAC) }); err != nil {
		return err
	}
	return p.configureLink(r, ns, func(*netlink.Handle) (netlink.Link, error) { return p.thisFunction(d.Address) })
}

// cycle takes the interface up and down, in the current namespace: as it goes down, drivers of functions reset themselves at
// their card. Intel's igbvf learns its address by that alone, and is refused any other. One that does not come up yet needs
// none of it.
func (p *Plugger) cycle(address string) error {
	link, err := p.thisFunction(address)
	if err != nil {
		return err
	}
	_ = netlink.LinkSetUp(link)
	if err := netlink.LinkSetDown(link); err != nil {
		return fmt.Errorf("take down %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// takeAddress gives the interface the port's MAC address, in the current namespace. Some drivers refuse it until the
// function has come back from the reset that a new address means.
func (p *Plugger) takeAddress(ctx context.Context, address, mac string) error {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	for end := time.Now().Add(2 * time.Second); ; {
		link, err := p.thisFunction(address)
		if err == nil {
			if link.Attrs().HardwareAddr.String() == mac {
				return nil
			}
			if err = netlink.LinkSetHardwareAddr(link, hw); err == nil {
				return nil
			}
		}
		if time.Now().After(end) {
			return fmt.Errorf("set address of device %s: %w", address, err)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// thisFunction finds the interface of a device in the current namespace.
func (p *Plugger) thisFunction(address string) (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	return p.among(links, address)
}

func (p *Plugger) among(links []netlink.Link, address string) (netlink.Link, error) {
	for _, l := range links {
		if p.pci.address(l) == address {
			return l, nil
		}
	}
	return nil, fmt.Errorf("interface of device %s: %w", address, novalet.ErrNotFound)
}

// functionIn finds it in a namespace; nil when it is not there.
func (p *Plugger) functionIn(ns *os.File, address string) (link netlink.Link, err error) {
	err = inNetNS(ns, func() (err error) {
		link, err = p.thisFunction(address)
		return err
	})
	if errors.Is(err, novalet.ErrNotFound) {
		return nil, nil
	}
	return link, err
}

// awaitFunction finds it on the host, where a namespace that ends gives it back.
func (p *Plugger) awaitFunction(ctx context.Context, address string) (netlink.Link, error) {
	for end := time.Now().Add(p.returnTime); ; {
		links, err := p.h.LinkList()
		if err != nil {
			return nil, fmt.Errorf("list network devices: %w", err)
		}
		link, err := p.among(links, address)
		if err == nil {
			return link, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("%w: interface of device %s is not on the host", novalet.ErrBusy, address)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// hostName is the name that an interface gets on the host: its own, or one made from its address where that is taken or
// not known.
func hostName(d *novalet.PCIDevice) string {
	if d.Name != "" && nameRE.MatchString(d.Name) {
		return d.Name
	}
	return spareName(d)
}

func spareName(d *novalet.PCIDevice) string {
	name := "nvf" + strings.NewReplacer(":", "", ".", "").Replace(strings.TrimPrefix(d.Address, "0000:"))
	return name[:min(len(name), 15)]
}

// dropNames takes away what the guest called the interface besides its name: a second name could be one that the host has,
// or comes to need.
func dropNames(h *netlink.Handle, link netlink.Link, d *novalet.PCIDevice) error {
	for _, other := range link.Attrs().AltNames {
		if err := h.LinkDelAltName(link, other); err != nil {
			return fmt.Errorf("remove name %q of device %s: %w", other, d.Address, err)
		}
	}
	if link.Attrs().Alias != "" {
		if err := h.LinkSetAlias(link, ""); err != nil {
			return fmt.Errorf("remove alias of device %s: %w", d.Address, err)
		}
	}
	return nil
}

// retrieveFunction takes the port's function out of a namespace. Nil when it is not there. What the guest did to it the
// kernel drops on the way (addresses, qdiscs, devices on top), or goes here and in resetFunction.
func (p *Plugger) retrieveFunction(d *novalet.PCIDevice, netns string) error {
	ns, err := openNetNS(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("open the host's network namespace: %w", err)
	}
	defer home.Close()
	return inNetNS(ns, func() error {
		link, err := p.thisFunction(d.Address)
		if errors.Is(err, novalet.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := dropNames(&netlink.Handle{}, link, d); err != nil {
			return err
		}
		// Looked at before: the kernel moves it first and renames it then, so that a name which is taken ends halfway.
		name := hostName(d)
		if there, err := p.link(name); err != nil {
			return err
		} else if there != nil {
			name = spareName(d)
		}
		return moveLink(link, home, name, nil, 0)
	})
}

// resetFunction makes a function on the host what it was: by name, down, and held to nothing.
func (p *Plugger) resetFunction(ctx context.Context, d *novalet.PCIDevice) error {
	have, err := p.pci.settings(d.ParentName, d.VF)
	if errors.Is(err, novalet.ErrNotFound) {
		return nil // the card is gone, or has no functions any more
	}
	if err != nil {
		return fmt.Errorf("read settings of device %s: %w", d.Address, err)
	}
	link, err := p.awaitFunction(ctx, d.Address)
	if err != nil {
		return err
	}
	if err := p.h.LinkSetDown(link); err != nil {
		return fmt.Errorf("take down %s: %w", link.Attrs().Name, err)
	}
	if err := dropNames(p.h, link, d); err != nil {
		return err
	}
	if err := p.resetFlags(link); err != nil {
		return fmt.Errorf("reset flags of device %s: %w", d.Address, err)
	}
	if name := hostName(d); link.Attrs().Name != name {
		if err := p.h.LinkSetName(link, name); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("rename %s: %w", link.Attrs().Name, err)
		}
	}
	if link.Attrs().MTU != 1500 {
		if err := p.h.LinkSetMTU(link, 1500); err != nil {
			return fmt.Errorf("set mtu of device %s: %w", d.Address, err)
		}
	}
	if err := p.pci.set(d.ParentName, d.VF, have, vfSettings{MAC: noMAC, Spoof: true}); err != nil {
		return fmt.Errorf("reset device %s: %w", d.Address, err)
	}
	return nil
}

// resetFlags undoes what a guest may have switched on, and the next one would find.
func (p *Plugger) resetFlags(link netlink.Link) error {
	flags := link.Attrs().RawFlags
	for _, f := range []struct {
		flag uint32
		undo func(netlink.Link) error
	}{{unix.IFF_PROMISC, p.h.SetPromiscOff}, {unix.IFF_ALLMULTI, p.h.LinkSetAllmulticastOff}, {unix.IFF_NOARP, p.h.LinkSetARPOn}} {
		if flags&f.flag != 0 {
			if err := f.undo(link); err != nil {
				return err
			}
		}
	}
	return nil
}

// silenceFunction drops every frame of the function in the namespace, or none any more.
func (p *Plugger) silenceFunction(d *novalet.PCIDevice, netns string, on bool) error {
	return p.silenceIn(netns, on, func() (netlink.Link, error) {
		link, err := p.thisFunction(d.Address)
		if errors.Is(err, novalet.ErrNotFound) {
			return nil, nil
		}
		return link, err
	})
}
