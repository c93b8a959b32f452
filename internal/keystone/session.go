// Package keystone holds sessions with Keystone: a token for each set of credentials, renewed before it ends, the
// addresses of the services from the catalog, and HTTP clients that carry the token, or a user's own.
//
// It starts no goroutine that outlives a call and keeps nothing on disk. A session may be made before Keystone is
// up: calls then return novalet.ErrTryAgain.
package keystone

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"

	"github.com/novalet/novalet"
)

const (
	// renewMargin is how long before its end a token is renewed, so that a request made with it can still be
	// validated by the service (and by the services that one asks).
	renewMargin = 2 * time.Minute
	// rejectPause is how long a refused login is remembered: Keystone may lock an account after a few failures
	// (lockout_failure_attempts), and four sections of nova.conf often name the same user.
	rejectPause = 15 * time.Second
)

// Session is one set of credentials at one Keystone. It is safe for concurrent use.
type Session struct {
	o         Options
	transport *http.Transport
	identity  *gophercloud.ServiceClient
	now       func() time.Time

	mu       sync.Mutex
	cur      *grant
	renewing chan struct{} // closed when the login under way has ended
	refused  error         // the last login was refused for good reasons
	refusedT time.Time
}

// grant is a token with what came along.
type grant struct {
	token     string
	expires   time.Time
	renewAt   time.Time
	projectID string
	userID    string
	catalog   []tokens.CatalogEntry
}

// New makes a session. It reads the CA and key files and checks the options, naming the one that is wrong; it
// does not connect.
func New(o Options) (*Session, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	tr, err := newTransport(&o)
	if err != nil {
		return nil, err
	}
	s := &Session{o: o, transport: tr, now: time.Now}
	s.identity = &gophercloud.ServiceClient{
		ProviderClient: s.provider("identity", nil),
		Endpoint:       identityURL(o.AuthURL),
		Type:           "identity",
	}
	return s, nil
}

// identityURL appends /v3/ to an address that names no version.
func identityURL(authURL string) string {
	u := strings.TrimRight(authURL, "/")
	if !strings.HasSuffix(u, "/v3") {
		u = strings.TrimSuffix(u, "/v2.0") + "/v3"
	}
	return u + "/"
}

// Token returns a valid token of the session's user, logging in when there is none. Any number of callers share
// one login. Errors: ErrTryAgain when Keystone cannot be reached or fails; else the login was refused, and the error
// names user and auth_url.
func (s *Session) Token(ctx context.Context) (novalet.Secret, error) {
	g, err := s.grant(ctx)
	if err != nil {
		return "", err
	}
	return novalet.Secret(g.token), nil
}

// ProjectID and UserID say who the session is, after a login.
func (s *Session) ProjectID(ctx context.Context) (string, error) {
	g, err := s.grant(ctx)
	if err != nil {
		return "", err
	}
	return g.projectID, nil
}

// UserID is the id of the session's user.
func (s *Session) UserID(ctx context.Context) (string, error) {
	g, err := s.grant(ctx)
	if err != nil {
		return "", err
	}
	return g.userID, nil
}

// Renew forgets the token, if it is still this one, so that the next call logs in again.
func (s *Session) Renew(token novalet.Secret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur != nil && s.cur.token == token.Reveal() {
		s.cur = nil
	}
}

// CloseIdle closes the connections that no request uses.
func (s *Session) CloseIdle() { s.transport.CloseIdleConnections() }

func (s *Session) grant(ctx context.Context) (*grant, error) {
	for {
		s.mu.Lock()
		now := s.now()
		if g := s.cur; g != nil && now.Before(g.renewAt) {
			s.mu.Unlock()
			return g, nil
		}
		if s.refused != nil && now.Sub(s.refusedT) < rejectPause {
			defer s.mu.Unlock()
			return nil, s.refused
		}
		if wait := s.renewing; wait != nil {
			s.mu.Unlock()
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return nil, fmt.Errorf("wait for a token of %s: %w", s.o.user(), context.Cause(ctx))
			}
		}
		done := make(chan struct{})
		s.renewing = done
		s.mu.Unlock()

		g, err := s.login(ctx)

		s.mu.Lock()
		s.renewing = nil
		close(done)
		switch {
		case err == nil:
			s.cur, s.refused = g, nil
		case !errors.Is(err, novalet.ErrTryAgain) && ctx.Err() == nil:
			s.refused, s.refusedT, s.cur = err, s.now(), nil
		case s.cur != nil && s.now().Before(s.cur.expires):
			// Keystone is away, but what we hold is still good.
			g, err = s.cur, nil
		}
		s.mu.Unlock()
		return g, err
	}
}

