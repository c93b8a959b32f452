package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/novalet/novalet/engine"
	"github.com/novalet/novalet/glancebridge"
	"github.com/novalet/novalet/network"
)

// leftover is what doctor says of an agent that does not run: what it left on the host that no instance needs.
type leftover struct {
	note    string   // why nothing was looked for, if so
	devices []string // network devices and ports of the switch
	fixed   bool
}

// stateSettings reads the agent's configuration: the files named, else the usual one if it is a compute service's. Without
// any it returns nil.
func stateSettings(files []string) (*settings, error) {
	if len(files) > 0 {
		return readSettings(files, nil)
	}
	s, err := readSettings([]string{defaultConfig}, nil)
	if err != nil {
		// A host without an agent may have no such file, or one of other services; the agent itself says what it lacks.
		return nil, nil
	}
	return s, nil
}

// examineState looks for what an agent with these settings left on the host, and removes it if fix is set: network
// devices and switch ports without an instance, and with fix also processes and cgroups whose keeper is gone, half
// images and emptied roots, as the agent's next start would. It changes nothing else, and nothing at all while an agent
// runs, which does the same by itself.
func examineState(ctx context.Context, s *settings, fix bool, log *slog.Logger) (out leftover, err error) {
	if _, err := os.Stat(s.stateDir); errors.Is(err, fs.ErrNotExist) {
		return leftover{note: "no agent ever ran with " + s.stateDir}, nil
	}
	lock, err := lockState(s.stateDir)
	if err != nil {
		return leftover{note: "an agent runs with " + s.stateDir + ": what is left over goes at its start"}, nil
	}
	defer lock.Close()
	if fix {
		e, err := engine.Open(s.engine(log))
		if err != nil {
			return out, fmt.Errorf("open the engine: %w", err)
		}
		if err := e.Close(); err != nil {
			return out, err
		}
		images, err := glancebridge.Open(s.images(glancebridge.NewFileGlance(""), log))
		if err != nil {
			return out, fmt.Errorf("open the image store: %w", err)
		}
		if err := images.Close(); err != nil {
			return out, err
		}
	}
	keep, err := known(s.stateDir)
	if err != nil {
		return out, err
	}
	p, err := network.New(network.Options{OVSDB: s.ovsdb, Owner: owner(s.stateDir), Logger: log})
	if err != nil {
		return out, fmt.Errorf("open the network: %w", err)
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	if fix {
		out.fixed = true
		out.devices, err = p.Sweep(ctx, keep)
	} else {
		out.devices, err = p.Orphans(ctx, keep)
	}
	return out, err
}

// known are the instances that a record or a root on the host names: what belongs to them stays.
func known(stateDir string) (map[string]bool, error) {
	keep := map[string]bool{}
	for _, dir := range []string{"records", "instances"} {
		list, err := os.ReadDir(filepath.Join(stateDir, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read the state: %w", err)
		}
		for _, e := range list {
			keep[strings.TrimSuffix(e.Name(), ".json")] = true
		}
	}
	return keep, nil
}

// text is the line of it.
func (l leftover) text() string {
	switch {
	case l.note != "":
		return "ok       left over                    " + l.note
	case l.fixed && len(l.devices) > 0:
		return "fixed    left over                    removed " + strings.Join(l.devices, ", ")
	case len(l.devices) > 0:
		return "LEFT     left over                    " + strings.Join(l.devices, ", ") + ": no instance needs them; novalet doctor --fix removes them"
	}
	return "ok       left over                    nothing"
}
