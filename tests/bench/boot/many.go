package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/flavors"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"

	"github.com/novalet/novalet/tests/bench/report"
)

// many measures the agent's memory with n instances on its host, without networks. They are of a flavor that takes nothing
// of the host in Placement but a little memory, else no host of a bench had room for them. The peer has no part in it.
func (b *bench) many(s series, n int) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	fmt.Printf("booting %d\n", n)
	disk := 0
	fl, err := flavors.Create(ctx, b.compute, flavors.CreateOpts{Name: fmt.Sprintf("bench.%d", time.Now().UnixNano()), RAM: 64, VCPUs: 1, Disk: &disk}).Extract()
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, flavors.Delete(context.WithoutCancel(ctx), b.compute, fl.ID).ExtractErr())
	}()
	specs := flavors.ExtraSpecsOpts{"resources:VCPU": "0", "resources:DISK_GB": "0", "resources:MEMORY_MB": "16"}
	if err := flavors.CreateExtraSpecs(ctx, b.compute, fl.ID, specs).Err; err != nil {
		return err
	}
	name := "bench-" + fl.ID
	defer func() { err = errors.Join(err, b.removeAll(name)) }()
	for left := n; left > 0; left -= 20 {
		_, err := servers.Create(ctx, b.compute, servers.CreateOpts{Name: name, ImageRef: b.image, FlavorRef: fl.ID, Networks: "none",
			AvailabilityZone: "nova:" + b.hosts[0], Min: min(left, 20), Max: min(left, 20)}, nil).Extract()
		if err != nil {
			return err
		}
		if err := b.allActive(ctx, name, n-max(left-20, 0)); err != nil {
			return err
		}
	}
	var samples []float64
	for range 10 {
		time.Sleep(3 * time.Second)
		v, err := b.resident("novalet")
		if err != nil {
			return err
		}
		samples = append(samples, v)
	}
	s.add("rss_200_mib", 0, report.Median(samples))
	return nil
}

// named lists the servers of a name.
func (b *bench) named(ctx context.Context, name string) ([]servers.Server, error) {
	page, err := servers.List(b.compute, servers.ListOpts{Name: "^" + name}).AllPages(ctx)
	if err != nil {
		return nil, err
	}
	return servers.ExtractServers(page)
}

// allActive waits until n servers of a name are ACTIVE.
func (b *bench) allActive(ctx context.Context, name string, n int) error {
	for {
		list, err := b.named(ctx, name)
		if err != nil {
			return err
		}
		active := 0
		for _, s := range list {
			switch s.Status {
			case "ACTIVE":
				active++
			case "ERROR":
				return fmt.Errorf("server %s: %s", s.ID, s.Fault.Message)
			}
		}
		if active == n {
			return nil
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return fmt.Errorf("%d of %d servers are ACTIVE: %w", active, n, ctx.Err())
		}
	}
}

// removeAll deletes the servers of a name and waits until they are gone.
func (b *bench) removeAll(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	asked := map[string]bool{}
	for {
		list, err := b.named(ctx, name)
		if err != nil || len(list) == 0 {
			return err
		}
		for _, s := range list {
			if asked[s.ID] {
				continue
			}
			asked[s.ID] = true
			if err := servers.Delete(ctx, b.compute, s.ID).ExtractErr(); err != nil && !gophercloud.ResponseCodeIs(err, http.StatusNotFound) {
				return err
			}
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return fmt.Errorf("%d servers are left: %w", len(list), ctx.Err())
		}
	}
}
