package agent

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/novalet/novalet"
)

func fileNamed(spec *novalet.ContainerSpec, path string) *novalet.File {
	for i := range spec.Files {
		if spec.Files[i].Path == path {
			return &spec.Files[i]
		}
	}
	return nil
}

func specOf(t *testing.T, r record, cfg Config) *novalet.ContainerSpec {
	t.Helper()
	a := &Agent{cfg: cfg}
	in := &instance{a: a, uuid: r.Instance.UUID, rec: r}
	spec, err := a.specFor(in)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func specRecord(kind novalet.Kind) record {
	dns, four := "10.0.0.2", 4
	return record{FirstBoot: true, Seed: "c2VlZA==",
		Image: &novalet.Image{Kind: kind, Init: map[novalet.Kind]string{novalet.KindMachine: "/sbin/init"}[kind],
			Config: novalet.ImageConfig{Entrypoint: []string{"/entry"}, Cmd: []string{"a"}, Env: []string{"X=1"}, User: "app", WorkingDir: "/srv", StopSignal: "SIGINT"}},
		Build: &novalet.BuildArgs{AdminPassword: "hunter2", InjectedFiles: []novalet.InjectedFile{{Path: "/etc/motd", Data: novalet.Secret(base64.StdEncoding.EncodeToString([]byte("hi")))}}},
		Instance: novalet.Instance{UUID: "11111111-0000-4000-8000-000000000000", Hostname: "web", Metadata: map[string]string{"X": "2", "Y": "3", "1Z": "no", "a-b": "no"},
			KeyPairs: []novalet.KeyPair{{Name: "k", Type: "ssh", Data: "ssh-ed25519 AAAA me\n"}},
			NetworkInfo: novalet.NetworkInfo{{ID: "p", Network: novalet.VIFNetwork{Subnets: []novalet.Subnet{{Version: 4, CIDR: "10.0.0.0/24",
				DNS: []novalet.IP{{Address: &dns, Version: &four}}, IPs: []novalet.FixedIP{{Address: "10.0.0.9", Version: 4}}}}}}}}}
}

func TestApplicationSpec(t *testing.T) {
	r := specRecord(novalet.KindApplication)
	spec := specOf(t, r, Config{DHCPDomain: "novalocal"})
	want := novalet.ProcessSpec{Args: []string{"/entry", "a"}, Env: []string{"X=2", "Y=3"}, Cwd: "/srv", User: "app", StopSignal: "SIGINT"}
	if diff := cmp.Diff(want, spec.Process); diff != "" {
		t.Errorf("process (-want +got):\n%s", diff)
	}
	for path, want := range map[string]string{
		"/etc/hostname":              "web\n",
		"/etc/hosts":                 "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n10.0.0.9\tweb.novalocal web\n",
		"/etc/resolv.conf":           "search novalocal\nnameserver 10.0.0.2\n",
		"/etc/motd":                  "hi",
		"/root/.ssh/authorized_keys": "ssh-ed25519 AAAA me\n",
	} {
		if f := fileNamed(spec, path); f == nil || string(f.Data) != want {
			t.Errorf("%s: %+v, want %q", path, f, want)
		}
	}
	if f := fileNamed(spec, "/root/.ssh/authorized_keys"); f.Mode != 0o600 || !f.Append {
		t.Errorf("authorized_keys %+v", f)
	}
	if fileNamed(spec, "/etc/fstab") != nil || len(spec.Trees) > 0 {
		t.Error("an application got a machine's files or a config drive")
	}
	r.FirstBoot = false
	spec = specOf(t, r, Config{})
	if fileNamed(spec, "/etc/motd") != nil || fileNamed(spec, "/root/.ssh/authorized_keys") != nil {
		t.Error("a later start would write over what the user changed")
	}
	if fileNamed(spec, "/etc/resolv.conf") == nil {
		t.Error("a later start does not know its name servers")
	}
}

func TestMachineSpec(t *testing.T) {
	r := specRecord(novalet.KindMachine)
	spec := specOf(t, r, Config{})
	if !slices.Equal(spec.Process.Args, []string{"/sbin/init"}) || !slices.Contains(spec.Process.Env, "product_name=OpenStack Nova") ||
		slices.Contains(spec.Process.Env, "Y=3") {
		t.Errorf("process %+v", spec.Process)
	}
	if f := fileNamed(spec, "/etc/machine-id"); f == nil || len(f.Data) != 0 {
		t.Errorf("machine-id %+v, want an empty one", f)
	}
	if f := fileNamed(spec, "/etc/fstab"); f == nil || strings.Contains(strings.Split(string(f.Data), "\n")[0], "LABEL") {
		t.Errorf("fstab %+v", f)
	}
	if fileNamed(spec, "/etc/resolv.conf") != nil {
		t.Error("a machine configures its own network")
	}
	r.FirstBoot = false
	if spec = specOf(t, r, Config{}); len(spec.Files) > 0 {
		t.Errorf("a later start would write over %v", spec.Files)
	}
}

// Where cloud-init is, it alone puts the key in.
func TestKeysAreLeftToCloudInit(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "usr/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "usr/bin/cloud-init"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	r := specRecord(novalet.KindMachine)
	r.Image.Layers = []novalet.Layer{{Path: t.TempDir()}, {Path: dir}}
	if spec := specOf(t, r, Config{}); fileNamed(spec, "/root/.ssh/authorized_keys") != nil {
		t.Error("the key is put in beside cloud-init")
	}
}

// A hostile layer whose links lead out of it is not followed.
func TestCloudInitLookupStaysInTheLayer(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(outside, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(outside, "bin/cloud-init"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "usr")); err != nil {
		t.Fatal(err)
	}
	if hasCloudInit([]novalet.Layer{{Path: dir}}) {
		t.Error("the lookup left the layer")
	}
}

func TestConfigDrive(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*record, *Config)
		want   bool
	}{
		{"none", func(*record, *Config) {}, false},
		{"asked", func(r *record, _ *Config) { r.Instance.ConfigDrive = "True" }, true},
		{"forced", func(_ *record, c *Config) { c.ForceConfigDrive = true }, true},
		{"image", func(r *record, _ *Config) {
			r.Instance.SystemMetadata = map[string]string{"image_img_config_drive": "mandatory"}
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, cfg := specRecord(novalet.KindMachine), Config{}
			c.change(&r, &cfg)
			spec := specOf(t, r, cfg)
			if hasConfigDrive(spec) != c.want {
				t.Fatalf("config drive %v, want %v", !c.want, c.want)
			}
			if !c.want {
				return
			}
			// ds-identify looks for a dated directory below /config-drive.
			tree := spec.Trees[0]
			if tree.Path != "/config-drive" || tree.Label != "config-2" ||
				!slices.ContainsFunc(tree.Files, func(f novalet.File) bool { return f.Path == "openstack/2018-08-27/meta_data.json" }) {
				t.Errorf("tree %s %s", tree.Path, tree.Label)
			}
		})
	}
}

