package oslomsg

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/novalet/novalet"
)

// DefaultPort is RabbitMQ's; oslo.messaging uses it with TLS too.
const DefaultPort = 5672

// Host is one broker of a transport URL.
type Host struct {
	Name     string // without brackets
	Port     int
	User     string
	Password novalet.Secret
}

// Addr is host:port, with brackets where they are needed.
func (h Host) Addr() string { return net.JoinHostPort(h.Name, strconv.Itoa(h.Port)) }

// URL is a parsed transport_url.
type URL struct {
	Hosts []Host
	Vhost string
	// Query holds the options that override those of [oslo_messaging_rabbit];
	// repeated ones are joined with commas.
	Query map[string]string
}

// ParseURL reads a transport_url,
//
//	rabbit://user:pass@host:port[,user:pass@host:port…]/vhost?option=value
//
// as oslo.messaging does. Errors never show a password.
func ParseURL(s string) (URL, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return URL{}, errors.New("transport_url: it has no scheme; write rabbit://user:password@host:5672/vhost")
	}
	switch strings.ToLower(scheme) {
	case "rabbit", "kombu", "amqp":
	default:
		return URL{}, fmt.Errorf("transport_url: scheme %q is not supported, only rabbit", clip(scheme, 20))
	}
	rest, _, _ = strings.Cut(rest, "#")
	rest, query, _ := strings.Cut(rest, "?")
	netloc, path, _ := strings.Cut(rest, "/")

	u := URL{Query: map[string]string{}}
	for i, part := range strings.Split(netloc, ",") {
		if part == "" {
			continue
		}
		h, err := parseHost(part)
		if err != nil {
			return URL{}, fmt.Errorf("transport_url: host %d: %w", i+1, err)
		}
		u.Hosts = append(u.Hosts, h)
	}
	if u.Hosts == nil {
		u.Hosts = []Host{{Name: "localhost", Port: DefaultPort, User: "guest", Password: "guest"}}
	}
	var err error
	if u.Vhost, err = url.PathUnescape(path); err != nil {
		return URL{}, errors.New("transport_url: the vhost has a bad % escape")
	}
	if u.Vhost == "" {
		u.Vhost = "/"
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return URL{}, errors.New("transport_url: the options after ? cannot be read")
	}
	for k, v := range values {
		u.Query[k] = strings.Join(v, ",")
	}
	return u, nil
}

// parseHost reads user:password@host:port, of which only the host is needed.
func parseHost(s string) (Host, error) {
	h := Host{Port: DefaultPort, User: "guest", Password: "guest"}
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		user, password, hasPassword := strings.Cut(s[:i], ":")
		s = s[i+1:]
		var err1, err2 error
		h.User, err1 = url.PathUnescape(user)
		plain, err2 := url.PathUnescape(password)
		if err1 != nil || err2 != nil {
			return h, errors.New("user or password has a bad % escape")
		}
		h.Password = novalet.Secret(plain)
		if !hasPassword {
			h.Password = ""
		}
	}
	name, port := s, ""
	switch {
	case strings.HasPrefix(s, "["):
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return h, errors.New("[ without ]")
		}
		name, port = s[1:end], s[end+1:]
		if port != "" && port[0] != ':' {
			return h, errors.New("text after ]")
		}
		port = strings.TrimPrefix(port, ":")
	case strings.Count(s, ":") == 1:
		name, port, _ = strings.Cut(s, ":")
	}
	if name == "" {
		return h, errors.New("the host name is missing")
	}
	h.Name = name
	if port != "" {
		n, err := strconv.Atoi(port)
		if err != nil || n < 1 || n > 65535 {
			return h, fmt.Errorf("port %q is no port", clip(port, 20))
		}
		h.Port = n
	}
	return h, nil
}
