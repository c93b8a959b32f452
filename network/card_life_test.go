//go:build !standin

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/hosttest"
)

// holder is a process in a network namespace that has nothing else to keep it.
func holder(t *testing.T) (path string, end func()) {
	t.Helper()
	cmd := exec.Command("sleep", "100000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := false
	end = func() {
		if !done {
			done = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(end)
	return fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid), end
}

// TestCardNamespaceEnds: a namespace that ends with a function in it gives it back, whatever the guest called it, and both
// the next plug and an unplug find it.
func TestCardNamespaceEnds(t *testing.T) {
	p, devices := useCard(t)
	p.returnTime = hosttest.Patience(p.returnTime)
	d := devices[0]
	v := cardVIF(d, 0, 42)
	for _, name := range []string{"", "mine", d.ParentName, "lo"} {
		for _, again := range []bool{true, false} {
			path, end := holder(t)
			r := &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: path, Static: true}
			if err := p.Plug(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			ns, err := openNetNS(path)
			if err != nil {
				t.Fatal(err)
			}
			inside(t, ns, func() error {
				l, err := netlink.LinkByName("eth0")
				if err != nil || name == "" {
					return err
				}
				if name == "lo" {
					// Two of that name are one too many only on the host.
					lo, err := netlink.LinkByName("lo")
					if err != nil {
						return err
					}
					if err := errors.Join(netlink.LinkSetDown(lo), netlink.LinkSetName(lo, "lo0")); err != nil {
						return err
					}
				}
				return errors.Join(netlink.LinkSetDown(l), netlink.LinkSetName(l, name), netlink.LinkSetAlias(l, "mine"), netlink.LinkSetMTU(l, 1000),
					netlink.LinkAddAltName(l, "minetoo"), netlink.LinkAddAltName(l, devices[1].Name),
					netlink.SetPromiscOn(l), netlink.LinkSetAllmulticastOn(l), netlink.LinkSetARPOff(l))
			})
			ns.Close()
			end()
			if again {
				next := newNS(t)
				r.NetNS = nsPath(next)
				if err := p.Plug(t.Context(), r); err != nil {
					t.Fatal(err)
				}
				if seen := state(t, next); !strings.Contains(seen, "eth0 "+evilMAC+" up mtu 1450\n  10.78.0.10/22\n") {
					t.Errorf("%q, inside the next: %s", name, seen)
				}
				if err := p.Park(t.Context(), instA, v, r.NetNS); err != nil {
					t.Fatal(err)
				}
			} else {
				link, err := p.awaitFunction(t.Context(), d.Address)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("called %q it comes back as %s", name, link.Attrs().Name)
			}
			if err := p.Unplug(t.Context(), instA, v); err != nil {
				t.Fatal(err)
			}
			expectBack(t, p, d)
		}
	}
}

// dying kills its process at one of the calls.
type dying struct {
	functions
	left int
}

func (d *dying) call() {
	if d.left--; d.left == 0 {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
}

func (d *dying) address(l netlink.Link) string {
	d.call()
	return d.functions.address(l)
}

func (d *dying) settings(parent string, vf int) (vfSettings, error) {
	d.call()
	return d.functions.settings(parent, vf)
}

func (d *dying) set(parent string, vf int, have, want vfSettings) error {
	d.call()
	err := d.functions.set(parent, vf, have, want)
	d.call()
	return err
}

// TestCardKilledAgent: an agent that is killed at any moment of a plug leaves what the next one can plug, or give back.
func TestCardKilledAgent(t *testing.T) {
	const key = "NOVALET_TEST_DYING_PLUG"
	if text := os.Getenv(key); text != "" {
		var o struct {
			Device *novalet.PCIDevice
			NetNS  string
			Calls  int
		}
		if err := json.Unmarshal([]byte(text), &o); err != nil {
			t.Fatal(err)
		}
		p := newPlugger(t, Options{})
		p.pci = &dying{p.pci, o.Calls}
		if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: cardVIF(o.Device, 0, 42), NetNS: o.NetNS, Static: true}); err != nil {
			t.Fatal(err)
		}
		return
	}
	p, devices := useCard(t)
	d := devices[0]
	v := cardVIF(d, 0, 42)
	for calls := 1; ; calls++ {
		path, end := holder(t)
		text, err := json.Marshal(map[string]any{"Device": d, "NetNS": path, "Calls": calls})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe", "-test.run", "^TestCardKilledAgent$")
		cmd.Env = append(os.Environ(), key+"="+string(text))
		out, err := cmd.CombinedOutput()
		var died *exec.ExitError
		if err != nil && (!errors.As(err, &died) || died.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL) {
			t.Fatalf("plug that dies at call %d: %v: %s", calls, err, out)
		}
		whole := err == nil
		if calls%2 == 0 {
			if err := p.Plug(t.Context(), &novalet.PlugRequest{InstanceUUID: instA, VIF: v, NetNS: path, Static: true}); err != nil {
				t.Fatalf("after call %d: %v", calls, err)
			}
			expectHeld(t, d, evilMAC, "vlan 42", "spoof checking on", "trust off")
			ns, err := openNetNS(path)
			if err != nil {
				t.Fatal(err)
			}
			if seen := state(t, ns); !strings.Contains(seen, "eth0 "+evilMAC+" up mtu 1450\n  10.78.0.10/22\n") {
				t.Errorf("after call %d, inside: %s", calls, seen)
			}
			ns.Close()
		}
		if err := errors.Join(p.Park(t.Context(), instA, v, path), p.Unplug(t.Context(), instA, v)); err != nil {
			t.Fatalf("after call %d: %v", calls, err)
		}
		expectBack(t, p, d)
		end()
		if whole {
			t.Logf("a plug has %d moments", calls)
			break
		}
		if calls > 200 {
			t.Fatal("a plug without end")
		}
	}
}
