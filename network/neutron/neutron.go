// Package neutron serves novalet.NetworkAPI from OpenStack Neutron: it makes, binds and frees the ports of instances
// and turns what Neutron says of them into Nova's network_info.
//
// It asks as little as it can: networks, subnets and extensions are kept for a minute, ports are made and bound in one
// request where the policy lets the agent's user do so (Neutron's default policy for an administrator), and several
// in one bulk request. What a user may see and choose is still asked with the user's own token.
//
// It starts no goroutine that outlives a call and keeps nothing on disk.
package neutron

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/keystone"
)

// Options of the API.
type Options struct {
	// Session logs in as the user of nova.conf's [neutron] section. Its ServiceUser, if any, accompanies user tokens.
	Session *keystone.Session
	// Host is what ports are bound to: the name under which the L2 agent or OVN chassis of this machine is registered.
	Host string
	// OVSBridge is [neutron] ovs_bridge, default br-int.
	OVSBridge string
	// CacheTTL is how long networks and subnets are believed; default 60 s.
	CacheTTL time.Duration
	// Logger; default slog.Default.
	Logger *slog.Logger
}

// API is a client of one Neutron, safe for concurrent use.
type API struct {
	o   Options
	log *slog.Logger

	visible  *cache[*network] // key project/network: what the project's users see
	networks *cache[*network] // key network: with the provider attributes
	ipam     *cache[*ipam]    // key network
	exts     *cache[map[string]bool]
	known    known

	// bindInPost is what is known of the policy: may ports of another project be created bound?
	bindInPost atomic.Int32
}

// The values of bindInPost.
const (
	bindUnknown int32 = iota
	bindAllowed
	bindForbidden
)

var _ novalet.NetworkAPI = (*API)(nil)

// New makes a client. It does not connect.
func New(o Options) (*API, error) {
	if o.Session == nil {
		return nil, errors.New("make neutron client: no session")
	}
	if o.Host == "" {
		return nil, errors.New("make neutron client: no host name")
	}
	if o.OVSBridge == "" {
		o.OVSBridge = "br-int"
	}
	if o.CacheTTL <= 0 {
		o.CacheTTL = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &API{
		o: o, log: o.Logger,
		visible:  newCache[*network](o.CacheTTL),
		networks: newCache[*network](o.CacheTTL),
		ipam:     newCache[*ipam](o.CacheTTL),
		exts:     newCache[map[string]bool](10 * o.CacheTTL),
	}, nil
}

// Invalidate forgets what is known of a network and its subnets, or of all when id is "". Call it when Neutron
// reports a change.
func (a *API) Invalidate(networkID string) {
	a.ipam.forget(networkID)
	a.networks.forget(networkID)
	a.visible.forgetSuffix("/", networkID)
}

// caller sends requests as one user.
type caller struct {
	sc *gophercloud.ServiceClient
	// user: it carries the requester's token, not the agent's.
	user bool
}

func (a *API) admin(ctx context.Context) (*caller, error) {
	sc, err := a.o.Session.Client(ctx, "network")
	if err != nil {
		return nil, err
	}
	return &caller{sc: sc}, nil
}

// asUser returns the requester's client, or nil when the request came without a token (a periodic task, or an
// operation resumed long after).
func (a *API) asUser(ctx context.Context, rc novalet.RequestContext) (*caller, error) {
	if rc.AuthToken == "" {
		return nil, nil
	}
	sc, err := a.o.Session.UserClient(ctx, rc, "network")
	if err != nil {
		return nil, err
	}
	return &caller{sc: sc, user: true}, nil
}

// url builds an address below /v2.0, which the catalog's endpoint may or may not name.
func (c *caller) url(path string, query url.Values) string {
	base := strings.TrimRight(c.sc.Endpoint, "/")
	if !strings.HasSuffix(base, "/v2.0") {
		base += "/v2.0"
	}
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return base + "/" + path
}

func (c *caller) get(ctx context.Context, path string, query url.Values, out any) error {
	_, err := c.sc.Get(ctx, c.url(path, query), out, nil)
	return wrap("read "+what(path), err)
}

func (c *caller) post(ctx context.Context, path string, in, out any) error {
	_, err := c.sc.Post(ctx, c.url(path, nil), in, out, &gophercloud.RequestOpts{OkCodes: []int{200, 201}})
	return wrap("create "+what(path), err)
}

func (c *caller) put(ctx context.Context, path string, in, out any) error {
	_, err := c.sc.Put(ctx, c.url(path, nil), in, out, &gophercloud.RequestOpts{OkCodes: []int{200, 201}})
	return wrap("update "+what(path), err)
}

// remove deletes; what is gone already is success.
func (c *caller) remove(ctx context.Context, path string) error {
	_, err := c.sc.Delete(ctx, c.url(path, nil), &gophercloud.RequestOpts{OkCodes: []int{200, 202, 204, 404}})
	return wrap("delete "+what(path), err)
}

// removeUnchanged deletes a resource that has still the revision; else the answer is 412. What is gone already is success. Only a
// Neutron with the extension revision-if-match heeds the condition.
func (c *caller) removeUnchanged(ctx context.Context, path string, revision int) error {
	_, err := c.sc.Delete(ctx, c.url(path, nil), &gophercloud.RequestOpts{OkCodes: []int{200, 202, 204, 404},
		MoreHeaders: map[string]string{"If-Match": fmt.Sprintf("revision_number=%d", revision)}})
	return wrap("delete "+what(path), err)
}

// what names a resource by its path: "port 3f…".
func what(path string) string {
	kind, id, ok := strings.Cut(path, "/")
	if ok {
		return strings.TrimSuffix(kind, "s") + " " + id
	}
	return kind
}

// apiError keeps the status and Neutron's own error type beside novalet's kinds.
type apiError struct {
	status int
	kind   string // type in NeutronError: OverQuota, IpAddressGenerationFailure, …
	err    error
}

func (e *apiError) Error() string { return e.err.Error() }
func (e *apiError) Unwrap() error { return e.err }

func wrap(verb string, err error) error {
	if err == nil {
		return nil
	}
	var u gophercloud.ErrUnexpectedResponseCode
	if !errors.As(err, &u) {
		var syn interface{ Offset() int64 }
		if errors.As(err, &syn) {
			return fmt.Errorf("%w: %s: %w", novalet.ErrTryAgain, verb, err)
		}
		return fmt.Errorf("%s: %w", verb, err)
	}
	return &apiError{status: u.Actual, kind: errorType(u.Body), err: keystone.Error(verb, err)}
}

// status of a Neutron answer, or 0.
func status(err error) int {
	var e *apiError
	if errors.As(err, &e) {
		return e.status
	}
	return 0
}

// forbidden: the policy, not the resource, said no.
func forbidden(err error) bool {
	s := status(err)
	return s == http.StatusForbidden || s == http.StatusUnauthorized
}

// withRequest puts the request id on everything sent under the context.
func withRequest(ctx context.Context, rc novalet.RequestContext) context.Context {
	return keystone.WithRequestID(ctx, rc.RequestID)
}
