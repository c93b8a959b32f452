package sriov

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
)

// tree is a sysfs in a folder.
type tree struct {
	t    *testing.T
	root string
}

func newTree(t *testing.T) tree { return tree{t, t.TempDir()} }

func (s tree) file(path, text string) {
	s.t.Helper()
	path = filepath.Join(s.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text+"\n"), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

func (s tree) link(path, to string) {
	s.t.Helper()
	path = filepath.Join(s.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		s.t.Fatal(err)
	}
}

// card adds a physical function with its virtual ones.
func (s tree) card(address, name string, functions ...string) {
	pf := "bus/pci/devices/" + address
	s.file(pf+"/sriov_numvfs", string(rune('0'+len(functions))))
	s.file(pf+"/net/"+name+"/address", "52:54:00:00:00:01")
	s.link("class/net/"+name+"/device", "../../../bus/pci/devices/"+address)
	for i, f := range functions {
		vf := "bus/pci/devices/" + f
		s.file(vf+"/vendor", "0x8086")
		s.file(vf+"/device", "0x1520")
		s.file(vf+"/numa_node", string(rune('0'+i)))
		s.file(vf+"/net/"+name+"v"+string(rune('0'+i))+"/address", "52:54:00:00:01:00")
		s.link("class/net/"+name+"v"+string(rune('0'+i))+"/device", "../../../bus/pci/devices/"+f)
		s.link(pf+"/virtfn"+string(rune('0'+i)), "../"+f)
	}
}

func (s tree) devices(specs ...string) []novalet.PCIDevice {
	s.t.Helper()
	list, err := ParseSpecs(specs)
	if err != nil {
		s.t.Fatal(err)
	}
	got, err := (&Inventory{specs: list, root: s.root}).PCIDevices()
	if err != nil {
		s.t.Fatal(err)
	}
	return got
}

func addresses(list []novalet.PCIDevice) string {
	var out []string
	for _, d := range list {
		out = append(out, d.Address)
	}
	return strings.Join(out, " ")
}

// TestDevices: the virtual functions of a network card are found with what Nova wants to know of them, and nothing else is.
func TestDevices(t *testing.T) {
	s := newTree(t)
	s.card("0000:03:00.0", "ens1", "0000:03:10.0", "0000:03:10.2")
	s.file("bus/pci/devices/0000:00:1f.2/vendor", "0x8086") // no network card
	s.file("bus/pci/devices/0000:04:00.0/sriov_numvfs", "1")
	s.link("bus/pci/devices/0000:04:00.0/virtfn0", "../0000:04:10.0") // a card of another kind: no interface
	s.file("bus/pci/devices/0000:04:10.0/vendor", "0x10de")
	got := s.devices(`{"devname": "ens1", "physical_network": "physnet1", "trusted": "true"}`)
	zero, one := 0, 1
	tags := map[string]string{"physical_network": "physnet1", "trusted": "true"}
	want := []novalet.PCIDevice{
		{Address: "0000:03:10.0", VendorID: "8086", ProductID: "1520", NUMANode: &zero, Name: "ens1v0", Parent: "0000:03:00.0",
			ParentName: "ens1", ParentMAC: "52:54:00:00:00:01", VF: 0, Tags: tags},
		{Address: "0000:03:10.2", VendorID: "8086", ProductID: "1520", NUMANode: &one, Name: "ens1v1", Parent: "0000:03:00.0",
			ParentName: "ens1", ParentMAC: "52:54:00:00:00:01", VF: 1, Tags: tags},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	// In an instance: the folder is there, what is in it belongs to another namespace.
	if err := os.RemoveAll(filepath.Join(s.root, "bus/pci/devices/0000:03:10.0/net/ens1v0")); err != nil {
		t.Fatal(err)
	}
	if got := s.devices(`{"devname": "ens1"}`); len(got) != 2 || got[0].Name != "" {
		t.Fatalf("with one in an instance: %+v", got)
	}
	// With another driver, as for a virtual machine, it is none of ours.
	if err := os.RemoveAll(filepath.Join(s.root, "bus/pci/devices/0000:03:10.0/net")); err != nil {
		t.Fatal(err)
	}
	if got := addresses(s.devices(`{"devname": "ens1"}`)); got != "0000:03:10.2" {
		t.Fatalf("with one that vfio has: %s", got)
	}
	if got := s.devices(); got != nil {
		t.Fatalf("without a spec: %v", got)
	}
	if got := newTree(t).devices(`{}`); got != nil {
		t.Fatalf("without PCI: %v", got)
	}
}

// TestSpecs: Nova's syntax, with what Nova's documentation has of examples.
func TestSpecs(t *testing.T) {
	s := newTree(t)
	s.card("0000:03:00.0", "ens1", "0000:03:10.0", "0000:03:10.2")
	s.card("0000:0a:00.0", "ens2", "0000:0a:00.1")
	const one, two, three = "0000:03:10.0", "0000:03:10.2", "0000:0a:00.1"
	for _, c := range []struct{ spec, want string }{
		{`{}`, one + " " + two + " " + three},
		{`{"devname": "ens2"}`, three},
		{`{"devname": "ens1v0"}`, one},
		{`{"devname": "ens7"}`, ""},
		{`{"address": "*:0a:00.*", "physical_network": "physnet1"}`, three},
		{`{"address": ":10.2"}`, two},
		{`{"address": ".2"}`, two},
		{`{"address": "03:10.0"}`, one},
		{`{"address": "0000:03:10.0"}`, one},
		{`{"address": "0000:03:00.0"}`, one + " " + two}, // the physical function stands for its own
		{`{"address": {"domain": ".*", "bus": "03", "slot": "10", "function": "[0-1]"}}`, one},
		{`{"address": {"bus": "0a"}}`, three},
		{`{"vendor_id": "8086", "product_id": "1520"}`, one + " " + two + " " + three},
		{`{"vendor_id": "15b3"}`, ""},
		{`{"product_id": "0x1520", "address": ":0a:*"}`, three},
		{`[{"devname": "ens2"}, {"address": "0000:03:10.2"}]`, two + " " + three},
		{`{"devname": "ens1", "remote_managed": "false"}`, one + " " + two},
	} {
		if got := addresses(s.devices(c.spec)); got != c.want {
			t.Errorf("%s: %q, want %q", c.spec, got, c.want)
		}
	}
	// The first entry that fits gives the tags.
	got := s.devices(`{"address": "0000:03:10.2", "physical_network": "a"}`, `{"devname": "ens1", "physical_network": "b", "trusted": true}`)
	if len(got) != 2 || got[0].Tags["physical_network"] != "b" || got[0].Tags["trusted"] != "true" || got[1].Tags["physical_network"] != "a" {
		t.Errorf("tags: %+v", got)
	}
}

// TestWrongSpecs: what is wrong, or cannot be done, ends with a reason.
func TestWrongSpecs(t *testing.T) {
	for spec, want := range map[string]string{
		`ens1`:                                 "neither",
		`[1]`:                                  "neither",
		`"x"`:                                  "neither",
		`{"vendor_id": "80861"}`:               "vendor_id",
		`{"product_id": "xyz"}`:                "product_id",
		`{"devname": "ens1", "address": ":1"}`: "exclude",
		`{"devname": "../x"}`:                  "no name",
		`{"address": "1:2:3:4.5"}`:             "no PCI address",
		`{"address": "0000:03:10.9"}`:          "no PCI address",
		`{"address": "zz:00.0"}`:               "no PCI address",
		`{"address": 7}`:                       "address",
		`{"address": {"bus": "("}}`:            "bus",
		`{"address": {"bus": 3}}`:              "bus",
		`{"remote_managed": "true"}`:           "SmartNIC",
		`{"resource_class": "CUSTOM_VF"}`:      "Placement",
		`{"physical_network": ["a"]}`:          "no text",
	} {
		_, err := ParseSpecs([]string{spec})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", spec, err, want)
		}
	}
}

func FuzzParseSpecs(f *testing.F) {
	for _, s := range []string{`{}`, `{"address": "*:0a:00.*"}`, `[{"devname": "a"}]`, `{"address": {"bus": "0[1-3]"}}`} {
		f.Add(s)
	}
	d := &novalet.PCIDevice{Address: "0000:03:10.0", Parent: "0000:03:00.0", ParentName: "ens1", VendorID: "8086", ProductID: "1520"}
	f.Fuzz(func(t *testing.T, text string) {
		specs, err := ParseSpecs([]string{text})
		if err != nil && specs != nil {
			t.Fatal("an error with a result")
		}
		for i := range specs {
			specs[i].fits(d, func(string) string { return "" })
		}
	})
}
