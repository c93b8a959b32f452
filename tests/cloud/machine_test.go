package cloud_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

// cloudConfig is user data that writes a file.
const cloudConfig = "#cloud-config\nwrite_files:\n- {path: /srv/from-user-data, content: it works}\n"

// TestMachine: a Debian root tarball with systemd, cloud-init and sshd boots to its login prompt and lets its user in.
func TestMachine(t *testing.T) {
	u := as(t, "demo")
	image := debianImage.id(t, u)
	leavesNothing(t)
	key, file := newKey(t, u)
	group := openGroup(t, u, 22)
	s := boot(t, u, bootOpts{name: "machine", image: image, flavor: "m1.small", key: key, groups: []string{group}, metadata: map[string]string{"color": "blue"},
		userData: cloudConfig})
	ns := besideNS(t, u)
	ip, port := fixedIP(t, u, s.ID)
	waitLog(t, u, s.ID, "machine login:", long)
	waitSSH(t, ns, file, "debian", ip)
	run := func(t *testing.T, command string) string {
		t.Helper()
		out, err := ssh(ns, file, "debian", ip, command)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	t.Run("inside", func(t *testing.T) {
		for _, c := range []struct{ command, want string }{
			{"hostname", "machine"},
			{"cat /srv/from-user-data", "it works"},
			{"cat /proc/1/comm", "systemd"},
			{"sudo -n id -u", "0"},
			{"curl -s http://169.254.169.254/openstack/latest/meta_data.json | grep -o blue", "blue"},
			{"cat /sys/class/net/eth0/mtu", fmt.Sprint(mtuOf(t, u, networkID(t, u, "private")))},
			{"ip -4 -o addr show eth0 | grep -o " + ip, ip},
			{"ip route show default | cut -d' ' -f1-2", "default via"},
			{"getent hosts machine | wc -l", "1"},
			{"nproc", "1"},
		} {
			if got := run(t, c.command); got != c.want {
				t.Errorf("%s: %q, want %q", c.command, got, c.want)
			}
		}
		eventually(t, long, "no unit failed", func() error {
			out, err := ssh(ns, file, "debian", ip, "systemctl is-system-running; systemctl --failed --no-legend --plain")
			if !strings.HasPrefix(out, "running") {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	})
	t.Run("floating ip", func(t *testing.T) {
		fip := floating(t, u, port)
		waitSSH(t, "", file, "debian", fip)
	})
	t.Run("soft reboot", func(t *testing.T) {
		was := run(t, "cat /proc/sys/kernel/random/boot_id; stat -c %Y /proc/1")
		up := run(t, "cut -d. -f1 /proc/uptime")
		run(t, "echo kept | sudo -n tee /srv/kept")
		must(t, servers.Reboot(t.Context(), u.compute, s.ID, servers.RebootOpts{Type: servers.SoftReboot}).ExtractErr())
		waitStatus(t, u, s.ID, "ACTIVE")
		eventually(t, long, "the machine is up again", func() error {
			out, err := ssh(ns, file, "debian", ip, "cat /srv/kept; stat -c %Y /proc/1")
			if err != nil {
				return err
			}
			if !strings.HasPrefix(out, "kept\n") || strings.HasSuffix(was, strings.TrimSpace(strings.TrimPrefix(out, "kept\n"))) {
				return fmt.Errorf("before %q (up %s s), after %q", was, up, out)
			}
			return nil
		})
	})
	t.Run("power off from inside", func(t *testing.T) {
		_, _ = ssh(ns, file, "debian", ip, "sudo -n systemctl poweroff")
		waitStatus(t, u, s.ID, "SHUTOFF")
		must(t, servers.Start(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, u, s.ID, "ACTIVE")
		waitSSH(t, ns, file, "debian", ip)
	})
	t.Run("stop is clean", func(t *testing.T) {
		start := time.Now()
		must(t, servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
		waitStatus(t, u, s.ID, "SHUTOFF")
		t.Logf("stopped in %v", time.Since(start).Round(time.Millisecond))
		// A machine that was killed writes no such line.
		if log := consoleLog(t, u, s.ID); !strings.Contains(tail(log, 4000), "Reached target") {
			t.Errorf("no sign of an orderly shutdown: %q", tail(log, 1000))
		}
	})
	remove(t, u, s.ID)
}

// TestCloudImage: a disk image as distributions publish them boots as it is: its partitions, its fstab and what it lacks
// of a virtual machine are no hindrance.
func TestCloudImage(t *testing.T) {
	u := as(t, "demo")
	image := upload(t, u, imageSpec{name: "novalet-test-cloud-image", container: "bare", disk: "qcow2"}, mustOpen(t, cloudImage(t)))
	key, file := newKey(t, u)
	s := boot(t, u, bootOpts{name: "cloud-image", image: image, flavor: "m1.small", key: key, groups: []string{openGroup(t, u, 22)}})
	ns := besideNS(t, u)
	ip, _ := fixedIP(t, u, s.ID)
	waitLog(t, u, s.ID, "cloud-image login:", long)
	waitSSH(t, ns, file, "debian", ip)
	eventually(t, long, "no unit failed", func() error {
		out, err := ssh(ns, file, "debian", ip, "systemctl is-system-running; systemctl --failed --no-legend --plain")
		if !strings.HasPrefix(out, "running") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if out, err := ssh(ns, file, "debian", ip, "grep -c PARTUUID /etc/fstab; sudo -n stat -c %U:%a /etc/shadow; df -B1M --output=size / | tail -n 1"); err != nil ||
		// Disks that an instance does not have are not in its fstab; the owners of its files are the image's.
		!strings.HasPrefix(out, "0\nroot:640\n") {
		t.Errorf("inside: %v, %q", err, out)
	}
}

// TestBusyboxMachine: a machine need not have systemd; its init ends at a stop, long before it would be killed.
func TestBusyboxMachine(t *testing.T) {
	u := as(t, "demo")
	root := append(busyboxRoot(t), member{name: "sbin/", mode: 0o755}, member{name: "sbin/init", link: "/bin/busybox", mode: 0o777},
		member{name: "etc/inittab", mode: 0o644, data: []byte("::sysinit:/bin/echo started by init\n::respawn:/bin/sleep 1000\n::shutdown:/bin/echo stopped by init\n")})
	image := upload(t, u, imageSpec{name: "novalet-test-busybox-machine", container: "bare", disk: "raw"}, bytes.NewReader(gzipped(t, makeTar(t, root))))
	s := boot(t, u, bootOpts{image: image, noNet: true})
	waitLog(t, u, s.ID, "started by init", long)
	must(t, servers.Stop(t.Context(), u.compute, s.ID).ExtractErr())
	waitStatus(t, u, s.ID, "SHUTOFF")
	waitLog(t, u, s.ID, "stopped by init", long)
}
