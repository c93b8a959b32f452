package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

// noRange is the answer of Glance with a store that cannot begin in the middle (StoreRandomGetNotSupported).
const noRange = http.StatusBadRequest

// Download implements Glance.
func (g *glanceClient) Download(ctx context.Context, rc novalet.RequestContext, id string, off int64) (io.ReadCloser, int64, error) {
	var body io.ReadCloser
	start := int64(0)
	err := g.each(ctx, rc, func(c *gophercloud.ServiceClient, base string) error {
		resp, err := getData(ctx, c, base, id, off, 0)
		var ge *GlanceError
		if off > 0 && errors.As(err, &ge) && ge.Status == noRange {
			resp, err = getData(ctx, c, base, id, 0, 0)
		}
		if err != nil {
			return err
		}
		if resp.StatusCode == http.StatusPartialContent {
			if start, err = rangeStart(resp.Header.Get("Content-Range")); err != nil {
				resp.Body.Close()
				return err
			}
		}
		body = resp.Body
		return nil
	})
	return body, start, err
}

// Range implements Glance.
func (g *glanceClient) Range(ctx context.Context, rc novalet.RequestContext, id string, off, n int64) (io.ReadCloser, error) {
	var body io.ReadCloser
	err := g.each(ctx, rc, func(c *gophercloud.ServiceClient, base string) error {
		resp, err := getData(ctx, c, base, id, off, n)
		var ge *GlanceError
		if errors.As(err, &ge) && ge.Status == noRange {
			return errNoRange
		}
		if err != nil {
			return err
		}
		start := int64(0)
		if resp.StatusCode == http.StatusPartialContent {
			start, err = rangeStart(resp.Header.Get("Content-Range"))
		} else {
			err = errNoRange
		}
		if err == nil && start != off {
			err = fmt.Errorf("download image: asked for offset %d, got %d", off, start)
		}
		if err != nil {
			resp.Body.Close()
			return err
		}
		body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, n), resp.Body}
		return nil
	})
	return body, err
}

// getData asks for n bytes at an offset, n 0 for all that follow.
func getData(ctx context.Context, c *gophercloud.ServiceClient, base, id string, off, n int64) (*http.Response, error) {
	req, err := newRequest(ctx, http.MethodGet, base+"images/"+url.PathEscape(id)+"/file", nil)
	if err != nil {
		return nil, err
	}
	switch {
	case n > 0:
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	case off > 0:
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", off))
	}
	resp, err := call(c, req, "download image", http.StatusOK, http.StatusPartialContent, http.StatusNoContent)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusNoContent {
		resp.Body.Close()
		return nil, &GlanceError{Verb: "download image", Status: resp.StatusCode, Text: "the image has no data"}
	}
	return resp, nil
}

// rangeStart reads the first offset of "bytes a-b/size".
func rangeStart(s string) (int64, error) {
	v, ok := strings.CutPrefix(s, "bytes ")
	a, _, ok2 := strings.Cut(v, "-")
	n, err := strconv.ParseInt(a, 10, 64)
	if !ok || !ok2 || err != nil || n < 0 {
		return 0, fmt.Errorf("download image: the answer has the range %q", cut(s))
	}
	return n, nil
}
