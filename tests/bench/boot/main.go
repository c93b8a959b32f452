// Command boot measures boots and deletes through a real cloud: novalet, which starts containers, against the stock
// nova-compute with its fake driver, which starts nothing, plugs nothing and waits for nothing. Both serve the same
// controllers and take turns. NOVALET_CLOUD names the cloud's folder; make bench-boot brings it up.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/flavors"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/image/v2/images"
	"github.com/gophercloud/gophercloud/v2/openstack/networking/v2/networks"
	"github.com/gophercloud/gophercloud/v2/pagination"

	"github.com/novalet/novalet/internal/httpapi"
	"github.com/novalet/novalet/internal/osloconf"
	"github.com/novalet/novalet/tests/bench/report"
)

func main() {
	rounds := flag.Int("rounds", 11, "rounds of single boots")
	batches := flag.Int("batches", 3, "rounds of twenty at once")
	many := flag.Int("many", 200, "instances with which the agent's memory is measured; 0 leaves the row out")
	idle := flag.Duration("idle", 4*time.Minute, "how long the idle bus is watched; 0 leaves the rows out")
	ours := flag.String("host", "novalet1", "novalet's compute host")
	stock := flag.String("stock", "stock1", "the stock compute's host")
	out := flag.String("out", ".", "directory in which build/bench is")
	flag.Parse()
	b, err := open(os.Getenv("NOVALET_CLOUD"), *ours, *stock)
	if err == nil {
		err = b.run(*rounds, *batches, *many, *idle, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench boot:", err)
		os.Exit(1)
	}
}

type bench struct {
	dir     string
	hosts   [2]string // ours, the peer's
	tap     *tap
	compute *gophercloud.ServiceClient
	image   string
	flavor  string
	network string
	api     *httpapi.Client
	options map[string]string
	// peerRequests is what peerRest counted; 0 until then.
	peerRequests float64
}

func open(dir, ours, stock string) (*bench, error) {
	if dir == "" {
		return nil, fmt.Errorf("set NOVALET_CLOUD to the cloud's folder (make cloud makes one)")
	}
	b := &bench{dir: dir, hosts: [2]string{ours, stock}, api: &httpapi.Client{Path: filepath.Join(dir, "novalet", "novalet.sock")}, options: map[string]string{}}
	env, err := openrc(filepath.Join(dir, "openrc-admin"))
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	p, err := openstack.AuthenticatedClient(ctx, gophercloud.AuthOptions{IdentityEndpoint: env["OS_AUTH_URL"], Username: env["OS_USERNAME"],
		Password: env["OS_PASSWORD"], AllowReauth: true, DomainName: "Default", Scope: &gophercloud.AuthScope{ProjectName: env["OS_PROJECT_NAME"], DomainName: "Default"}})
	if err != nil {
		return nil, err
	}
	eo := gophercloud.EndpointOpts{Region: env["OS_REGION_NAME"]}
	if b.compute, err = openstack.NewComputeV2(p, eo); err != nil {
		return nil, err
	}
	b.compute.Microversion = "2.79"
	net, err := openstack.NewNetworkV2(p, eo)
	if err != nil {
		return nil, err
	}
	glance, err := openstack.NewImageV2(p, eo)
	if err != nil {
		return nil, err
	}
	if err := b.find(ctx, net, glance); err != nil {
		return nil, err
	}
	cfg, err := osloconf.Load([]string{filepath.Join(dir, "etc", "nova-compute.conf")}, nil)
	if err != nil {
		return nil, err
	}
	for _, o := range []string{"vif_plugging_timeout", "vif_plugging_is_fatal", "report_interval"} {
		b.options[o] = cfg.String("DEFAULT", o, "default")
	}
	url := strings.Replace(cfg.String("DEFAULT", "transport_url", ""), "rabbit://", "amqp://", 1)
	settings, err := os.ReadFile(filepath.Join(dir, "settings"))
	if err != nil {
		return nil, err
	}
	if m := regexp.MustCompile(`SAVED_NET=(\S+)`).FindSubmatch(settings); m != nil {
		b.options["net"] = string(m[1])
	}
	b.tap, err = openTap(url, b.hosts[:])
	return b, err
}

// find looks up the image, the flavor and the network that make cloud leaves.
func (b *bench) find(ctx context.Context, net, glance *gophercloud.ServiceClient) error {
	page, err := flavors.ListDetail(b.compute, nil).AllPages(ctx)
	if err != nil {
		return err
	}
	fl, err := flavors.ExtractFlavors(page)
	if err != nil {
		return err
	}
	for _, f := range fl {
		if f.Name == "m1.tiny" {
			b.flavor = f.ID
		}
	}
	if page, err = images.List(glance, images.ListOpts{Name: "busybox"}).AllPages(ctx); err != nil {
		return err
	}
	im, err := images.ExtractImages(page)
	if err != nil {
		return err
	}
	if page, err = networks.List(net, networks.ListOpts{Name: "private"}).AllPages(ctx); err != nil {
		return err
	}
	nl, err := networks.ExtractNetworks(page)
	if err != nil {
		return err
	}
	if len(im) == 0 || len(nl) == 0 || b.flavor == "" {
		return fmt.Errorf("the cloud lacks the image busybox, the flavor m1.tiny or the network private")
	}
	b.image, b.network = im[0].ID, nl[0].ID
	return nil
}

func openrc(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	env := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		if line, ok := strings.CutPrefix(s.Text(), "export "); ok {
			for _, kv := range strings.Fields(line) {
				k, v, _ := strings.Cut(kv, "=")
				env[k] = strings.Trim(v, `'"`)
			}
		}
	}
	return env, nil
}

