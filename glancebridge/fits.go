package glancebridge

import (
	"errors"

	"github.com/novalet/novalet"
)

// needs is what an image asks of a flavor.
type needs struct {
	minDiskGB, minRAMMB int64
	// bytes is what the disk has to hold: the unpacked tree, the image itself, or the virtual disk that it is of.
	bytes int64
}

// needs gives what a stored image with so many bytes of data asks for. What the request says of min_disk and min_ram is
// newer than what was recorded.
func (rec *imageRecord) needs(r *novalet.ImageRequest, data int64) needs {
	n := needs{minDiskGB: rec.MinDiskGB, minRAMMB: rec.MinRAMMB, bytes: max(data, rec.VirtualSize)}
	if r.Meta.Status != "" {
		n.minDiskGB, n.minRAMMB = r.Meta.MinDiskGB, r.Meta.MinRAMMB
	}
	return n
}

// fits compares an image with the request's flavor as Nova does (nova/compute/api.py, _validate_flavor_image_nostatus;
// for the virtual size nova/virt/libvirt/imagebackend.py, verify_base_size).
func fits(r *novalet.ImageRequest, id string, n needs) error {
	fault := func(class string, details map[string]any, format string, args ...any) error {
		f := novalet.Faultf(novalet.ErrAbort, class, format+"; choose a larger flavor", args...)
		f.Details = details
		f.Details["image_id"] = id
		return f
	}
	switch {
	case r.MemoryMB > 0 && n.minRAMMB > r.MemoryMB:
		return fault("FlavorMemoryTooSmall", map[string]any{}, "the image wants %d MiB of memory (min_ram), the flavor has %d MiB",
			n.minRAMMB, r.MemoryMB)
	case r.MaxBytes > 0 && n.minDiskGB > r.MaxBytes>>30:
		return fault("FlavorDiskSmallerThanMinDisk", map[string]any{"flavor_size": r.MaxBytes, "image_min_disk": n.minDiskGB << 30},
			"the image wants a disk of %d GB (min_disk), the flavor's has %d GB", n.minDiskGB, r.MaxBytes>>30)
	case r.MaxBytes > 0 && n.bytes > r.MaxBytes:
		return fault("FlavorDiskSmallerThanImage", map[string]any{"flavor_size": r.MaxBytes, "image_size": n.bytes},
			"the image needs a disk of %d MiB, the flavor's has %d MiB", (n.bytes+1<<20-1)>>20, r.MaxBytes>>20)
	}
	return nil
}

// tooSmall is the fault of an image that was found not to fit while it was unpacked.
func tooSmall(imageID, text string) *novalet.Fault {
	return &novalet.Fault{Kind: novalet.ErrAbort, Class: "FlavorDiskSmallerThanImage", Text: text, Details: map[string]any{"image_id": imageID}}
}

func isTooSmall(err error) bool {
	var f *novalet.Fault
	return errors.As(err, &f) && f.Class == "FlavorDiskSmallerThanImage"
}