func TestConfigDriveIsReported(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.ForceConfigDrive = true })
	uuid := l.boot()
	if got := l.world.Row(uuid).ConfigDrive; got != "True" {
		t.Errorf("config_drive %q, want True", got)
	}
	// The later starts have it too.
	l.cast(uuid, novalet.MethodReboot, novalet.TaskRebootingHard, novalet.OperationArgs{RebootType: "HARD"})
	l.await(uuid, novalet.VMActive)
	if _, spec := l.world.Specs(uuid); !hasConfigDrive(spec) {
		t.Error("the config drive is gone after a reboot")
	}
}

func TestRescueSpec(t *testing.T) {
	r := specRecord(novalet.KindApplication)
	r.FirstBoot = false
	r.Rescue = &rescueState{Image: &novalet.Image{Kind: novalet.KindMachine, Init: "/sbin/init", Layers: []novalet.Layer{{DiffID: "sha256:r"}}}}
	spec := specOf(t, r, Config{})
	if spec.Rescue != "/mnt" || spec.Kind != novalet.KindMachine || spec.Layers[0].DiffID != "sha256:r" || fileNamed(spec, "/root/.ssh/authorized_keys") == nil {
		t.Errorf("spec %+v", spec)
	}
}

func TestLimits(t *testing.T) {
	inst := &novalet.Instance{Flavor: novalet.Flavor{MemoryMB: 512, VCPUs: 2, RootGB: 3, Swap: 64, ExtraSpecs: map[string]string{
		"quota:cpu_quota": "50000", "quota:cpu_shares": "300", "quota:disk_total_bytes_sec": "1000", "quota:disk_read_bytes_sec": "7", "quota:disk_write_iops_sec": "9"}}}
	got, err := limits(&Config{PIDsLimit: 100}, inst)
	if err != nil {
		t.Fatal(err)
	}
	want := novalet.Limits{MemoryBytes: 512 << 20, VCPUs: 2, CPUShares: 300, CPUQuota: 50000, CPUPeriod: 100000,
		PIDs: 100, RootBytes: 3 << 30, ReadBPS: 7, WriteBPS: 1000, WriteIOPS: 9}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("limits (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"x", "-5", "99999999999999999999", ""} {
		inst.Flavor.ExtraSpecs = map[string]string{"quota:cpu_shares": bad}
		if _, err := limits(&Config{}, inst); !errors.Is(err, novalet.ErrAbort) || !strings.Contains(novalet.FaultText(err), "quota:cpu_shares") {
			t.Errorf("cpu_shares %q: %v, want ErrAbort that names the key", bad, err)
		}
	}
}

