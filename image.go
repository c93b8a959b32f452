package novalet

import (
	"context"
	"time"
)

// ImageMeta is what Nova says of a Glance image: the dict of build_and_run_instance, or rebuilt from the
// instance's system_metadata.
type ImageMeta struct {
	ID              string            `json:"id"`
	Name            string            `json:"name"`
	Status          string            `json:"status"`
	Size            int64             `json:"size"` // bytes
	DiskFormat      string            `json:"disk_format"`
	ContainerFormat string            `json:"container_format"`
	MinDiskGB       int64             `json:"min_disk"`
	MinRAMMB        int64             `json:"min_ram"`
	Owner           string            `json:"owner"`
	Properties      map[string]string `json:"properties,omitempty"`
}

// Kind says how an instance is run; the image decides, a property may override.
type Kind string

const (
	// KindApplication runs the command of the image's config; addresses are set from the host.
	KindApplication Kind = "application"
	// KindMachine runs the image's own /sbin/init, with cloud-init and DHCP.
	KindMachine Kind = "machine"
)

// ImageConfig is what an image says about the process to run, in OCI's terms.
type ImageConfig struct {
	Entrypoint   []string          `json:"entrypoint,omitempty"`
	Cmd          []string          `json:"cmd,omitempty"`
	Env          []string          `json:"env,omitempty"` // KEY=value
	WorkingDir   string            `json:"working_dir,omitempty"`
	User         string            `json:"user,omitempty"`
	StopSignal   string            `json:"stop_signal,omitempty"`
	Volumes      []string          `json:"volumes,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	Architecture string            `json:"architecture,omitempty"` // OCI's word, such as amd64
}

// Layer is one read-only tree of the store.
type Layer struct {
	// DiffID names the layer: "sha256:<hex>" over the uncompressed tar, or a digest of the same form for trees
	// that came from something else than a tar.
	DiffID string `json:"diff_id"`
	// Path is the directory that holds the tree, ids unshifted. Root only.
	Path string `json:"path"`
	// Size is the sum of the file sizes in bytes.
	Size int64 `json:"size"`
}

// Image is an image unpacked and ready to run from.
type Image struct {
	ID     string      `json:"id"`     // Glance's
	Layers []Layer     `json:"layers"` // base first
	Config ImageConfig `json:"config"`
	Kind   Kind        `json:"kind"`
	// Format is what the bytes were found to be, such as "docker-archive", "root-tar", "qcow2".
	Format string `json:"format"`
	// Init is the path of the machine's init inside the image, "" when there is none.
	Init string `json:"init,omitempty"`
	// Size is the sum of the layers' sizes in bytes.
	Size int64 `json:"size"`
}

// ImageRequest asks for an image on behalf of an instance.
type ImageRequest struct {
	Context      RequestContext
	InstanceUUID string
	ImageID      string
	Meta         ImageMeta
	// MaxBytes is the flavor's disk: it bounds the unpacked size, the image's min_disk, and the size of the disk that the
	// image is of. MemoryMB is the flavor's memory, against the image's min_ram. 0 is no bound of the flavor's.
	MaxBytes int64
	MemoryMB int64
	// TrustedCertificates are ids in the key manager that the user named with the server: the image has to be signed, by a
	// certificate that leads to one of them.
	TrustedCertificates []string
}

// SnapshotRequest asks for the upload of a running instance's root as an image that exists in Glance in status
// queued.
type SnapshotRequest struct {
	Context      RequestContext
	InstanceUUID string
	ImageID      string
	Base         *Image
	// Root is where the instance's writable layer lies.
	Root RootDirs
	// Freeze stops the instance for the moment of the copy, the function it returns lets it go on.
	Freeze func(context.Context) (thaw func(), err error)
	// Captured is called when the copy is complete and the upload begins.
	Captured func(context.Context) error
	// Whole asks for a self-contained image also where snapshots name the image below them, such as for a server that comes
	// back from it.
	Whole bool
	// Properties are set on the image beside those it has.
	Properties map[string]string
}

// ImageStatus is one image of the store as the image list shows it.
type ImageStatus struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Format   string    `json:"format"`
	Layers   []Layer   `json:"layers"`
	Size     int64     `json:"size"`
	LastUsed time.Time `json:"last_used"`
	UsedBy   []string  `json:"used_by"` // instance uuids
	// Progress is bytes fetched while the image is being fetched, else equal to Total.
	Progress, Total int64
}

// LayerCheck is what reading one stored layer again has shown.
type LayerCheck struct {
	DiffID string   `json:"diff_id"`
	Images []string `json:"images"` // ids of the stored images that have the layer
	Size   int64    `json:"size"`   // bytes
	// Problem says how the layer differs from what was stored, "" when it does not. Healed: it was fetched again; Error
	// says why that failed.
	Problem string `json:"problem,omitempty"`
	Healed  bool   `json:"healed,omitempty"`
	Error   string `json:"error,omitempty"`
}

// ImageStore turns Glance images into layers. Served by glancebridge. Every method may be repeated.
type ImageStore interface {
	// Prepare fetches, verifies and unpacks the image unless the store has it, and leases its layers to the
	// instance until Release. It blocks for as long as that takes; concurrent calls for one image share one
	// download. A wrong, refused or too large image is ErrAbort with a Fault text for the tenant; an unreachable
	// Glance is ErrTryAgain; a full disk here is ErrReschedule. Of an image that is a delta of others, each call asks
	// Glance for those with the user's token. On error nothing is leased.
	Prepare(ctx context.Context, r *ImageRequest) (*Image, error)
	// Release drops the instance's leases. Nil when there are none.
	Release(ctx context.Context, instanceUUID string) error
	// Snapshot uploads the instance's root as an image, self-contained unless the store makes deltas, and returns when
	// Glance has verified it. On error Glance is left with no image that looks whole.
	Snapshot(ctx context.Context, r *SnapshotRequest) error
	// DeleteImage removes an image from Glance, such as that of a server that is no longer shelved. ErrNotFound when
	// there is none.
	DeleteImage(ctx context.Context, rc RequestContext, imageID string) error
	// RotateBackups keeps the newest of an instance's images of one backup type in Glance and deletes the older ones, as
	// Nova's compute manager does after a backup (_rotate_backups). It goes on after an image that cannot be deleted,
	// such as a protected one, and then returns an error. With keep 0 all go.
	RotateBackups(ctx context.Context, rc RequestContext, instanceUUID, backupType string, keep int64) error
	// Cache fetches an image without leasing it: "cached", "existing", "unsupported" or "error".
	Cache(ctx context.Context, rc RequestContext, imageID string) (string, error)
	// List shows what the store holds and what it is fetching.
	List(ctx context.Context) ([]ImageStatus, error)
	// Verify reads every stored layer and compares it with what was recorded when it was stored. One that differs is
	// given to no instance any more, so that the next Prepare of an image with it fetches it again; with heal that is
	// done here, with the service's own credentials. It blocks for as long as reading the store takes. An error is one of
	// the store itself.
	Verify(ctx context.Context, heal bool) ([]LayerCheck, error)
	// Collect removes what nothing has used for longer than the options allow, and returns the bytes freed.
	Collect(ctx context.Context) (int64, error)
}
