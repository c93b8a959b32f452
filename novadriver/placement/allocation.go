package placement

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"

	"github.com/novalet/novalet"
)

// allocation is what a consumer holds, as Placement has it at 1.28: unknown keys of the inner parts are kept.
type allocation struct {
	Allocations        map[string]json.RawMessage `json:"allocations"`
	ProjectID          string                     `json:"project_id,omitempty"`
	UserID             string                     `json:"user_id,omitempty"`
	ConsumerGeneration *int64                     `json:"consumer_generation"`
}

func consumerPath(uuid string) string { return "/allocations/" + url.PathEscape(uuid) }

// DeleteAllocation implements novalet.Placement.
func (c *Client) DeleteAllocation(ctx context.Context, instanceUUID string) error {
	err := c.do(ctx, "DELETE", consumerPath(instanceUUID), "", nil, nil)
	if err != nil && !errors.Is(err, novalet.ErrNotFound) {
		return fmt.Errorf("delete the allocation of %s: %w", instanceUUID, err)
	}
	return nil
}

func (c *Client) allocation(ctx context.Context, consumer string) (*allocation, error) {
	a := &allocation{}
	if err := c.do(ctx, "GET", consumerPath(consumer), "1.28", nil, a); err != nil {
		return nil, err
	}
	for id, raw := range a.Allocations {
		// What is read has a "generation" that a write may not have.
		var m map[string]json.RawMessage
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, fmt.Errorf("read the allocation of %s on %s: %w", consumer, id, err)
		}
		delete(m, "generation")
		b, err := json.Marshal(m)
		if err != nil {
			return nil, err
		}
		a.Allocations[id] = b
	}
	return a, nil
}

// RemoveFromAllocation takes one provider out of what a consumer holds: what an evacuated instance still had on the
// host it left. Nil when it holds nothing there. Errors: ErrTryAgain.
func (c *Client) RemoveFromAllocation(ctx context.Context, consumer, providerUUID string) error {
	var err error
	for range attempts {
		var a *allocation
		if a, err = c.allocation(ctx, consumer); err != nil {
			break
		}
		if _, held := a.Allocations[providerUUID]; !held {
			return nil
		}
		delete(a.Allocations, providerUUID)
		if len(a.Allocations) == 0 {
			return c.DeleteAllocation(ctx, consumer)
		}
		if err = c.do(ctx, "PUT", consumerPath(consumer), "1.28", a, nil); err == nil || !isConcurrent(err) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("take provider %s out of the allocation of %s: %w", providerUUID, consumer, err)
	}
	return nil
}

// MoveAllocation gives to one consumer all that another holds, in place of what it has: how a resize that came to
// nothing gives the instance back what its migration holds. Nil when from holds nothing. Errors: ErrTryAgain.
func (c *Client) MoveAllocation(ctx context.Context, from, to string) error {
	var err error
	for range attempts {
		var src, dst *allocation
		if src, err = c.allocation(ctx, from); err != nil {
			break
		}
		if len(src.Allocations) == 0 {
			return nil
		}
		if dst, err = c.allocation(ctx, to); err != nil {
			break
		}
		body := map[string]any{
			from: map[string]any{
				"allocations": map[string]any{}, "project_id": src.ProjectID, "user_id": src.UserID,
				"consumer_generation": src.ConsumerGeneration,
			},
			to: map[string]any{
				"allocations": src.Allocations, "project_id": src.ProjectID, "user_id": src.UserID,
				"consumer_generation": dst.ConsumerGeneration,
			},
		}
		if err = c.do(ctx, "POST", "/allocations", "1.28", body, nil); err == nil || !isConcurrent(err) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("move the allocation of %s to %s: %w", from, to, err)
	}
	return nil
}

// Consumers lists who holds resources of a provider. Errors: ErrNotFound, ErrTryAgain.
func (c *Client) Consumers(ctx context.Context, providerUUID string) ([]string, error) {
	var got struct {
		Allocations map[string]json.RawMessage `json:"allocations"`
	}
	if err := c.do(ctx, "GET", "/resource_providers/"+url.PathEscape(providerUUID)+"/allocations", "", nil, &got); err != nil {
		return nil, fmt.Errorf("list the consumers of provider %s: %w", providerUUID, err)
	}
	out := make([]string, 0, len(got.Allocations))
	for id := range got.Allocations {
		out = append(out, id)
	}
	return out, nil
}
