package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/internal/statefile"
)

// recordVersion is the version of the records this agent writes. A record of a later version is left alone; older
// ones are brought up by upgrade. testdata keeps one of each.
const recordVersion = 1

// seenPerInstance bounds the ids of operations that a record remembers to tell a duplicate by.
const seenPerInstance = 64

// finishedIDs bounds the ids remembered of instances whose record is gone.
const finishedIDs = 8192

// record is what the agent keeps of one instance.
type record struct {
	Version  int              `json:"version"`
	Instance novalet.Instance `json:"instance"`
	// Ops is the journal: the first is under way, the others wait. An operation leaves it when it is done.
	Ops []novalet.Operation `json:"ops,omitempty"`
	// Seen are the ids of the latest operations, oldest first.
	Seen []string `json:"seen,omitempty"`
	// Resident: the instance is on this host and counts against its resources.
	Resident bool `json:"resident,omitempty"`
	// Allocated: NetworkInfo holds all ports that the build under way got.
	Allocated bool `json:"allocated,omitempty"`
	// Build are the arguments that made the instance, for later starts, rescues and rebuilds.
	Build *novalet.BuildArgs `json:"build,omitempty"`
	// Image is what it runs from.
	Image *novalet.Image `json:"image,omitempty"`
	// Seed is the random_seed of its metadata.
	Seed string `json:"seed,omitempty"`
	// FirstBoot: the files that are written once are still to be written.
	FirstBoot bool `json:"first_boot,omitempty"`
	// CPUSet are the host CPUs it has for itself.
	CPUSet string `json:"cpuset,omitempty"`
	// PCI are the devices that it has, or that are still to be taken back from it (Pending.Plugs).
	PCI []novalet.PCIClaim `json:"pci,omitempty"`
	// Interfaces are the numbers of the interfaces inside, by port.
	Interfaces map[string]int `json:"interfaces,omitempty"`
	// Tags are the names that their owner gave interfaces, by port.
	Tags map[string]string `json:"tags,omitempty"`
	// BootID is the host's boot in which it was last started.
	BootID string `json:"boot_id,omitempty"`
	// Failed, when set, says that the build under way has failed and is being undone.
	Failed *failure `json:"failed,omitempty"`
	// Pending is what is left to undo after the instance went.
	Pending *pending `json:"pending,omitempty"`
	// Console: a console was opened, so there may be tokens to clean.
	Console bool `json:"console,omitempty"`
	// Quiesced is until when the guest is stopped by quiesce_instance at the latest; a time that has passed while that is being done
	// or undone.
	Quiesced *time.Time `json:"quiesced,omitempty"`
	// Rescue is set while the instance is rescued.
	Rescue *rescueState `json:"rescue,omitempty"`
}

// failure is why a build failed, as kept over a restart.
type failure struct {
	Reschedule bool           `json:"reschedule,omitempty"`
	Quiet      bool           `json:"quiet,omitempty"` // the instance is gone or not ours: no fault, no save
	Gone       bool           `json:"gone,omitempty"`  // it is gone: its allocation too
	Freed      bool           `json:"freed,omitempty"` // its row and its allocation are free for another host
	Class      string         `json:"class,omitempty"`
	Text       string         `json:"text,omitempty"`
	Cause      string         `json:"cause,omitempty"`
	Details    map[string]any `json:"details,omitempty"`
}

// pending lists what could not be undone yet.
type pending struct {
	Container bool `json:"container,omitempty"`
	Plugs     bool `json:"plugs,omitempty"`
	Image     bool `json:"image,omitempty"`
	Ports     bool `json:"ports,omitempty"`
	// Allocation in Placement.
	Allocation bool                   `json:"allocation,omitempty"`
	Context    novalet.RequestContext `json:"context"`
	// Info names the ports to keep or delete.
	Info novalet.NetworkInfo `json:"info,omitempty"`
}

func (p *pending) empty() bool {
	return p == nil || !p.Container && !p.Plugs && !p.Image && !p.Ports && !p.Allocation
}

// rescueState is what an unrescue restores.
type rescueState struct {
	Image    *novalet.Image `json:"image"` // the rescue image
	Password novalet.Secret `json:"password,omitempty"`
}

// store reads and writes the records.
type store struct {
	dir      string
	sync     bool
	frozen   atomic.Bool // tests: as if the process had died
	mu       sync.Mutex
	finished map[string]bool
	order    []string
	log      *os.File
	lines    int
}

