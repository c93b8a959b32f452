package glancebridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

// Cloud gives clients of an OpenStack service whose transport sends and renews the tokens. internal/keystone's Session
// is one. The transport must not send a body again that it cannot rewind, and must end a request with its context.
type Cloud interface {
	// Client acts as the service user, UserClient as the user whose token the context holds.
	Client(ctx context.Context, serviceType string) (*gophercloud.ServiceClient, error)
	UserClient(ctx context.Context, rc novalet.RequestContext, serviceType string) (*gophercloud.ServiceClient, error)
}

// glanceClient speaks Glance's API v2.
type glanceClient struct{ cloud Cloud }

// NewGlance returns the image service of a cloud. It reads and writes with the user's token; when there is none, or it
// is no longer accepted (401), with the service credentials: the API has checked the user's right before it sent the
// request here.
func NewGlance(c Cloud) Glance { return &glanceClient{c} }

// each calls f with the user's client, then the service's. f must not have had an effect when it gives a 401.
func (g *glanceClient) each(ctx context.Context, rc novalet.RequestContext, f func(c *gophercloud.ServiceClient, base string) error) error {
	if rc.AuthToken != "" {
		c, err := g.cloud.UserClient(ctx, rc, "image")
		if err != nil {
			return err
		}
		err = f(c, imageBase(c.Endpoint))
		var ge *GlanceError
		if !errors.As(err, &ge) || ge.Status != http.StatusUnauthorized {
			return err
		}
	}
	c, err := g.cloud.Client(ctx, "image")
	if err != nil {
		return err
	}
	return f(c, imageBase(c.Endpoint))
}

// imageBase is the root of API v2; catalogs have it with and without the version.
func imageBase(endpoint string) string {
	e := strings.TrimSuffix(endpoint, "/")
	if i := strings.LastIndexByte(e, '/'); i >= 0 && strings.HasPrefix(e[i:], "/v2") {
		return e + "/"
	}
	return e + "/v2/"
}

// call sends one request and sorts the answer. The body is the caller's to close unless there is an error.
func call(c *gophercloud.ServiceClient, req *http.Request, verb string, ok ...int) (*http.Response, error) {
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := c.HTTPClient.Do(req)
	if err != nil {
		return nil, callError(req.Context(), verb, err)
	}
	for _, s := range ok {
		if resp.StatusCode == s {
			return resp, nil
		}
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusNotFound, http.StatusGone:
		return nil, fmt.Errorf("%s: %w", verb, novalet.ErrNotFound)
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout,
		http.StatusInternalServerError:
		return nil, fmt.Errorf("%w: %s: Glance answers %d", novalet.ErrTryAgain, verb, resp.StatusCode)
	}
	return nil, &GlanceError{Verb: verb, Status: resp.StatusCode, Text: plain(string(text))}
}

func callError(ctx context.Context, verb string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // its text has the address, which is in the log of the transport
	}
	if errors.Is(err, novalet.ErrTryAgain) {
		return fmt.Errorf("%s: %w", verb, err)
	}
	return fmt.Errorf("%w: %s: %w", novalet.ErrTryAgain, verb, err)
}

// plain takes the text out of Glance's HTML error pages.
func plain(s string) string {
	var b strings.Builder
	tag := false
	for _, r := range s {
		switch {
		case r == '<':
			tag = true
		case r == '>':
			tag = false
			b.WriteByte(' ')
		case !tag:
			b.WriteRune(r)
		}
	}
	return cut(strings.Join(strings.Fields(b.String()), " "))
}

func newRequest(ctx context.Context, method, url string, body io.Reader) (*http.Request, error) {
	return http.NewRequestWithContext(ctx, method, url, body)
}

// Get implements Glance.
func (g *glanceClient) Get(ctx context.Context, rc novalet.RequestContext, id string) (*ImageRecord, error) {
	var rec *ImageRecord
	err := g.each(ctx, rc, func(c *gophercloud.ServiceClient, base string) (err error) {
		rec, err = readRecord(ctx, c, base, id)
		return err
	})
	return rec, err
}

// Readable implements Glance.
func (g *glanceClient) Readable(ctx context.Context, rc novalet.RequestContext, id string) (*ImageRecord, error) {
	if rc.AuthToken == "" {
		return nil, fmt.Errorf("read image as the user: no token: %w", novalet.ErrNotFound)
	}
	c, err := g.cloud.UserClient(ctx, rc, "image")
	if err != nil {
		return nil, err
	}
	rec, err := readRecord(ctx, c, imageBase(c.Endpoint), id)
	var ge *GlanceError
	if errors.As(err, &ge) && (ge.Status == http.StatusUnauthorized || ge.Status == http.StatusForbidden) {
		return nil, fmt.Errorf("read image as the user: %w", novalet.ErrNotFound)
	}
	return rec, err
}

func readRecord(ctx context.Context, c *gophercloud.ServiceClient, base, id string) (*ImageRecord, error) {
	req, err := newRequest(ctx, http.MethodGet, base+"images/"+url.PathEscape(id), nil)
	if err != nil {
		return nil, err
	}
	resp, err := call(c, req, "read image", http.StatusOK)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var raw map[string]any
	dec := json.NewDecoder(io.LimitReader(resp.Body, 4<<20))
	dec.UseNumber()
	if err := dec.Decode(&raw); err != nil {
		return nil, fmt.Errorf("%w: read image: decode: %w", novalet.ErrTryAgain, err)
	}
	return recordOf(raw), nil
}

