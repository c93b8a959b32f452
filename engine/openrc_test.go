package engine

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/novalet/novalet"
)

// greeter is a service of OpenRC's.
const greeter = `#!/sbin/openrc-run
description="says when it comes and goes"
depend() {
	after *
}
start() {
	ebegin "Starting greeter"
	echo "greeter is up, $RC_RUNLEVEL"
	eend 0
}
stop() {
	echo "greeter is down"
}
`

// openrc returns a Debian whose services are OpenRC's, and an init for it.
func openrc(t testing.TB, more map[string]string, packages ...string) []novalet.Layer {
	t.Helper()
	files := map[string]string{
		"etc/init.d/greeter": greeter,
		// In the runlevel by a copy: a link of that name leads to the same.
		"etc/runlevels/default/greeter": greeter,
	}
	maps.Copy(files, more)
	return packaged(t, files, append([]string{"openrc", "librc1", "libeinfo1"}, packages...)...)
}

// TestOpenRC: a machine whose services are OpenRC's boots to its default runlevel, reboots and powers off from inside,
// and stops in order from outside, its services first: under sysvinit, as Gentoo has it, and under OpenRC's own init.
func TestOpenRC(t *testing.T) {
	sysv := map[string]string{"etc/inittab": `id:3:initdefault:
si::sysinit:/sbin/openrc sysinit
rc::bootwait:/sbin/openrc boot
l0:0:wait:/sbin/openrc shutdown
l0s:0:wait:/sbin/halt -d -f -p
l3:3:wait:/sbin/openrc default
l6:6:wait:/sbin/openrc reboot
l6r:6:wait:/sbin/reboot -d -f
ca:12345:ctrlaltdel:/sbin/shutdown -r now
1:2345:respawn:/sbin/getty --noclear 38400 tty1
`}
	for _, tt := range []struct {
		name             string
		layers           func(t testing.TB) []novalet.Layer
		init             []string
		reboot, poweroff string
	}{
		{"sysvinit", func(t testing.TB) []novalet.Layer { return openrc(t, sysv, "sysvinit-core") }, nil, "telinit 6", "telinit 0"},
		{"openrc-init", func(t testing.TB) []novalet.Layer { return openrc(t, nil) }, []string{"/sbin/openrc-init"},
			"openrc-shutdown --reboot now", "openrc-shutdown --poweroff now"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			te := newEngine(t)
			ctx := te.ctx()
			events := te.Events(ctx)
			start := func(c *novalet.ContainerSpec) {
				t.Helper()
				if _, err := te.Create(ctx, &novalet.SandboxSpec{ID: "m", Hostname: "rc"}); err != nil {
					t.Fatal(err)
				}
				if err := te.Start(ctx, "m", c); err != nil {
					t.Fatal(err)
				}
			}
			up := func() {
				t.Helper()
				eventually(t, "the service is up", func() string {
					out, _ := te.sh("m", "rc-status default")
					if !strings.Contains(out, "greeter") || !strings.Contains(out, "started") {
						return out
					}
					return ""
				})
			}
			start(&novalet.ContainerSpec{Kind: novalet.KindMachine, Layers: tt.layers(t), Process: novalet.ProcessSpec{Args: tt.init}})
			te.waitLog("m", "greeter is up, default")
			up()
			if out, code := te.sh("m", "touch /before; "+tt.reboot); code != 0 {
				t.Fatal(out)
			}
			wantEvent(t, events, novalet.EventRebooted)
			te.waitState("m", novalet.ContainerRunning)
			up()
			if out, _ := te.sh("m", "ls /before"); out != "/before\n" {
				t.Errorf("after the reboot: %q", out)
			}
			log, err := te.ConsoleLog(ctx, "m", 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			downs := strings.Count(string(log), "greeter is down")
			if downs != 1 {
				t.Errorf("the service was stopped %d times by the reboot:\n%s", downs, log)
			}
			if err := te.Stop(ctx, "m", novalet.StopOptions{Timeout: time.Minute}); err != nil {
				t.Fatal(err)
			}
			if st := te.waitState("m", novalet.ContainerStopped); st.ExitCode != 0 {
				t.Errorf("it was killed: %+v", st)
			}
			if log, err = te.ConsoleLog(ctx, "m", 1<<20); err != nil || strings.Count(string(log), "greeter is down") != 2 {
				t.Errorf("the stop did not stop the service: %v\n%s", err, log)
			}
			start(nil)
			up()
			te.sh("m", tt.poweroff)
			if ev := wantEvent(t, events, novalet.EventExited); ev.ExitCode != 0 {
				t.Errorf("poweroff: %+v", ev)
			}
			te.waitState("m", novalet.ContainerStopped)
		})
	}
}
