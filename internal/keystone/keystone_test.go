package keystone

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

// cloud is a Keystone and one service, as far as sessions see them.
type cloud struct {
	*httptest.Server
	logins   atomic.Int32
	password string
	lifetime time.Duration

	mu      sync.Mutex
	valid   map[string]bool
	last    map[string]any // body of the last login
	service http.HandlerFunc
}

func newCloud(t *testing.T) *cloud {
	c := &cloud{password: "s3cret-pw", lifetime: time.Hour, valid: map[string]bool{}}
	c.Server = httptest.NewServer(http.HandlerFunc(c.serve))
	t.Cleanup(c.Close)
	return c
}

func (c *cloud) serve(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/net/") {
		c.mu.Lock()
		ok := c.valid[r.Header.Get("X-Auth-Token")]
		service := c.service
		c.mu.Unlock()
		switch {
		case !ok:
			w.WriteHeader(http.StatusUnauthorized)
		case service != nil:
			service(w, r)
		default:
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, `{"ok": true}`)
		}
		return
	}
	if r.URL.Path != "/v3/auth/tokens" || r.Method != http.MethodPost {
		http.NotFound(w, r)
		return
	}
	n := c.logins.Add(1)
	body, _ := io.ReadAll(r.Body)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = nil
	_ = json.Unmarshal(body, &c.last)
	if !strings.Contains(string(body), `"`+c.password+`"`) {
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, `{"error": {"code": 401, "message": "you sent %s"}}`, strings.ReplaceAll(string(body), `"`, `'`))
		return
	}
	token := fmt.Sprintf("token-%d", n)
	c.valid[token] = true
	w.Header().Set("X-Subject-Token", token)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(map[string]any{"token": map[string]any{
		"expires_at": time.Now().Add(c.lifetime).UTC().Format(time.RFC3339Nano),
		"user":       map[string]string{"id": "u1"}, "project": map[string]string{"id": "p1"},
		"catalog": []any{map[string]any{"type": "network", "endpoints": []any{
			map[string]string{"interface": "public", "region": "other", "url": "http://192.0.2.1:9696"},
			map[string]string{"interface": "public", "region": "here", "url": c.URL + "/net"},
			map[string]string{"interface": "admin", "region": "here", "url": "http://192.0.2.2:9696"},
		}}},
	}})
}

func options(c *cloud) Options {
	return Options{
		Section: "neutron", AuthURL: c.URL, Username: "nova", Password: novalet.Secret(c.password), UserDomainName: "Default",
		ProjectName: "service", ProjectDomainName: "Default", RegionName: "here", ConnectRetries: -1,
	}
}

func session(t *testing.T, o Options) *Session {
	t.Helper()
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.CloseIdle)
	return s
}

func TestTokenIsSharedByConcurrentCallers(t *testing.T) {
	c := newCloud(t)
	s := session(t, options(c))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if tok, err := s.Token(t.Context()); err != nil || tok.Reveal() != "token-1" {
				t.Errorf("token %q, %v", tok.Reveal(), err)
			}
		})
	}
	wg.Wait()
	if n := c.logins.Load(); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
	if got := fmt.Sprint(c.last["auth"].(map[string]any)["scope"]); got != "map[project:map[domain:map[name:Default] name:service]]" {
		t.Errorf("scope %s", got)
	}
	if p, _ := s.ProjectID(t.Context()); p != "p1" {
		t.Errorf("project %q", p)
	}
}

func TestTokenIsRenewedBeforeItEnds(t *testing.T) {
	c := newCloud(t)
	s := session(t, options(c))
	if _, err := s.Token(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.now = func() time.Time { return time.Now().Add(c.lifetime - renewMargin/2) }
	tok, err := s.Token(t.Context())
	if err != nil || tok.Reveal() != "token-2" {
		t.Fatalf("token %q, %v; want a new one", tok.Reveal(), err)
	}
}

func TestKeystoneAwayKeepsAValidToken(t *testing.T) {
	c := newCloud(t)
	s := session(t, options(c))
	if _, err := s.Token(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Close()
	s.now = func() time.Time { return time.Now().Add(c.lifetime - renewMargin/2) }
	if tok, err := s.Token(t.Context()); err != nil || tok.Reveal() != "token-1" {
		t.Errorf("token %q, %v", tok.Reveal(), err)
	}
	s.now = func() time.Time { return time.Now().Add(c.lifetime + time.Minute) }
	if _, err := s.Token(t.Context()); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("expired token and no Keystone: %v, want ErrTryAgain", err)
	}
}

func TestStartedBeforeKeystone(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := options(&cloud{Server: &httptest.Server{URL: "http://" + l.Addr().String()}, password: "x"})
	l.Close()
	s := session(t, o)
	if _, err := s.Token(t.Context()); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("%v, want ErrTryAgain", err)
	}
	if _, err := s.Client(t.Context(), "network"); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("%v, want ErrTryAgain", err)
	}
}

