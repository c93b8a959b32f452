package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
)

// recordVersion is raised when a reader of an older version could misunderstand a record.
const recordVersion = 1

// record is what is written down of an instance. It holds injected files, so only root can read it.
type record struct {
	Version  int            `json:"version"`
	ID       string         `json:"id"`
	Slot     int            `json:"slot"` // which range of ids
	UIDBase  uint32         `json:"uid_base"`
	UIDSize  uint32         `json:"uid_size"`
	Hostname string         `json:"hostname"`
	Kind     novalet.Kind   `json:"kind,omitempty"`
	Limits   novalet.Limits `json:"limits"`
	// CPUs is the floating set of processors.
	CPUs string `json:"cpus,omitempty"`
	// Spec is of the instance's own root; Rescue of the rescue system that runs instead.
	Spec   *novalet.ContainerSpec `json:"spec,omitempty"`
	Rescue *novalet.ContainerSpec `json:"rescue,omitempty"`
	// BootID is the host boot in which it last ran.
	BootID string `json:"boot_id,omitempty"`
}

const recordName = "record.json"

// save writes the record: to a new file, renamed, and then, in the background, synced with its directory. An agent that
// dies at any point finds one whole record; a host that loses power may lose the last one. So Start
// waits until the slot of a new instance is synced.
func (e *Engine) save(r *record) (synced <-chan error, err error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("write record: %w", err)
	}
	dir := e.dir(r.ID)
	if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("write record: %w", err)
	}
	tmp := filepath.Join(dir, recordName+".new")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("write record: %w", err)
	}
	if _, err = f.Write(b); err == nil {
		err = os.Rename(tmp, filepath.Join(dir, recordName))
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("write record: %w", err)
	}
	done := make(chan error, 1)
	e.wg.Add(1)
	go func() {
		defer e.wg.Done()
		err := errors.Join(unix.Fdatasync(int(f.Fd())), f.Close(), syncDir(dir))
		if errors.Is(err, os.ErrNotExist) {
			err = nil // removed meanwhile
		}
		if err != nil {
			e.log.Error("sync record", "instance", r.ID, "error", err)
			err = fmt.Errorf("sync record: %w", err)
		}
		done <- err
	}()
	return done, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// load reads a record.
func (e *Engine) load(id string) (*record, error) {
	b, err := os.ReadFile(filepath.Join(e.dir(id), recordName))
	if err != nil {
		return nil, fmt.Errorf("read record: %w", err)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("read record: %w", err)
	}
	if r.Version != recordVersion || r.ID != id || r.UIDBase < 65536 || r.UIDSize == 0 || r.Slot < 0 {
		return nil, fmt.Errorf("read record: version %d, not usable", r.Version)
	}
	return &r, nil
}

// slotOf reads no more than the slot, from a record that is not usable otherwise.
func (e *Engine) slotOf(id string) (int, bool) {
	b, err := os.ReadFile(filepath.Join(e.dir(id), recordName))
	var r struct {
		Slot *int `json:"slot"`
	}
	if err != nil || json.Unmarshal(b, &r) != nil || r.Slot == nil || *r.Slot < 0 {
		return 0, false
	}
	return *r.Slot, true
}

// takeSlot finds a free range of ids. e.mu is held.
func (e *Engine) takeSlot(id string) (int, uint32, error) {
	if e.o.MaxInstances > 0 && len(e.slots) >= e.o.MaxInstances {
		return 0, 0, fmt.Errorf("create container: %w: this host holds %d instances", novalet.ErrReschedule, len(e.slots))
	}
	for slot := 0; ; slot++ {
		base := uint64(e.o.UIDBase) + uint64(slot)*uint64(e.o.UIDCount)
		if base+uint64(e.o.UIDCount) > uint64(e.o.UIDMax)+1 {
			return 0, 0, fmt.Errorf("create container: %w: no user id range is free", novalet.ErrReschedule)
		}
		if _, used := e.slots[slot]; !used {
			e.slots[slot] = id
			return slot, uint32(base), nil
		}
	}
}
