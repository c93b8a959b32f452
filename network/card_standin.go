//go:build standin

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/novalet/novalet"
)

// A program built with the tag "standin" takes pairs of virtual Ethernet devices for a card, for tests on machines without
// one. The folder NOVALET_STANDIN_SYSFS has the part of sysfs that network/sriov reads; the file "far" of a function names
// the end of its pair that stays on the host, "settings" is what the physical function would hold it to.
type standin struct {
	h    *netlink.Handle
	root string
}

func newFunctions(h *netlink.Handle) functions {
	return standin{h, os.Getenv("NOVALET_STANDIN_SYSFS")}
}

func (s standin) address(link netlink.Link) string {
	if link.Type() != "veth" {
		return ""
	}
	files, _ := filepath.Glob(filepath.Join(s.root, "bus/pci/devices/*/far"))
	for _, f := range files {
		name, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		far, err := s.h.LinkByName(strings.TrimSpace(string(name)))
		if err == nil && far.Attrs().Index == link.Attrs().ParentIndex && far.Attrs().ParentIndex == link.Attrs().Index {
			return filepath.Base(filepath.Dir(f))
		}
	}
	return ""
}

func (s standin) file(parent string, vf int) string {
	return filepath.Join(s.root, "class/net", parent, "device", fmt.Sprintf("virtfn%d", vf), "settings")
}

func (s standin) settings(parent string, vf int) (out vfSettings, err error) {
	out = vfSettings{MAC: noMAC, Spoof: true}
	path := s.file(parent, vf)
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		return out, fmt.Errorf("function %d of interface %s: %w", vf, parent, novalet.ErrNotFound)
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	return out, err
}

func (s standin) set(parent string, vf int, _, want vfSettings) error {
	data, err := json.Marshal(want)
	if err != nil {
		return err
	}
	return os.WriteFile(s.file(parent, vf), data, 0o600)
}
