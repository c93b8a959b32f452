package cloud_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/services"
)

// needAlone skips a test that others would notice: one that brings a second compute host into the cloud, to which their servers
// go, too, or takes something from it.
func needAlone(t *testing.T) {
	t.Helper()
	state(t)
	if os.Getenv("NOVALET_CLOUD_ALONE") == "" {
		t.Skip("others on the cloud would notice: a second compute host, a broker that restarts: NOVALET_CLOUD_ALONE=1")
	}
}

// secondHost is an agent with a host name and a state of its own that serves in the cloud.
type secondHost struct {
	t         *testing.T
	name, dir string
	conf      string
	cmd       *exec.Cmd
	out       *lockedBuffer
}

// newSecondHost starts it with more configuration than the cloud's own, and takes all it is away at the end.
func newSecondHost(t *testing.T, name, more string) *secondHost {
	t.Helper()
	own, err := os.ReadFile(filepath.Join(state(t), "etc", "nova-compute.conf"))
	if err != nil {
		t.Fatal(err)
	}
	h := &secondHost{t: t, name: name, dir: filepath.Join(state(t), name, "novalet")}
	h.conf = filepath.Join(h.dir, "nova.conf")
	text := strings.ReplaceAll(string(own), filepath.Join(state(t), "novalet")+"\n", h.dir+"\n")
	text = strings.Replace(text, "host = "+computeHost(), "host = "+name, 1)
	if err := os.MkdirAll(h.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.conf, []byte(text+more), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.clear)
	h.start()
	return h
}

func (h *secondHost) start() {
	h.t.Helper()
	h.out = new(lockedBuffer)
	h.cmd = exec.Command(novaletBin(), "agent", "--config-file", h.conf)
	h.cmd.Stdout, h.cmd.Stderr = h.out, h.out
	if err := h.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, long, h.name+" serves", func() error {
		if !strings.Contains(h.out.String(), "compute service started") {
			return fmt.Errorf("it says %s", tail(h.out.String(), 500))
		}
		l, err := h.services()
		if err == nil && (len(l) != 1 || l[0].State != "up" && !l[0].ForcedDown) {
			err = fmt.Errorf("its services: %v; it says %s", l, tail(h.out.String(), 500))
		}
		return err
	})
}

// end ends the agent and waits for it; its instances run on.
func (h *secondHost) end(s os.Signal) {
	if h.cmd == nil {
		return
	}
	_ = h.cmd.Process.Signal(s)
	_ = h.cmd.Wait() // a killed one is no failure
	h.cmd = nil
}

func (h *secondHost) services() ([]services.Service, error) {
	admin := as(h.t, "admin")
	p, err := services.List(admin.compute, services.ListOpts{Binary: "nova-compute", Host: h.name}).AllPages(context.Background())
	if err != nil {
		return nil, err
	}
	return services.ExtractServices(p)
}

// forceDown says that the host is dead, or alive again.
func (h *secondHost) forceDown(down bool) {
	h.t.Helper()
	l, err := h.services()
	if err != nil || len(l) != 1 {
		h.t.Fatalf("services of %s: %v, %v", h.name, l, err)
	}
	admin := as(h.t, "admin")
	_, err = admin.compute.Put(context.Background(), admin.compute.ServiceURL("os-services", l[0].ID), map[string]any{"forced_down": down}, nil,
		&gophercloud.RequestOpts{OkCodes: []int{http.StatusOK}})
	if err != nil {
		h.t.Fatalf("force down %v: %v", down, err)
	}
}

// containers lists what runs there, as the host's own agent sees it.
func (h *secondHost) containers() string {
	h.t.Helper()
	out, err := sh(context.Background(), "env", "NOVALET_SOCKET="+filepath.Join(h.dir, "novalet.sock"), novaletBin(), "ps", "-q")
	if err != nil {
		h.t.Fatalf("novalet ps on %s: %v", h.name, err)
	}
	return out
}

// clear ends the agent, and takes its records from Nova and its folder from the host.
func (h *secondHost) clear() {
	h.end(syscall.SIGTERM)
	l, err := h.services()
	if err != nil {
		h.t.Error(err)
	}
	admin := as(h.t, "admin")
	for _, s := range l {
		if err := services.Delete(context.Background(), admin.compute, s.ID).ExtractErr(); err != nil {
			h.t.Errorf("delete the service of %s: %v", h.name, err)
		}
	}
	// Its keepers and prepared sandboxes, and what is mounted.
	if out, err := sh(context.Background(), "env", "STATE="+filepath.Dir(h.dir), "bash", "../../devstack/host.sh", "guests"); err != nil {
		h.t.Errorf("clean up after %s: %v: %s", h.name, err, out)
		return
	}
	if err := os.RemoveAll(filepath.Dir(h.dir)); err != nil {
		h.t.Error(err)
	}
}

// bootOn boots on one host, which only an administrator may name.
func bootOn(t *testing.T, admin *user, host string, o bootOpts) *servers.Server {
	t.Helper()
	o.zone = "nova:" + host
	var s *servers.Server
	// The scheduler looks for new hosts now and then.
	eventually(t, long, "Nova schedules to "+host, func() (err error) {
		if s == nil {
			if s, err = tryCreate(t, admin, o); err != nil {
				return err
			}
		}
		now, err := servers.Get(t.Context(), admin.compute, s.ID).Extract()
		if err != nil {
			return err
		}
		if now.Status == "ERROR" {
			err = errors.New(now.Fault.Message)
			if !strings.Contains(err.Error(), "is not mapped to any cell") {
				t.Fatalf("server %s is in ERROR: %v", o.name, err)
			}
			remove(t, admin, s.ID)
			s = nil
			return err
		}
		if now.Status != "ACTIVE" {
			return fmt.Errorf("status %s", now.Status)
		}
		return nil
	})
	return waitStatus(t, admin, s.ID, "ACTIVE")
}
