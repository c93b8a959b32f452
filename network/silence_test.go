package network

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// TestSilence: an instance that is silent neither answers nor speaks, its address and routes stay, what the guest has put
// on the interface itself stays, and afterwards all is as it was.
func TestSilence(t *testing.T) {
	hostNS(t)
	p := newPlugger(t, Options{})
	a, b := newNS(t), newNS(t)
	va, vb := vif(portA, "fa:16:3e:00:00:0a", "10.78.0.10"), vif(portB, "fa:16:3e:00:00:0b", "10.78.0.11")
	for _, r := range []*novalet.PlugRequest{{InstanceUUID: instA, VIF: va, NetNS: nsPath(a), Static: true}, {InstanceUUID: instB, VIF: vb, NetNS: nsPath(b), Static: true}} {
		if err := p.Plug(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	pass, err := loadClassifier([]insn{{op: opMovImm, imm: tcActUnspec}, {op: opExit}})
	if err != nil {
		t.Skipf("the kernel takes no classifier: %v", err)
	}
	t.Cleanup(func() { unix.Close(pass) })
	qdiscs := func() string {
		var out strings.Builder
		inside(t, a, func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			list, err := netlink.QdiscList(l)
			for _, q := range list {
				out.WriteString(q.Type() + " ")
			}
			for _, hook := range silenceHooks {
				have, ferr := netlink.FilterList(l, hook)
				for _, f := range have {
					if b, ok := f.(*netlink.BpfFilter); ok {
						out.WriteString(b.Name + " ")
					}
				}
				err = errors.Join(err, ferr)
			}
			return err
		})
		return out.String()
	}
	silence := func(on bool) {
		t.Helper()
		for range 2 { // repeated, it changes nothing
			if err := p.Silence(t.Context(), instA, va, nsPath(a), on); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, own := range []bool{false, true} {
		if own {
			inside(t, a, func() error {
				l, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				if err := netlink.QdiscAdd(clsact(l)); err != nil {
					return err
				}
				return netlink.FilterAdd(&netlink.BpfFilter{Fd: pass, Name: "guests_own", DirectAction: true, FilterAttrs: netlink.FilterAttrs{
					LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1}})
			})
		}
		before, was := state(t, a), qdiscs()
		if err := ping(b, "10.78.0.10"); err != nil {
			t.Fatal(err)
		}
		silence(true)
		if got := state(t, a); got != before {
			t.Errorf("inside, silent:\n%s\nwas\n%s", got, before)
		}
		if err := inNetNS(b, func() error { return exec.Command("ping", "-c", "2", "-W", "1", "10.78.0.10").Run() }); err == nil {
			t.Error("it answers while silent")
		}
		if err := inNetNS(a, func() error { return exec.Command("ping", "-c", "1", "-W", "1", "10.78.0.11").Run() }); err == nil {
			t.Error("it speaks while silent")
		}
		sent := func() (n uint64) {
			l, err := p.h.LinkByName(tapName(portA))
			if err != nil {
				t.Fatal(err)
			}
			return l.Attrs().Statistics.RxPackets
		}
		n := sent()
		_ = inNetNS(a, func() error { return exec.Command("ping", "-c", "1", "-W", "1", "10.78.0.11").Run() })
		if now := sent(); now != n {
			t.Errorf("%d frames came out of it while silent", now-n)
		}
		silence(false)
		if err := ping(b, "10.78.0.10"); err != nil {
			t.Errorf("it does not answer afterwards: %v", err)
		}
		if err := ping(a, "10.78.0.11"); err != nil {
			t.Errorf("it does not speak afterwards: %v", err)
		}
		if now := qdiscs(); now != was {
			t.Errorf("on the interface are %q, were %q", now, was)
		}
	}
	// What it does not know it leaves alone.
	if err := p.Silence(t.Context(), instB, va, nsPath(a), true); err != nil {
		t.Error(err)
	}
	if err := ping(b, "10.78.0.10"); err != nil {
		t.Errorf("another instance's port was silenced: %v", err)
	}
	if err := p.Unplug(t.Context(), instA, va); err != nil {
		t.Fatal(err)
	}
	if err := p.Silence(t.Context(), instA, va, nsPath(a), true); err != nil {
		t.Errorf("a port that is not plugged: %v", err)
	}
}
