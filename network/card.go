//go:build !standin

package network

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// cards speaks to the kernel's drivers.
type cards struct{ h *netlink.Handle }

func newFunctions(h *netlink.Handle) functions { return cards{h} }

// driverInfo is struct ethtool_drvinfo of linux/ethtool.h.
type driverInfo struct {
	cmd                                          uint32
	driver, version, firmware, bus, erom         [32]byte
	_                                            [12]byte
	privFlags, stats, testinfo, eedump, regdumps uint32
}

// address implements functions. Kernels before 5.14 do not name the device in netlink; ethtool's ioctl does on all.
func (cards) address(link netlink.Link) string {
	a := link.Attrs()
	if a.ParentDevBus == "pci" {
		return a.ParentDev
	}
	if a.ParentDevBus != "" || link.Type() != "device" {
		return ""
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(s)
	info := driverInfo{cmd: unix.ETHTOOL_GDRVINFO}
	req := ethtoolReq{data: unsafe.Pointer(&info)}
	copy(req.name[:unix.IFNAMSIZ-1], a.Name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return ""
	}
	return strings.TrimRight(string(info.bus[:]), "\x00")
}

// settings implements functions.
func (c cards) settings(parent string, vf int) (vfSettings, error) {
	link, err := c.h.LinkByName(parent)
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		return vfSettings{}, fmt.Errorf("interface %s: %w", parent, novalet.ErrNotFound)
	}
	if err != nil {
		return vfSettings{}, fmt.Errorf("look up interface %s: %w", parent, err)
	}
	for _, v := range link.Attrs().Vfs {
		if v.ID == vf {
			return vfSettings{MAC: v.Mac.String(), VLAN: v.Vlan, Spoof: v.Spoofchk, Trust: v.Trust == 1}, nil
		}
	}
	return vfSettings{}, fmt.Errorf("function %d of interface %s: %w", vf, parent, novalet.ErrNotFound)
}

// set implements functions. The check comes before trust, so that no moment is without both.
func (c cards) set(parent string, vf int, have, want vfSettings) error {
	link, err := c.h.LinkByName(parent)
	if err != nil {
		return fmt.Errorf("look up interface %s: %w", parent, err)
	}
	if have.MAC != want.MAC {
		mac, err := net.ParseMAC(want.MAC)
		if err != nil {
			return err
		}
		// Not every driver takes the address back; the next instance's replaces it.
		if err := c.h.LinkSetVfHardwareAddr(link, vf, mac); err != nil && want.MAC != noMAC {
			return fmt.Errorf("set its address: %w", err)
		}
	}
	if have.VLAN != want.VLAN {
		if err := c.h.LinkSetVfVlan(link, vf, want.VLAN); err != nil {
			return fmt.Errorf("set its VLAN: %w", err)
		}
	}
	// A driver that does not tell is read as if it checked, so it is told in any case.
	if have.Spoof != want.Spoof || want.Spoof && want.MAC != noMAC {
		if err := c.h.LinkSetVfSpoofchk(link, vf, want.Spoof); err != nil {
			if want.MAC == noMAC && errors.Is(err, unix.EOPNOTSUPP) {
				return nil // a card that checks nothing has nothing to be put back
			}
			return fmt.Errorf("set its check of addresses: %w", err)
		}
	}
	if have.Trust != want.Trust {
		if err := c.h.LinkSetVfTrust(link, vf, want.Trust); err != nil {
			return fmt.Errorf("set its trust: %w", err)
		}
	}
	return nil
}
