package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/network"
)

// inNamespace runs the program again in a network namespace without IPv6, and f there.
func inNamespace(f func() error) error {
	const inside = "NOVALET_BENCH_INSIDE"
	if os.Geteuid() != 0 {
		return errors.New("needs root")
	}
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		return cmd.Run()
	}
	for _, scope := range []string{"all", "default"} {
		// A kernel without IPv6 has no such file.
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+scope+"/disable_ipv6", []byte("1"), 0)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set up lo: %w", err)
	}
	return f()
}

const bridgeName = "brqbench"

// bridge is where the instances' ports are.
type bridge struct{ p *network.Plugger }

func newBridge() (*bridge, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	br := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(br); err != nil {
		return nil, fmt.Errorf("make bridge: %w", err)
	}
	if err := netlink.LinkSetUp(br); err != nil {
		return nil, fmt.Errorf("set up bridge: %w", err)
	}
	p, err := network.New(network.Options{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return nil, err
	}
	return &bridge{p: p}, nil
}

func (b *bridge) close() { _ = b.p.Close() }

// vif is a port as Neutron's Linux bridge agent describes it.
func (b *bridge) vif(n int) *novalet.VIF {
	return &novalet.VIF{ID: fmt.Sprintf("%08x-%02x00-4000-8000-000000000000", n>>8, n&255), Type: "bridge", Address: fmt.Sprintf("fa:16:3e:%02x:%02x:%02x", n>>16&255, n>>8&255, n&255),
		Network: novalet.VIFNetwork{Bridge: bridgeName, Meta: novalet.NetworkMeta{MTU: 1500}, Subnets: []novalet.Subnet{{
			CIDR: "10.66.0.0/16", IPs: []novalet.FixedIP{{Address: fmt.Sprintf("10.66.%d.%d", 1+n/200%200, 1+n%200)}}}}}}
}

func (b *bridge) plug(ctx context.Context, in *instance, netns string) error {
	return b.p.Plug(ctx, &novalet.PlugRequest{InstanceUUID: in.id, VIF: in.vif, NetNS: netns, Static: true})
}

func (b *bridge) unplug(ctx context.Context, in *instance) error {
	return b.p.Unplug(ctx, in.id, in.vif)
}
