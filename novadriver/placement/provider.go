package placement

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/novalet/novalet"
)

// Class is what the host has of one resource class.
type Class struct {
	Total    int64 // 0 leaves the class out: Placement accepts no empty inventory
	Reserved int64
	// Ratio is the configured allocation ratio; nil keeps what Placement has, and starts with Initial.
	Ratio   *float64
	Initial float64
}

// Want describes the provider as it should be.
type Want struct {
	UUID string // the ComputeNode's
	Name string // hypervisor hostname
	// Classes by name: VCPU, MEMORY_MB, DISK_GB.
	Classes map[string]Class
	// Extra are classes that an operator adds, as they are to be. Custom classes are created.
	Extra map[string]Inventory
	// Traits the provider must have. Traits not known to this Placement are left out; CUSTOM_ ones are created.
	Traits []string
	// Managed are the traits that are taken away unless Traits names them. All others are left alone.
	Managed []string
}

// Inventory is one class as Placement has it.
type Inventory struct {
	Total           int64   `json:"total"`
	Reserved        int64   `json:"reserved"`
	MinUnit         int64   `json:"min_unit"`
	MaxUnit         int64   `json:"max_unit"`
	StepSize        int64   `json:"step_size"`
	AllocationRatio float64 `json:"allocation_ratio"`
}

// provider is what was last read or written.
type provider struct {
	uuid        string
	generation  int64
	inventories map[string]Inventory
	traits      map[string]bool
	supported   map[string]bool // traits asked for, by whether this Placement knows them
	read        time.Time
}

// Sync makes the provider what want says and returns the allocation ratio in force of each class. It sends nothing when
// all is as it should be and was looked at less than five minutes ago. It may be repeated. Errors: ErrTryAgain when
// Placement is away.
func (c *Client) Sync(ctx context.Context, want *Want) (map[string]float64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for range attempts {
		var ratios map[string]float64
		if ratios, err = c.sync(ctx, want); err == nil {
			return ratios, nil
		}
		c.known = nil // whatever went wrong, look again
		if !isConcurrent(err) && !errors.Is(err, novalet.ErrNotFound) {
			break
		}
	}
	return nil, fmt.Errorf("keep resource provider %s: %w", want.Name, err)
}

func (c *Client) sync(ctx context.Context, want *Want) (map[string]float64, error) {
	p := c.known
	if p == nil || p.uuid != want.UUID || c.now().Sub(p.read) > refreshAfter {
		var err error
		if p, err = c.load(ctx, want); err != nil {
			return nil, err
		}
		c.known = p
	}
	next, ratios := inventories(p.inventories, want.Classes)
	maps.Copy(next, want.Extra)
	if !maps.Equal(next, p.inventories) {
		if err := c.makeClasses(ctx, p, want.Extra); err != nil {
			return nil, err
		}
		if err := c.putInventories(ctx, p, next); err != nil {
			return nil, err
		}
	}
	if err := c.putTraits(ctx, p, want); err != nil {
		return nil, err
	}
	return ratios, nil
}

// load reads the provider, and makes it when there is none.
func (c *Client) load(ctx context.Context, want *Want) (*provider, error) {
	p := &provider{uuid: want.UUID, read: c.now(), traits: map[string]bool{}, supported: map[string]bool{}}
	var list struct {
		Providers []struct {
			UUID       string `json:"uuid"`
			Name       string `json:"name"`
			Generation int64  `json:"generation"`
		} `json:"resource_providers"`
	}
	if err := c.do(ctx, "GET", "/resource_providers?in_tree="+url.QueryEscape(want.UUID), "1.14", nil, &list); err != nil {
		return nil, err
	}
	found := false
	for _, r := range list.Providers {
		if r.UUID == want.UUID {
			p.generation, found = r.Generation, true
		}
	}
	if !found {
		return p, c.create(ctx, p, want)
	}
	var inv struct {
		Generation  int64                `json:"resource_provider_generation"`
		Inventories map[string]Inventory `json:"inventories"`
	}
	if err := c.do(ctx, "GET", p.path("/inventories"), "1.26", nil, &inv); err != nil {
		return nil, err
	}
	p.generation, p.inventories = inv.Generation, inv.Inventories
	var tr struct {
		Traits []string `json:"traits"`
	}
	if err := c.do(ctx, "GET", p.path("/traits"), "1.6", nil, &tr); err != nil {
		return nil, err
	}
	for _, t := range tr.Traits {
		p.traits[t] = true
	}
	return p, nil
}

