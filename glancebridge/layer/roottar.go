package layer

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"slices"
	"strings"
)

// readRoot reads a root file system, for a unified image from below its rootfs folder.
func readRoot(r io.Reader, enc *Encoder, o ArchiveOptions, kind archiveKind) (*Result, error) {
	res := &Result{Format: "root-tar"}
	var obs Observed
	var meta []byte
	sawMeta, sawRoot, opened := false, kind == kindRoot, false
	to := TarOptions{MaxEntries: o.Limits.Entries, enc: enc}
	sink := obs.Observe(func(e *Entry, content io.Reader) error {
		if e.Name == "" && e.Mode&0o555 != 0o555 {
			// The folder that somebody packed was private, as those of mktemp are; as the root of a system it would keep
			// everybody but root from every file.
			opened = true
			e.Mode |= 0o555
		}
		return enc.Entry(e, content)
	})
	if kind == kindUnified {
		inner := sink
		sink = func(e *Entry, content io.Reader) error {
			switch {
			case e.Name == "rootfs.img" || e.Name == "rootfs.squashfs":
				return Refuse("the image is an incus image that holds %s; upload a container image with a rootfs folder", e.Name)
			case e.Name == "metadata.yaml" && e.Type == TypeRegular:
				sawMeta = true
				b, err := io.ReadAll(io.LimitReader(content, 1<<20))
				meta = b
				return err
			case e.Name == "rootfs" || strings.HasPrefix(e.Name, "rootfs/"):
				sawRoot = true
				e.Name = stripDir(e.Name, "rootfs")
				if e.Type == TypeHardlink {
					e.Linkname = stripDir(e.Linkname, "rootfs")
				}
				return inner(e, content)
			}
			if strings.HasPrefix(e.Name, "templates/") && len(res.Warnings) == 0 {
				res.Warnings = append(res.Warnings, "the templates of the incus image are not run")
			}
			return nil
		}
	}
	if err := enc.Begin(0, 0); err != nil {
		return nil, err
	}
	info, err := ReadTar(r, to, sink)
	if err != nil {
		return nil, err
	}
	if err := enc.End(); err != nil {
		return nil, err
	}
	l := StreamLayer{Index: 0, ID: info.DiffID, DiffID: info.DiffID, Observed: obs}
	switch {
	case !info.Ended:
		return nil, Refuse("the archive ends without an end mark, so it may be cut short; make it again")
	case kind == kindUnified && !sawRoot:
		return nil, Refuse("the image is the metadata half of a split incus image; upload the unified image (incus image export " +
			"of a container, one file) or a tar of the root file system")
	case !slices.ContainsFunc([]string{"etc", "bin", "usr", "sbin", "lib", "init"}, func(s string) bool { return slices.Contains(obs.Top, s) }):
		return nil, Refuse("the archive has no etc, bin or usr at its top, so it is no root file system; make it with tar -C ROOT -c .")
	case kind == kindUnified:
		l.ID = derived("rootfs", info.DiffID)
		if sawMeta {
			res.Format = "incus-unified"
			res.Config.Architecture = yamlArch(meta)
		}
	case obs.Whiteouts || opened:
		// As an image layer the same bytes would be another tree.
		l.ID = derived("root-tar", info.DiffID)
	}
	if opened {
		res.Warnings = append(res.Warnings, "the root directory was not readable for all; it is now")
	}
	res.Layers, res.Order = []StreamLayer{l}, []int{0}
	if a := res.Config.Architecture; a != "" && !sameArch(a, o.Arch) {
		return nil, archRefused(a, o.Arch)
	}
	return res, nil
}

// derived names a tree that was read from a tar by other rules than those for image layers.
func derived(rule, diffID string) string {
	h := sha256.Sum256([]byte("novalet " + rule + "\n" + diffID))
	return "sha256:" + hex.EncodeToString(h[:])
}

// yamlArch takes the architecture from an incus metadata.yaml, a flat key of its top.
func yamlArch(b []byte) string {
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "architecture:"); ok {
			return strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	return ""
}