// between is the time from one question to nova-api to the next, seldom from one to the next while the bus has not shown what
// is asked for. Each takes a good part of a processor for as long as it lasts, and of Neutron's time those for a whole server:
// asked all the while they made a delete longer by some 45 ms.
const between, seldom = 50 * time.Millisecond, 5 * time.Second

// boot asks for a server on a host and waits until it is ACTIVE.
func (b *bench) boot(host string, net bool) (uuid string, postToActive time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var nets any = "none"
	if net {
		nets = []servers.Network{{UUID: b.network}}
	}
	start := time.Now()
	s, err := servers.Create(ctx, b.compute, servers.CreateOpts{Name: "bench", ImageRef: b.image, FlavorRef: b.flavor, Networks: nets,
		AvailabilityZone: "nova:" + host}, nil).Extract()
	if err != nil {
		return "", 0, fmt.Errorf("create a server on %s: %w", host, err)
	}
	for {
		b.tap.wait(start, s.ID, "Instance.save", "active", seldom)
		got, err := servers.Get(ctx, b.compute, s.ID).Extract()
		switch {
		case err != nil:
			return s.ID, 0, err
		case got.Status == "ACTIVE":
			return s.ID, time.Since(start), nil
		case got.Status == "ERROR":
			return s.ID, 0, fmt.Errorf("server %s on %s is in ERROR: %q", s.ID, host, got.Fault.Message)
		}
		time.Sleep(between)
	}
}

// remove deletes a server and waits until it is gone. It asks for the addresses, which are in Nova's database: to show a whole
// server nova-api asks Neutron twice, which is just what the delete waits for.
func (b *bench) remove(uuid string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	if err := servers.Delete(ctx, b.compute, uuid).ExtractErr(); err != nil && !gophercloud.ResponseCodeIs(err, http.StatusNotFound) {
		return err
	}
	for {
		b.tap.wait(start, uuid, "Instance.destroy", "", seldom)
		err := servers.ListAddresses(b.compute, uuid).EachPage(ctx, func(context.Context, pagination.Page) (bool, error) { return true, nil })
		if gophercloud.ResponseCodeIs(err, http.StatusNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		time.Sleep(between)
	}
}

// wired reads from the agent's log how long a boot waited for Neutron to wire its ports.
func (b *bench) wired(uuid string) (time.Duration, error) {
	text, err := os.ReadFile(filepath.Join(b.dir, "log", "novalet.log"))
	if err != nil {
		return 0, err
	}
	m := regexp.MustCompile(`msg="instance booted" instance=` + uuid + ` .*steps\.wired=(\S+)`).FindSubmatch(text)
	if m == nil {
		return 0, fmt.Errorf("the agent's log has no boot of %s", uuid)
	}
	return time.ParseDuration(string(m[1]))
}

// rest reads the agent's own count of REST requests.
func (b *bench) rest() (float64, error) {
	text, err := b.api.Metrics(context.Background())
	if err != nil {
		return 0, err
	}
	var n float64
	for l := range strings.Lines(string(text)) {
		if f := strings.Fields(l); len(f) == 2 && strings.HasPrefix(f[0], "novalet_rest_requests_total{") && !strings.Contains(f[0], `service="identity"`) {
			v, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				return 0, err
			}
			n += v
		}
	}
	return n, nil
}

