package keystone

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/gophercloud/gophercloud/v2"

	"github.com/novalet/novalet"
)

const (
	maxErrorBody = 16 << 10 // bytes kept of an error's body
	maxJSONBody  = 64 << 20 // bytes read of a JSON answer
)

// authFunc gives the headers of a request and says how to go on after a 401: whether fresh ones may help.
type authFunc func(ctx context.Context) (headers map[string]string, renew func() bool, err error)

// Client returns a client of a service that acts as the session's own user. The token is renewed by itself. The
// Endpoint ends in "/" and is the catalog's; append the version where the catalog leaves it out. Cheap once the catalog is
// known. Errors as Endpoint's; requests fail with ErrTryAgain when the service cannot be reached.
func (s *Session) Client(ctx context.Context, serviceType string) (*gophercloud.ServiceClient, error) {
	ep, err := s.Endpoint(ctx, serviceType)
	if err != nil {
		return nil, err
	}
	return &gophercloud.ServiceClient{
		ProviderClient: s.provider(serviceType, s.ownAuth),
		Endpoint:       ep,
		Type:           serviceType,
	}, nil
}

// UserClient returns a client that acts with the token of the user who asked, and with the service user's token
// beside it when Options.ServiceUser is set (so that an expired user token still counts). The address comes from
// this session's catalog.
func (s *Session) UserClient(ctx context.Context, rc novalet.RequestContext, serviceType string) (*gophercloud.ServiceClient, error) {
	if rc.AuthToken == "" {
		return nil, fmt.Errorf("%w: the request carries no user token", novalet.ErrUnsupported)
	}
	ep, err := s.Endpoint(ctx, serviceType)
	if err != nil {
		return nil, err
	}
	auth := func(ctx context.Context) (map[string]string, func() bool, error) {
		h := map[string]string{"X-Auth-Token": rc.AuthToken.Reveal()}
		if s.o.ServiceUser == nil {
			return h, func() bool { return false }, nil
		}
		t, err := s.o.ServiceUser.Token(ctx)
		if err != nil {
			return nil, nil, err
		}
		h["X-Service-Token"] = t.Reveal()
		return h, func() bool { s.o.ServiceUser.Renew(t); return true }, nil
	}
	return &gophercloud.ServiceClient{
		ProviderClient: s.provider(serviceType, auth),
		Endpoint:       ep,
		Type:           serviceType,
	}, nil
}

func (s *Session) ownAuth(ctx context.Context) (map[string]string, func() bool, error) {
	t, err := s.Token(ctx)
	if err != nil {
		return nil, nil, err
	}
	return map[string]string{"X-Auth-Token": t.Reveal()}, func() bool { s.Renew(t); return true }, nil
}

type requestIDKey struct{}

// WithRequestID makes requests under ctx carry the request id, which the services write to their logs as
// global_request_id.
func WithRequestID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, requestIDKey{}, id)
}

func (s *Session) provider(service string, auth authFunc) *gophercloud.ProviderClient {
	p := &gophercloud.ProviderClient{
		HTTPClient: http.Client{
			Transport: &roundTripper{s: s, service: service, auth: auth},
			// The transport puts the token on whatever it sends: another host must not get it.
			CheckRedirect: func(req *http.Request, via []*http.Request) error {
				if req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme || len(via) > 3 {
					return http.ErrUseLastResponse
				}
				return nil
			},
		},
	}
	p.UserAgent.Prepend("novalet")
	return p
}

// roundTripper adds the tokens, repeats what may be repeated, and bounds what comes back.
type roundTripper struct {
	s       *Session
	service string
	auth    authFunc
}

// RoundTrip implements http.RoundTripper.
func (t *roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	// Each try sends a copy of the body where there is one; the original is only closed.
	if req.GetBody != nil && req.Body != nil {
		defer req.Body.Close()
	}
	renewed := false
	for failures := 0; ; {
		r, err := t.prepare(req)
		if err != nil {
			return nil, err
		}
		renew := func() bool { return false }
		if t.auth != nil {
			var h map[string]string
			if h, renew, err = t.auth(ctx); err != nil {
				closeBody(r)
				return nil, err
			}
			for k, v := range h {
				r.Header.Set(k, v)
			}
		}
		start := time.Now()
		resp, err := t.s.transport.RoundTrip(r)
		t.observe(req, resp, time.Since(start))
		rewind := req.Body == nil || req.Body == http.NoBody || req.GetBody != nil
		if err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			failures++
			if rewind && repeatable(req.Method, err) && failures <= t.s.o.ConnectRetries && pause(ctx, failures) {
				continue
			}
			return nil, fmt.Errorf("%w: reach the %s service: %w", novalet.ErrTryAgain, t.service, err)
		}
		if resp.StatusCode == http.StatusUnauthorized && t.auth != nil && !renewed && rewind && renew() {
			renewed = true
			drain(resp)
			continue
		}
		bound(resp)
		return resp, nil
	}
}

