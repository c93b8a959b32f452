package glancebridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/novalet/novalet"
)

// ImageRecord is Glance's record of an image.
type ImageRecord struct {
	novalet.ImageMeta
	// Checksum is the MD5 of old images; HashAlgo and HashValue are os_hash_algo and os_hash_value.
	Checksum  string `json:"checksum,omitempty"`
	HashAlgo  string `json:"os_hash_algo,omitempty"`
	HashValue string `json:"os_hash_value,omitempty"`
	// Visibility is public, community, shared or private.
	Visibility string `json:"visibility,omitempty"`
	// VirtualSize is the size of the disk that the image is of, in bytes, 0 when Glance does not know.
	VirtualSize int64 `json:"virtual_size,omitempty"`
	// CreatedAt is when the record was made, zero when that is not known.
	CreatedAt time.Time `json:"created_at,omitzero"`
	// Stores names where Glance keeps the data, "" when it does not say.
	Stores string `json:"stores,omitempty"`
}

// Glance is the image service as the store needs it. The methods block, and may be repeated unless said otherwise.
// Errors: novalet.ErrNotFound; novalet.ErrTryAgain when the service cannot be reached or is broken; a *GlanceError for
// every other answer.
type Glance interface {
	// Get reads the record.
	Get(ctx context.Context, rc novalet.RequestContext, id string) (*ImageRecord, error)
	// Find reads the records of all images of one project that have the properties. The order is not defined.
	Find(ctx context.Context, rc novalet.RequestContext, owner string, properties map[string]string) ([]ImageRecord, error)
	// Download opens the data at an offset in bytes. start is where the data really begins: 0 when the service
	// cannot begin elsewhere.
	Download(ctx context.Context, rc novalet.RequestContext, id string, off int64) (body io.ReadCloser, start int64, err error)
	// Range opens n bytes of the data at an offset. errNoRange when the service gives only the whole of it.
	Range(ctx context.Context, rc novalet.RequestContext, id string, off, n int64) (io.ReadCloser, error)
	// Readable reads the record with the user's own token alone: ErrNotFound when the user may not read the image, or
	// there is no token.
	Readable(ctx context.Context, rc novalet.RequestContext, id string) (*ImageRecord, error)
	// Update sets the formats and properties of a record. Properties that are not named stay.
	Update(ctx context.Context, rc novalet.RequestContext, id string, u ImageUpdate) error
	// Upload sends the data of a queued image. It reads body once, and never sends part of it twice; the caller checks
	// the record afterwards.
	Upload(ctx context.Context, rc novalet.RequestContext, id string, body io.Reader) error
	// Delete removes an image. ErrNotFound when there is none.
	Delete(ctx context.Context, rc novalet.RequestContext, id string) error
}

// errNoRange: the image's store begins at the beginning only.
var errNoRange = errors.New("Glance does not serve parts of the image")

// ImageUpdate is a change of a record; zero fields are left alone.
type ImageUpdate struct {
	DiskFormat, ContainerFormat string
	MinDiskGB                   int64
	Properties                  map[string]string
}

// GlanceError is an answer that is neither success nor passing trouble.
type GlanceError struct {
	Verb   string
	Status int
	Text   string
}

// Error implements error.
func (e *GlanceError) Error() string {
	return fmt.Sprintf("%s: Glance answers %d %s %s", e.Verb, e.Status, http.StatusText(e.Status), e.Text)
}