func (c *Client) create(ctx context.Context, p *provider, want *Want) error {
	var made struct {
		Generation int64 `json:"generation"`
	}
	err := c.do(ctx, "POST", "/resource_providers", "1.20", map[string]string{"uuid": want.UUID, "name": want.Name}, &made)
	var conflict *conflictError
	if errors.As(err, &conflict) && strings.Contains(conflict.detail, "name") {
		return fmt.Errorf("another resource provider is already named %s: this host was registered before under another "+
			"compute_id; restore that file, or delete the old compute service and its provider: %w", want.Name, err)
	}
	if err != nil {
		return err
	}
	p.generation, p.inventories = made.Generation, map[string]Inventory{}
	c.log.Info("created resource provider", "provider", want.UUID, "name", want.Name)
	return nil
}

func (p *provider) path(rest string) string { return "/resource_providers/" + p.uuid + rest }

// inventories computes what the provider should have, and the ratios. Classes that are not ours go, as with Nova's own drivers
// (update_provider_tree says all that there is): what an operator adds stands in a provider config file, and goes with it.
func inventories(have map[string]Inventory, classes map[string]Class) (map[string]Inventory, map[string]float64) {
	next := map[string]Inventory{}
	ratios := map[string]float64{}
	for name, cl := range classes {
		old, there := have[name]
		ratio := cl.Initial
		switch {
		case cl.Ratio != nil:
			ratio = *cl.Ratio
		case there && old.AllocationRatio > 0:
			ratio = old.AllocationRatio
		}
		if ratio <= 0 {
			ratio = 1
		}
		ratios[name] = ratio
		if cl.Total <= 0 {
			continue
		}
		next[name] = Inventory{
			Total: cl.Total, Reserved: min(max(cl.Reserved, 0), cl.Total),
			MinUnit: 1, MaxUnit: cl.Total, StepSize: 1, AllocationRatio: ratio,
		}
	}
	return next, ratios
}

