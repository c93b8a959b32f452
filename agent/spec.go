package agent

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/configdrive"
)

// This file is where Nova's words meet OCI's: an instance goes in, a sandbox and a container come out. What users
// may rely on is written down in docs/instances.md.

// propKind is the image property that overrides what the image looks like.
const propKind = "novalet_kind"

// configDrivePath is where the config drive is shown; cloud-init looks there without a block device
// (cloudinit/sources/DataSourceConfigDrive.py, tools/ds-identify).
const configDrivePath = "/config-drive"

// rescuePath is where a rescued instance's own root is shown.
const rescuePath = "/mnt"

// kindAsked returns the kind that the image's property asks for, "" when it does not: known before the image is.
func kindAsked(inst *novalet.Instance) novalet.Kind {
	switch k := novalet.Kind(strings.ToLower(strings.TrimSpace(inst.ImageProperty(propKind)))); k {
	case novalet.KindApplication, novalet.KindMachine:
		return k
	}
	return ""
}

// kindOf returns the kind an image is run as; the image store has looked at its properties.
func kindOf(img *novalet.Image) novalet.Kind {
	if img.Kind == novalet.KindMachine {
		return novalet.KindMachine
	}
	return novalet.KindApplication
}

// sandboxSpec is what Create needs; it is known before the image is.
func sandboxSpec(cfg *Config, inst *novalet.Instance, build *novalet.BuildArgs, cpuset string) (*novalet.SandboxSpec, error) {
	l, err := limits(cfg, inst)
	if err != nil {
		return nil, err
	}
	gib, err := ephemerals(inst, build)
	if err != nil {
		return nil, err
	}
	for _, g := range gib {
		l.EphemeralBytes = append(l.EphemeralBytes, g<<30)
	}
	l.CPUSet, l.SwapBytes = cpuset, swapMB(inst, build)<<20
	return &novalet.SandboxSpec{ID: inst.UUID, Hostname: hostname(inst), Kind: kindAsked(inst), Limits: l}, nil
}

// hostname is the instance's host name, never empty.
func hostname(inst *novalet.Instance) string {
	name, _, _ := strings.Cut(inst.Hostname, ".")
	if name == "" {
		name = "server-" + inst.UUID
	}
	return name[:min(len(name), 63)]
}

// specFor makes the container of an instance from its record: image, boot arguments and interfaces. Files that the
// user may change later are given at the first boot only.
func (a *Agent) specFor(in *instance) (*novalet.ContainerSpec, error) {
	var r record
	in.read(func(x *record) { r = *x })
	img := r.Image
	if r.Rescue != nil {
		img = r.Rescue.Image
	}
	if img == nil {
		return nil, fmt.Errorf("start instance %s: its image is not recorded: %w", in.uuid, novalet.ErrInvalidState)
	}
	inst := &r.Instance
	args := r.Build
	if args == nil {
		args = &novalet.BuildArgs{}
	}
	kind := kindOf(img)
	spec := &novalet.ContainerSpec{Kind: kind, Layers: img.Layers}
	if r.Rescue != nil {
		spec.Rescue = rescuePath
	}
	first := r.FirstBoot || r.Rescue != nil
	switch kind {
	case novalet.KindMachine:
		spec.Process = machineProcess(img)
		if first {
			spec.Files = append(spec.Files, machineFiles(inst)...)
		}
	default:
		p, err := applicationProcess(img, inst)
		if err != nil {
			return nil, err
		}
		spec.Process = *p
		spec.Files = append(spec.Files, networkFiles(&a.cfg, inst)...)
	}
	if first {
		if key := authorizedKeys(inst); key != nil && !hasCloudInit(img.Layers) {
			spec.Files = append(spec.Files, *key)
		}
	}
	if r.FirstBoot && r.Rescue == nil {
		files, err := injectedFiles(args.InjectedFiles)
		if err != nil {
			return nil, err
		}
		spec.Files = append(spec.Files, files...)
	}
	if a.wantsConfigDrive(inst) {
		password := args.AdminPassword
		if r.Rescue != nil {
			password = r.Rescue.Password
		}
		cpus, err := parseCPUList(r.CPUSet)
		if err != nil {
			return nil, err
		}
		gib, err := ephemerals(inst, args)
		if err != nil {
			return nil, err
		}
		tree, err := configdrive.Build(&configdrive.Input{Instance: inst, Network: inst.NetworkInfo, Files: args.InjectedFiles,
			AdminPassword: password, Seed: r.Seed, DHCPDomain: a.cfg.DHCPDomain, DedicatedCPUs: cpus, Ephemerals: len(gib), Swap: swapMB(inst, args) > 0,
			Devices: taggedDevices(&r)})
		if err != nil {
			return nil, err
		}
		spec.Trees = append(spec.Trees, novalet.Tree{Path: configDrivePath, Label: configdrive.Label, Files: tree})
	}
	return spec, nil
}

