package novadriver

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/novalet/novalet/novadriver/placement"
)

// computeNode stands in a provider config for every node that is not named itself.
const computeNode = "$COMPUTE_NODE"

// maxProviderConfig bounds a file, in bytes.
const maxProviderConfig = 1 << 20

// ProviderConfig is what an operator adds to a resource provider (nova/compute/provider_config.py, schema 1.0).
type ProviderConfig struct {
	File string // base name, for messages
	// UUID or Name tell the provider; UUID may be "$COMPUTE_NODE".
	UUID, Name  string
	Traits      []string
	Inventories map[string]placement.Inventory
}

func (p *ProviderConfig) id() string {
	if p.UUID != "" {
		return p.UUID
	}
	return p.Name
}

// customName is what Placement takes as the name of a trait or a class that is not its own.
var customName = regexp.MustCompile(`^CUSTOM_[A-Z0-9_]{1,248}$`)

var schemaVersion = regexp.MustCompile(`^([0-9]+)\.([0-9]+)$`)

// ReadProviderConfigs reads the *.yaml files of a folder in the order of their names. Without the folder there are none.
// The error names file and place. Entries that add nothing are left out.
func ReadProviderConfigs(dir string) ([]ProviderConfig, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	var all []ProviderConfig
	seen := map[string]string{}
	for _, path := range paths {
		list, err := readProviderConfig(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, p := range list {
			if other, ok := seen[p.id()]; ok {
				return nil, fmt.Errorf("%s: provider %s is defined in %s already", path, p.id(), other)
			}
			seen[p.id()] = p.File
			if len(p.Traits) > 0 || len(p.Inventories) > 0 {
				all = append(all, p)
			}
		}
	}
	return all, nil
}

// providerFile is a file as far as it is read; what is unknown on these levels is left to later schemas.
type providerFile struct {
	Meta *struct {
		Version yaml.Node `yaml:"schema_version"`
	} `yaml:"meta"`
	Providers []struct {
		Identification map[string]string `yaml:"identification"`
		Inventories    struct {
			Additional []map[string]map[string]yaml.Node `yaml:"additional"`
		} `yaml:"inventories"`
		Traits struct {
			Additional []string `yaml:"additional"`
		} `yaml:"traits"`
	} `yaml:"providers"`
}

func readProviderConfig(path string) ([]ProviderConfig, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxProviderConfig {
		return nil, fmt.Errorf("larger than %d bytes", maxProviderConfig)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseProviderConfig(filepath.Base(path), text)
}

func parseProviderConfig(file string, text []byte) ([]ProviderConfig, error) {
	var f providerFile
	if err := yaml.Unmarshal(text, &f); err != nil {
		return nil, err
	}
	if f.Meta == nil {
		return nil, errors.New("meta.schema_version is missing")
	}
	v := schemaVersion.FindStringSubmatch(f.Meta.Version.Value)
	if v == nil || f.Meta.Version.Tag != "!!str" {
		return nil, errors.New(`meta.schema_version: want a text such as '1.0', in quotes`)
	}
	if v[1] != "1" {
		return nil, fmt.Errorf("meta.schema_version: %s is not supported, 1.0 is", f.Meta.Version.Value)
	}
	var out []ProviderConfig
	for i, p := range f.Providers {
		c := ProviderConfig{File: file, Traits: p.Traits.Additional}
		if err := c.identify(p.Identification); err != nil {
			return nil, fmt.Errorf("providers[%d]: identification: %w", i, err)
		}
		for _, t := range c.Traits {
			if !customName.MatchString(t) {
				return nil, fmt.Errorf("providers[%d]: traits: %q is no custom trait (CUSTOM_…)", i, t)
			}
		}
		var err error
		if c.Inventories, err = readInventories(p.Inventories.Additional); err != nil {
			return nil, fmt.Errorf("providers[%d]: inventories: %w", i, err)
		}
		out = append(out, c)
	}
	return out, nil
}

func (p *ProviderConfig) identify(id map[string]string) error {
	uuid, hasUUID := id["uuid"]
	name, hasName := id["name"]
	switch {
	case len(id) != 1 || hasUUID == hasName:
		return errors.New("want either uuid or name")
	case hasName && (name == "" || len(name) > 200):
		return errors.New("name: want 1 to 200 characters")
	case hasUUID && uuid != computeNode && !isUUID(strings.ToLower(uuid)):
		return fmt.Errorf("uuid: %q is neither one nor %s", uuid, computeNode)
	}
	if p.UUID, p.Name = uuid, name; uuid != computeNode {
		p.UUID = strings.ToLower(uuid)
	}
	return nil
}

// readInventories joins the list of maps into one; what is left out has Placement's defaults.
func readInventories(list []map[string]map[string]yaml.Node) (map[string]placement.Inventory, error) {
	out := map[string]placement.Inventory{}
	for _, m := range list {
		for class, fields := range m {
			if !customName.MatchString(class) {
				return nil, fmt.Errorf("%q is no custom resource class (CUSTOM_…)", class)
			}
			inv := placement.Inventory{MinUnit: 1, MaxUnit: 1<<31 - 1, StepSize: 1, AllocationRatio: 1}
			if _, ok := fields["total"]; !ok {
				return nil, fmt.Errorf("%s: total is missing", class)
			}
			ints := map[string]*int64{"total": &inv.Total, "reserved": &inv.Reserved, "min_unit": &inv.MinUnit, "max_unit": &inv.MaxUnit, "step_size": &inv.StepSize}
			for _, name := range slices.Sorted(maps.Keys(fields)) {
				node := fields[name]
				var err error
				switch dst := ints[name]; {
				case dst != nil:
					*dst, err = strconv.ParseInt(node.Value, 10, 64)
				case name == "allocation_ratio":
					inv.AllocationRatio, err = strconv.ParseFloat(node.Value, 64)
				default:
					return nil, fmt.Errorf("line %d: %s has no %q", node.Line, class, name)
				}
				if err != nil || node.Tag == "!!str" {
					return nil, fmt.Errorf("line %d: %s of %s: %q is no number", node.Line, name, class, node.Value)
				}
			}
			out[class] = inv
		}
	}
	return out, nil
}

// providerConfig finds what is added to a provider: under its own uuid or name, else what is for every node.
func providerConfig(list []ProviderConfig, uuid, name string) (*ProviderConfig, error) {
	var own, every *ProviderConfig
	for i := range list {
		p := &list[i]
		switch {
		case p.UUID == computeNode:
			every = p
		case p.UUID == uuid && uuid != "", p.Name == name && name != "":
			if own != nil {
				return nil, fmt.Errorf("provider config %s conflicts with %s: the provider is named by both name %s and uuid %s", p.File, own.File, name, uuid)
			}
			own = p
		}
	}
	if own == nil {
		own = every
	}
	return own, nil
}