// resident is the memory in MiB of a service by the cloud's pid file.
func (b *bench) resident(name string) (float64, error) {
	pid, err := os.ReadFile(filepath.Join(b.dir, "run", name+".pid"))
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(pid)), "status"))
	if err != nil {
		return 0, err
	}
	var kb float64
	for l := range strings.Lines(string(text)) {
		if _, err := fmt.Sscanf(l, "VmRSS: %f kB", &kb); err == nil {
			return kb / 1024, nil
		}
	}
	return 0, fmt.Errorf("no VmRSS of %s", name)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (b *bench) run(rounds, batches, many int, idle time.Duration, out string) error {
	name := "boot"
	if n := b.options["net"]; n != "linuxbridge" {
		name += "-" + n
	}
	r := report.New(name, rounds)
	for k, v := range b.options {
		r.Options[k] = v
	}
	s := series{}
	// keep writes what is measured by now: the rest of a run may fail, or be cut off.
	keep := func() error {
		b.rows(r, s)
		_, err := r.Save(out)
		return err
	}
	// A round that fails is the last one; the rows that do not hang on it are measured all the same.
	var failed error
	// The first boot of each fetches the image and fills caches: it is not counted.
	for i := -1; i < rounds; i++ {
		one := series{}
		if failed = b.round(one); failed != nil {
			failed = fmt.Errorf("round %d of %d: %w", i+1, rounds, failed)
			fmt.Fprintln(os.Stderr, "bench boot:", failed)
			failed = errors.Join(failed, b.removeAll("bench"))
			break
		}
		if i >= 0 {
			s.append(one)
		}
		if err := keep(); err != nil {
			return err
		}
		fmt.Printf("round %d of %d\n", i+1, rounds)
	}
	for i := range batches {
		one := series{}
		if err := b.batch(one); err != nil {
			err = fmt.Errorf("batch %d of %d: %w", i+1, batches, err)
			fmt.Fprintln(os.Stderr, "bench boot:", err)
			if i == 0 {
				r.Missing["concurrent20_nonet"] = err.Error()
			}
			failed = errors.Join(failed, err, b.removeAll("bench"))
			break
		}
		s.append(one)
		if err := keep(); err != nil {
			return err
		}
		fmt.Printf("batch %d of %d\n", i+1, batches)
	}
	rss := [2]float64{}
	for who, name := range []string{"novalet", "nova-compute-" + b.hosts[1]} {
		var err error
		if rss[who], err = b.resident(name); err != nil {
			return errors.Join(err, keep())
		}
	}
	s["rss_idle_mib"] = append(s["rss_idle_mib"], rss)
	if many > 0 {
		if err := b.many(s, many); err != nil {
			r.Missing["rss_200_mib"] = err.Error()
		}
	}
	if idle > 0 {
		if err := b.idle(s, idle); err != nil {
			r.Missing["idle_messages"], r.Missing["idle_bytes"] = err.Error(), err.Error()
		}
	}
	if err := keep(); err != nil {
		return err
	}
	if peer, err := b.peerRest(); err != nil {
		r.Missing["rest_calls"] = err.Error()
	} else {
		b.peerRequests = peer
	}
	b.rows(r, s)
	return errors.Join(failed, r.Write(os.Stdout, out))
}

// round boots and deletes one server without and one with a network on each contender.
func (b *bench) round(s series) error {
	for _, net := range []bool{false, true} {
		for who, host := range b.hosts {
			start := time.Now()
			restBefore, err := b.rest()
			if err != nil {
				return err
			}
			uuid, post, err := b.boot(host, net)
			if err != nil {
				return err
			}
			ev, took, err := b.await(start, uuid, "build_and_run_instance", "Instance.save", "active")
			if err != nil {
				return err
			}
			restAfter, err := b.rest()
			if err != nil {
				return err
			}
			n := calls(ev, requestOf(ev, uuid, "build_and_run_instance"))
			var wait time.Duration
			if net && who == 0 {
				if wait, err = b.wired(uuid); err != nil {
					return err
				}
			}
			start = time.Now()
			if err := b.remove(uuid); err != nil {
				return err
			}
			dev, del, err := b.await(start, uuid, "terminate_instance", "Instance.destroy", "")
			if err != nil {
				return err
			}
			if net {
				s.add("own_time_onenet", who, ms(took-wait))
				s.add("total_onenet", who, ms(took))
				s.add("wired_wait", who, ms(wait))
				s.add("post_to_active_onenet", who, ms(post))
				s.add("conductor_calls", who, float64(n))
				s.add("delete", who, ms(del))
				s.add("conductor_calls_delete", who, float64(calls(dev, requestOf(dev, uuid, "terminate_instance"))))
				if who == 0 {
					s.add("rest_calls", 0, restAfter-restBefore)
				}
			} else {
				s.add("cast_to_active_nonet", who, ms(took))
				s.add("post_to_active_nonet", who, ms(post))
			}
		}
	}
	return nil
}

// await waits until the tap has seen the end of an operation.
func (b *bench) await(from time.Time, uuid, cast, save, vmState string) ([]event, time.Duration, error) {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		ev := b.tap.since(from)
		if d, ok := span(ev, uuid, cast, save, vmState); ok {
			time.Sleep(300 * time.Millisecond) // what goes on beside the last save
			return b.tap.since(from), d, nil
		}
	}
	return nil, 0, fmt.Errorf("the bus shows no %s with %s of %s", cast, save, uuid)
}

// batch boots twenty at once on each contender: from the first cast to the last final save.
func (b *bench) batch(s series) error {
	const n = 20
	for who, host := range b.hosts {
		start := time.Now()
		uuids := make([]string, n)
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { uuids[i], _, errs[i] = b.boot(host, false) })
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
		var total time.Duration
		for _, id := range uuids {
			_, d, err := b.await(start, id, "build_and_run_instance", "Instance.save", "active")
			if err != nil {
				return err
			}
			total = max(total, d)
		}
		s.add("concurrent20_nonet", who, ms(total))
		for i := range n {
			wg.Go(func() { errs[i] = b.remove(uuids[i]) })
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
	}
	return nil
}