// wantsConfigDrive follows nova/virt/configdrive.py required_by.
func (a *Agent) wantsConfigDrive(inst *novalet.Instance) bool {
	return truth(inst.ConfigDrive) || inst.ImageProperty("img_config_drive") == "mandatory" || configDriveForced(&a.cfg, inst)
}

// configDriveForced: the option gives a drive to what was never launched; the row is told then.
func configDriveForced(cfg *Config, inst *novalet.Instance) bool {
	return !truth(inst.ConfigDrive) && cfg.ForceConfigDrive && inst.LaunchedAt == nil
}

func hasConfigDrive(spec *novalet.ContainerSpec) bool {
	return slices.ContainsFunc(spec.Trees, func(t novalet.Tree) bool { return t.Label == configdrive.Label })
}

// truth reads a boolean as oslo.utils' bool_from_string does.
func truth(s string) bool {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "1", "t", "true", "on", "y", "yes":
		return true
	}
	return false
}

// machineProcess runs the image's own init: the engine finds it when no arguments are given. product_name is what
// cloud-init knows OpenStack by where there is no DMI table of the guest's own (ds-identify's PID 1 check and
// DataSourceOpenStack.detect_openstack): with it the metadata service is found by DHCP, without a config drive.
func machineProcess(img *novalet.Image) novalet.ProcessSpec {
	c := &img.Config
	p := novalet.ProcessSpec{Cwd: "/", User: "0:0", Env: append(environment(c.Env, nil), "product_name=OpenStack Nova"), StopSignal: c.StopSignal}
	if img.Init != "" {
		p.Args = []string{img.Init}
	} else {
		p.Args = slices.Concat(c.Entrypoint, c.Cmd)
	}
	return p
}

// applicationProcess is the image's command, which the image store has replaced by os_command_line if that is set.
func applicationProcess(img *novalet.Image, inst *novalet.Instance) (*novalet.ProcessSpec, error) {
	c := &img.Config
	args := slices.Concat(c.Entrypoint, c.Cmd)
	if len(args) == 0 {
		return nil, novalet.Faultf(novalet.ErrAbort, "ImageUnacceptable",
			"The image names no command to run. Set the image property os_command_line, or use an image with a CMD or with its own /sbin/init.")
	}
	return &novalet.ProcessSpec{Args: args, Env: environment(c.Env, inst.Metadata), Cwd: c.WorkingDir, User: c.User, StopSignal: c.StopSignal}, nil
}

// environment is the image's with the server's metadata laid over it: every metadata key that is a name of an
// environment variable becomes one, as with nova-docker.
func environment(image []string, metadata map[string]string) []string {
	var out []string
	for _, e := range image {
		k, _, ok := strings.Cut(e, "=")
		if _, over := metadata[k]; ok && !over && !strings.ContainsRune(e, 0) {
			out = append(out, e)
		}
	}
	keys := make([]string, 0, len(metadata))
	for k, v := range metadata {
		if envName(k) && !strings.ContainsRune(v, 0) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		out = append(out, k+"="+metadata[k])
	}
	return out
}

func envName(s string) bool {
	for i, c := range s {
		if !(c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || i > 0 && c >= '0' && c <= '9') {
			return false
		}
	}
	return s != ""
}

// hasCloudInit says whether one of the layers brings cloud-init. The lookup never leaves the layer.
func hasCloudInit(layers []novalet.Layer) bool {
	for _, l := range layers {
		root, err := os.OpenRoot(l.Path)
		if err != nil {
			continue
		}
		_, err = root.Lstat("usr/bin/cloud-init")
		_ = root.Close() // opened for reading
		if err == nil {
			return true
		}
	}
	return false
}