// baseFields are members of Glance's record that are no properties.
var baseFields = map[string]bool{"id": true, "name": true, "status": true, "size": true, "disk_format": true,
	"container_format": true, "min_disk": true, "min_ram": true, "owner": true, "checksum": true, "os_hash_algo": true,
	"os_hash_value": true, "stores": true, "self": true, "file": true, "schema": true, "tags": true, "visibility": true,
	"protected": true, "os_hidden": true, "created_at": true, "updated_at": true, "virtual_size": true, "locations": true,
	"direct_url": true}

func recordOf(raw map[string]any) *ImageRecord {
	text := func(k string) string { s, _ := raw[k].(string); return s }
	number := func(k string) int64 {
		n, _ := raw[k].(json.Number)
		i, _ := n.Int64()
		return i
	}
	r := &ImageRecord{ImageMeta: novalet.ImageMeta{ID: text("id"), Name: text("name"), Status: text("status"),
		Size: number("size"), DiskFormat: text("disk_format"), ContainerFormat: text("container_format"),
		MinDiskGB: number("min_disk"), MinRAMMB: number("min_ram"), Owner: text("owner"), Properties: map[string]string{}},
		Checksum: text("checksum"), HashAlgo: text("os_hash_algo"), HashValue: text("os_hash_value"), Stores: text("stores"),
		VirtualSize: number("virtual_size"), Visibility: text("visibility")}
	// Glance writes 2026-11-28T04:27:42Z.
	if at, err := time.Parse(time.RFC3339, text("created_at")); err == nil {
		r.CreatedAt = at
	}
	for k, v := range raw {
		if s, ok := v.(string); ok && !baseFields[k] {
			r.Properties[k] = s
		}
	}
	return r
}

// Update implements Glance. It sends one PATCH (openstack-images-v2.1-json-patch), which Glance applies whole or not.
func (g *glanceClient) Update(ctx context.Context, rc novalet.RequestContext, id string, u ImageUpdate) error {
	have, err := g.Get(ctx, rc, id)
	if err != nil {
		return err
	}
	type op struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value"`
	}
	ops := []op{}
	set := func(k string, v any) { ops = append(ops, op{"replace", "/" + k, v}) }
	if u.ContainerFormat != "" {
		set("container_format", u.ContainerFormat)
	}
	if u.DiskFormat != "" {
		set("disk_format", u.DiskFormat)
	}
	if u.MinDiskGB > 0 {
		set("min_disk", u.MinDiskGB)
	}
	for k, v := range u.Properties {
		o := op{"add", "/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(k), v}
		if _, ok := have.Properties[k]; ok {
			o.Op = "replace"
		}
		ops = append(ops, o)
	}
	if len(ops) == 0 {
		return nil
	}
	b, err := json.Marshal(ops)
	if err != nil {
		return err
	}
	return g.each(ctx, rc, func(c *gophercloud.ServiceClient, base string) error {
		req, err := newRequest(ctx, http.MethodPatch, base+"images/"+url.PathEscape(id), strings.NewReader(string(b)))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/openstack-images-v2.1-json-patch")
		resp, err := call(c, req, "update image", http.StatusOK)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
}

// Upload implements Glance. The body is sent by net/http itself and by one client only: gophercloud was seen to report
// success for images cut by a repeated request, so a token that has expired costs a further try by the caller.
func (g *glanceClient) Upload(ctx context.Context, rc novalet.RequestContext, id string, body io.Reader) error {
	// A request without effect settles which client is accepted, before the first byte is on the way.
	var c *gophercloud.ServiceClient
	var base string
	err := g.each(ctx, rc, func(sc *gophercloud.ServiceClient, b string) error {
		req, err := newRequest(ctx, http.MethodGet, b+"images/"+url.PathEscape(id), nil)
		if err != nil {
			return err
		}
		resp, err := call(sc, req, "read image", http.StatusOK)
		if err != nil {
			return err
		}
		c, base = sc, b
		return resp.Body.Close()
	})
	if err != nil {
		return err
	}
	// Hiding the type keeps net/http from learning how to rewind it.
	req, err := newRequest(ctx, http.MethodPut, base+"images/"+url.PathEscape(id)+"/file", struct{ io.Reader }{body})
	if err != nil {
		return err
	}
	// In chunks, without a length, as Nova itself sends: servers take a body that ends before its length for a whole one,
	// but not one that lacks its last chunk.
	req.ContentLength = -1
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := call(c, req, "upload image", http.StatusNoContent)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Delete implements Glance.
func (g *glanceClient) Delete(ctx context.Context, rc novalet.RequestContext, id string) error {
	return g.each(ctx, rc, func(c *gophercloud.ServiceClient, base string) error {
		req, err := newRequest(ctx, http.MethodDelete, base+"images/"+url.PathEscape(id), nil)
		if err != nil {
			return err
		}
		resp, err := call(c, req, "delete image", http.StatusNoContent)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
}