func TestWrongPassword(t *testing.T) {
	c := newCloud(t)
	o := options(c)
	o.Password = "hunter2-wrong"
	s := session(t, o)
	for range 3 {
		_, err := s.Token(t.Context())
		if err == nil || errors.Is(err, novalet.ErrTryAgain) {
			t.Fatalf("error %v, want a lasting one", err)
		}
		for _, want := range []string{"nova", c.URL, "[neutron]"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error %q does not name %q", err, want)
			}
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("error shows the password: %q", err)
		}
	}
	if n := c.logins.Load(); n != 1 {
		t.Errorf("%d logins in a row, want 1: accounts get locked", n)
	}
}

func TestClientRenewsOn401(t *testing.T) {
	c := newCloud(t)
	s := session(t, options(c))
	cl, err := s.Client(t.Context(), "network")
	if err != nil {
		t.Fatal(err)
	}
	if cl.Endpoint != c.URL+"/net/" {
		t.Fatalf("endpoint %q", cl.Endpoint)
	}
	c.mu.Lock()
	c.valid = map[string]bool{} // Keystone was restarted with new keys
	var got string
	c.service = func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got = string(b)
		w.WriteHeader(http.StatusCreated)
		fmt.Fprint(w, "{}")
	}
	c.mu.Unlock()
	var out map[string]any
	if _, err := cl.Post(t.Context(), cl.ServiceURL("v2.0", "ports"), map[string]string{"a": "b"}, &out, nil); err != nil {
		t.Fatal(err)
	}
	if got != `{"a":"b"}` {
		t.Errorf("body of the second try %q", got)
	}
	if n := c.logins.Load(); n != 2 {
		t.Errorf("%d logins, want 2", n)
	}
}

func TestUserClientSendsBothTokens(t *testing.T) {
	c := newCloud(t)
	o := options(c)
	o.ServiceUser = session(t, options(c))
	s := session(t, o)
	c.valid["user-token"] = true
	var h http.Header
	c.service = func(w http.ResponseWriter, r *http.Request) { h = r.Header; fmt.Fprint(w, "{}") }
	cl, err := s.UserClient(t.Context(), novalet.RequestContext{AuthToken: "user-token"}, "network")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Get(WithRequestID(t.Context(), "req-1"), cl.ServiceURL("x"), nil, nil); err != nil {
		t.Fatal(err)
	}
	if h.Get("X-Auth-Token") != "user-token" || !strings.HasPrefix(h.Get("X-Service-Token"), "token-") || h.Get("X-Openstack-Request-Id") != "req-1" {
		t.Errorf("headers %v", h)
	}
	// An expired user token stays a 401: it must not be answered with the service user's rights.
	cl, _ = s.UserClient(t.Context(), novalet.RequestContext{AuthToken: "expired"}, "network")
	if _, err := cl.Get(t.Context(), cl.ServiceURL("x"), nil, nil); Status(err) != http.StatusUnauthorized {
		t.Errorf("error %v, want 401", err)
	}
	if _, err := s.UserClient(t.Context(), novalet.RequestContext{}, "network"); !errors.Is(err, novalet.ErrUnsupported) {
		t.Errorf("no token: %v", err)
	}
}

func TestRetriesOnlyWhatMayBeRepeated(t *testing.T) {
	c := newCloud(t)
	o := options(c)
	o.ConnectRetries = 2
	var seen atomic.Int32
	o.Observe = func(r Request) {
		if r.Service == "network" {
			seen.Add(1)
		}
	}
	s := session(t, o)
	cl, err := s.Client(t.Context(), "network")
	if err != nil {
		t.Fatal(err)
	}
	var calls atomic.Int32
	c.service = func(w http.ResponseWriter, r *http.Request) {
		if calls.Add(1) == 1 {
			conn, _, _ := w.(http.Hijacker).Hijack()
			conn.Close()
			return
		}
		fmt.Fprint(w, "{}")
	}
	// On a connection that was used before net/http would itself try again.
	s.CloseIdle()
	if _, err := cl.Get(t.Context(), cl.ServiceURL("x"), nil, nil); err != nil {
		t.Errorf("GET over a broken connection: %v", err)
	}
	s.CloseIdle()
	calls.Store(0)
	if _, err := cl.Post(t.Context(), cl.ServiceURL("x"), map[string]int{}, nil, nil); !errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("POST over a broken connection: %v, want ErrTryAgain", err)
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("POST was sent %d times", n)
	}
	if n := seen.Load(); n != 3 {
		t.Errorf("observed %d requests, want 3", n)
	}
}

