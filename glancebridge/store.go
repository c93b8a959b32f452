// Package glancebridge turns Glance images into layers: it fetches the bytes, tells their format from their content,
// unpacks them in two helper processes without rights, and keeps the trees in a store on disk named by digest,
// shared by all instances. It serves novalet.ImageStore.
//
// Open starts no goroutine that outlives Close. On disk, below Options.Dir (mode 0700, mounted nosuid and nodev):
//
//	layers/<hex of the layer's id>/fs          the tree, read-only by custom
//	layers/<hex>/meta.json, durable            what it is; the second file says that it survives a loss of power
//	layers/<hex>/tar.json, corrupt             what it comes to as a tar of ours; how it differs from that
//	replaced/<random>/fs, users.json           a corrupt tree that instances still run on, and which
//	images/<image id>.json                     which layers make an image, and what it runs
//	leases/<instance id>.json                  which images an instance uses
//	uploads/<image id>.json                    that a snapshot was being sent to an image
//	ingest/<random>                            work in progress, removed at the next Open when a crash left it
package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge/layer"
)

// Options configure a Store.
type Options struct {
	// Dir is the store's folder; it is made, and closed to others. Its file system must take id-mapped mounts.
	Dir string
	// Glance is where images come from.
	Glance Glance
	// Logger is told of transitions; nil is silence.
	Logger *slog.Logger
	// Helper is the command that runs HelperMain; by default this very binary with HelperCommand.
	Helper []string
	// Unconfined runs the helpers as goroutines without changing owners, for tests and development without root.
	Unconfined bool
	// Arch is the architecture to run on in OCI's words; by default this machine's.
	Arch string
	// MaxImageBytes bounds what an image may unpack to (default 1 TiB), MaxDownloadBytes the image itself
	// (default 256 GiB).
	MaxImageBytes, MaxDownloadBytes int64
	// MaxEntries bounds the files of an image; default layer.DefaultEntries.
	MaxEntries int64
	// IdleTimeout ends a download that gives no data (default 30 s); Tries is how often in a row a download may give
	// nothing before it is given up (default 5), RetryDelay the first wait between (default 250 ms).
	IdleTimeout time.Duration
	Tries       int
	RetryDelay  time.Duration
	// SavingTimeout is how long a snapshot waits while Glance still holds an upload whose connection was cut (default
	// 2 min).
	SavingTimeout time.Duration
	// WholeImages has every image fetched whole and checked against the checksum in its record. Else, where Glance serves
	// parts, the layers of a container archive that are stored already are left out, and the others are checked by the
	// digests in its config.
	WholeImages bool
	// DeltaSnapshots has a snapshot hold what the instance wrote alone, and name the image below it by digest. Such images are
	// read whatever this says.
	DeltaSnapshots bool
	// VerifySignatures has every image checked against the signature in its properties, and refuses those without one; for
	// a request that names trusted certificates this holds anyway. Certificates is where they come from, nil refuses all
	// that would be checked. ValidateCertificates has every signing certificate lead to a trusted one, by default to one of
	// TrustedCertificates.
	VerifySignatures     bool
	Certificates         Certificates
	ValidateCertificates bool
	TrustedCertificates  []string
	// Concurrency bounds the images fetched at a time; default 4.
	Concurrency int
	// RemoveUnused and MinAge are [image_cache] remove_unused_base_images and
	// remove_unused_original_minimum_age_seconds: Collect removes images without users that were last used longer
	// ago than MinAge. KeepUnused turns the removal off.
	KeepUnused bool
	MinAge     time.Duration
	// HighWater, when set, makes Collect remove unused images regardless of age, the longest unused first, when the store
	// holds more than that many bytes, until it is at LowWater. HighPercent and LowPercent are the same for the file
	// system that the store lies on, in percent of it. After a fetch that crosses a mark Collect is run at once.
	HighWater, LowWater     int64
	HighPercent, LowPercent int
	// IDBase and IDSize are the host ids the applier's user namespace is mapped to: a range that nothing else on
	// the host uses. Default 2952790016 (0xB0000000) and 268435456.
	IDBase, IDSize uint32
}

// Store implements novalet.ImageStore. Its methods may be called concurrently.
type Store struct {
	o     Options
	log   *slog.Logger
	ctx   context.Context // ends with Close
	stop  context.CancelCauseFunc
	wg    sync.WaitGroup
	slots chan struct{}
	boot  string // this boot of the host
	dir   *os.File
	unbnd func() error // undoes the mount of Open

	idmap idMap
	grace time.Duration // an image used so short a time ago is not removed for room: who asked for it is about to take it
	look  time.Duration // how long the members of an archive are looked at before the whole of it is fetched
	usage func() (size, used int64, err error)

	mu       sync.Mutex
	flights  map[string]*flight
	images   map[string]*imageRecord
	layers   map[string]*layerMeta // by id
	noRange  map[string]bool       // images whose parts are not served
	leases   map[string]*leaseRecord
	fetching int // flights that still run, also those nobody waits for
	closed   bool
	dirty    bool // something is not durable yet
	syncing  bool
	sealing  bool // a goroutine records what layers come to
	unsealed bool // and has more to do than it knows of
}