// prepare clones the request with its body at the start.
func (t *roundTripper) prepare(req *http.Request) (*http.Request, error) {
	r := req.Clone(req.Context())
	if req.GetBody != nil {
		b, err := req.GetBody()
		if err != nil {
			return nil, err
		}
		r.Body = b
	}
	if id, ok := req.Context().Value(requestIDKey{}).(string); ok && id != "" {
		r.Header.Set("X-OpenStack-Request-ID", id)
	}
	return r, nil
}

func (t *roundTripper) observe(req *http.Request, resp *http.Response, d time.Duration) {
	if t.s.o.Observe == nil {
		return
	}
	o := Request{Service: t.service, Method: req.Method, Path: req.URL.Path, Duration: d}
	if resp != nil {
		o.Status = resp.StatusCode
	}
	t.s.o.Observe(o)
}

// repeatable: a request that never left may be sent again whatever it asks; one that may have arrived only if
// asking twice is asking once.
func repeatable(method string, err error) bool {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete, http.MethodOptions:
		return true
	}
	return false
}

func pause(ctx context.Context, failures int) bool {
	d := min(100*time.Millisecond<<min(failures, 6), 2*time.Second)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

type limitedBody struct {
	io.Reader
	io.Closer
}

// bound keeps a hostile or broken service from filling the memory. A download is left alone.
func bound(resp *http.Response) {
	switch {
	case resp.StatusCode >= 400:
		resp.Body = limitedBody{io.LimitReader(resp.Body, maxErrorBody), resp.Body}
	case strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json"):
		resp.Body = limitedBody{io.LimitReader(resp.Body, maxJSONBody), resp.Body}
	}
}

func drain(resp *http.Response) {
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorBody))
	_ = resp.Body.Close()
}

func closeBody(r *http.Request) {
	if r.Body != nil {
		_ = r.Body.Close()
	}
}

func newTransport(o *Options) (*http.Transport, error) {
	tlsConf := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: o.Insecure} // #nosec G402: the operator's option
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read [%s] cafile: %w", o.Section, err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read [%s] cafile: no certificate in %s", o.Section, o.CAFile)
		}
		tlsConf.RootCAs = pool
	}
	if o.CertFile != "" {
		key := o.KeyFile
		if key == "" {
			key = o.CertFile
		}
		c, err := tls.LoadX509KeyPair(o.CertFile, key)
		if err != nil {
			return nil, fmt.Errorf("read [%s] certfile: %w", o.Section, err)
		}
		tlsConf.Certificates = []tls.Certificate{c}
	}
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: o.ConnectTimeout, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       tlsConf,
		TLSHandshakeTimeout:   o.ConnectTimeout,
		ResponseHeaderTimeout: o.Timeout,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       90 * time.Second,
		// Behind wsgi servers a request that waits for "100 Continue" waits for nothing.
		ExpectContinueTimeout: 0,
	}, nil
}

// Status returns the HTTP status of an error of a client, or 0.
func Status(err error) int {
	var u gophercloud.ErrUnexpectedResponseCode
	if errors.As(err, &u) {
		return u.Actual
	}
	return 0
}

// Error turns an error of a client into one that says what to do: 404 is ErrNotFound, 409 ErrBusy, 5xx, 408 and 429
// ErrTryAgain. The text is verb, status and the service's own message. Nil stays nil.
func Error(verb string, err error) error {
	if err == nil {
		return nil
	}
	var u gophercloud.ErrUnexpectedResponseCode
	if !errors.As(err, &u) {
		return fmt.Errorf("%s: %w", verb, err)
	}
	text := fmt.Errorf("%s: status %d: %s", verb, u.Actual, ErrorMessage(u.Body))
	switch {
	case u.Actual == http.StatusNotFound:
		return fmt.Errorf("%w: %w", novalet.ErrNotFound, text)
	case u.Actual == http.StatusConflict:
		return fmt.Errorf("%w: %w", novalet.ErrBusy, text)
	case u.Actual >= 500 || u.Actual == http.StatusTooManyRequests || u.Actual == http.StatusRequestTimeout:
		return fmt.Errorf("%w: %w", novalet.ErrTryAgain, text)
	}
	return text
}

// ErrorMessage takes the message out of an OpenStack error body, at most 300 bytes of it, on one line.
func ErrorMessage(body []byte) string {
	text := ""
	// {"NeutronError": {"type":…, "message":…}}, {"error": {"message":…}}, {"errors": [{"detail":…}]}
	var outer map[string]json.RawMessage
	if json.Unmarshal(body, &outer) == nil {
		for _, raw := range outer {
			var m struct{ Message, Detail, Title string }
			var list []struct{ Message, Detail, Title string }
			if json.Unmarshal(raw, &list) == nil && len(list) > 0 {
				m = list[0]
			} else if json.Unmarshal(raw, &m) != nil {
				var s string
				if json.Unmarshal(raw, &s) == nil && text == "" {
					text = s
				}
				continue
			}
			if t := firstOf(m.Message, m.Detail, m.Title); t != "" {
				text = t
			}
		}
	}
	if text == "" {
		text = string(bytes.ToValidUTF8(body, nil))
	}
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > 300 {
		text = strings.ToValidUTF8(text[:300], "") + "…"
	}
	return text
}

func firstOf(s ...string) string {
	for _, t := range s {
		if t != "" {
			return t
		}
	}
	return ""
}