func openStore(stateDir string, log *slog.Logger) (*store, []record, error) {
	s := &store{dir: dirOf(stateDir), sync: true, finished: map[string]bool{}}
	for _, d := range []string{stateDir, s.dir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, nil, fmt.Errorf("make state directory: %w", err)
		}
	}
	if err := statefile.Clean(s.dir); err != nil {
		return nil, nil, err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list records: %w", err)
	}
	var records []record
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		r, err := readRecord(filepath.Join(s.dir, e.Name()))
		if err == nil && r.Instance.UUID != name {
			err = fmt.Errorf("record of %q names instance %q", name, r.Instance.UUID)
		}
		if err != nil {
			// One bad record must not keep the agent from starting; the file is kept for the operator.
			aside := filepath.Join(s.dir, e.Name()+".bad")
			log.Error("set a broken record aside", "file", e.Name(), "aside", filepath.Base(aside), "err", errors.Join(err, os.Rename(filepath.Join(s.dir, e.Name()), aside)))
			continue
		}
		records = append(records, *r)
	}
	if err := s.openFinished(filepath.Join(stateDir, "finished.log")); err != nil {
		return nil, nil, err
	}
	return s, records, nil
}

func readRecord(path string) (*record, error) {
	var r record
	if err := statefile.Read(path, &r); err != nil {
		return nil, err
	}
	if err := r.upgrade(); err != nil {
		return nil, err
	}
	if !validUUID(r.Instance.UUID) {
		return nil, fmt.Errorf("record has no instance uuid")
	}
	return &r, nil
}

// upgrade brings a record of an older version up to this one.
func (r *record) upgrade() error {
	if r.Version < 1 || r.Version > recordVersion {
		return fmt.Errorf("record version %d, this agent knows 1 to %d", r.Version, recordVersion)
	}
	return nil
}

func (s *store) write(r *record) error {
	if s.frozen.Load() {
		return errors.New("store is frozen")
	}
	r.Version = recordVersion
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	return statefile.WriteBytes(s.path(r.Instance.UUID), data, s.sync)
}

// remove deletes a record for good and remembers the ids it had seen.
func (s *store) remove(r *record) error {
	if s.frozen.Load() {
		return errors.New("store is frozen")
	}
	if err := s.remember(r.Seen); err != nil {
		return err
	}
	return statefile.Remove(s.path(r.Instance.UUID), s.sync)
}

func (s *store) path(uuid string) string { return filepath.Join(s.dir, uuid+".json") }

func (s *store) openFinished(path string) error {
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read finished operations: %w", err)
	}
	ids := strings.Fields(string(data))
	ids = ids[max(0, len(ids)-finishedIDs):]
	if err := statefile.WriteBytes(path, []byte(strings.Join(append(ids, ""), "\n")), true); err != nil {
		return err
	}
	if s.log, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return fmt.Errorf("open finished operations: %w", err)
	}
	for _, id := range ids {
		s.finished[id] = true
	}
	s.order, s.lines = ids, len(ids)
	return nil
}

// remember appends ids to the log of finished operations; the log is cut when it has grown to twice its use.
func (s *store) remember(ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.log.WriteString(strings.Join(ids, "\n") + "\n"); err != nil {
		return fmt.Errorf("write finished operations: %w", err)
	}
	if s.sync {
		if err := s.log.Sync(); err != nil {
			return fmt.Errorf("sync finished operations: %w", err)
		}
	}
	for _, id := range ids {
		s.finished[id] = true
	}
	s.order = append(s.order, ids...)
	if drop := len(s.order) - finishedIDs; drop > 0 {
		for _, id := range s.order[:drop] {
			delete(s.finished, id)
		}
		s.order = slices.Clone(s.order[drop:])
	}
	if s.lines += len(ids); s.lines > 2*finishedIDs {
		name := s.log.Name()
		if err := s.log.Close(); err != nil {
			return fmt.Errorf("close finished operations: %w", err)
		}
		if err := statefile.WriteBytes(name, []byte(strings.Join(s.order, "\n")+"\n"), s.sync); err != nil {
			return err
		}
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return fmt.Errorf("open finished operations: %w", err)
		}
		s.log, s.lines = f, len(s.order)
	}
	return nil
}

// wasFinished says whether the operation belonged to an instance whose record is gone.
func (s *store) wasFinished(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.finished[id]
}

func (s *store) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Close()
}

// validUUID says whether s is a uuid in its usual form, and so safe as a file name.
func validUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range s {
		switch {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case c >= '0' && c <= '9', c >= 'a' && c <= 'f', c >= 'A' && c <= 'F':
		default:
			return false
		}
	}
	return true
}
