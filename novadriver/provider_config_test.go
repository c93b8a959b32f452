package novadriver

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet/novadriver/placement"
)

// providerFiles writes a folder of files by name.
func providerFiles(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// The first is the example of Nova's manual (doc/source/admin/managing-resource-providers.rst) in our words.
const providerSample = `
meta:
  schema_version: '1.0'
providers:
  - identification:
      name: node1
    inventories:
      additional:
        - CUSTOM_EXAMPLE_RESOURCE_CLASS:
            total: 100
            reserved: 0
            min_unit: 1
            max_unit: 10
            step_size: 1
            allocation_ratio: 1.5
        - CUSTOM_SHORT: {total: 3}
    traits:
      additional:
        - CUSTOM_EXAMPLE_TRAIT
    later_schemas: may have more
  - identification: {uuid: $COMPUTE_NODE}
    traits: {additional: [CUSTOM_ALL]}
  - identification: {name: adds-nothing}
`

func TestProviderConfigs(t *testing.T) {
	dir := providerFiles(t, map[string]string{"b.yaml": providerSample, "ignored.yml": "nonsense: [",
		"a.yaml": "meta: {schema_version: '1.7'}\nproviders: [{identification: {uuid: 5D1F7C1E-0000-4000-8000-000000000001}, traits: {additional: [CUSTOM_A]}}]\n"})
	got, err := ReadProviderConfigs(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []ProviderConfig{
		{File: "a.yaml", UUID: instUUID, Traits: []string{"CUSTOM_A"}, Inventories: map[string]placement.Inventory{}},
		{File: "b.yaml", Name: "node1", Traits: []string{"CUSTOM_EXAMPLE_TRAIT"}, Inventories: map[string]placement.Inventory{
			"CUSTOM_EXAMPLE_RESOURCE_CLASS": {Total: 100, MinUnit: 1, MaxUnit: 10, StepSize: 1, AllocationRatio: 1.5},
			"CUSTOM_SHORT":                  {Total: 3, MinUnit: 1, MaxUnit: 1<<31 - 1, StepSize: 1, AllocationRatio: 1}}},
		{File: "b.yaml", UUID: "$COMPUTE_NODE", Traits: []string{"CUSTOM_ALL"}, Inventories: map[string]placement.Inventory{}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("configs differ (-want +got):\n%s", diff)
	}
	for _, c := range []struct{ uuid, name, trait string }{
		{"other", "node1", "CUSTOM_EXAMPLE_TRAIT"}, {instUUID, "node2", "CUSTOM_A"}, {"other", "node2", "CUSTOM_ALL"},
	} {
		p, err := providerConfig(got, c.uuid, c.name)
		if err != nil || p == nil || p.Traits[0] != c.trait {
			t.Errorf("%s %s: %+v, %v; want %s", c.uuid, c.name, p, err, c.trait)
		}
	}
	if _, err := providerConfig(got, instUUID, "node1"); err == nil || !strings.Contains(err.Error(), "conflicts") {
		t.Errorf("one provider by name and by uuid: %v", err)
	}
	if p, err := providerConfig(nil, instUUID, "node1"); p != nil || err != nil {
		t.Errorf("without files: %+v, %v", p, err)
	}
	if got, err := ReadProviderConfigs(filepath.Join(dir, "none")); len(got) > 0 || err != nil {
		t.Errorf("without a folder: %v, %v", got, err)
	}
}

func TestProviderConfigErrors(t *testing.T) {
	const meta = "meta: {schema_version: '1.0'}\n"
	entry := func(s string) string { return meta + "providers:\n- identification: {name: n}\n  " + s + "\n" }
	for _, c := range []struct{ text, word string }{
		{"", "schema_version"},
		{"a: [", "yaml"},
		{"providers: []", "schema_version"},
		{"meta: {schema_version: 1.0}", "quotes"},
		{"meta: {schema_version: '2.0'}", "2.0 is not supported"},
		{meta + "providers: [{traits: {}}]", "identification"},
		{meta + "providers: [{identification: {}}]", "either uuid or name"},
		{meta + "providers: [{identification: {uuid: x, name: y}}]", "either uuid or name"},
		{meta + "providers: [{identification: {uuid: x}}]", `"x"`},
		{meta + "providers: [{identification: {name: ''}}]", "name"},
		{meta + "providers: [{identification: {host: h}}]", "either uuid or name"},
		{entry("traits: {additional: [HW_CPU_X86_AVX]}"), "HW_CPU_X86_AVX"},
		{entry("traits: {additional: [custom_x]}"), "custom_x"},
		{entry("traits: [CUSTOM_X]"), "line 4"},
		{entry("inventories: {additional: [{VCPU: {total: 1}}]}"), "VCPU"},
		{entry("inventories: {additional: [{CUSTOM_X: {reserved: 1}}]}"), "total"},
		{entry("inventories: {additional: [{CUSTOM_X: {total: many}}]}"), "many"},
		{entry("inventories: {additional: [{CUSTOM_X: {total: '1'}}]}"), "total"},
		{entry("inventories: {additional: [{CUSTOM_X: {total: 1.5}}]}"), "total"},
		{entry("inventories: {additional: [{CUSTOM_X: {total: 1, colour: 2}}]}"), "colour"},
		{meta + "providers: [{identification: {name: n}}, {identification: {name: n}}]", "already"},
	} {
		_, err := ReadProviderConfigs(providerFiles(t, map[string]string{"p.yaml": c.text}))
		if err == nil || !strings.Contains(err.Error(), c.word) || !strings.Contains(err.Error(), "p.yaml") {
			t.Errorf("%q: error %v, want one with %s", c.text, err, c.word)
		}
	}
}

func FuzzProviderConfig(f *testing.F) {
	f.Add([]byte(providerSample))
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := parseProviderConfig("p.yaml", text)
		if err != nil {
			return
		}
		for _, p := range list {
			for _, name := range slices.Concat(p.Traits, slices.Collect(maps.Keys(p.Inventories))) {
				if !strings.HasPrefix(name, "CUSTOM_") {
					t.Errorf("%q came through", name)
				}
			}
		}
	})
}

// The additions reach Placement with the host's own; a trait that is this program's own is refused at the start.
func TestProviderConfigApplied(t *testing.T) {
	all, err := ReadProviderConfigs(providerFiles(t, map[string]string{"p.yaml": providerSample}))
	if err != nil {
		t.Fatal(err)
	}
	b := started(t, "zed", func(o *Options) { o.Providers = all })
	w := b.provider.wanted()
	if w.Extra["CUSTOM_SHORT"].Total != 3 || !slices.Contains(w.Traits, "CUSTOM_EXAMPLE_TRAIT") || slices.Contains(w.Traits, "CUSTOM_ALL") || w.Classes["VCPU"].Total != 8 {
		t.Errorf("wanted %+v", w)
	}
	bad := newBench(t, "zed", func(o *Options) {
		o.Providers = []ProviderConfig{{File: "p.yaml", UUID: computeNode, Traits: []string{traitNovalet}}}
	})
	if err := bad.build().Start(bad.ctx()); err == nil || !strings.Contains(err.Error(), "p.yaml") || !strings.Contains(err.Error(), traitNovalet) {
		t.Errorf("our own trait: %v", err)
	}
}
