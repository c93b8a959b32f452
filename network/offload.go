package network

import (
	"fmt"
	"net"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// ethtoolValue is struct ethtool_value of linux/ethtool.h.
type ethtoolValue struct{ cmd, data uint32 }

// ethtoolReq is struct ifreq with its data pointer.
type ethtoolReq struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

// setTxChecksum switches the transmit checksum offload of a device by ETHTOOL_STXCSUM on a socket of its namespace.
func setTxChecksum(socket int, name string, on bool) error {
	v := ethtoolValue{cmd: unix.ETHTOOL_STXCSUM}
	if on {
		v.data = 1
	}
	req := ethtoolReq{data: unsafe.Pointer(&v)}
	copy(req.name[:unix.IFNAMSIZ-1], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(socket), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
	if errno != 0 {
		return fmt.Errorf("switch off the checksum offload of %s: %w", name, errno)
	}
	return nil
}

// noTxChecksum switches it off on the port's end inside, found by its MAC address: the guest may have renamed it. It
// runs in the guest's namespace.
func noTxChecksum(r *novalet.PlugRequest) error {
	inner, err := innerLink(&netlink.Handle{}, r)
	if err != nil {
		return err
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(s)
	return setTxChecksum(s, inner.Attrs().Name, false)
}

// innerLink finds the port's end in the handle's namespace, of an empty one in the current: by its name and MAC, else by its MAC.
func innerLink(h *netlink.Handle, r *novalet.PlugRequest) (netlink.Link, error) {
	mac, err := net.ParseMAC(r.VIF.Address)
	if err != nil {
		return nil, err
	}
	name := InnerName(r.Index)
	link, err := h.LinkByName(name)
	if err == nil && link.Type() == "veth" && link.Attrs().HardwareAddr.String() == mac.String() {
		return link, nil
	}
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices inside: %w", err)
	}
	for _, l := range links {
		if l.Type() == "veth" && l.Attrs().HardwareAddr.String() == mac.String() {
			return l, nil
		}
	}
	return nil, fmt.Errorf("interface %s is not in the namespace: %w", name, novalet.ErrNotFound)
}
