package keystone

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/novalet/novalet"
)

// Options are the credentials and the way to the services, as the [neutron], [glance], [placement], [cinder] and
// [service_user] sections of nova.conf have them (keystoneauth1/loading).
type Options struct {
	// Section names the options in errors, such as "neutron".
	Section string

	AuthType                           string // password (also v3password), v3applicationcredential
	AuthURL                            string // with or without /v3
	Username, UserID                   string
	Password                           novalet.Secret
	UserDomainName, UserDomainID       string
	ProjectName, ProjectID             string
	ProjectDomainName, ProjectDomainID string
	DefaultDomainName, DefaultDomainID string
	DomainName, DomainID               string // domain scope
	SystemScope                        string // "all"
	ApplicationCredentialID            string
	ApplicationCredentialName          string
	ApplicationCredentialSecret        novalet.Secret
	RegionName                         string
	ValidInterfaces                    []string // default internal, public: Nova's own
	EndpointOverride                   string   // base URL of the service, instead of the catalog's
	CAFile, CertFile, KeyFile          string
	Insecure                           bool
	// ConnectTimeout bounds making a connection (default 10 s), Timeout the wait for the answer's first byte
	// (default 60 s). Neither bounds the reading of a body: downloads are bounded by their context.
	ConnectTimeout, Timeout time.Duration
	// ConnectRetries is how often a request is repeated after a connection failure (default 3; negative: never).
	ConnectRetries int

	// ServiceUser, if set, gives the X-Service-Token that UserClient sends along with a user's token, so that a long
	// operation outlives the token ([service_user] send_service_user_token).
	ServiceUser *Session
	// Observe, if set, is told of every request after its answer's header came. It must not block.
	Observe func(Request)
}

// Request is what Observe learns of one HTTP request.
type Request struct {
	Service  string // type in the catalog: network, placement, image, identity
	Method   string
	Path     string
	Status   int // 0 when no answer came
	Duration time.Duration
}

// OptionsFrom reads the options of an oslo.config section. get returns the value of a key and whether it is set.
// Errors name the section and the key. Both spellings of keystoneauth are known (user_name, tenant_name, …).
func OptionsFrom(section string, get func(key string) (string, bool)) (Options, error) {
	str := func(keys ...string) string {
		for _, k := range keys {
			if v, ok := get(k); ok && strings.TrimSpace(v) != "" {
				return strings.TrimSpace(v)
			}
		}
		return ""
	}
	secret := func(key string) novalet.Secret {
		v, _ := get(key)
		return novalet.Secret(v)
	}
	o := Options{
		Section:                     section,
		AuthType:                    str("auth_type", "auth_plugin"),
		AuthURL:                     str("auth_url"),
		Username:                    str("username", "user-name", "user_name"),
		UserID:                      str("user_id", "user-id"),
		Password:                    secret("password"),
		UserDomainName:              str("user_domain_name", "user-domain-name"),
		UserDomainID:                str("user_domain_id", "user-domain-id"),
		ProjectName:                 str("project_name", "project-name", "tenant_name", "tenant-name"),
		ProjectID:                   str("project_id", "project-id", "tenant_id", "tenant-id"),
		ProjectDomainName:           str("project_domain_name", "project-domain-name"),
		ProjectDomainID:             str("project_domain_id", "project-domain-id"),
		DefaultDomainName:           str("default_domain_name", "default-domain-name"),
		DefaultDomainID:             str("default_domain_id", "default-domain-id"),
		DomainName:                  str("domain_name", "domain-name"),
		DomainID:                    str("domain_id", "domain-id"),
		SystemScope:                 str("system_scope", "system-scope"),
		ApplicationCredentialID:     str("application_credential_id", "application-credential-id"),
		ApplicationCredentialName:   str("application_credential_name", "application-credential-name"),
		ApplicationCredentialSecret: secret("application_credential_secret"),
		RegionName:                  str("region_name", "region-name", "os_region_name"),
		EndpointOverride:            str("endpoint_override", "endpoint-override"),
		CAFile:                      str("cafile"),
		CertFile:                    str("certfile"),
		KeyFile:                     str("keyfile"),
	}
	for _, i := range strings.Split(str("valid_interfaces", "valid-interfaces"), ",") {
		if i = strings.TrimSuffix(strings.TrimSpace(i), "URL"); i != "" {
			o.ValidInterfaces = append(o.ValidInterfaces, i)
		}
	}
	if v := str("insecure"); v != "" {
		switch strings.ToLower(v) {
		case "true", "1", "yes", "on":
			o.Insecure = true
		case "false", "0", "no", "off":
		default:
			return o, fmt.Errorf("read [%s] insecure: %q is no boolean", section, v)
		}
	}
	if v := str("timeout"); v != "" {
		s, err := strconv.ParseFloat(v, 64)
		if err != nil || s <= 0 || s > 86400 {
			return o, fmt.Errorf("read [%s] timeout: %q is no number of seconds", section, v)
		}
		o.Timeout = time.Duration(s * float64(time.Second))
	}
	if v := str("connect_retries", "connect-retries", "http_retries"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 || n > 100 {
			return o, fmt.Errorf("read [%s] connect_retries: %q is no small number", section, v)
		}
		if o.ConnectRetries = n; n == 0 {
			o.ConnectRetries = -1
		}
	}
	return o, nil
}

