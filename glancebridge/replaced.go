package glancebridge

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet/internal/statefile"
)

// replacedUsers is users.json of a tree in replaced/.
type replacedUsers struct {
	Version   int      `json:"version"`
	Instances []string `json:"instances"`
}

// replaceLocked puts a layer in the place of a corrupt one. Instances that run on the old tree keep it until their
// leases end: it is mounted below their roots. s.mu is held.
func (s *Store) replaceLocked(m *layerMeta, out string) error {
	var users []string
	for _, l := range s.leases {
		if slices.Contains(l.Layers, m.ID) {
			users = append(users, l.Instance)
		}
	}
	slices.Sort(users)
	old := s.layerDir(m.ID)
	if len(users) > 0 {
		// Where the old tree comes to lie must be settled before the exchange: a crash behind it must not lose the tree.
		if err := statefile.Write(filepath.Join(old, "users.json"), &replacedUsers{Version: recordVersion, Instances: users}); err != nil {
			return fmt.Errorf("replace corrupt layer: %w", err)
		}
		keep, err := os.MkdirTemp(s.path("replaced"), "")
		if err == nil {
			err = unix.Rename(out, keep) // onto an empty folder, which os.Rename refuses
		}
		if err != nil {
			return fmt.Errorf("replace corrupt layer: %w", err)
		}
		out = keep
	}
	if err := unix.Renameat2(unix.AT_FDCWD, out, unix.AT_FDCWD, old, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("replace corrupt layer: %w", err)
	}
	s.layers[m.ID] = m
	s.dirty = true
	s.log.Info("corrupt layer replaced", "layer", m.ID, "instances", users)
	return nil
}

// sweepReplacedLocked moves the replaced trees aside that no instance runs on any more. s.mu is held.
func (s *Store) sweepReplacedLocked() (victims []string) {
	entries, err := os.ReadDir(s.path("replaced"))
	if err != nil {
		s.log.Warn("look for replaced layers", "err", err)
		return nil
	}
	for _, e := range entries {
		var u replacedUsers
		p := s.path("replaced", e.Name())
		// Without a list it is what a crash left, and nobody was told of it.
		if err := statefile.Read(filepath.Join(p, "users.json"), &u); err == nil &&
			slices.ContainsFunc(u.Instances, func(id string) bool { return s.leases[id] != nil }) {
			continue
		}
		aside := s.path("ingest", "replaced-"+e.Name())
		if err := os.Rename(p, aside); err != nil {
			s.log.Warn("remove replaced layer", "err", err)
			continue
		}
		victims = append(victims, aside)
	}
	return victims
}