func (s *Session) login(ctx context.Context) (*grant, error) {
	o := &s.o
	a := &tokens.AuthOptions{
		Username:   o.Username,
		UserID:     o.UserID,
		Password:   o.Password.Reveal(),
		DomainName: o.UserDomainName,
		DomainID:   o.UserDomainID,
		Scope: tokens.Scope{
			ProjectID: o.ProjectID, ProjectName: o.ProjectName,
			DomainID: o.ProjectDomainID, DomainName: o.ProjectDomainName,
		},
	}
	switch {
	case o.UserID != "":
		a.Username, a.DomainName, a.DomainID = "", "", ""
	case o.UserDomainID != "":
		a.DomainName = ""
	}
	switch {
	case o.AuthType == "v3applicationcredential":
		a.Password, a.Scope = "", tokens.Scope{}
		a.ApplicationCredentialID, a.ApplicationCredentialName = o.ApplicationCredentialID, o.ApplicationCredentialName
		a.ApplicationCredentialSecret = o.ApplicationCredentialSecret.Reveal()
	case o.SystemScope != "":
		a.Scope = tokens.Scope{System: true}
	case o.ProjectID != "":
		a.Scope = tokens.Scope{ProjectID: o.ProjectID}
	case o.ProjectName == "":
		a.Scope = tokens.Scope{DomainID: o.DomainID, DomainName: o.DomainName}
	case o.ProjectDomainID != "":
		a.Scope.DomainName = ""
	}
	r := tokens.Create(ctx, s.identity, a)
	if r.Err != nil {
		return nil, s.loginError(ctx, r.Err)
	}
	var body struct {
		ExpiresAt time.Time             `json:"expires_at"`
		Catalog   []tokens.CatalogEntry `json:"catalog"`
		Project   struct{ ID string }   `json:"project"`
		User      struct{ ID string }   `json:"user"`
	}
	token := r.Header.Get("X-Subject-Token")
	if err := r.ExtractIntoStructPtr(&body, "token"); err != nil || token == "" || body.ExpiresAt.IsZero() {
		return nil, fmt.Errorf("%w: log in as %s at %s: the answer holds no token", novalet.ErrTryAgain, o.user(), o.AuthURL)
	}
	g := &grant{token: token, expires: body.ExpiresAt, catalog: body.Catalog, projectID: body.Project.ID, userID: body.User.ID}
	margin := min(renewMargin, body.ExpiresAt.Sub(s.now())/4)
	g.renewAt = body.ExpiresAt.Add(-margin)
	return g, nil
}

// loginError says who could not log in where. Nothing of the request is in it.
func (s *Session) loginError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("log in as %s at %s: %w", s.o.user(), s.o.AuthURL, context.Cause(ctx))
	}
	var u gophercloud.ErrUnexpectedResponseCode
	if !errors.As(err, &u) {
		return fmt.Errorf("log in as %s at %s: %w", s.o.user(), s.o.AuthURL, err)
	}
	where := fmt.Sprintf("log in as %s at %s ([%s])", s.o.user(), s.o.AuthURL, s.o.Section)
	switch {
	case u.Actual == http.StatusUnauthorized:
		return fmt.Errorf("%s: Keystone refuses user name, password or project", where)
	case u.Actual == http.StatusNotFound:
		return fmt.Errorf("%s: no Keystone v3 at auth_url", where)
	case u.Actual >= 500 || u.Actual == http.StatusTooManyRequests || u.Actual == http.StatusRequestTimeout:
		return fmt.Errorf("%w: %s: Keystone answers %d", novalet.ErrTryAgain, where, u.Actual)
	}
	return fmt.Errorf("%s: Keystone answers %d: %s", where, u.Actual, ErrorMessage(u.Body))
}

// Endpoint returns the base URL of a service, ending in "/": endpoint_override, or the catalog's entry for the region
// and the first of valid_interfaces that has one. serviceType is the catalog's (network, image, placement, …) or
// one of its official aliases. Errors: ErrTryAgain; ErrNotFound when the catalog has no such service.
func (s *Session) Endpoint(ctx context.Context, serviceType string) (string, error) {
	if s.o.EndpointOverride != "" && serviceType != "identity" {
		return gophercloud.NormalizeURL(s.o.EndpointOverride), nil
	}
	g, err := s.grant(ctx)
	if err != nil {
		return "", err
	}
	names := serviceNames(serviceType)
	for _, iface := range s.o.ValidInterfaces {
		for _, name := range names {
			for _, entry := range g.catalog {
				if entry.Type != name {
					continue
				}
				for _, e := range entry.Endpoints {
					if e.Interface != iface || s.o.RegionName != "" && e.Region != s.o.RegionName && e.RegionID != s.o.RegionName {
						continue
					}
					if u, err := url.Parse(e.URL); err == nil && u.Host != "" {
						return gophercloud.NormalizeURL(e.URL), nil
					}
				}
			}
		}
	}
	return "", fmt.Errorf("%w: no endpoint of service %q (region %q, interfaces %s) in the catalog of %s",
		novalet.ErrNotFound, serviceType, s.o.RegionName, strings.Join(s.o.ValidInterfaces, ", "), s.o.AuthURL)
}

// serviceNames are the catalog types that stand for the same service.
func serviceNames(t string) []string {
	if t == "network" || t == "networking" {
		return []string{"network", "networking"}
	}
	if a, ok := gophercloud.ServiceTypeAliases[t]; ok {
		return append([]string{t}, a...)
	}
	names := []string{t}
	for official, aliases := range gophercloud.ServiceTypeAliases {
		// A volumev2 endpoint speaks another API than volumev3: only the official name stands in for an alias.
		if slices.Contains(aliases, t) {
			names = append(names, official)
		}
	}
	return names
}
