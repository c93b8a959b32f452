package glancebridge

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

const (
	// findPage is how many records are asked for at a time; Glance gives fewer where its api_limit_max is lower.
	findPage = 100
	// maxFound bounds a listing, so that a service that goes round in a circle ends it.
	maxFound = 10_000
)

// matches reports whether the image belongs to a project, "" for any, and has all the properties.
func (r *ImageRecord) matches(owner string, properties map[string]string) bool {
	if owner != "" && r.Owner != owner {
		return false
	}
	for k, v := range properties {
		if have, ok := r.Properties[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// Find implements Glance. It follows the pages by the id of the last image of each.
func (g *glanceClient) Find(ctx context.Context, rc novalet.RequestContext, owner string, properties map[string]string) ([]ImageRecord, error) {
	q := url.Values{"limit": {strconv.Itoa(findPage)}, "sort_key": {"created_at"}, "sort_dir": {"desc"}}
	if owner != "" {
		q.Set("owner", owner)
	}
	for k, v := range properties {
		q.Set(k, v)
	}
	var out []ImageRecord
	err := g.each(ctx, rc, func(c *gophercloud.ServiceClient, base string) error {
		out = nil
		seen := map[string]bool{}
		q.Del("marker")
		for {
			page, more, err := findOnce(ctx, c, base, q)
			if err != nil {
				return err
			}
			last := ""
			for i := range page {
				last = page[i].ID
				if seen[last] {
					return fmt.Errorf("list images: Glance gives image %s on two pages", last)
				}
				seen[last] = true
				// Glance reads some values as operators (in:, like:); what is wanted is this very value.
				if page[i].matches(owner, properties) {
					out = append(out, page[i])
				}
			}
			if !more || last == "" {
				return nil
			}
			if len(seen) >= maxFound {
				return fmt.Errorf("list images: more than %d of one kind", maxFound)
			}
			q.Set("marker", last)
		}
	})
	return out, err
}

// findOnce reads one page, and whether there are more.
func findOnce(ctx context.Context, c *gophercloud.ServiceClient, base string, q url.Values) (page []ImageRecord, more bool, err error) {
	req, err := newRequest(ctx, http.MethodGet, base+"images?"+q.Encode(), nil)
	if err != nil {
		return nil, false, err
	}
	resp, err := call(c, req, "list images", http.StatusOK)
	if err != nil {
		return nil, false, err
	}
	defer resp.Body.Close()
	var doc struct {
		Images []map[string]any `json:"images"`
		Next   string           `json:"next"`
	}
	dec := json.NewDecoder(io.LimitReader(resp.Body, 64<<20))
	dec.UseNumber()
	if err := dec.Decode(&doc); err != nil {
		return nil, false, fmt.Errorf("%w: list images: decode: %w", novalet.ErrTryAgain, err)
	}
	for _, raw := range doc.Images {
		page = append(page, *recordOf(raw))
	}
	return page, doc.Next != "", nil
}
