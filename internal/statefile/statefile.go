// Package statefile keeps JSON documents on disk so that a crash at any moment leaves either the old document or
// the new one. Files are readable by their owner alone, since records hold passwords. The package starts no
// goroutine and holds nothing open.
package statefile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// MaxBytes is the largest document Read accepts, so that a damaged file cannot eat the agent's memory.
const MaxBytes = 64 << 20

// tmpMark is part of every temporary name; Clean removes what a crash left of them.
const tmpMark = ".tmp-"

// Write replaces path by v as JSON: temporary file in the same directory, fsync, rename, fsync of the directory.
// Nil means that the document survives a loss of power. It may be repeated.
func Write(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(path), err)
	}
	return WriteBytes(path, data, true)
}

// WriteBytes is Write for a document that is encoded already. Without sync the document survives a crash of the
// process but not one of the host.
func WriteBytes(path string, data []byte, sync bool) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+tmpMark+"*")
	if err != nil {
		return fmt.Errorf("create state file: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreNotExist(os.Remove(f.Name())))
		}
	}()
	// os.CreateTemp makes the file 0600 before the umask, never wider.
	if _, err := f.Write(data); err != nil {
		return errors.Join(fmt.Errorf("write state file: %w", err), f.Close())
	}
	if sync {
		if err := f.Sync(); err != nil {
			return errors.Join(fmt.Errorf("sync state file: %w", err), f.Close())
		}
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("close state file: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("rename state file: %w", err)
	}
	if sync {
		return syncDir(dir)
	}
	return nil
}

// Read decodes path into v. A missing file is fs.ErrNotExist.
func Read(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open state file: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxBytes+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("read state file: %w", err)
	}
	if len(data) > MaxBytes {
		return fmt.Errorf("read state file %s: larger than %d bytes", filepath.Base(path), MaxBytes)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode state file %s: %w", filepath.Base(path), err)
	}
	return nil
}

// Remove deletes path for good. Nil when it is not there.
func Remove(path string, sync bool) error {
	if err := os.Remove(path); err != nil {
		return ignoreNotExist(err)
	}
	if sync {
		return syncDir(filepath.Dir(path))
	}
	return nil
}

// Clean removes the temporary files that a crash left in dir. Call it before the first Write there.
func Clean(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list state files: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && strings.Contains(e.Name(), tmpMark) {
			errs = append(errs, ignoreNotExist(os.Remove(filepath.Join(dir, e.Name()))))
		}
	}
	return errors.Join(errs...)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open state directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync state directory: %w", err)
	}
	return nil
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
