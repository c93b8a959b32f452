package placement

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

// refreshAfter is how old what we know of the provider may be before it is read again
// (resource_provider_association_refresh).
const refreshAfter = 5 * time.Minute

// attempts is how often a write is tried when somebody else wrote in between, as stock does.
const attempts = 4

// maxBody bounds an answer.
const maxBody = 16 << 20

// Service gives a client of the placement service with a valid token, such as keystone.Session.Client.
type Service func(ctx context.Context) (*gophercloud.ServiceClient, error)

// Client speaks to Placement. It is safe for concurrent use.
type Client struct {
	service Service
	log     *slog.Logger
	now     func() time.Time

	mu    sync.Mutex // held over Sync and SetTrait: the provider has one writer here
	known *provider
}

var _ novalet.Placement = (*Client)(nil)

// New makes a client. It does not connect. A nil logger logs nothing.
func New(service Service, logger *slog.Logger) *Client {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &Client{service: service, log: logger, now: time.Now}
}

// conflictError is a 409.
type conflictError struct {
	code   string // placement.concurrent_update, placement.inventory.inuse, …
	detail string
}

func (e *conflictError) Error() string { return "conflict: " + e.detail }

// concurrent: somebody wrote since we read; reading again helps. Old versions send no code.
func (e *conflictError) concurrent() bool {
	return e.code == "placement.concurrent_update" || e.code == "" && strings.Contains(e.detail, "generation conflict")
}

// isConcurrent reports whether err is such a conflict.
func isConcurrent(err error) bool {
	var c *conflictError
	return errors.As(err, &c) && c.concurrent()
}

// do sends one request and decodes the answer into out (unless nil). Errors: ErrNotFound for 404, *conflictError for
// 409, ErrTryAgain when Placement cannot be reached or fails, else the status with Placement's own words.
func (c *Client) do(ctx context.Context, method, path, version string, in, out any) error {
	sc, err := c.service(ctx)
	if err != nil {
		return fmt.Errorf("%s placement %s: %w", method, path, err)
	}
	o := &gophercloud.RequestOpts{
		KeepResponseBody: true,
		OkCodes:          []int{200, 201, 202, 204, 400, 401, 403, 404, 409, 413, 429, 500, 501, 502, 503, 504},
		MoreHeaders:      map[string]string{"Accept": "application/json"},
	}
	if version != "" {
		o.MoreHeaders["OpenStack-API-Version"] = "placement " + version
	}
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode %s %s: %w", method, path, err)
		}
		// A raw body can be sent again after a renewed token.
		o.RawBody = bytes.NewReader(b)
		o.MoreHeaders["Content-Type"] = "application/json"
	}
	resp, err := sc.Request(ctx, method, strings.TrimRight(sc.Endpoint, "/")+path, o)
	if err != nil {
		return fmt.Errorf("%s placement %s: %w", method, path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("%w: %s placement %s: %w", novalet.ErrTryAgain, method, path, err)
	}
	switch s := resp.StatusCode; {
	case s == http.StatusNotFound:
		return fmt.Errorf("%s placement %s: %w", method, path, novalet.ErrNotFound)
	case s == http.StatusConflict:
		code, detail := errorText(body)
		return fmt.Errorf("%s placement %s: %w", method, path, &conflictError{code, detail})
	case s >= 500 || s == http.StatusTooManyRequests:
		_, detail := errorText(body)
		return fmt.Errorf("%w: %s placement %s: status %d: %s", novalet.ErrTryAgain, method, path, s, detail)
	case s >= 400:
		_, detail := errorText(body)
		return fmt.Errorf("%s placement %s: status %d: %s", method, path, s, detail)
	}
	if out == nil || len(bytes.TrimSpace(body)) == 0 {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("%s placement %s: read the answer: %w", method, path, err)
	}
	return nil
}

// errorText takes code and detail from Placement's error document.
func errorText(body []byte) (code, detail string) {
	var doc struct {
		Errors []struct {
			Code   string `json:"code"`
			Detail string `json:"detail"`
			Title  string `json:"title"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) == nil && len(doc.Errors) > 0 {
		e := doc.Errors[0]
		if e.Detail == "" {
			e.Detail = e.Title
		}
		return e.Code, clip(strings.TrimSpace(e.Detail))
	}
	return "", clip(string(body))
}

func clip(s string) string {
	if len(s) > 300 {
		return s[:300] + "…"
	}
	return s
}