func TestErrorsAreBoundedAndKept(t *testing.T) {
	c := newCloud(t)
	s := session(t, options(c))
	cl, err := s.Client(t.Context(), "network")
	if err != nil {
		t.Fatal(err)
	}
	status := http.StatusConflict
	c.service = func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"NeutronError": {"type": "IpAddressGenerationFailure", "message": "No more\nIPs", "detail": ""}}%s`,
			strings.Repeat(" ", 4*maxErrorBody))
	}
	_, err = cl.Get(t.Context(), cl.ServiceURL("x"), nil, nil)
	var u gophercloud.ErrUnexpectedResponseCode
	if !errors.As(err, &u) || len(u.Body) != maxErrorBody {
		t.Fatalf("error %T with %d bytes", err, len(u.Body))
	}
	for st, kind := range map[int]error{404: novalet.ErrNotFound, 409: novalet.ErrBusy, 503: novalet.ErrTryAgain, 429: novalet.ErrTryAgain} {
		status = st
		_, err = cl.Get(t.Context(), cl.ServiceURL("x"), nil, nil)
		if e := Error("read x", err); !errors.Is(e, kind) || !strings.Contains(e.Error(), "No more IPs") {
			t.Errorf("status %d: %v", st, e)
		}
	}
}

func TestRedirectToAnotherHostKeepsTheToken(t *testing.T) {
	c := newCloud(t)
	var leaked atomic.Bool
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		leaked.Store(true)
	}))
	defer other.Close()
	c.service = func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, http.StatusFound) }
	s := session(t, options(c))
	cl, err := s.Client(t.Context(), "network")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Get(t.Context(), cl.ServiceURL("x"), nil, nil); Status(err) != http.StatusFound {
		t.Errorf("error %v, want the redirect itself", err)
	}
	if leaked.Load() {
		t.Error("the redirect was followed to another host")
	}
}

func TestEndpoint(t *testing.T) {
	c := newCloud(t)
	o := options(c)
	o.ValidInterfaces = []string{"internal", "admin"}
	s := session(t, o)
	if ep, err := s.Endpoint(t.Context(), "networking"); err != nil || ep != "http://192.0.2.2:9696/" {
		t.Errorf("endpoint %q, %v", ep, err)
	}
	if _, err := s.Endpoint(t.Context(), "image"); !errors.Is(err, novalet.ErrNotFound) || !strings.Contains(err.Error(), `"image"`) {
		t.Errorf("no such service: %v", err)
	}
	o.EndpointOverride = "http://192.0.2.9:1/x"
	if ep, _ := session(t, o).Endpoint(t.Context(), "image"); ep != "http://192.0.2.9:1/x/" {
		t.Errorf("override %q", ep)
	}
}

func TestOptions(t *testing.T) {
	section := map[string]string{
		"auth_type": "password", "auth_url": "http://k:5000/v3", "username": "nova", "password": "p", "user_domain_name": "Default",
		"project_name": "service", "project_domain_name": "Default", "valid_interfaces": "internalURL, public", "timeout": "1.5",
		"insecure": "False", "connect_retries": "0",
	}
	get := func(m map[string]string) func(string) (string, bool) {
		return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
	}
	o, err := OptionsFrom("neutron", get(section))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); err != nil {
		t.Fatal(err)
	}
	if strings.Join(o.ValidInterfaces, " ") != "internal public" || o.Timeout != 1500*time.Millisecond || o.ConnectRetries != -1 {
		t.Errorf("options %+v", o)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca"), []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{
		"auth_url": "", "username": "", "password": "", "user_domain_name": "", "project_name": "", "project_domain_name": "",
		"auth_type": "v3oidc", "valid_interfaces": "inside", "insecure": "maybe", "timeout": "soon", "connect_retries": "many",
		"cafile": filepath.Join(dir, "ca"), "certfile": filepath.Join(dir, "none"), "endpoint_override": "ftp://x", "system_scope": "some",
	} {
		m := map[string]string{}
		for k, v := range section {
			m[k] = v
		}
		m[key] = value
		o, err := OptionsFrom("neutron", get(m))
		if err == nil {
			_, err = New(o)
		}
		if err == nil || !strings.Contains(err.Error(), "[neutron] "+key) {
			t.Errorf("%s = %q: error %v does not name it", key, value, err)
		}
	}
}

func TestIdentityURL(t *testing.T) {
	for in, want := range map[string]string{
		"http://k:5000": "http://k:5000/v3/", "http://k:5000/": "http://k:5000/v3/", "http://k/identity/v3": "http://k/identity/v3/",
		"http://k:5000/v2.0": "http://k:5000/v3/",
	} {
		if got := identityURL(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestCancelledCallerIsNoOutage(t *testing.T) {
	c := newCloud(t)
	s := session(t, options(c))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Token(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, novalet.ErrTryAgain) {
		t.Errorf("error %v, want context.Canceled", err)
	}
	if _, err := s.Token(t.Context()); err != nil {
		t.Errorf("the next caller: %v", err)
	}
}
