package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/agent"
	"github.com/novalet/novalet/engine"
	"github.com/novalet/novalet/glancebridge"
	"github.com/novalet/novalet/internal/minicloud"
	"github.com/novalet/novalet/network"
	"github.com/novalet/novalet/network/natbridge"
	"github.com/novalet/novalet/novadriver"
	"github.com/novalet/novalet/novadriver/oslomsg/membus"
)

func demoCommand() *command {
	return &command{name: "demo", summary: "Boot two instances on this machine, without OpenStack",
		long: `Runs the same agent over an in-memory bus with a small controller in the process: it boots an application and a
machine, pings one from the other, prints their state, addresses and console logs and where the time of a boot
went, and removes everything when it ends.`,
		flags: func(fs *pflag.FlagSet) {
			fs.String("dir", "/var/lib/novalet-demo", "state of the demo; removed at the end")
			fs.String("images", defaultImages, "folder with the images (tests/images/demo.sh makes them)")
			fs.Bool("keep", false, "leave the instances running until Ctrl-C, and say what to type")
			fs.BoolP("verbose", "v", false, "show the agent's log")
			fs.Duration("timeout", 5*time.Minute, "give up after this long")
		},
		run: func(ctx context.Context, fs *pflag.FlagSet) error {
			dir, _ := fs.GetString("dir")
			images, _ := fs.GetString("images")
			keep, _ := fs.GetBool("keep")
			verbose, _ := fs.GetBool("verbose")
			limit, _ := fs.GetDuration("timeout")
			d := &demo{dir: dir, images: images, out: os.Stdout, began: time.Now()}
			return d.run(ctx, keep, verbose, limit)
		}}
}

// demo is one run of it.
type demo struct {
	dir, images string
	out         io.Writer
	began       time.Time

	bridge *natbridge.Bridge
	host   *host
	cloud  *minicloud.Cloud
	ids    []string
}

func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "[%5.1f s] %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context, keep, verbose bool, limit time.Duration) (err error) {
	if err := fit("sudo make demo"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done within %v (--timeout)", limit))
	defer cancel()
	var logTo io.Writer = os.Stderr
	if !verbose {
		f, cerr := os.CreateTemp("", "novalet-demo-*.log")
		if cerr != nil {
			return fmt.Errorf("make the log: %w", cerr)
		}
		defer f.Close()
		logTo = f
		defer func() {
			if err != nil {
				fmt.Fprintf(os.Stderr, "novalet demo: the agent's log is %s\n", f.Name())
			} else {
				os.Remove(f.Name())
			}
		}()
	}
	log := slog.New(slog.NewTextHandler(logTo, nil))
	stop, err := d.open(ctx, log)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return err
	}
	if err := d.show(ctx); err != nil {
		return err
	}
	if keep {
		d.say("running; in another terminal:")
		sock := filepath.Join(d.dir, "novalet.sock")
		for _, c := range []string{"ps", "logs -f web", "exec -t machine /bin/bash", "console machine", "images tree", "health --metrics"} {
			fmt.Fprintf(d.out, "            bin/novalet %s --socket %s %s\n", strings.Fields(c)[0], sock, strings.Join(strings.Fields(c)[1:], " "))
		}
		d.say("Ctrl-C ends it")
		cancelled := make(chan struct{})
		context.AfterFunc(ctx, func() { close(cancelled) })
		<-cancelled
		ctx = context.WithoutCancel(ctx)
	}
	return d.finish(ctx)
}

