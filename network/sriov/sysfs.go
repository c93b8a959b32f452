package sriov

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/novalet/novalet"
)

// Inventory reads the host's devices.
type Inventory struct {
	specs []Spec
	root  string // where sysfs is mounted
}

var _ novalet.PCIDevices = (*Inventory)(nil)

// New returns the devices that specs allow. It does not read them yet.
func New(specs []Spec) *Inventory { return &Inventory{specs: specs, root: sysfsRoot()} }

var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)

// PCIDevices implements novalet.PCIDevices. A virtual function counts when the function it belongs to has a network
// interface: only by that can it be set up. Its own may be in an instance, where /sys of the host does not show it.
func (v *Inventory) PCIDevices() ([]novalet.PCIDevice, error) {
	if len(v.specs) == 0 {
		return nil, nil
	}
	dir := filepath.Join(v.root, "bus/pci/devices")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a host without PCI
	}
	if err != nil {
		return nil, fmt.Errorf("list PCI devices: %w", err)
	}
	var out []novalet.PCIDevice
	for _, e := range entries {
		if _, ok := split(e.Name()); !ok {
			continue
		}
		functions, err := v.functionsOf(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		out = append(out, functions...)
	}
	slices.SortFunc(out, func(a, b novalet.PCIDevice) int { return strings.Compare(a.Address, b.Address) })
	return out, nil
}

// functionsOf lists the virtual functions of a physical one that may be used; none of any other device.
func (v *Inventory) functionsOf(dir string) ([]novalet.PCIDevice, error) {
	n, err := number(filepath.Join(dir, "sriov_numvfs"))
	if err != nil || n == 0 {
		return nil, nil // not a physical function, or one that has none
	}
	parent := netdevOf(dir)
	if parent == "" {
		return nil, nil
	}
	mac := text(filepath.Join(dir, "net", parent, "address"))
	var out []novalet.PCIDevice
	for i := range n {
		target, err := os.Readlink(filepath.Join(dir, fmt.Sprintf("virtfn%d", i)))
		if err != nil {
			continue // on its way: the next look finds it
		}
		address := filepath.Base(target)
		if _, ok := split(address); !ok {
			continue
		}
		d := novalet.PCIDevice{Address: address, Parent: filepath.Base(dir), ParentName: parent, ParentMAC: mac, VF: i}
		own := filepath.Join(filepath.Dir(dir), address)
		d.VendorID, d.ProductID = strings.TrimPrefix(text(filepath.Join(own, "vendor")), "0x"), strings.TrimPrefix(text(filepath.Join(own, "device")), "0x")
		if d.VendorID == "" || d.ProductID == "" {
			continue
		}
		if node, err := number(filepath.Join(own, "numa_node")); err == nil && node >= 0 {
			d.NUMANode = &node
		}
		// The folder is there for a function that has a driver of network interfaces, wherever the interface is. Without it the
		// function is a virtual machine's, by way of vfio-pci, or nobody's.
		if st, err := os.Stat(filepath.Join(own, "net")); err != nil || !st.IsDir() {
			continue
		}
		d.Name = netdevOf(own)
		for j := range v.specs {
			if s := &v.specs[j]; s.fits(&d, v.addressOf) {
				d.Tags = maps.Clone(s.tags)
				out = append(out, d)
				break
			}
		}
	}
	return out, nil
}

// netdevOf is the name of the interface of a device, "" when it has none here.
func netdevOf(dir string) string {
	entries, err := os.ReadDir(filepath.Join(dir, "net"))
	if err != nil {
		return ""
	}
	for _, e := range entries {
		if nameRE.MatchString(e.Name()) {
			return e.Name()
		}
	}
	return ""
}

// addressOf is the device of an interface, "" when it has none.
func (v *Inventory) addressOf(devname string) string {
	target, err := os.Readlink(filepath.Join(v.root, "class/net", devname, "device"))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

func text(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func number(path string) (int, error) { return strconv.Atoi(text(path)) }