// check completes the defaults and says what is missing.
func (o *Options) check() error {
	fail := func(key, why string) error { return fmt.Errorf("read [%s] %s: %s", o.Section, key, why) }
	if o.Section == "" {
		o.Section = "keystone_authtoken"
	}
	if o.ConnectTimeout <= 0 {
		o.ConnectTimeout = 10 * time.Second
	}
	if o.Timeout <= 0 {
		o.Timeout = time.Minute
	}
	if o.ConnectRetries == 0 {
		o.ConnectRetries = 3
	}
	if len(o.ValidInterfaces) == 0 {
		o.ValidInterfaces = []string{"internal", "public"}
	}
	for _, i := range o.ValidInterfaces {
		if i != "internal" && i != "public" && i != "admin" {
			return fail("valid_interfaces", fmt.Sprintf("%q is none of internal, public, admin", i))
		}
	}
	if err := checkURL(o.AuthURL); err != nil {
		return fail("auth_url", err.Error())
	}
	if o.EndpointOverride != "" {
		if err := checkURL(o.EndpointOverride); err != nil {
			return fail("endpoint_override", err.Error())
		}
	}
	if o.SystemScope != "" && o.SystemScope != "all" {
		return fail("system_scope", `only "all" is known`)
	}
	switch o.AuthType {
	case "", "password", "v3password":
		if o.Username == "" && o.UserID == "" {
			return fail("username", "missing")
		}
		if o.Password == "" {
			return fail("password", "missing")
		}
		if o.UserDomainName == "" && o.UserDomainID == "" {
			o.UserDomainName, o.UserDomainID = o.DefaultDomainName, o.DefaultDomainID
		}
		if o.UserID == "" && o.UserDomainName == "" && o.UserDomainID == "" {
			return fail("user_domain_name", "missing")
		}
		if o.ProjectDomainName == "" && o.ProjectDomainID == "" {
			o.ProjectDomainName, o.ProjectDomainID = o.DefaultDomainName, o.DefaultDomainID
		}
		if o.ProjectID == "" && o.ProjectName == "" && o.SystemScope == "" && o.DomainID == "" && o.DomainName == "" {
			return fail("project_name", "missing")
		}
		if o.ProjectID == "" && o.ProjectName != "" && o.ProjectDomainName == "" && o.ProjectDomainID == "" {
			return fail("project_domain_name", "missing")
		}
	case "v3applicationcredential":
		if o.ApplicationCredentialSecret == "" {
			return fail("application_credential_secret", "missing")
		}
		if o.ApplicationCredentialID == "" && (o.ApplicationCredentialName == "" || o.Username == "" && o.UserID == "") {
			return fail("application_credential_id", "missing")
		}
	default:
		return fail("auth_type", fmt.Sprintf("%q is not supported (password, v3applicationcredential)", o.AuthType))
	}
	return nil
}

// user names the account in errors.
func (o *Options) user() string {
	for _, s := range []string{o.Username, o.UserID, o.ApplicationCredentialName, o.ApplicationCredentialID} {
		if s != "" {
			return s
		}
	}
	return "?"
}

func checkURL(s string) error {
	if s == "" {
		return errors.New("missing")
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		// The text itself may hold a password, so it is not shown.
		return errors.New("is no http or https URL")
	}
	if u.User != nil {
		return errors.New("holds a user name; use username and password")
	}
	return nil
}