// open starts controller, bridge and agent. The function it returns undoes it, also after an error.
func (d *demo) open(ctx context.Context, log *slog.Logger) (stop func() error, err error) {
	var undo []func() error
	stop = func() error {
		var errs []error
		for i := len(undo) - 1; i >= 0; i-- {
			errs = append(errs, undo[i]())
		}
		return errors.Join(errs...)
	}
	s := &settings{host: "demo", stateDir: d.dir, statePath: d.dir, runDir: filepath.Join(d.dir, "run"), socket: filepath.Join(d.dir, "novalet.sock"),
		// Ids that no agent with the usual options gives out.
		idBase: 1 << 29, cgroupRoot: cgroupRootFor(d.dir), agent: agent.DefaultConfig(), imageMinAge: 24 * time.Hour}
	if exists(d.dir) {
		d.say("removing what an earlier demo left in %s", d.dir)
		if err := wipe(ctx, s, log); err != nil {
			return stop, fmt.Errorf("remove what an earlier demo left in %s: %w", d.dir, err)
		}
	}
	if err := os.MkdirAll(d.dir, 0o711); err != nil {
		return stop, fmt.Errorf("make the state folder: %w", err)
	}
	// Also after an error or Ctrl-C in the middle, when instances are still there.
	undo = append(undo, func() error { return wipe(context.WithoutCancel(ctx), s, log) })
	s.driver = novadriver.Options{Host: "demo", MyIP: "127.0.0.1", StateDir: d.dir, HypervisorVersion: hypervisorVersion(version)}
	bus := membus.New()
	if d.cloud, err = minicloud.New(minicloud.Options{Transport: bus.Connect(), Host: "demo", Logger: log}); err != nil {
		return stop, fmt.Errorf("start the controller: %w", err)
	}
	undo = append(undo, d.cloud.Close)
	if d.bridge, err = natbridge.New(natbridge.Options{StateDir: d.dir, Logger: log}); err != nil {
		return stop, err
	}
	undo = append(undo, d.bridge.Close)
	conn := bus.Connect()
	undo = append(undo, conn.Close)
	svc := &services{network: d.bridge, glance: glancebridge.NewFileGlance(d.images), requests: requestCounter()}
	if d.host, err = openHost(s, svc, conn, log); err != nil {
		return stop, err
	}
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	failed := make(chan error, 1)
	wg.Go(func() { failed <- d.host.run(runCtx) })
	undo = append(undo, func() error {
		cancel()
		wg.Wait()
		d.host.close()
		return nil
	})
	for !d.host.started.Load() {
		select {
		case err := <-failed:
			return stop, err
		case <-ctx.Done():
			return stop, context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
	d.say("agent started, network %s", d.bridge.Subnet())
	return stop, nil
}

// wipe removes all that an agent with these settings left on the host, running instances included, and its state. It
// fails when one is running.
func wipe(ctx context.Context, s *settings, log *slog.Logger) (err error) {
	lock, err := lockState(s.stateDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	e, err := engine.Open(s.engine(log))
	if err != nil {
		return fmt.Errorf("open the engine: %w", err)
	}
	list, err := e.List(ctx)
	for _, c := range list {
		err = errors.Join(err, e.Destroy(ctx, c.ID, novalet.DestroyOptions{}))
	}
	if err = errors.Join(err, e.Close()); err != nil {
		return err
	}
	images, err := glancebridge.Open(s.images(glancebridge.NewFileGlance(""), log))
	if err != nil {
		return fmt.Errorf("open the image store: %w", err)
	}
	if err := images.Close(); err != nil {
		return err
	}
	p, err := network.New(network.Options{Owner: owner(s.stateDir), Logger: log})
	if err != nil {
		return fmt.Errorf("open the network: %w", err)
	}
	_, err = p.Sweep(ctx, nil)
	if err = errors.Join(err, p.Close()); err != nil {
		return err
	}
	b, err := natbridge.New(natbridge.Options{StateDir: s.stateDir, Logger: log})
	if err != nil {
		return err
	}
	if err := b.Remove(); err != nil {
		return err
	}
	return os.RemoveAll(s.stateDir)
}

// show boots the instances and prints what they do.
func (d *demo) show(ctx context.Context) error {
	list, err := glancebridge.NewFileGlance(d.images).List()
	if err != nil {
		return err
	}
	meta := func(name string) (novalet.ImageMeta, error) {
		for _, r := range list {
			if r.Name == name {
				return novalet.ImageMeta{ID: r.ID, Name: r.Name, Status: r.Status, Size: r.Size, DiskFormat: r.DiskFormat, ContainerFormat: r.ContainerFormat,
					Properties: r.Properties}, nil
			}
		}
		return novalet.ImageMeta{}, fmt.Errorf("no image %q in %s: make it with tests/images/demo.sh %s", name, d.images, d.images)
	}
	for _, b := range []struct {
		name, image string
		flavor      novalet.Flavor
	}{
		{"web", "web", novalet.Flavor{Name: "demo.tiny", FlavorID: "1", MemoryMB: 64, VCPUs: 1, RootGB: 1}},
		{"machine", "debian-12", novalet.Flavor{Name: "demo.small", FlavorID: "2", MemoryMB: 512, VCPUs: 1, RootGB: 2}},
	} {
		im, err := meta(b.image)
		if err != nil {
			return err
		}
		id, err := d.cloud.Boot(ctx, minicloud.BootRequest{Name: b.name, Image: im, Flavor: b.flavor})
		if err != nil {
			return err
		}
		d.ids = append(d.ids, id)
		d.say("booting %s from %s (%s)", b.name, im.Name, size(im.Size))
	}
	var web string
	for _, id := range d.ids {
		s, err := d.cloud.Wait(ctx, id, minicloud.Settled)
		if err != nil {
			return err
		}
		if s.VMState != novalet.VMActive {
			return fmt.Errorf("instance %s is in state %s: %s", s.Name, s.VMState, s.Fault)
		}
		d.say("%s is ACTIVE, %s", s.Name, strings.Join(s.Addresses, " "))
		d.timings(id)
		if s.Name == "web" && len(s.Addresses) > 0 {
			web = s.Addresses[0]
		}
	}
	if err := d.waitLog(ctx, d.ids[0], "serves port 80"); err != nil {
		return err
	}
	if err := d.waitLog(ctx, d.ids[1], "login:"); err != nil {
		return err
	}
	for _, p := range [][]string{{"ping", "-c", "3", "-i", "0.2", "-W", "2", web}, {"curl", "-sS", "-m", "10", "http://" + web + "/"}} {
		d.say("machine$ %s", strings.Join(p, " "))
		if err := d.inMachine(ctx, p); err != nil {
			return err
		}
	}
	for _, id := range d.ids {
		text, err := d.cloud.ConsoleOutput(ctx, id, 8)
		if err != nil {
			return err
		}
		s, err := d.cloud.Show(id)
		if err != nil {
			return err
		}
		d.say("the end of the console log of %s:", s.Name)
		for l := range strings.Lines(text) {
			fmt.Fprintf(d.out, "            | %s\n", printable(strings.TrimRight(l, "\r\n")))
		}
	}
	return nil
}

// timings prints where the time of a boot went.
func (d *demo) timings(id string) {
	t, ok := d.host.agent.Timings(id)
	// They are complete a moment after Nova was told.
	for end := time.Now().Add(5 * time.Second); !ok && time.Now().Before(end); t, ok = d.host.agent.Timings(id) {
		time.Sleep(10 * time.Millisecond)
	}
	if !ok {
		d.say("the agent kept no timings of %s", id)
		return
	}
	var parts []string
	for _, s := range t.Steps {
		parts = append(parts, fmt.Sprintf("%s %.1f", s.Name, float64(s.Took.Microseconds())/1000))
	}
	fmt.Fprintf(d.out, "            %.0f ms from the request: %s (ms; steps overlap)\n", float64(t.Total.Microseconds())/1000, strings.Join(parts, ", "))
}

// waitLog waits until the console log holds a text.
func (d *demo) waitLog(ctx context.Context, id, want string) error {
	for {
		text, err := d.cloud.ConsoleOutput(ctx, id, -1)
		if err != nil {
			return err
		}
		if strings.Contains(text, want) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %q in the console log: %w", want, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// inMachine runs a command in the second instance; the network inside may need a moment more than the login prompt.
func (d *demo) inMachine(ctx context.Context, args []string) error {
	for {
		var out strings.Builder
		code, err := d.host.engine.Exec(ctx, d.ids[1], &novalet.ExecSpec{Process: novalet.ProcessSpec{Args: args}, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &out})
		if err == nil && code == 0 {
			for l := range strings.Lines(out.String()) {
				fmt.Fprintf(d.out, "            | %s\n", printable(strings.TrimRight(l, "\r\n")))
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("run %s in the machine: exit code %d, %w: %s", args[0], code, errors.Join(err, context.Cause(ctx)), out.String())
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// finish deletes the instances and waits until they are gone.
func (d *demo) finish(ctx context.Context) error {
	for _, id := range d.ids {
		if err := d.cloud.Delete(ctx, id); err != nil {
			return err
		}
	}
	for _, id := range d.ids {
		if _, err := d.cloud.Wait(ctx, id, func(s *minicloud.Server) bool { return s.Deleted }); err != nil {
			return err
		}
	}
	// The controller knows first; the agent has something to tell yet.
	for end := time.Now().Add(10 * time.Second); d.host.agent.Unfinished() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	d.say("both deleted, nothing left")
	return nil
}
