package walk

import (
	"errors"
	"strings"

	"github.com/novalet/novalet/glancebridge/layer"
)

var errFound = errors.New("found")

// Lookup finds the inode at a path; nil when there is none. It follows no symlinks.
func Lookup(fs FS, path string) (*Node, error) {
	n, err := fs.Stat(fs.Root())
	for name := range strings.SplitSeq(path, "/") {
		if err != nil || n.Type != layer.TypeDirectory {
			return nil, err
		}
		var ref uint64
		err = fs.ReadDir(n, func(b []byte, r uint64) error {
			if string(b) == name {
				ref = r
				return errFound
			}
			return nil
		})
		if err == nil {
			return nil, nil
		}
		if !errors.Is(err, errFound) {
			return nil, err
		}
		n, err = fs.Stat(ref)
	}
	return n, err
}

// Exists says whether there is anything at a path. It follows no symlinks.
func Exists(fs FS, path string) (bool, error) {
	n, err := Lookup(fs, path)
	return n != nil, err
}