func TestCPUList(t *testing.T) {
	for s, want := range map[string]string{"": "[]", "0-3,^2, 8": "[0 1 3 8]", "5": "[5]", "1,1": "[1]"} {
		got, err := parseCPUList(s)
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("%q: %v, %v; want %s", s, got, err, want)
		}
	}
	for _, s := range []string{"a", "3-1", "-1", "0-99999", "1-"} {
		if _, err := parseCPUList(s); err == nil {
			t.Errorf("%q was accepted", s)
		}
	}
}

// Two instances with CPUs of their own never share one, a third is handed on, and a delete gives them back.
func TestDedicatedCPUs(t *testing.T) {
	l := newLab(t, func(l *lab) { l.cfg.CPUDedicatedSet = "2-5" })
	pinned := func(op *novalet.Operation) {
		op.Instance.Flavor.VCPUs = 2
		op.Instance.Flavor.ExtraSpecs = map[string]string{"hw:cpu_policy": "dedicated"}
		op.Args.Build.MayReschedule = true
	}
	set := func(uuid string) string { s, _ := l.world.Specs(uuid); return s.Limits.CPUSet }
	one, two := l.boot(pinned), l.boot(pinned)
	if set(one) != "2,3" || set(two) != "4,5" {
		t.Errorf("sets %q and %q", set(one), set(two))
	}
	op := l.server(pinned)
	l.submit(op)
	eventually(t, "the third is handed on", func() bool { return slices.Contains(l.world.Rescheduled(), op.Instance.UUID) })
	l.cast(one, novalet.MethodTerminate, novalet.TaskDeleting, novalet.OperationArgs{})
	l.awaitGone(one)
	if four := l.boot(pinned); set(four) != "2,3" {
		t.Errorf("set %q, want what the deleted one had", set(four))
	}
}

// TestEphemeralAndSwap: the request divides what the flavor has; without one it is one disk and all of the swap.
func TestEphemeralAndSwap(t *testing.T) {
	inst := &novalet.Instance{Flavor: novalet.Flavor{EphemeralGB: 5, Swap: 64}}
	blank := func(format string, size int64) novalet.BlockDevice {
		return novalet.BlockDevice{SourceType: "blank", DestinationType: "local", GuestFormat: format, VolumeSize: size}
	}
	const gib = 1 << 30
	for name, c := range map[string]struct {
		build *novalet.BuildArgs
		disks []int64
		swap  int64
	}{
		"nothing asked": {nil, []int64{5 * gib}, 64 << 20},
		"only an image": {&novalet.BuildArgs{BlockDevices: []novalet.BlockDevice{{SourceType: "image", DestinationType: "local"}}}, []int64{5 * gib}, 64 << 20},
		"divided": {&novalet.BuildArgs{BlockDevices: []novalet.BlockDevice{blank("", 2), blank("swap", 32), blank("ext4", 3)}},
			[]int64{2 * gib, 3 * gib}, 32 << 20},
	} {
		s, err := sandboxSpec(&Config{}, inst, c.build, "")
		if err != nil || !slices.Equal(s.Limits.EphemeralBytes, c.disks) || s.Limits.SwapBytes != c.swap {
			t.Errorf("%s: %+v %v", name, s, err)
		}
	}
	_, err := sandboxSpec(&Config{}, inst, &novalet.BuildArgs{BlockDevices: []novalet.BlockDevice{blank("xfs", 1)}}, "")
	if !errors.Is(err, novalet.ErrAbort) || !strings.Contains(novalet.FaultText(err), `"xfs"`) {
		t.Errorf("a format that is not made: %v", err)
	}
	inst.Flavor = novalet.Flavor{}
	if s, err := sandboxSpec(&Config{}, inst, nil, ""); err != nil || s.Limits.EphemeralBytes != nil || s.Limits.SwapBytes != 0 {
		t.Errorf("a flavor with neither: %+v %v", s, err)
	}
}