var _ novalet.ImageStore = (*Store)(nil)

var errClosed = errors.New("the image store is closing")

// Open opens or makes the store in o.Dir and repairs what a crash left. One process at a time may have a store
// open. Close releases it.
func Open(o Options) (*Store, error) {
	if o.Dir == "" || o.Glance == nil {
		return nil, errors.New("open image store: Dir and Glance are required")
	}
	o.setDefaults()
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	s := &Store{
		o: o, log: o.Logger, boot: boot, slots: make(chan struct{}, o.Concurrency),
		flights: map[string]*flight{}, images: map[string]*imageRecord{}, layers: map[string]*layerMeta{},
		leases: map[string]*leaseRecord{}, noRange: map[string]bool{}, grace: time.Minute, look: 10 * time.Second,
	}
	s.usage = s.diskUsage
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.ctx, s.stop = context.WithCancelCause(context.Background())
	if err := s.openDir(); err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	if err := s.repair(); err != nil {
		return nil, errors.Join(fmt.Errorf("open image store: %w", err), s.closeDir())
	}
	if !o.Unconfined {
		// The first image need not wait for it; whatever fails here will fail there, and is told then.
		s.wg.Go(func() { _, _ = s.idmap.namespace(s) })
	}
	return s, nil
}

func (o *Options) setDefaults() {
	def := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&o.MaxImageBytes, 1<<40)
	def(&o.MaxDownloadBytes, 256<<30)
	def(&o.MaxEntries, layer.DefaultEntries)
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	if len(o.Helper) == 0 {
		// The link leads to this binary also after an upgrade replaced the file.
		o.Helper = []string{"/proc/self/exe", HelperCommand}
	}
	if o.IdleTimeout <= 0 {
		o.IdleTimeout = 30 * time.Second
	}
	if o.Tries <= 0 {
		o.Tries = 5
	}
	if o.RetryDelay <= 0 {
		o.RetryDelay = 250 * time.Millisecond
	}
	if o.SavingTimeout <= 0 {
		o.SavingTimeout = 2 * time.Minute
	}
	if o.Concurrency <= 0 {
		o.Concurrency = 4
	}
	if o.MinAge <= 0 {
		o.MinAge = 24 * time.Hour
	}
	if o.IDBase == 0 {
		o.IDBase = 0xB0000000
	}
	if o.IDSize == 0 {
		o.IDSize = min(0x10000000, 1<<32-1-o.IDBase)
	}
}

// openDir makes the folders, locks the store and closes it to setuid programs and devices.
func (s *Store) openDir() error {
	for _, d := range []string{"", "layers", "images", "leases", "uploads", "replaced", "ingest"} {
		p := filepath.Join(s.o.Dir, d)
		if err := os.MkdirAll(p, 0o700); err != nil {
			return err
		}
	}
	if err := os.Chmod(s.o.Dir, 0o700); err != nil {
		return err
	}
	dir, err := os.Open(s.o.Dir)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		if err == unix.EWOULDBLOCK {
			return fmt.Errorf("%w: another process has the store %s open", novalet.ErrBusy, s.o.Dir)
		}
		return fmt.Errorf("lock store: %w", err)
	}
	s.dir = dir
	if !s.o.Unconfined {
		if err := s.bind(); err != nil {
			dir.Close()
			return err
		}
	}
	return nil
}

// Close ends downloads that run, waits for them, and releases the store.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.stop(errClosed)
	s.wg.Wait()
	s.syncNow()
	return s.closeDir()
}

func (s *Store) closeDir() error {
	err := s.idmap.close()
	if s.unbnd != nil {
		err = errors.Join(err, s.unbnd())
	}
	return errors.Join(err, s.dir.Close())
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return string(b[:max(len(b)-1, 0)]), nil
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// validID keeps ids that become file names harmless.
func validID(id string) bool { return idPattern.MatchString(id) }

// refused is the fault of an image that cannot be booted anywhere.
func refused(imageID, text string) *novalet.Fault {
	return &novalet.Fault{Kind: novalet.ErrAbort, Class: "ImageUnacceptable", Text: text,
		Details: map[string]any{"image_id": imageID, "reason": text}}
}
