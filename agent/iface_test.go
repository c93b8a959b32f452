package agent

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/fake"
)

// addresses lists what Nova shows and what the host has set inside.
func (l *lab) addresses(uuid string) (shown []string, inside []string) {
	for _, v := range l.world.Row(uuid).Info {
		for _, s := range v.Network.Subnets {
			for _, ip := range s.IPs {
				shown = append(shown, ip.Address)
			}
		}
	}
	for _, p := range l.world.Plugs(uuid) {
		inside = append(inside, strings.Fields(strings.ReplaceAll(p.Address, ",", " "))...)
	}
	return shown, inside
}

func TestFixedIPs(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	first, _ := l.addresses(uuid)
	add := l.cast(uuid, novalet.MethodAddFixedIP, novalet.TaskNone, novalet.OperationArgs{NetworkID: "net"})
	eventually(t, "the address was added", func() bool { return l.idle(uuid) && l.h.Faults.Calls("NetworkAPI.AddAddress") == 1 })
	two, inside := l.addresses(uuid)
	if len(two) != 2 || two[0] != first[0] || !slices.Equal(two, inside) {
		t.Fatalf("Nova shows %v, the guest has %v; want %v and one more", two, inside, first)
	}
	l.cast(uuid, novalet.MethodRemoveFixedIP, novalet.TaskNone, novalet.OperationArgs{Address: two[1]})
	eventually(t, "the address was removed", func() bool {
		shown, inside := l.addresses(uuid)
		return l.idle(uuid) && slices.Equal(shown, first) && slices.Equal(inside, first)
	})
	if got := l.says(uuid); !slices.Equal(got[2:], []string{"create_ip start", "create_ip end", "delete_ip start", "delete_ip end"}) {
		t.Errorf("told %q", got)
	}
	// Delivered again, the first cast does nothing.
	l.submit(add)
	if n := l.h.Faults.Calls("NetworkAPI.AddAddress"); n != 1 {
		t.Errorf("%d addresses were asked for", n)
	}
	l.cast(uuid, novalet.MethodAddFixedIP, novalet.TaskNone, novalet.OperationArgs{NetworkID: "another"})
	eventually(t, "a network without a port is refused", func() bool { return len(l.world.Row(uuid).Faults) == 1 && l.idle(uuid) })
	if r := l.world.Row(uuid); r.VMState != novalet.VMActive {
		t.Errorf("the instance is %s", r.VMState)
	}
}

// A crash after Neutron gave the address does not make it two.
func TestFixedIPOnce(t *testing.T) {
	l := newLab(t)
	uuid := l.boot()
	reached := make(chan struct{})
	agent, faults := l.agent, l.h.Faults
	faults.Hook(func(_ context.Context, name string, p fake.Phase) {
		if name == "NetworkAPI.AddAddress" && p == fake.After {
			agent.store.frozen.Store(true)
			faults.Kill()
			close(reached)
		}
	})
	l.cast(uuid, novalet.MethodAddFixedIP, novalet.TaskNone, novalet.OperationArgs{NetworkID: "net"})
	<-reached
	l.crash()
	l.open()
	eventually(t, "Nova shows both addresses", func() bool {
		shown, _ := l.addresses(uuid)
		return len(shown) == 2 && l.idle(uuid)
	})
	if p := l.world.Ports(uuid); len(p) != 1 || len(p[0].More) != 1 {
		t.Errorf("ports %+v", p)
	}
}