// makeClasses creates the custom classes that the provider does not have yet.
func (c *Client) makeClasses(ctx context.Context, p *provider, extra map[string]Inventory) error {
	for name := range extra {
		if _, has := p.inventories[name]; has || !strings.HasPrefix(name, "CUSTOM_") {
			continue
		}
		if err := c.do(ctx, "PUT", "/resource_classes/"+url.PathEscape(name), "1.7", nil, nil); err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) putInventories(ctx context.Context, p *provider, next map[string]Inventory) error {
	body := map[string]any{"resource_provider_generation": p.generation, "inventories": next}
	var got struct {
		Generation int64 `json:"resource_provider_generation"`
	}
	err := c.do(ctx, "PUT", p.path("/inventories"), "1.26", body, &got)
	var conflict *conflictError
	if errors.As(err, &conflict) && !conflict.concurrent() {
		// A class that instances hold cannot be taken away: keep it as it is.
		if kept := keepClasses(p.inventories, next); kept {
			body["inventories"] = next
			err = c.do(ctx, "PUT", p.path("/inventories"), "1.26", body, &got)
		}
	}
	if err != nil {
		return err
	}
	p.generation, p.inventories = got.Generation, next
	return nil
}

// keepClasses puts back the classes that next leaves out.
func keepClasses(have, next map[string]Inventory) bool {
	kept := false
	for name, inv := range have {
		if _, ok := next[name]; !ok {
			next[name], kept = inv, true
		}
	}
	return kept
}

// putTraits brings the traits of want that this Placement knows onto the provider.
func (c *Client) putTraits(ctx context.Context, p *provider, want *Want) error {
	if err := c.learnTraits(ctx, p, want.Traits); err != nil {
		return err
	}
	next := maps.Clone(p.traits)
	for _, t := range want.Managed {
		delete(next, t)
	}
	for _, t := range want.Traits {
		if p.supported[t] {
			next[t] = true
		}
	}
	if maps.Equal(next, p.traits) {
		return nil
	}
	return c.writeTraits(ctx, p, next)
}

func (c *Client) writeTraits(ctx context.Context, p *provider, next map[string]bool) error {
	var got struct {
		Generation int64 `json:"resource_provider_generation"`
	}
	body := map[string]any{"resource_provider_generation": p.generation, "traits": slices.Sorted(maps.Keys(next))}
	if err := c.do(ctx, "PUT", p.path("/traits"), "1.6", body, &got); err != nil {
		return err
	}
	p.generation, p.traits = got.Generation, next
	return nil
}

// learnTraits asks which of the traits this Placement knows, and creates the custom ones.
func (c *Client) learnTraits(ctx context.Context, p *provider, traits []string) error {
	var ask []string
	for _, t := range traits {
		if _, ok := p.supported[t]; ok {
			continue
		}
		if p.traits[t] {
			p.supported[t] = true
			continue
		}
		ask = append(ask, t)
	}
	if len(ask) == 0 {
		return nil
	}
	var got struct {
		Traits []string `json:"traits"`
	}
	if err := c.do(ctx, "GET", "/traits?name=in:"+url.QueryEscape(strings.Join(ask, ",")), "1.6", nil, &got); err != nil {
		return err
	}
	for _, t := range ask {
		p.supported[t] = slices.Contains(got.Traits, t)
		switch {
		case p.supported[t]:
		case strings.HasPrefix(t, "CUSTOM_"):
			if err := c.do(ctx, "PUT", "/traits/"+url.PathEscape(t), "1.6", nil, nil); err != nil {
				return err
			}
			p.supported[t] = true
		default:
			c.log.Info("this Placement does not know the trait", "trait", t)
		}
	}
	return nil
}

// HasTrait says whether this Placement knows a trait. Errors: ErrTryAgain.
func (c *Client) HasTrait(ctx context.Context, trait string) (bool, error) {
	var got struct {
		Traits []string `json:"traits"`
	}
	err := c.do(ctx, "GET", "/traits?name=in:"+url.QueryEscape(trait), "1.6", nil, &got)
	return slices.Contains(got.Traits, trait), err
}

// SetTrait puts one trait on the provider or takes it away, whatever else is there. It may be repeated. Errors:
// ErrNotFound without the provider, ErrTryAgain.
func (c *Client) SetTrait(ctx context.Context, uuid, trait string, on bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for range attempts {
		p := &provider{uuid: uuid}
		var got struct {
			Generation int64    `json:"resource_provider_generation"`
			Traits     []string `json:"traits"`
		}
		if err = c.do(ctx, "GET", p.path("/traits"), "1.6", nil, &got); err != nil {
			break
		}
		p.generation, p.traits = got.Generation, map[string]bool{}
		for _, t := range got.Traits {
			p.traits[t] = true
		}
		if p.traits[trait] != on {
			next := maps.Clone(p.traits)
			if next[trait] = true; !on {
				delete(next, trait)
			}
			if err = c.writeTraits(ctx, p, next); isConcurrent(err) {
				continue
			}
		}
		if err == nil && c.known != nil && c.known.uuid == uuid {
			c.known.generation, c.known.traits = p.generation, p.traits
		}
		break
	}
	if err != nil {
		return fmt.Errorf("set trait %s of provider %s to %v: %w", trait, uuid, on, err)
	}
	return nil
}
