package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"
)

// request is a line that keystoneauth or glanceclient writes for each request, at debug level, with the URL.
var request = regexp.MustCompile(`curl -g -i -X [A-Z]+ '?(http://[^ ']+)`)

// identity are Keystone's URLs: tokens are not counted on either side.
var identity = regexp.MustCompile(`^http://[^/]+:5000/|/identity/`)

// peerRest counts the requests to Neutron, Placement and Glance that the stock service makes in one boot with a network.
// It logs them only at debug level, which slows it: so it runs so for three boots that are timed by nobody, the first of
// which fill its caches.
func (b *bench) peerRest() (n float64, err error) {
	if err := b.stock("stop", ""); err != nil {
		return 0, err
	}
	if err := b.stock("start", "HTTP_DEBUG=1"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, b.stock("stop", ""), b.stock("start", "")) }()
	path := filepath.Join(b.dir, "log", "nova-compute-"+b.hosts[1]+".log")
	for i := range 3 {
		from, err := os.Stat(path)
		if err != nil {
			return 0, err
		}
		start := time.Now()
		uuid, _, err := b.boot(b.hosts[1], true)
		if err != nil && i == 0 {
			// It comes up with the record of the service before it: what is sent to it meanwhile ends in ERROR.
			if err := b.remove(uuid); err != nil {
				return 0, err
			}
			continue
		}
		if err != nil {
			return 0, err
		}
		if _, _, err := b.await(start, uuid, "build_and_run_instance", "Instance.save", "active"); err != nil {
			return 0, err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		n = 0
		for _, m := range request.FindAllSubmatch(text[from.Size():], -1) {
			if !identity.Match(m[1]) {
				n++
			}
		}
		if err := b.remove(uuid); err != nil {
			return 0, err
		}
	}
	if n == 0 {
		return 0, fmt.Errorf("%s shows no requests of a boot", path)
	}
	return n, nil
}

// stock starts or stops the stock service by the cloud's own script.
func (b *bench) stock(verb, env string) error {
	cmd := exec.Command("devstack/compute.sh", verb, "stock", b.hosts[1])
	cmd.Env = append(os.Environ(), "STATE="+b.dir, env)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s the stock service: %w: %s", verb, err, out)
	}
	return nil
}
