// Package layer turns streams of file-system entries into read-only layers: whatever an image was (tar, squashfs,
// a disk's file system), it becomes a stream of Entry values that one applier writes. It starts no goroutine
// that outlives a call and keeps nothing on disk beside the tree it is told to write.
package layer

import (
	"io"
	"time"
)

// Type is the kind of a file-system entry.
type Type uint8

// The kinds of entry.
const (
	TypeRegular Type = iota + 1
	TypeDirectory
	TypeSymlink
	TypeHardlink // Linkname is the path of an entry of the same stream, or of a layer below
	TypeCharDevice
	TypeBlockDevice
	TypeFIFO
	TypeSocket
)

// Entry is one member of a tree. It carries the image's own numbers: ids unshifted, mode with setuid, setgid and
// sticky bits. Name is relative to the root, slash-separated, raw bytes, without "./" and leading "/"; it
// is hostile until the applier has resolved it.
type Entry struct {
	Name     string
	Type     Type
	Mode     uint32 // permission bits and 07000
	UID, GID uint32
	ModTime  time.Time
	Size     int64 // of a regular file, bytes
	Linkname string
	Major    uint32
	Minor    uint32
	Xattrs   map[string]string // raw values
	// Holes, when known, are the parts of a regular file that hold no data; the content reader gives zeros there.
	Holes []Extent
}

// Extent is a range of a file in bytes.
type Extent struct{ Off, Len int64 }

// Sink takes a stream of entries. content is valid only during the call and only for a regular file; it need not
// be read. An error ends the stream.
type Sink func(e *Entry, content io.Reader) error
