package cloud_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// api asks Nova's API for what the library has no call for, at a microversion, and gives the answer's body.
func api(t *testing.T, u *user, microversion, method, path string, body any, ok ...int) (map[string]json.RawMessage, error) {
	t.Helper()
	c := *u.compute
	c.Microversion = microversion
	var out map[string]json.RawMessage
	opts := &gophercloud.RequestOpts{OkCodes: ok, JSONBody: body}
	if slices.Contains(ok, http.StatusOK) {
		opts.JSONResponse = &out
	}
	resp, err := c.Request(t.Context(), method, c.ServiceURL(strings.Split(path, "/")...), opts)
	if err == nil {
		_ = resp.Body.Close()
	}
	return out, err
}

// TestDiagnostics: an operator sees the counters of a running server, in Nova's own form and in the older one, and is refused what
// does not run.
func TestDiagnostics(t *testing.T) {
	admin := as(t, "admin")
	u := as(t, "demo")
	s := boot(t, u, bootOpts{image: appImage.id(t, u)})
	path := "servers/" + s.ID + "/diagnostics"
	d, err := api(t, admin, "2.48", "GET", path, nil, http.StatusOK)
	must(t, err)
	var nics []struct {
		MAC string `json:"mac_address"`
		Rx  int    `json:"rx_packets"`
	}
	must(t, json.Unmarshal(d["nic_details"], &nics))
	if string(d["state"]) != `"running"` || len(nics) != 1 || !strings.HasPrefix(nics[0].MAC, "fa:16:3e:") || string(d["num_cpus"]) != "1" {
		t.Errorf("%s", d)
	}
	if d, err = api(t, admin, "2.1", "GET", path, nil, http.StatusOK); err != nil || d["memory"] == nil || d[nics[0].MAC+"_rx"] == nil {
		t.Errorf("the older form: %s %v", d, err)
	}
	must(t, servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "SHUTOFF")
	if _, err := api(t, admin, "2.48", "GET", path, nil, http.StatusOK); !gophercloud.ResponseCodeIs(err, http.StatusConflict) {
		t.Errorf("of a stopped server: %v", err)
	}
}

// TestUptime: the hypervisor's line is one of uptime(1).
func TestUptime(t *testing.T) {
	admin := as(t, "admin")
	d, err := api(t, admin, "2.53", "GET", "os-hypervisors/"+providerID(t)+"/uptime", nil, http.StatusOK)
	must(t, err)
	var h struct{ State, Uptime string }
	must(t, json.Unmarshal(d["hypervisor"], &h))
	if h.State != "up" || !strings.Contains(h.Uptime, "load average: ") {
		t.Errorf("%+v", h)
	}
}

// TestInjectNetworkInfo: what an operator sends to repair a server's network ends well, and the network is as before.
func TestInjectNetworkInfo(t *testing.T) {
	admin := as(t, "admin")
	u := as(t, "demo")
	s := boot(t, u, bootOpts{image: appImage.id(t, u), groups: []string{openGroup(t, u)}})
	ip, _ := fixedIP(t, u, s.ID)
	pid, _, _ := strings.Cut(initPID(t, s.ID), "@")
	for range 2 { // the first time the agent may learn something new, and set the addresses for that
		out, err := sh(t.Context(), "nsenter", "-t", pid, "-n", "ip", "addr", "flush", "dev", "eth0")
		if err != nil {
			t.Fatal(err, out)
		}
		_, err = api(t, admin, "2.79", "POST", "servers/"+s.ID+"/action", map[string]any{"injectNetworkInfo": nil}, http.StatusAccepted)
		must(t, err)
		eventually(t, long, "the address is back", func() error {
			if out := inside(t, s.ID, "ip", "-4", "addr", "show", "eth0"); !strings.Contains(out, ip+"/") {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	}
	ping(t, besideNS(t, u), ip)
}

// TestFixedIPs: one more address of the server's network, and one less, as clients before microversion 2.44 ask for it.
func TestFixedIPs(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	s := boot(t, u, bootOpts{image: image, groups: []string{openGroup(t, u)}})
	first, _ := fixedIP(t, u, s.ID)
	addresses := func(want int) (list []string) {
		t.Helper()
		eventually(t, long, fmt.Sprintf("the server has %d addresses", want), func() error {
			now, err := servers.Get(t.Context(), u.compute, s.ID).Extract()
			if err != nil {
				return err
			}
			list = nil
			for _, l := range now.Addresses {
				for _, a := range l.([]any) {
					list = append(list, a.(map[string]any)["addr"].(string))
				}
			}
			out := inside(t, s.ID, "ip", "-4", "addr", "show", "eth0")
			for _, a := range list {
				if !strings.Contains(out, a+"/") {
					return fmt.Errorf("%s is not inside: %s", a, out)
				}
			}
			if len(list) != want || strings.Count(out, "inet ") != want {
				return fmt.Errorf("%v; inside: %s", list, out)
			}
			return nil
		})
		return list
	}
	action := func(what map[string]any) {
		t.Helper()
		_, err := api(t, u, "2.43", "POST", "servers/"+s.ID+"/action", what, http.StatusAccepted)
		must(t, err)
	}
	addresses(1)
	action(map[string]any{"addFixedIp": map[string]string{"networkId": networkID(t, u, privateNet(u))}})
	more := slices.DeleteFunc(addresses(2), func(a string) bool { return a == first })
	ping(t, besideNS(t, u), more[0])
	action(map[string]any{"removeFixedIp": map[string]string{"address": more[0]}})
	if left := addresses(1); left[0] != first {
		t.Errorf("left is %v, not %s", left, first)
	}
	remove(t, u, s.ID)
}

// TestCrashDump: a container has no kernel to dump; the action says so, and the server runs on.
func TestCrashDump(t *testing.T) {
	u := as(t, "demo")
	s := boot(t, u, bootOpts{image: appImage.id(t, u), noNet: true})
	was := initPID(t, s.ID)
	_, err := api(t, u, "2.79", "POST", "servers/"+s.ID+"/action", map[string]any{"trigger_crash_dump": nil}, http.StatusAccepted)
	must(t, err)
	eventually(t, long, "the action ends", func() error {
		d, err := api(t, u, "2.79", "GET", "servers/"+s.ID+"/os-instance-actions", nil, http.StatusOK)
		if err != nil {
			return err
		}
		var list []struct{ Action, Message string }
		if err := json.Unmarshal(d["instanceActions"], &list); err != nil {
			return err
		}
		if list[0].Action != "trigger_crash_dump" || list[0].Message != "Error" {
			return fmt.Errorf("%+v", list)
		}
		return nil
	})
	waitStatus(t, u, s.ID, "ACTIVE")
	if now := initPID(t, s.ID); now != was {
		t.Errorf("init was %s, is %s", was, now)
	}
}
